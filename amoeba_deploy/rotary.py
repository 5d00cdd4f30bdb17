"""Rotary position frequencies, scaled as a config says, for engines whose graph we write ourselves."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Rope
from amoeba_deploy.errors import BadInput

ROPE_KINDS = ("default", "linear", "llama3")


def inverse_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Rotary frequencies [head_dim/2], scaled as the config says.

    theta^(-2i/d); ``linear`` divides all by the factor; ``llama3`` divides the low ones and blends between
    (transformers, modeling_rope_utils.py, _compute_llama3_parameters).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.setting("factor"))
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind != "default":
        raise BadInput(f"rotary scaling '{rope.kind}' is not emitted; known are {', '.join(ROPE_KINDS)}")
    return np.asarray(frequencies, np.float32)


def _llama3(rope: Rope, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    factor, original = float(rope.setting("factor")), float(rope.setting("original_max_position_embeddings"))
    low, high = float(rope.setting("low_freq_factor")), float(rope.setting("high_freq_factor"))
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies, np.float32)
