"""Rotary frequencies and their scalings, as transformers computes them (modeling_rope_utils.py)."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Rope
from amoeba_deploy.errors import BadInput

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
Real = TypeVar("Real", np.float32, np.float64)


def turning(rope: Rope, head_dim: int) -> int:
    """How many channels of a head turn."""
    return int(head_dim * float(dict(rope.settings).get("partial_rotary_factor", 1.0)))


def inverse_frequencies(rope: Rope, head_dim: int, trained: int, dtype: type[Real]) -> tuple[NDArray[Real], float]:
    """Rotary frequencies [turning channels / 2], scaled as the config says, and the factor of all cosines and sines.

    theta^(-2i/d); ``linear`` divides all by the factor; ``llama3`` divides the low ones and blends between
    (_compute_llama3_parameters), ``yarn`` likewise by another ramp, with a factor (_compute_yarn_parameters);
    ``longrope`` divides each by its own, here those for texts within the original context
    (_compute_longrope_parameters).

    Args:
        rope: the settings.
        head_dim: channels of a head.
        trained: positions of the config, which a scaling starts from where it does not say.
        dtype: what is computed in; transformers does in float32.

    Raises:
        BadInput: a scaling that is none of ``ROPE_KINDS``.
    """
    turned = turning(rope, head_dim)
    exponents = np.arange(0, turned, 2, dtype=dtype) / dtype(turned)
    frequencies: NDArray[Real] = (1.0 / (dtype(rope.theta) ** exponents)).astype(dtype)
    factor = 1.0
    if rope.kind == "linear":
        frequencies = (frequencies / dtype(rope.setting("factor"))).astype(dtype)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, factor = _yarn(rope, frequencies, turned, trained)
    elif rope.kind == "longrope":
        divisors: NDArray[Real] = np.asarray(rope.setting("short_factor"), dtype)
        frequencies, factor = (frequencies / divisors).astype(dtype), _long(rope, trained)
    elif rope.kind != "default":
        raise BadInput(f"rotary scaling '{rope.kind}' is not computed here; known are {', '.join(ROPE_KINDS)}")
    return frequencies.astype(dtype), factor


def _said(rope: Rope) -> dict[str, Any]:
    """The settings that the config does not leave to the scaling."""
    return {name: value for name, value in rope.settings if value is not None}


def _llama3(rope: Rope, frequencies: NDArray[Real]) -> NDArray[Real]:
    factor, original = float(rope.setting("factor")), float(rope.setting("original_max_position_embeddings"))
    low, high = float(rope.setting("low_freq_factor")), float(rope.setting("high_freq_factor"))
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    found: NDArray[Real] = (1 - blend) * frequencies / factor + blend * frequencies
    return found


def _stretch(factor: float, share: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _yarn(rope: Rope, frequencies: NDArray[Real], turned: int, trained: int) -> tuple[NDArray[Real], float]:
    """YaRN (https://arxiv.org/abs/2309.00071): few turns within the trained context are interpolated, many are not."""
    said = _said(rope)
    original = float(said.get("original_max_position_embeddings", trained))
    factor = float(said.get("factor", trained / original))

    def pair(turns: float) -> float:
        """The pair of channels that makes so many turns in the trained context."""
        return turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(float(said.get("beta_fast") or 32)), pair(float(said.get("beta_slow") or 1))
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    if low == high:
        high += 0.001
    number = frequencies.dtype.type
    ramp = np.clip((np.arange(turned // 2, dtype=number) - number(low)) / number(high - low), 0, 1)
    scaled: NDArray[Real] = frequencies / number(factor) * ramp + frequencies * (1 - ramp)
    given, share, all_share = (said.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None:
        given = _stretch(factor)
        if share and all_share:
            given = _stretch(factor, float(share)) / _stretch(factor, float(all_share))
    return scaled, float(given)


def _long(rope: Rope, trained: int) -> float:
    """LongRoPE's factor of cosines and sines (https://arxiv.org/abs/2402.13753)."""
    said = _said(rope)
    if "attention_factor" in said:
        return float(said["attention_factor"])
    original = int(rope.setting("original_max_position_embeddings"))
    factor = float(said.get("factor") or trained / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
