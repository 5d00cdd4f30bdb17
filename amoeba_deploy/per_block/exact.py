"""The exact optimum: dynamic programming over blocks, with lists of partial choices kept short by dominance and bounds.

A list holds partial choices of the first k blocks as (costs, rise). A partial choice goes where another one costs no
more and rises no more (dominance; Nemhauser and Ullmann, Discrete dynamic programming and capital allocation,
Management Science 15(9), 1969), or where even the linear relaxation of the blocks behind it (hulls.py) does not come
below the best choice that is known. Every partial choice, completed at a corner of that relaxation, is itself a whole
choice, so the best known one improves on the way. Options go beforehand likewise, each on its own (Pisinger, A minimal
algorithm for the multiple-choice knapsack problem, EJOR 83(2), 1995). Costs stay floating-point numbers throughout.

Of several budgets the first is kept by the relaxation; the others are added to the rises with Lagrangian multipliers,
which can only lower a bound, and checked as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.per_block.hulls import Relaxation, folded
from amoeba_deploy.per_block.partials import Partials, nothing, traced, undominated
from amoeba_deploy.per_block.problem import Choices, Floats, Integers, Problem, Solution

_EQUAL = 1e-12
"""A partial choice is given up unless it can be better by more than this share of the rises' size."""
_CUTS = 60
"""Cuts of the ellipsoid for each budget and budget."""
_WIDEST = 32.0
"""How large multipliers are looked for, where rises and costs have equal spans."""
_NARROW = 256
"""Partial choices that the first of two passes keeps of each list, under several budgets."""


def solve(problem: Problem) -> Solution:
    """The choice of least rise within every budget.

    Raises:
        NoShapeFits: no choice is; the message names the least that the blocks can cost.
    """
    found = _solve(problem.of_constraints(problem.constraints[:1]))
    if found is not None and len(problem.constraints) > 1 and not problem.fits(found.choices):
        found = _solve(problem)
    if found is None:
        raise NoShapeFits(_impossible(problem))
    return Solution.of(problem, found.choices)


def least(problem: Problem, place: int = 0) -> float:
    """The least that one budget can be, given the other ones; infinite where those cannot be kept."""
    constraint = problem.constraints[place]
    others = [other for number, other in enumerate(problem.constraints) if number != place]
    costs = np.where(np.isfinite(problem.rises), constraint.costs, np.inf)
    if not others:
        return constraint.fixed + float(costs.min(axis=1).sum())
    found = _solve_any(Problem(costs, tuple(others)))
    return math.inf if found is None else constraint.used(found.choices)


def supported_front(problem: Problem) -> list[Solution]:
    """Choices that are each optimal for what they take of the first budget, in order of that: the corners of the
    convex front over all values of it, from the least to the one from which on nothing improves.

    Those that break another budget are left out; between two of them there may be choices that are optimal for their
    cost and not on the convex front, which ``solve`` finds for a budget.
    """
    first = problem.constraints[0]
    relaxed = Relaxation.of(first.costs, problem.rises)
    corners = range(len(relaxed.envelopes[0].costs))
    found = (Solution.of(problem, relaxed.corner_choices(0, corner).tolist()) for corner in corners)
    others = problem.constraints[1:]
    return [one for one in found if all(c.used(one.choices) - c.fixed <= c.allowed for c in others)]


def _impossible(problem: Problem) -> str:
    for place, constraint in enumerate(problem.constraints):
        lowest = least(problem, place)
        if math.isfinite(lowest) and lowest - constraint.fixed > constraint.allowed:
            return (
                f"no plan fits the budget: the least possible {constraint.name} is "
                f"{_amount(lowest, constraint.unit)} where {_amount(constraint.budget, constraint.unit)} is allowed; "
                f"raise it, or allow narrower blocks or fewer of them"
            )
    names = ", ".join(constraint.name for constraint in problem.constraints)
    return f"no plan fits all budgets together ({names}); raise one of them, or allow narrower blocks or fewer of them"


def _amount(value: float, unit: str) -> str:
    return f"{value:.6g} {unit}".rstrip()


@dataclass
class _Best:
    """The best whole choice so far."""

    rise: float = math.inf
    choices: Choices | None = None


def _solve_any(problem: Problem) -> Solution | None:
    found = _solve(problem.of_constraints(problem.constraints[:1]))
    if found is None or problem.fits(found.choices):
        return found
    return _solve(problem)


def _solve(problem: Problem) -> Solution | None:
    found = _Search(problem).run()
    return None if found is None else Solution.of(problem, found)


class _Search:
    """One run of the dynamic programming under all budgets of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.costs = np.stack([constraint.costs for constraint in problem.constraints])
        self.allowed = np.array([constraint.allowed for constraint in problem.constraints])
        self.available = np.isfinite(problem.rises)
        self.finite = np.where(self.available, problem.rises, 0.0)
        self.equal = _EQUAL * max(float(np.abs(self.finite).max(axis=1).sum()), 1e-300)
        least = np.where(self.available[None], self.costs, np.inf).min(axis=2)
        # What the blocks from each one on cost at least, of every budget: [constraints, blocks + 1].
        self.rest = np.concatenate([np.cumsum(least[:, ::-1], axis=1)[:, ::-1], np.zeros((len(least), 1))], axis=1)
        self.best = _Best()
        self.impossible = False

    def run(self) -> Choices | None:
        """The best choice, None where none fits."""
        if (self.rest[:, 0] > self.allowed).any():
            return None
        self.multipliers = self._multipliers()
        if self.impossible:
            return None
        self.relaxed = self._relaxation()
        self._complete([nothing(len(self.costs))], 0)
        if len(self.costs) > 1:
            # A good choice to begin with is worth a pass of its own where bounds are weaker.
            self._improve()
            self._reduce()
            self._pass(_NARROW)
            self._improve()
        self._reduce()
        self._pass()
        return self.best.choices

    def _pass(self, width: int | None = None) -> None:
        """All blocks in turn; ``width`` keeps only so many of the most promising partial choices."""
        lists = [nothing(len(self.costs))]
        for block in range(self.problem.blocks):
            found = self._extended(lists[-1], block)
            if width is not None and len(found.rises) > width:
                bounds = self._bounds(found.rises, found.costs, block + 1)
                found = found.kept(np.argsort(bounds, kind="stable")[:width])
            lists.append(found)
            if not len(found.rises):
                return
            self._complete(lists, block + 1)

    def _relaxation(self) -> Relaxation:
        rises = np.where(self.available, self.problem.rises, np.inf)
        return Relaxation.of(self.costs[0], folded(rises, self.costs[1:], self.multipliers))

    def _offset(self) -> float:
        return float(np.dot(self.multipliers, self.allowed[1:]))

    def _bounds(self, partials_rises: Floats, costs: Floats, block: int) -> Floats:
        """The least rise [n] of whole choices that begin with partial ones, blocks from ``block`` on being free."""
        own = partials_rises + self.multipliers @ costs[1:]
        return own + self.relaxed.envelopes[block].bound(self.allowed[0] - costs[0]) - self._offset()

    def _extended(self, before: Partials, block: int) -> Partials:
        """The list with one block more."""
        options = np.flatnonzero(self.available[block])
        rises = (before.rises[:, None] + self.problem.rises[block, options][None]).ravel()
        costs = (before.costs[:, :, None] + self.costs[:, block, options][:, None, :]).reshape(len(self.costs), -1)
        places = np.arange(len(rises))
        fits = (costs + self.rest[:, block + 1, None] <= self.allowed[:, None]).all(axis=0)
        places = places[fits]
        bounds = self._bounds(rises[places], costs[:, places], block + 1)
        places = places[bounds < self.best.rise - self.equal]
        found = Partials(
            rises[places], costs[:, places], places // len(options), options[places % len(options)].astype(np.int64)
        )
        return found.kept(undominated(found.rises, found.costs))

    def _complete(self, lists: Sequence[Partials], block: int) -> None:
        """Complete every partial choice at a corner of the relaxation behind it; remember the best that fits."""
        partials, envelope = lists[-1], self.relaxed.envelopes[block]
        corners = envelope.corner(self.allowed[0] - partials.costs[0])
        reached = corners >= 0
        for place in range(1, len(self.costs)):
            sums = self.relaxed.corner_sums(block, self.costs[place])
            reached &= partials.costs[place] + sums[np.maximum(corners, 0)] <= self.allowed[place]
        if not reached.any():
            return
        rises = envelope.rises if len(self.costs) == 1 else self.relaxed.corner_sums(block, self.finite)
        whole = np.where(reached, partials.rises + rises[np.maximum(corners, 0)], np.inf)
        place = int(np.argmin(whole))
        if whole[place] < self.best.rise:
            front = traced(lists, place)
            behind = self.relaxed.corner_choices(block, int(corners[place])).tolist()
            self.best = _Best(float(whole[place]), (*front, *behind))

    def _reduce(self) -> None:
        """Take away options with which no choice can beat the best one, by the relaxation at the best multiplier."""
        if self.best.choices is None or not self.available.any():
            return
        multiplier = -self.relaxed.slope_at(float(self.allowed[0]))
        prices = np.array([multiplier, *self.multipliers])
        reduced = np.where(self.available, self.problem.rises, np.inf) + np.tensordot(prices, self.costs, axes=1)
        lowest = reduced.min(axis=1)
        bounds = lowest.sum() - lowest[:, None] + reduced - float(np.dot(prices, self.allowed))
        self.available &= bounds < self.best.rise - self.equal
        if not self.available.any(axis=1).all():
            self.available[:] = False  # nothing beats the best one

    def _multipliers(self) -> Floats:
        """Multipliers of all budgets but the first at which the relaxation is highest; bounds hold whatever they are.

        The relaxation is concave in the multipliers of all budgets, and the choice of least priced rise gives a
        supergradient, what it takes beyond the budgets: the ellipsoid method (Shor, 1977; Yudin and Nemirovskii, 1976).
        Choices on the way that fit are remembered.
        """
        count = len(self.costs)
        if count == 1:
            return np.zeros(0)
        rises = np.where(self.available, self.problem.rises, np.inf)
        scales = self._scales()
        costs, allowed = self.costs / scales[:, None, None], self.allowed / scales
        blocks = np.arange(self.problem.blocks)
        center, shape = np.ones(count), np.eye(count) * 4 * _WIDEST**2
        best, highest = np.zeros(count), -math.inf
        most = float(self.finite.max(axis=1).sum()) + self.equal
        for _ in range(_CUTS * count * count):
            cut = np.where(center < 0, 1.0, 0.0)
            if not cut.any():
                priced = rises + np.tensordot(center, costs, axes=1)
                chosen = priced.argmin(axis=1)
                value = float(priced[blocks, chosen].sum() - center @ allowed)
                if value > highest:
                    best, highest = center.copy(), value
                if value > most:
                    self.impossible = True  # every choice that fits would rise by more than any choice does
                    break
                cut = costs[:, blocks, chosen].sum(axis=1) - allowed
                self._remember(chosen)
            length = math.sqrt(max(float(cut @ shape @ cut), 0.0))
            if length <= self.equal:
                break
            step = shape @ cut / length
            center = center + step / (count + 1)
            shape = count**2 / (count**2 - 1) * (shape - 2 / (count + 1) * np.outer(step, step))
        return best[1:] / scales[1:]

    def _scales(self) -> Floats:
        """For each budget how much of it a unit of rise is worth, roughly: its costs' span over the rises' span."""
        finite = self.problem.rises[self.available]
        rise = float(finite.max() - finite.min()) or 1.0
        spans = self.costs.max(axis=(1, 2)) - self.costs.min(axis=(1, 2))
        return np.where(spans > 0, spans, 1.0) / rise

    def _remember(self, chosen: Integers) -> None:
        blocks = np.arange(self.problem.blocks)
        rise = float(self.problem.rises[blocks, chosen].sum())
        if rise < self.best.rise and (self.costs[:, blocks, chosen].sum(axis=1) <= self.allowed).all():
            self.best = _Best(rise, tuple(chosen.tolist()))

    def _improve(self) -> None:
        """Exchange the options of single blocks of the best choice while that lowers its rise and fits."""
        if self.best.choices is None:
            return
        blocks, chosen = np.arange(self.problem.blocks), np.array(self.best.choices)
        while True:
            used = self.costs[:, blocks, chosen]
            free = self.allowed - used.sum(axis=1)
            fits = (self.costs - used[:, :, None] <= free[:, None, None]).all(axis=0)
            gains = np.where(fits, self.problem.rises - self.problem.rises[blocks, chosen][:, None], np.inf)
            block, option = np.unravel_index(int(np.argmin(gains)), gains.shape)
            if not gains[block, option] < -self.equal:
                break
            chosen[block] = option
        self._remember(chosen)
