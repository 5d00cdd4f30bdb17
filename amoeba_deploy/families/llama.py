"""Llama 1, 2 and 3: multi-head or grouped-query, embeddings tied or not, biases on all linears or none.

transformers 5 refuses a Llama whose hidden size its heads do not divide, even with an explicit head size. Such a
subnet is written as a Mistral without a sliding window, which computes the same function and has no such check, or,
where it has biases, as a Granite whose multipliers are those of a Llama. Fewer engines run a Granite than a Llama.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families.family import Family


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _held_by(subnet: Architecture) -> str:
    if subnet.hidden % subnet.heads == 0:
        return "llama"
    return "granite" if subnet.mlp_bias or subnet.qkv_bias else "mistral"


def _rewrite(config: dict[str, Any], subnet: Architecture) -> None:
    config |= {"attention_bias": subnet.qkv_bias, "mlp_bias": subnet.mlp_bias}
    kind = _held_by(subnet)
    if kind == "llama":
        return
    config.pop("pretraining_tp", None)
    if kind == "granite":
        config |= {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "attention_multiplier": subnet.head_dim**-0.5,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
        return
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    for key in ("attention_bias", "mlp_bias"):
        del config[key]


FAMILY = Family("llama", _flags, rewrite=_rewrite, held_by=_held_by, compensated="llama", class_name="LlamaForCausalLM")
