"""What a task found: its main metric with a standard error, and the score of every question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are the share of questions answered right."""


@dataclass(frozen=True)
class TaskResult:
    """The main metric of one task, over ``questions`` questions or documents.

    ``standard_error`` is None where the harness gives none; ``chance`` is what guessing would give, None where nothing
    is to be chosen. ``scores`` holds the metric of every question in order where it is a mean over questions: two
    models that answered the same questions are compared by them in pairs. ``metrics`` are all that the harness gives.
    """

    metric: str
    value: float
    standard_error: float | None
    questions: int
    chance: float | None
    shots: int = 0
    scores: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The main metric of a task that counts right answers, a share in [0, 1]."""
        return self.value

    @property
    def is_share(self) -> bool:
        """Whether the main metric is a share of questions."""
        return self.metric in SHARES

    def to_json(self) -> dict[str, Any]:
        """One entry of ``tasks`` in ``evaluate --json``."""
        name = "accuracy" if self.is_share else self.metric
        found: dict[str, Any] = {name: self.value, f"{name}_se": self.standard_error, "n": self.questions}
        if self.chance is not None:
            found["chance"] = self.chance
        others = {key: value for key, value in self.metrics.items() if key != self.metric}
        return found | {"metric": self.metric, "shots": self.shots} | ({"metrics": others} if others else {})

    def saved(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "metric": self.metric,
            "value": self.value,
            "se": self.standard_error,
            "n": self.questions,
            "chance": self.chance,
            "shots": self.shots,
            "scores": list(self.scores),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def restored(cls, value: Mapping[str, Any]) -> TaskResult:
        """From what ``saved`` gave; raises KeyError or TypeError where it is something else."""
        return cls(
            value["metric"],
            value["value"],
            value["se"],
            value["n"],
            value["chance"],
            value["shots"],
            tuple(value["scores"]),
            dict(value["metrics"]),
        )
