"""Sampling: how a model's generation settings reshape the distribution of the next token, and a draw from it.

The settings and their order are those of transformers' ``generate(do_sample=True)``: the repetition penalty first
(Keskar et al. 2019, https://arxiv.org/abs/1909.05858), then temperature, top-k, top-p (Holtzman et al. 2019,
https://arxiv.org/abs/1904.09751) and min-p (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object

GENERATION = "generation_config.json"
_OTHERS: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
}
"""Settings that would change the distribution and are not done here, with the values that change nothing."""

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingSettings:
    """What reshapes a distribution; the defaults are transformers'."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_sampling(folder: Path) -> SamplingSettings:
    """The settings of a model's ``generation_config.json``; transformers' own where it names none.

    Raises:
        BadInput: a setting has a value that cannot be, or one is set that is not done here.
    """
    file = folder / GENERATION
    found = read_json_object(file) if file.is_file() else {}
    for name, neutral in _OTHERS.items():
        if found.get(name) not in neutral:
            raise BadInput(f"{file}: sets {name}, which --sample does not know; leave out --sample")
    limits: dict[str, tuple[type, Callable[[float], bool]]] = {
        "temperature": (float, lambda value: value > 0),
        "top_k": (int, lambda value: value >= 0),
        "top_p": (float, lambda value: 0 <= value <= 1),
        "min_p": (float, lambda value: 0 <= value <= 1),
        "repetition_penalty": (float, lambda value: value > 0),
    }
    settings = {}
    for name, (kind, legal) in limits.items():
        value = found.get(name)
        if value is None:
            continue
        number = isinstance(value, int) or (kind is float and isinstance(value, float))
        if isinstance(value, bool) or not number or not legal(value):
            raise BadInput(f"{file}: {name} is {value!r}, which cannot be; mend it, or leave out --sample")
        settings[name] = kind(value)
    return SamplingSettings(**settings)


def warped(logits: Logits, ids: Sequence[int], settings: SamplingSettings) -> Logits:
    """Logits [vocabulary] after all settings; minus infinity for what cannot be drawn. ``ids`` are all so far."""
    found = np.array(logits, dtype=np.float32)
    if settings.repetition_penalty != 1:
        seen = np.unique(np.asarray(ids, dtype=np.int64))
        values, penalty = found[seen], np.float32(settings.repetition_penalty)
        found[seen] = np.where(values < 0, values * penalty, values / penalty)
    if settings.temperature != 1:
        found /= np.float32(settings.temperature)
    if settings.top_k:
        kept = min(settings.top_k, found.size)
        found[found < np.partition(found, -kept)[-kept]] = -np.inf
    if settings.top_p < 1:
        order = np.argsort(found, kind="stable")
        lost = np.cumsum(softmax(found)[order]) <= 1 - settings.top_p
        lost[-1] = False
        found[order[lost]] = -np.inf
    if settings.min_p:
        chances = softmax(found)
        found[chances < settings.min_p * chances.max()] = -np.inf
    return found


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities [vocabulary] of logits."""
    raised = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(raised / raised.sum())


def greedy(logits: Logits, _ids: Sequence[int]) -> int:
    """The most likely token, whatever was before."""
    return int(logits.argmax())


class Sampler:
    """Draws from the reshaped distribution; the same seed, the same draws."""

    def __init__(self, settings: SamplingSettings, seed: int) -> None:
        self._settings, self._rng = settings, np.random.default_rng(seed)

    def __call__(self, logits: Logits, ids: Sequence[int]) -> int:
        chances = softmax(warped(logits, ids, self._settings))
        return int(self._rng.choice(chances.size, p=chances))
