"""Cases: what a search chooses for one device in some engines, at every budget.

The choice changes only where a shape's latency comes within the budget. So the search itself is asked once at each
latency that a shape has, and a page has only to look up what it said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


Chosen = tuple[Candidate, str | None, int]
"""The best shape, the limits that keep better ones out, and how many cannot be told apart from it."""


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
        latencies = sorted({self.latency(candidate) for candidate in self.found})
        chosen: list[tuple[float, Chosen]] = []
        for ms, found in zip(latencies, self._asked(latencies), strict=True):
            if found is not None and (not chosen or chosen[-1][1] != found):
                chosen.append((ms, found))
        ends = [ms for ms, _ in chosen[1:]] + [math.inf]
        return tuple(
            Step(ms, shortest(ms, end), best, alike, binding)
            for (ms, (best, binding, alike)), end in zip(chosen, ends, strict=True)
        )

    def _asked(self, latencies: Sequence[float]) -> list[Chosen | None]:
        """What the search says at each of some latencies.

        Losses that cannot be told apart can make a choice come, go and come again. Where no rows of losses are known
        nothing is tied: what is chosen at both ends of a range is chosen throughout, and few have to be asked for.
        """
        found: dict[int, Chosen | None] = {}
        tied = any(candidate.quality.losses is not None for candidate in self.found)
        ranges = [(0, len(latencies) - 1)]
        with self.request.progress.bar("budgets", len(latencies)) as advance:
            while ranges:
                low, high = ranges.pop()
                for end in (low, high):
                    if end not in found:
                        found[end] = self._at(latencies[end])
                        advance()
                if high - low < 2 or (not tied and found[low] == found[high]):
                    found |= dict.fromkeys(range(low + 1, high), found[low])
                    continue
                middle = (low + high) // 2
                ranges += [(middle, high), (low, middle)]
        return [found[number] for number in range(len(latencies))]

    def _at(self, ms: float) -> Chosen | None:
        """What the search says of one budget; None where no shape fits."""
        request = self.request
        try:
            result = search(self.found, replace(request.budget, ms=ms), request.target.workload, request.axes)
        except NoShapeFits:
            return None
        return result.best, result.binding, len(result.equals)

    @property
    def choices(self) -> tuple[Step, ...]:
        """The steps at which another shape is chosen than below them."""
        before = (None, *(step.best for step in self.steps))
        return tuple(step for best, step in zip(before, self.steps, strict=False) if step.best is not best)


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
