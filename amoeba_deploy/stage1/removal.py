"""What a model's metric becomes when units are removed, for many sets at once.

All sets that are measured together leave everything before one boundary untouched, so each starts from the hidden
states there. Behind it, sets that keep the same units up to some point have the same states up to that point, and
share them: a trie over kept units, walked unit by unit. A set is given up as soon as its sum over the first batches
reaches what it would have to beat; sums never fall, so it could not have won.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from amoeba_deploy.stage1.blocks import Blocks, Forward, Units, chunks
from amoeba_deploy.stage1.calibration import Batch, Metric, batch_cost
from amoeba_deploy.stage1.lanes import Lanes
from amoeba_deploy.stage1.states import BoundaryStates

if TYPE_CHECKING:
    import torch

Removed = tuple[int, ...]
"""Units that are removed, ascending."""
Costs = tuple[float, ...]
"""A metric's sum over each batch, in order; fewer than there are batches where the set was given up."""


@dataclass(frozen=True)
class Trial:
    """Units to remove, and the sum that the set must stay below to be of use."""

    removed: Removed
    limit: float = math.inf


@dataclass
class Work:
    """What measuring took, in tokens x units run, and how many sets were measured or given up early.

    ``tokens`` were run behind boundaries; ``tokens_untouched`` to reach them, of which ``tokens_repeated`` for want of
    memory.
    """

    tokens: int = 0
    tokens_untouched: int = 0
    tokens_repeated: int = 0
    trials: int = 0
    given_up: int = 0

    def add(self, other: Work) -> None:
        """Add another's work to this one."""
        self.tokens += other.tokens
        self.tokens_untouched += other.tokens_untouched
        self.tokens_repeated += other.tokens_repeated
        self.trials += other.trials
        self.given_up += other.given_up


class Remover(Protocol):
    """Measures sets of removed units over the calibration batches: here, or on a cluster."""

    units: int

    @property
    def work(self) -> Work:
        """All work so far."""
        ...

    def costs(self, boundary: int, trials: Sequence[Trial]) -> list[Costs]:
        """For each trial the metric's sums over batches. No trial removes a unit before ``boundary``."""
        ...


@dataclass
class _Path:
    """A trial on its way through the units."""

    removed: frozenset[int]
    limit: float
    costs: list[float]

    @property
    def is_open(self) -> bool:
        """Whether it can still win; a sum that is not a number stays open, to be reported."""
        return not sum(self.costs) >= self.limit


class LocalRemover:
    """Measures on this machine."""

    def __init__(
        self,
        blocks: Blocks,
        batches: Sequence[Batch],
        metric: Metric,
        units: Units,
        memory: int,
        lanes: Lanes | None = None,
    ) -> None:
        """Keep at most ``memory`` bytes of hidden states, and run in ``lanes`` (one a processor where left out)."""
        self.batches, self.metric, self.memory = batches, metric, memory
        self.forward = Forward(blocks, units, lanes)
        self.states = BoundaryStates(self.forward, batches, memory)
        self.units = self.forward.count
        self._walked = Work()

    @property
    def work(self) -> Work:
        """All work so far."""
        made = Work(0, self.states.tokens_run, self.states.tokens_repeated)
        made.add(self._walked)
        return made

    def costs(self, boundary: int, trials: Sequence[Trial]) -> list[Costs]:
        """For each trial the metric's sums over batches; see ``Remover``."""
        paths = [_Path(frozenset(trial.removed), trial.limit, []) for trial in trials]
        self._walked.trials += len(paths)
        for chunk in chunks(self.forward, self.batches, self.memory, len(paths) + 1):
            live = [path for path in paths if path.is_open]
            if live:
                self._measure(boundary, live, chunk)
        self._walked.given_up += sum(len(path.costs) < len(self.batches) for path in paths)
        return [tuple(path.costs) for path in paths]

    def _measure(self, boundary: int, paths: Sequence[_Path], chunk: range) -> None:
        batches = [self.batches[number] for number in chunk]
        ends = self._walk(boundary, paths, chunk)
        head = self.forward.blocks.head()  # a streamed one is read once for all paths
        for path, states in zip(paths, ends, strict=True):
            found = self.forward.log_likelihood_all(head, batches, states)
            path.costs += [batch_cost(self.metric, *pair) for pair in zip(batches, found, strict=True)]

    def _walk(self, boundary: int, paths: Sequence[_Path], chunk: range) -> list[list[torch.Tensor]]:
        """Each path's states behind the last unit; paths that keep the same units so far hold the same states."""
        tokens = sum(self.batches[number].tokens for number in chunk)
        start = self.states.at(boundary, chunk)
        held: list[list[torch.Tensor]] = [start for _ in paths]
        for unit in range(boundary, self.units):
            made: dict[int, list[torch.Tensor]] = {}
            for place, path in enumerate(paths):
                before = held[place]
                if unit in path.removed:
                    continue
                if id(before) not in made:
                    made[id(before)] = self.forward.run_all(unit, before)
                    self._walked.tokens += tokens
            held = [
                before if unit in path.removed else made[id(before)] for path, before in zip(paths, held, strict=True)
            ]
        return held


def total(costs: Costs) -> float:
    """The sum over batches, in their order."""
    return sum(costs)


def describe(removed: Removed, units: Units) -> str:
    """Removed units for people: block numbers, or attention and feed-forward by block."""
    if units == "block":
        return f"blocks {list(removed)}"
    return ", ".join(f"{'feed-forward' if unit % 2 else 'attention'} {unit // 2}" for unit in removed) or "none"
