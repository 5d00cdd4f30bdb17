"""A key/value cache of fixed size for engines that are compiled once: every layer holds the whole context.

transformers' own sliding-window layers keep Python numbers that change with every token, which no single graph can
hold. Here such layers are as long as the others: their window is in the attention mask, which transformers makes
anyway. It costs memory, never exactness.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from amoeba_deploy.architecture import Architecture

if TYPE_CHECKING:
    from transformers import StaticCache


def attentions(model: Any) -> Iterator[Any]:
    """The attention modules of a transformers model in the order of the layers of its cache."""
    for layer in model.model.layers:
        # A ragged subnet's block without attention has a stand-in, and no layer in the cache.
        if hasattr(layer.self_attn, "layer_idx"):
            yield layer.self_attn


def static_cache(model: Any, context: int, batch: int, layer_class: Any = None) -> StaticCache:
    """An empty cache of a transformers model for ``batch`` sequences of ``context`` positions.

    Its tensors, [batch, key/value heads, context, head size] in the model's dtype and on its device, are made here and
    stay the same ones. ``layer_class`` derives from transformers' ``StaticLayer``, which it is where left out.
    """
    import torch
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=model.config, max_cache_len=context)
    layers = []
    for attention in attentions(model):
        # A ragged subnet's modules have a config of their own each.
        heads = attention.config.num_key_value_heads
        layer = (layer_class or StaticLayer)(context)
        like = torch.zeros(batch, heads, 1, attention.head_dim, dtype=model.dtype, device=model.device)
        layer.lazy_initialization(like, like)
        layers.append(layer)
    cache.layers = layers
    return cache


def fix_rotary(model: Any) -> None:
    """Keep the rotary angles of short texts, which a graph for no longer ones never leaves."""
    rotary = model.model.rotary_emb
    if getattr(rotary, "rope_type", None) == "longrope":
        rotary.rope_type = "default"


def rotary_refusal(subnet: Architecture) -> str | None:
    """Why a model's rotary angles cannot be in one graph, as half a sentence, or None."""
    if subnet.rope.kind != "dynamic":
        return None
    return "its rotary scaling 'dynamic' changes with the length of the text, which one graph cannot"
