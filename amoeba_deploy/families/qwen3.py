"""Qwen3 (dense): grouped-query, an RMS norm over each query and key head, head size set apart from hidden size
(128 where the config names none).

The norms' weights are shared by all heads of a block, so removing heads leaves them as they are.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.families.family import Family
from amoeba_deploy.families.qwen2 import sliding_window


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": bias, "output_bias": bias, "sliding_window": sliding_window(config)}


_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, "max_window_layers": 28}
FAMILY = Family("qwen3", _flags, _DEFAULTS)
