"""Rotary frequencies with the scalings that the graph knows, as transformers computes them (modeling_rope_utils.py)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Rope
from amoeba_deploy.errors import BadInput

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(rope: Rope, head_dim: int, trained: int) -> tuple[NDArray[np.float32], float]:
    """Rotary frequencies [head_dim/2], scaled as the config says, and the factor of all cosines and sines.

    theta^(-2i/d); ``linear`` divides all by the factor; ``llama3`` divides the low ones and blends between
    (_compute_llama3_parameters), ``yarn`` likewise by another ramp, with a factor (_compute_yarn_parameters).

    Args:
        rope: the settings.
        head_dim: channels of a head.
        trained: positions of the config, which a scaling starts from where it does not say.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.kind == "default":
        return frequencies, 1.0
    if rope.kind == "linear":
        return np.asarray(frequencies / np.float32(rope.setting("factor")), np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim, trained)
    raise BadInput(f"rotary scaling '{rope.kind}' is not emitted; known are {', '.join(ROPE_KINDS)}")


def _llama3(rope: Rope, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    factor, original = float(rope.setting("factor")), float(rope.setting("original_max_position_embeddings"))
    low, high = float(rope.setting("low_freq_factor")), float(rope.setting("high_freq_factor"))
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies, np.float32)


def _stretch(factor: float, share: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _yarn(
    rope: Rope, frequencies: NDArray[np.float32], head_dim: int, trained: int
) -> tuple[NDArray[np.float32], float]:
    """YaRN (https://arxiv.org/abs/2309.00071): few turns within the trained context are interpolated, many are not."""
    said = {name: value for name, value in rope.settings if value is not None}
    original = float(said.get("original_max_position_embeddings", trained))
    factor = float(said.get("factor", trained / original))

    def pair(turns: float) -> float:
        """The pair of channels that makes so many turns in the trained context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(float(said.get("beta_fast") or 32)), pair(float(said.get("beta_slow") or 1))
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    scaled = frequencies / np.float32(factor) * ramp + frequencies * (1 - ramp)
    given, share, all_share = (said.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None:
        given = _stretch(factor)
        if share and all_share:
            given = _stretch(factor, float(share)) / _stretch(factor, float(all_share))
    return np.asarray(scaled, np.float32), float(given)
