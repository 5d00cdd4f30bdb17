"""Hidden states in front of every unit of the untouched model, kept within a bound of memory.

Stage 1 walks from the last unit to the first and asks for the states in front of each. They are made by one pass over
the model and kept as far as memory allows; what does not fit is made again from the nearest that is kept, and never
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amoeba_deploy.stage1.blocks import Forward, state_bytes
from amoeba_deploy.stage1.calibration import Batch

if TYPE_CHECKING:
    import torch


@dataclass
class _Kept:
    """One batch's states by boundary, and the boundary that it has reached so far."""

    states: dict[int, torch.Tensor] = field(default_factory=dict)
    reached: int = 0

    def nearest(self, boundary: int) -> int:
        """The latest boundary at or before one from which states can be made; 0 is the embedding."""
        for later in [b for b in self.states if b > boundary]:
            del self.states[later]
        return max(self.states, default=0)


class BoundaryStates:
    """States at boundaries that descend. Counts tokens x units run: all, and those run again for want of memory."""

    def __init__(self, forward: Forward, batches: Sequence[Batch], limit: int) -> None:
        """Keep at most ``limit`` bytes of states, beside those that are being worked on."""
        self.forward, self.batches = forward, batches
        size = sum(state_bytes(batch, forward.blocks.hidden) for batch in batches)
        self.capacity = limit // max(size, 1)
        self.tokens_run = self.tokens_repeated = 0
        self._kept = [_Kept() for _ in batches]

    def at(self, boundary: int, chunk: Iterable[int]) -> list[torch.Tensor]:
        """The states [rows, length, hidden] in front of unit ``boundary`` of the batches whose numbers are given."""
        numbers = list(chunk)
        begins = [self._kept[number].nearest(boundary) for number in numbers]
        worth = [self._worth_keeping(number, boundary) for number in numbers]
        found = self._starts(numbers, begins)
        for unit in range(min(begins), boundary):
            places = [place for place, begin in enumerate(begins) if begin <= unit]
            for place, state in zip(places, self.forward.run_all(unit, [found[p] for p in places]), strict=True):
                found[place] = state
                self._count(numbers[place], unit)
                if unit + 1 in worth[place]:
                    self._kept[numbers[place]].states[unit + 1] = state
        return found

    def _starts(self, numbers: Sequence[int], begins: Sequence[int]) -> list[torch.Tensor]:
        new = [number for number, begin in zip(numbers, begins, strict=True) if begin not in self._kept[number].states]
        embedded = dict(zip(new, self.forward.embed_all([self.batches[number] for number in new]), strict=True))
        return [
            embedded[number] if number in embedded else self._kept[number].states[begin]
            for number, begin in zip(numbers, begins, strict=True)
        ]

    def _worth_keeping(self, number: int, boundary: int) -> set[int]:
        """Boundaries on the way to keep: all where they fit, else evenly spread ones."""
        begin, free = self._kept[number].nearest(boundary), self.capacity - len(self._kept[number].states)
        if free >= boundary - begin:
            return set(range(begin + 1, boundary + 1))
        return {begin + round(k * (boundary - begin) / (free + 1)) for k in range(1, free + 1)}

    def _count(self, number: int, unit: int) -> None:
        tokens, kept = self.batches[number].tokens, self._kept[number]
        self.tokens_run += tokens
        if unit < kept.reached:
            self.tokens_repeated += tokens
        kept.reached = max(kept.reached, unit + 1)
