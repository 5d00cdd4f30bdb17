"""Llama 1, 2 and 3: multi-head or grouped-query, embeddings tied or not, biases on all linears or none.

transformers 5 refuses a Llama whose hidden size its heads do not divide, even with an explicit head size. Such a
subnet is written as a Mistral without a sliding window, which computes the same function and has no such check; a
Mistral has no biases, so a Llama with biases keeps only head counts that divide its hidden size.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families.family import Family


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _refusal(subnet: Architecture) -> str | None:
    if subnet.hidden % subnet.heads and (subnet.qkv_bias or subnet.mlp_bias):
        return (
            f"its {subnet.heads} heads do not divide the hidden size {subnet.hidden}, which no stock class takes for a "
            f"Llama with biases; choose a width that keeps a divisor of {subnet.hidden} heads"
        )
    return None


def _rewrite(config: dict[str, Any], subnet: Architecture) -> None:
    if subnet.hidden % subnet.heads == 0:
        return
    config["architectures"] = ["MistralForCausalLM"]
    config["model_type"] = "mistral"
    config["sliding_window"] = None
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)


FAMILY = Family("llama", _flags, rewrite=_rewrite, refusal=_refusal)
