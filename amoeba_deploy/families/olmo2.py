"""OLMo 2: norms behind the sublayers, none in front of them, and norms over all query and over all key heads together.

Without some of its heads such a norm has another scale, so heads stay: blocks and neurons are removed.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families.family import (
    ATTENTION,
    FEED_FORWARD,
    MIDDLE_NORM,
    OUTPUT_BIAS,
    QKV_BIASES,
    Family,
    Tensors,
)


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "head_rule": "all",
        "traits": ("norm behind each sublayer", "norm over all heads together"),
    }


def _tensors(architecture: Architecture) -> Tensors:
    norms: Tensors = {"self_attn.q_norm.weight": ("query",), "self_attn.k_norm.weight": ("key_value",)}
    behind: Tensors = {"post_feedforward_layernorm.weight": ("hidden",)}
    biases = QKV_BIASES | OUTPUT_BIAS if architecture.qkv_bias else {}
    return ATTENTION | norms | MIDDLE_NORM | FEED_FORWARD | behind | biases


_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
FAMILY = Family("olmo2", _flags, _DEFAULTS, tensors=_tensors)
