"""Gemma 2: a norm in front of and behind each sublayer, scaled embeddings, soft-capped scores and logits.

Blocks attend to a sliding window and to everything in turn. A config without ``layer_types`` means that pattern over
the full model, so a subnet always carries the list of its own blocks. Scores are scaled by ``query_pre_attn_scalar``,
whatever the head size. The stock config class insists that query heads divide the hidden size.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture, Scales
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families.family import (
    ATTENTION,
    FEED_FORWARD,
    INPUT_NORM,
    MIDDLE_NORM,
    Family,
    Tensors,
    biases_and_norms,
    window_in_use,
)


def flags(config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    if config.get("use_bidirectional_attention"):
        raise BadInput("config.json has use_bidirectional_attention; what reads ahead is no model that writes text")
    bias = bool(config.get("attention_bias", False))
    capped = any(config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping"))
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "norms": 4,
        "head_rule": "divides",
        "scales": Scales(
            embedding=config["hidden_size"] ** 0.5, attention=float(config["query_pre_attn_scalar"]) ** -0.5
        ),
        "sliding_window": window_in_use(config),
        "traits": (
            "constant scaling",
            "norm behind each sublayer",
            "norm of weight one plus its tensor",
            "feed-forward with GELU",
            *(["soft-capping"] if capped else []),
        ),
    }


def tensors(architecture: Architecture) -> Tensors:
    """A block: both sublayers between two norms."""
    before: Tensors = {"pre_feedforward_layernorm.weight": ("hidden",)}
    behind: Tensors = {"post_feedforward_layernorm.weight": ("hidden",)}
    block = INPUT_NORM | ATTENTION | MIDDLE_NORM | before | FEED_FORWARD | behind
    return block | biases_and_norms(architecture)


def _layer_lists(config: dict[str, Any]) -> dict[str, list[Any]]:
    kinds = ("sliding_attention", "full_attention")
    return {"layer_types": [kinds[index % 2] for index in range(config["num_hidden_layers"])]}


DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
FAMILY = Family(
    "gemma2",
    flags,
    DEFAULTS,
    tensors=tensors,
    activations=("gelu_pytorch_tanh",),
    layer_lists=_layer_lists,
)
