"""Rotary positions: from a config's settings to what llama.cpp turns pairs of channels by.

transformers pairs channel i with channel i + n/2 of the n that turn; llama.cpp's architectures of the Llama kind pair
2i with 2i + 1, so the rows of queries and keys change places. There a file may also divide each pair's angle by a
factor of its own, which any scaling that does not depend on the length of the text comes down to.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Rope

STILL = 1e30
"""The factor of a pair that does not turn: its angle is zero."""
FACTORED = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
"""Scalings that factors express."""


def turning(rope: Rope, head_dim: int) -> int:
    """How many channels of a head turn."""
    return int(head_dim * float(dict(rope.settings).get("partial_rotary_factor", 1.0)))


def pair_order(rope: Rope, head_dim: int) -> NDArray[np.int64]:
    """For each channel [head_dim] of a head as llama.cpp has it the channel of transformers that it is."""
    turned = turning(rope, head_dim)
    order = np.arange(head_dim)
    order[:turned:2], order[1:turned:2] = np.arange(turned // 2), np.arange(turned // 2, turned)
    return order


def frequencies(rope: Rope, head_dim: int, context: int) -> tuple[NDArray[np.float64], float]:
    """The angle of each turning pair a position, and the factor on cosines and sines; ``context`` is the model's.

    Of longrope those for texts that are no longer than the original context. The formulas are those of transformers'
    ``modeling_rope_utils``.
    """
    turned = turning(rope, head_dim)
    base = rope.theta ** (-np.arange(0, turned, 2) / turned)
    if rope.kind == "linear":
        return base / float(rope.setting("factor")), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, turned, context)
    if rope.kind == "longrope":
        factors = np.asarray(rope.setting("short_factor"), np.float64)
        return base / factors, _long_factor(rope, context)
    return base, 1.0


def _llama3(rope: Rope, base: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = float(rope.setting("low_freq_factor")), float(rope.setting("high_freq_factor"))
    length = 2 * math.pi / base
    ratio = float(rope.setting("original_max_position_embeddings")) / length
    smooth = np.clip((ratio - low) / (high - low), 0.0, 1.0)
    scaled: NDArray[np.float64] = (1 - smooth) * base / float(rope.setting("factor")) + smooth * base
    return scaled


def _yarn(rope: Rope, base: NDArray[np.float64], turned: int, context: int) -> tuple[NDArray[np.float64], float]:
    settings = dict(rope.settings)
    factor = float(rope.setting("factor"))
    original = settings.get("original_max_position_embeddings") or context
    fast, slow = settings.get("beta_fast") or 32, settings.get("beta_slow") or 1

    def channel(rotations: float) -> float:
        return turned * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(fast), channel(slow)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(turned // 2) - low) / (high - low), 0, 1)
    scale = settings.get("attention_factor")
    if scale is None:
        one, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = _mscale(factor, one) / _mscale(factor, all_dims) if one and all_dims else _mscale(factor, 1.0)
    return base / factor * ramp + base * (1 - ramp), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _long_factor(rope: Rope, context: int) -> float:
    settings = dict(rope.settings)
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    original = int(rope.setting("original_max_position_embeddings"))
    factor = float(settings.get("factor") or context / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def factors(rope: Rope, head_dim: int, context: int) -> NDArray[np.float32] | None:
    """``rope_freqs.weight`` [head_dim / 2]: what llama.cpp's own angles are divided by; None where by nothing."""
    found, _ = frequencies(rope, head_dim, context)
    if rope.kind in ("default", "linear") and turning(rope, head_dim) == head_dim:
        return None
    own = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    divided = np.full(head_dim // 2, STILL)
    divided[: len(found)] = own[: len(found)] / found
    return divided.astype(np.float32)
