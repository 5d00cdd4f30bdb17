"""Lower convex hulls of the blocks' options, and what they bound: the linear relaxation of the blocks behind a point.

The linear relaxation of a multiple-choice knapsack is solved by a greedy: each block starts at its cheapest option,
and steps along the lower hulls of (cost, rise) are taken in order of slope, the steepest first (Sinha and Zoltners,
The Multiple-Choice Knapsack Problem, Operations Research 27(3), 1979). The value as a function of the budget is a
convex, piecewise linear function. At its corners no step is taken in part, so they are choices too, each of them the
optimum for the budget that it uses: the solutions of the Lagrangian relaxation over all multipliers (Everett, 1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoeba_deploy.per_block.problem import Floats, Integers


def lower_hull(costs: Floats, rises: Floats) -> Integers:
    """Indices of the corners of the lower convex hull of options [n], in order of cost, from the cheapest option to
    that of the least rise; of equal points the first."""
    order = np.lexsort((rises, costs))
    below = np.minimum.accumulate(rises[order])
    falls = np.flatnonzero(below < np.concatenate([[np.inf], below[:-1]]))
    x, y = costs[order[falls]].tolist(), rises[order[falls]].tolist()
    hull: list[int] = []
    for place in range(len(falls)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # Below the line from a to the new point b is a corner.
            if (y[b] - y[a]) * (x[place] - x[a]) < (y[place] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(place)
    return np.asarray(order[falls[hull]], np.int64)


@dataclass(frozen=True)
class Envelope:
    """The relaxation's value of some blocks: corners at budgets ``costs`` [n], ascending, with ``rises`` [n]."""

    costs: Floats
    rises: Floats

    def bound(self, budget: Floats) -> Floats:
        """The least rise that the blocks can have within budgets [m], relaxed; infinite where they cost more."""
        found = np.interp(budget, self.costs, self.rises)
        return np.where(budget < self.costs[0], np.inf, found)

    def corner(self, budget: Floats) -> Integers:
        """For each budget [m] the last corner within it, -1 where there is none."""
        return np.searchsorted(self.costs, budget, side="right").astype(np.int64) - 1


@dataclass(frozen=True)
class Relaxation:
    """The steps of all blocks in order of slope, and the envelopes of the blocks from each one on.

    ``envelopes[k]`` is of the blocks k, k+1, ... (the last one is of none); its corner j has taken the first j of the
    steps that belong to those blocks. ``steps`` holds of each step its block and the option that it leads to, and
    ``starts`` [blocks] the option where each block begins.
    """

    envelopes: tuple[Envelope, ...]
    steps: tuple[Integers, Integers]
    slopes: Floats
    starts: Integers

    @classmethod
    def of(cls, costs: Floats, rises: Floats) -> Relaxation:
        """From costs and rises [blocks, options]."""
        count = len(rises)
        hulls = [lower_hull(costs[k], rises[k]) for k in range(count)]
        blocks = np.concatenate([np.full(len(hull) - 1, k) for k, hull in enumerate(hulls)]).astype(np.int64)
        ends = np.concatenate([hull[1:] for hull in hulls])
        begins = np.concatenate([hull[:-1] for hull in hulls])
        wide, down = costs[blocks, ends] - costs[blocks, begins], rises[blocks, ends] - rises[blocks, begins]
        # Rounding must not put a block's later step in front of an earlier one.
        slopes = np.concatenate([np.maximum.accumulate(part) for part in _by_block(down / wide, hulls)])
        order = np.lexsort((np.arange(len(slopes)), blocks, slopes))
        blocks, ends, slopes = blocks[order], ends[order], slopes[order]
        wide, down = wide[order], down[order]
        starts = np.array([hull[0] for hull in hulls], np.int64)
        first = np.arange(count)
        cheapest, highest = costs[first, starts], rises[first, starts]
        envelopes = []
        for k in range(count + 1):
            own = blocks >= k
            envelopes.append(
                Envelope(
                    np.concatenate([[0.0], np.cumsum(wide[own])]) + cheapest[k:].sum(),
                    np.concatenate([[0.0], np.cumsum(down[own])]) + highest[k:].sum(),
                )
            )
        return cls(tuple(envelopes), (blocks, ends), slopes, starts)

    def corner_choices(self, block: int, corner: int) -> Integers:
        """The options of the blocks from ``block`` on at a corner of their envelope."""
        found = self.starts.copy()
        blocks, ends = self.steps
        own = np.flatnonzero(blocks >= block)[:corner]
        found[blocks[own]] = ends[own]  # a block's steps ascend, so the last one stays
        return found[block:]

    def corner_sums(self, block: int, values: Floats) -> Floats:
        """At each corner of the envelope from ``block`` on the sum of another value [blocks, options] of its choice."""
        blocks, ends = self.steps
        before = np.empty(len(ends), np.int64)
        at = self.starts.copy()
        for place, (index, end) in enumerate(zip(blocks.tolist(), ends.tolist(), strict=True)):
            before[place], at[index] = at[index], end
        change = values[blocks, ends] - values[blocks, before]
        own = blocks >= block
        start = float(values[np.arange(block, len(values)), self.starts[block:]].sum())
        found: Floats = np.concatenate([[0.0], np.cumsum(change[own])]) + start
        return found

    def slope_at(self, budget: float) -> float:
        """The envelope's slope at a budget: minus the best Lagrangian multiplier; 0 beyond its last corner."""
        place = int(np.searchsorted(self.envelopes[0].costs, budget, side="right")) - 1
        return float(self.slopes[place]) if 0 <= place < len(self.slopes) else 0.0


def _by_block(values: Floats, hulls: Sequence[Integers]) -> list[Floats]:
    return np.split(values, np.cumsum([len(hull) - 1 for hull in hulls])[:-1])


def folded(rises: Floats, costs: Floats, multipliers: Floats) -> Floats:
    """Rises to which other ``costs`` [budgets, blocks, options] were added, each times its multiplier [budgets]: a
    Lagrangian relaxation of their budgets."""
    return rises + np.tensordot(multipliers, costs, axes=1) if len(multipliers) else rises
