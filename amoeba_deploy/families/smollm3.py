"""SmolLM3: a Llama in which every fourth block has no rotary positions, or those that ``no_rope_layers`` gives a zero.

A config without ``no_rope_layers`` or ``layer_types`` means the pattern of the full model, so a subnet always carries
both lists for its own blocks.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families.family import Family, window_in_use


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    mixed = not all(config["no_rope_layers"][: config["num_hidden_layers"]])
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "sliding_window": window_in_use(config),
        "traits": ("attention without rotary positions",) if mixed else (),
    }


def _layer_lists(config: dict[str, Any]) -> dict[str, list[Any]]:
    depth, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotary = config.get("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(depth)]
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    kinds = ["sliding_attention" if windowed and not each else "full_attention" for each in rotary[:depth]]
    return {"no_rope_layers": rotary, "layer_types": kinds}


def _rewrite(config: dict[str, Any], subnet: Architecture) -> None:
    config |= {"attention_bias": subnet.qkv_bias, "mlp_bias": subnet.mlp_bias}


_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2000000.0,
    "no_rope_layer_interval": 4,
}
FAMILY = Family(
    "smollm3",
    _flags,
    _DEFAULTS,
    rewrite=_rewrite,
    compensated="smollm3",
    layer_lists=_layer_lists,
)
