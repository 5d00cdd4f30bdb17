"""The problem that is solved: one option for each block, least total rise in loss, within additive budgets.

It is the multiple-choice knapsack problem, with more than one budget the multi-dimensional one (Kellerer, Pferschy and
Pisinger, Knapsack Problems, 2004, chapters 11 and 9). Nothing here knows of models: rises and costs are arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Choices = tuple[int, ...]
"""For each block the index of its option."""

_ROUNDING = 1e-12
"""Sums of some hundred numbers in another order differ by less than this share of the numbers' size."""


@dataclass(frozen=True)
class Constraint:
    """One additive budget: fixed + the sum over blocks of ``costs`` [blocks, options] must not exceed ``budget``."""

    name: str
    unit: str
    costs: Floats
    budget: float
    fixed: float = 0.0

    @cached_property
    def allowed(self) -> float:
        """What the blocks' costs may sum to: the budget less what is fixed, and the rounding of such a sum."""
        size = max(abs(self.budget), abs(self.fixed), float(np.abs(self.costs).max(axis=1).sum()))
        return self.budget - self.fixed + _ROUNDING * size

    def used(self, choices: Choices) -> float:
        """What a choice takes of the budget, the fixed part included."""
        return self.fixed + float(self.costs[np.arange(len(choices)), list(choices)].sum())


@dataclass(frozen=True)
class Problem:
    """Rises [blocks, options] in loss, infinite for an option that a block does not have, and the budgets.

    The first constraint is the one that a front is over.
    """

    rises: Floats
    constraints: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        shapes = {constraint.costs.shape for constraint in self.constraints}
        if not self.constraints or shapes != {self.rises.shape} or self.rises.ndim != 2 or not self.rises.size:
            raise ValueError(f"rises {self.rises.shape} and costs {shapes} must be alike, [blocks, options]")
        if np.isnan(self.rises).any() or not all(np.isfinite(c.costs).all() for c in self.constraints):
            raise ValueError("rises must be numbers and costs must be finite")
        if not np.isfinite(self.rises).any(axis=1).all():
            raise ValueError("a block has no option")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return int(self.rises.shape[0])

    @property
    def options(self) -> int:
        """How many options each block has, those that are not there included."""
        return int(self.rises.shape[1])

    def rise(self, choices: Choices) -> float:
        """The total rise of a choice."""
        return float(self.rises[np.arange(len(choices)), list(choices)].sum())

    def fits(self, choices: Choices) -> bool:
        """Whether a choice is within every budget."""
        return all(constraint.used(choices) - constraint.fixed <= constraint.allowed for constraint in self.constraints)

    def of_constraints(self, constraints: Sequence[Constraint]) -> Problem:
        """The same rises under other budgets."""
        return Problem(self.rises, tuple(constraints))


@dataclass(frozen=True)
class Solution:
    """A choice, its total rise, and what it takes of each budget, fixed parts included."""

    choices: Choices
    rise: float
    used: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem, choices: Sequence[int]) -> Solution:
        """The solution that a choice is."""
        found = tuple(int(choice) for choice in choices)
        return cls(found, problem.rise(found), tuple(c.used(found) for c in problem.constraints))


def dropped_at_most(dropped: NDArray[np.bool_], blocks: int, kept: int) -> Constraint:
    """That at least ``kept`` of ``blocks`` blocks are kept, as a budget of the options [options] that drop a block."""
    costs = np.tile(dropped.astype(np.float64), (blocks, 1))
    return Constraint("removed blocks", "", costs, float(blocks - kept))
