"""Rotary positions: from a config's settings to what llama.cpp turns pairs of channels by.

transformers pairs channel i with channel i + n/2 of the n that turn; llama.cpp's architectures of the Llama kind pair
2i with 2i + 1, so the rows of queries and keys change places. There a file may also divide each pair's angle by a
factor of its own, which any scaling that does not depend on the length of the text comes down to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Rope
from amoeba_deploy.rotary import ROPE_KINDS, inverse_frequencies, turning

STILL = 1e30
"""The factor of a pair that does not turn: its angle is zero."""
FACTORED = frozenset(ROPE_KINDS)
"""Scalings that factors express."""


def pair_order(rope: Rope, head_dim: int) -> NDArray[np.int64]:
    """For each channel [head_dim] of a head as llama.cpp has it the channel of transformers that it is."""
    turned = turning(rope, head_dim)
    order = np.arange(head_dim)
    order[:turned:2], order[1:turned:2] = np.arange(turned // 2), np.arange(turned // 2, turned)
    return order


def factors(rope: Rope, head_dim: int, context: int) -> NDArray[np.float32] | None:
    """``rope_freqs.weight`` [head_dim / 2]: what llama.cpp's own angles are divided by; None where by nothing."""
    if rope.kind in ("default", "linear") and turning(rope, head_dim) == head_dim:
        return None
    found, _ = inverse_frequencies(rope, head_dim, context, np.float64)
    own = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    divided = np.full(head_dim // 2, STILL)
    divided[: len(found)] = own[: len(found)] / found
    return divided.astype(np.float32)
