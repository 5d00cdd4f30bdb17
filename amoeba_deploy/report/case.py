"""Cases: what a search chooses for one device in some engines, at every budget.

The choice changes only where a shape's latency comes within the budget. So the search itself is asked once at each
latency that a shape has, and a page has only to look up what it said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.progress import Progress
from amoeba_deploy.report.command import decimal
from amoeba_deploy.request import Answer, Request
from amoeba_deploy.search import Candidate, search
from amoeba_deploy.space import Space

Pair = tuple[str, str]
"""A flow and a precision."""


@dataclass(frozen=True)
class Step:
    """What a search chooses from one latency on, up to that of the next step."""

    ms: float
    budget: str
    """The shortest number of milliseconds at or above ``ms`` that is below the next step."""
    best: Candidate
    alike: int
    """How many shapes within the budget cannot be told apart from it in quality."""
    binding: str | None
    """The limits that keep a better shape out."""


def resolved(space: Space, asked: Mapping[str, Any], progress: Progress) -> Request:
    """The request that options make where the latency's budget binds nothing."""
    return Request.of(space, {**asked, "latency": math.inf}, progress)


@dataclass(frozen=True)
class Case:
    """A search of one device in some engines whose latency nothing bounds yet."""

    answer: Answer
    asked: Mapping[str, Any]
    """The options that make the same search from the command line, but for its budget."""

    @classmethod
    def of(cls, space: Space, asked: Mapping[str, Any], progress: Progress) -> Case:
        """Resolve the options of a search and consider every shape; raises what a search raises."""
        return cls(resolved(space, asked, progress).answer(), asked)

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.answer.request

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The engines that the shapes are ranked in."""
        return tuple(dict.fromkeys((c.flow, c.precision) for c in self.found))

    @property
    def found(self) -> tuple[Candidate, ...]:
        """Every shape that was considered."""
        return self.answer.result.found

    def latency(self, candidate: Candidate) -> float:
        """The latency that the budget bounds, in milliseconds."""
        return candidate.prediction.value(self.request.budget.metric, self.request.target.workload.tokens)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What is chosen at every budget; below the first step no shape fits."""
        request = self.request
        chosen: list[tuple[float, tuple[Candidate, str | None, int]]] = []
        for ms in sorted({self.latency(candidate) for candidate in self.found}):
            try:
                result = search(self.found, replace(request.budget, ms=ms), request.target.workload, request.axes)
            except NoShapeFits:
                continue
            same = (result.best, result.binding, len(result.equals))
            if not chosen or chosen[-1][1] != same:
                chosen.append((ms, same))
        ends = [ms for ms, _ in chosen[1:]] + [math.inf]
        return tuple(
            Step(ms, shortest(ms, end), best, alike, binding)
            for (ms, (best, binding, alike)), end in zip(chosen, ends, strict=True)
        )

    @property
    def choices(self) -> tuple[Step, ...]:
        """The steps at which another shape is chosen than below them."""
        before = (None, *(step.best for step in self.steps))
        return tuple(step for best, step in zip(before, self.steps, strict=False) if step.best is not best)

    def step_at(self, ms: float) -> Step | None:
        """What is chosen within a budget; None where no shape fits."""
        return next((step for step in reversed(self.steps) if step.ms <= ms), None)


def shortest(low: float, high: float) -> str:
    """The number with the fewest significant digits, at least three, that is not below ``low`` and below ``high``.

    >>> shortest(0.97761, 1.2), shortest(0.97761, 0.9777), shortest(40.0, 41.0)
    ('0.978', '0.97761', '40')
    """
    for digits in range(3, 18):
        shift = digits - 1 - math.floor(math.log10(low))
        for number in (math.floor(low * 10.0**shift), math.floor(low * 10.0**shift) + 1):
            value = float(f"{number}e{-shift}")
            if low <= value < high:
                return decimal(value)
    return decimal(low)
