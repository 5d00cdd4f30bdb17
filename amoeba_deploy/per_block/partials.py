"""Lists of partial choices: the first k blocks have their options, with where each came from and what dominates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoeba_deploy.per_block.problem import Floats, Integers

_PAIRS = 1 << 19
"""Comparisons of dominance under several budgets that a list is worth."""


@dataclass(frozen=True)
class Partials:
    """Partial choices: rises [n], costs [constraints, n], and where each came from: its parent and its last option."""

    rises: Floats
    costs: Floats
    parents: Integers
    options: Integers

    def kept(self, which: Integers) -> Partials:
        """Some of them, in that order."""
        return Partials(self.rises[which], self.costs[:, which], self.parents[which], self.options[which])


def nothing(constraints: int) -> Partials:
    """The choice of no block."""
    return Partials(np.zeros(1), np.zeros((constraints, 1)), np.zeros(1, np.int64), np.zeros(1, np.int64))


def traced(lists: Sequence[Partials], place: int) -> list[int]:
    """The options of the partial choice at ``place`` of the last list."""
    found = []
    for partials in reversed(lists[1:]):
        found.append(int(partials.options[place]))
        place = int(partials.parents[place])
    return found[::-1]


def undominated(rises: Floats, costs: Floats) -> Integers:
    """Places of partial choices that no other one dominates, in order of the first cost; of equal ones the first."""
    order = np.lexsort((rises, *costs[::-1]))
    if len(costs) == 1:
        sorted_rises = rises[order]
        lowest = np.concatenate([[np.inf], np.minimum.accumulate(sorted_rises)[:-1]])
        return order[sorted_rises < lowest]
    values = np.concatenate([costs[1:], rises[None]])[:, order]
    kept = np.ones(len(order), np.bool_)
    # Each is compared with those in front of it, which cost no more of the first budget, within a window: what is
    # left over is merely kept.
    window = max(1, _PAIRS // max(len(order), 1))
    for back in range(1, min(window, len(order) - 1) + 1):
        kept[back:] &= ~(values[:, :-back] <= values[:, back:]).all(axis=0)
    return order[kept]
