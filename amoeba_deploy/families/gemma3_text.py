"""Gemma 3, its text models: as Gemma 2, with a norm over each query and key head and a second rotary base.

Blocks with a sliding window rotate by a base of their own, and the full ones alone are scaled. transformers 5 holds
both in ``rope_parameters``, one entry a kind of block; older files have ``rope_theta`` and ``rope_scaling`` for the
full ones and ``rope_local_base_freq`` for the others. Subnets carry both spellings. Every sixth block is a full one
where ``layer_types`` is missing, or as ``sliding_window_pattern`` says; a subnet carries the list, and the pattern,
which no longer holds, goes.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.architecture import Architecture, Rope, rope_from_config
from amoeba_deploy.families import gemma2
from amoeba_deploy.families.family import Family

_BASES = {"full_attention": 1000000.0, "sliding_attention": 10000.0}


def ropes_of(config: dict[str, Any]) -> dict[str, Rope]:
    """The rotary settings of both kinds of blocks."""
    given = config.get("rope_parameters") or {}
    full, local = (dict(given.get(kind) or {}) for kind in _BASES)
    full |= config.get("rope_scaling") or {}
    full.setdefault("rope_theta", config.get("rope_theta") or _BASES["full_attention"])
    local.setdefault("rope_theta", config.get("rope_local_base_freq") or _BASES["sliding_attention"])
    return {
        "full_attention": rope_from_config({"rope_parameters": full}),
        "sliding_attention": rope_from_config({"rope_parameters": local}),
    }


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    found = gemma2.flags(config)
    ropes = ropes_of(config)
    if "sliding_attention" in config["layer_types"] and ropes["sliding_attention"] != ropes["full_attention"]:
        found["traits"] += ("second rotary base",)
    return found | {"qk_norm": True, "rope": ropes["full_attention"]}


def _layer_lists(config: dict[str, Any]) -> dict[str, list[Any]]:
    pattern = config["sliding_window_pattern"]
    kinds = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    return {"layer_types": kinds}


def _spell_rope(config: dict[str, Any], _subnet: Architecture) -> None:
    ropes = ropes_of(config)
    full, local = ropes["full_attention"], ropes["sliding_attention"]
    scaled = {"rope_type": full.kind, "type": full.kind, **dict(full.settings)}
    config |= {
        "rope_parameters": {
            kind: {"rope_theta": rope.theta, "rope_type": rope.kind, **dict(rope.settings)}
            for kind, rope in ropes.items()
        },
        "rope_theta": full.theta,
        "rope_scaling": None if full.kind == "default" else scaled,
        "rope_local_base_freq": local.theta,
    }


def _rewrite(config: dict[str, Any], _subnet: Architecture) -> None:
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        config.pop(key, None)


_DEFAULTS = gemma2.DEFAULTS | {
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
FAMILY = Family(
    "gemma3_text",
    _flags,
    _DEFAULTS,
    rewrite=_rewrite,
    tensors=gemma2.tensors,
    activations=("gelu_pytorch_tanh",),
    layer_lists=_layer_lists,
    spell_rope=_spell_rope,
)
