"""Qwen2 and Qwen2.5: grouped-query, biases on queries, keys and values, often tied embeddings.

``use_sliding_window`` (off in all released checkpoints) windows the blocks that ``layer_types``, or in older configs
``max_window_layers``, name; both follow the kept blocks.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.families.family import Family


def sliding_window(config: dict[str, Any]) -> int | None:
    """The window in positions where any block really uses one, else None."""
    if not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", 4096)
    if window is None or window >= config.get("max_position_embeddings", 32768):
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" not in kinds:
        return None
    if not isinstance(kinds, list) and config.get("max_window_layers", 28) >= config["num_hidden_layers"]:
        return None
    return int(window)


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_window": sliding_window(config)}


_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "max_window_layers": 28}
FAMILY = Family("qwen2", _flags, _DEFAULTS, compensated="llama")
