"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one matrix, gates and ups in another; no biases.

Rotary positions may turn only the first part of each head (``partial_rotary_factor``), and long contexts scale each
pair by a factor of its own (``longrope``). The stock config class compares the number of those factors with hidden size
/ heads, not with the head size, so from a model with ``longrope`` no heads can be removed.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture, Rope, rope_from_config
from amoeba_deploy.families.family import INPUT_NORM, MIDDLE_NORM, Family, Tensors

_OTHER_NAMES = {"su": "longrope", "yarn": "longrope"}
"""What releases before transformers knew the kind called it."""


def _rope(config: dict[str, Any]) -> Rope:
    """Rotary settings with what stands beside them in the config: the partial factor, and where long factors begin."""
    rope = rope_from_config(config)
    kind = _OTHER_NAMES.get(rope.kind, rope.kind)
    settings = {"partial_rotary_factor": config.get("partial_rotary_factor", 1.0)} | dict(rope.settings)
    if kind == "longrope":
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return Rope(rope.theta, kind, tuple(sorted(settings.items())))


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    rope, window, context = _rope(config), config.get("sliding_window"), config["max_position_embeddings"]
    partial = rope.setting("partial_rotary_factor") != 1
    return {
        "rope": rope,
        "sliding_window": int(window) if window is not None and window < context else None,
        "head_rule": "all" if rope.kind == "longrope" else "any",
        "traits": ("fused query, key and value matrix", *(["partial rotary turn"] if partial else [])),
    }


def _tensors(_architecture: Architecture) -> Tensors:
    matrices: Tensors = {
        "self_attn.qkv_proj.weight": (("query", "key_value", "key_value"), "hidden"),
        "self_attn.o_proj.weight": ("hidden", "query"),
    }
    feed_forward: Tensors = {
        "mlp.gate_up_proj.weight": (("neuron", "neuron"), "hidden"),
        "mlp.down_proj.weight": ("hidden", "neuron"),
    }
    return INPUT_NORM | matrices | MIDDLE_NORM | feed_forward


_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0),
    "self_attn.k_proj": ("self_attn.qkv_proj", 1),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}


def _spell_rope(config: dict[str, Any], subnet: Architecture) -> None:
    rope = subnet.rope
    settings = dict(rope.settings)
    config["rope_parameters"] = {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}
    config["rope_theta"] = rope.theta
    config["partial_rotary_factor"] = settings.pop("partial_rotary_factor")
    # transformers 4 takes exactly a type and the two lists of factors, and this entry wins over the newer one in 5.
    settings.pop("original_max_position_embeddings", None)
    config["rope_scaling"] = None if rope.kind == "default" else {"type": rope.kind, **settings}


_DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
FAMILY = Family("phi3", _flags, _DEFAULTS, tensors=_tensors, fused=_FUSED, spell_rope=_spell_rope)
