"""Quantities: what a candidate can be bounded by, or weighed on a front by; of each, less is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from amoeba_deploy.profiles.prediction import Metric
from amoeba_deploy.search.candidate import Candidate


@dataclass(frozen=True)
class Quantity:
    """One such figure."""

    name: str
    """As options and JSON spell it."""
    title: str
    """As people read it."""
    value: Callable[[Candidate, int], float]
    """Of a candidate where so many tokens are generated."""
    text: Callable[[float], str]
    """A value with its unit."""
    told: str
    """How a sentence goes on after a candidate's name to say its value."""
    source: Callable[[Candidate], str]
    """Where a candidate's value comes from."""


def three_digits(value: float) -> str:
    """Three digits, or all before the point.

    >>> three_digits(1.48853), three_digits(1234.5)
    ('1.49', '1234')
    """
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _milliseconds(value: float) -> str:
    return f"{three_digits(value)} ms"


def _bytes(value: float) -> str:
    return f"{three_digits(value / 1e9)} GB" if value >= 1e7 else f"{three_digits(value / 1e6)} MB"


def _latency(metric: Metric) -> Quantity:
    def value(candidate: Candidate, tokens: int) -> float:
        return candidate.prediction.value(metric, tokens)

    title = metric.upper()
    return Quantity(metric, title, value, _milliseconds, f"which needs {title}", _predicted)


def _predicted(candidate: Candidate) -> str:
    return candidate.prediction.source


def _memory(candidate: Candidate, _tokens: int) -> float:
    return candidate.prediction.memory_bytes


def _size(candidate: Candidate, _tokens: int) -> float:
    return candidate.artifact_bytes


def _size_source(candidate: Candidate) -> str:
    return "the weights alone" if candidate.prediction.artifact_bytes is None else candidate.prediction.source


def _badness(candidate: Candidate, _tokens: int) -> float:
    return candidate.badness


def _quality_source(candidate: Candidate) -> str:
    return candidate.quality.source


def _loss_text(value: float) -> str:
    return f"{value:.4f}"


QUANTITIES: Mapping[str, Quantity] = {
    **{metric: _latency(metric) for metric in ("tpot", "ttft", "e2e")},
    "memory": Quantity("memory", "memory", _memory, _bytes, "which needs", _predicted),
    "size": Quantity("size", "artefact size", _size, _bytes, "whose artefact takes", _size_source),
    "loss": Quantity("loss", "loss", _badness, _loss_text, "whose loss is", _quality_source),
}
"""By name. ``loss`` stands for quality: where no loss is known it is the share of parameters kept, negated."""
