"""Granite (dense): a Llama with constant multipliers on embeddings, attention scores, sublayers and logits."""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture, Scales
from amoeba_deploy.families.family import Family


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    scales = Scales(
        embedding=float(config.get("embedding_multiplier", 1.0)),
        attention=float(config.get("attention_multiplier", 1.0)),
        residual=float(config.get("residual_multiplier", 1.0)),
        logits=float(config.get("logits_scaling", 1.0)),
    )
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "scales": scales,
        "traits": ("constant scaling",),
    }


def _rewrite(config: dict[str, Any], subnet: Architecture) -> None:
    config |= {"attention_bias": subnet.qkv_bias, "mlp_bias": subnet.mlp_bias}


FAMILY = Family("granite", _flags, rewrite=_rewrite, compensated="granite", class_name="GraniteForCausalLM")
