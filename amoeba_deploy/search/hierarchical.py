"""Hierarchical search: a coarse grid over depth and width, then finer ones around the best under the budget.

It is the search of AmoebaLLM's paper (arXiv 2411.10606), for devices where every latency must first be measured: some
tens of shapes are asked for instead of all. Each level is chosen by what all levels before have told: shapes that
nobody asked for are judged by the latencies interpolated between those that were.

What can be ruled out is not asked for: a shape of no better quality than the best one known, and one that keeps at
least as much in depth and width as a shape that was too slow or too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.search.budget import Budget
from amoeba_deploy.search.candidate import Candidate
from amoeba_deploy.search.choice import preference
from amoeba_deploy.shape import Shape

Place = tuple[int, int]
"""Positions of a shape's depth and width among all depths and widths, largest first."""
Judge = Callable[[Sequence[Shape]], Sequence[Candidate]]
"""Finds out the latencies of some shapes, and gives all shapes of the search as far as they are known then."""


@dataclass(frozen=True)
class Level:
    """How many shapes a level asked for, and the best that fits of all that were asked for until then."""

    asked: int
    best: Candidate | None

    def to_json(self) -> dict[str, Any]:
        """One entry of ``levels`` in the JSON output."""
        return {"asked": self.asked, "best": None if self.best is None else self.best.to_json()}


@dataclass(frozen=True)
class Descent:
    """What a hierarchical search asked for, level by level."""

    asked: tuple[Candidate, ...]
    levels: tuple[Level, ...]
    gap: float
    """By how much a shape that was not asked for could be better, where latency and size never fall as shapes grow; in
    the unit of quality. 0: none can."""


def hierarchical(
    shapes: Sequence[Shape],
    judge: Judge,
    budget: Budget,
    workload: Workload,
    say: Callable[[Level], None] = lambda _: None,
) -> Descent:
    """Ask for few of some shapes and come close to the best of all.

    Args:
        shapes: all there are, in one flow, precision and policy.
        judge: asked for a level's shapes at a time.
        budget: what the best must stay within.
        workload: what latencies are stated for.
        say: told of each level.
    """
    lattice = _Lattice.of(shapes)
    step = lattice.coarse_step
    asked: dict[Place, None] = {}
    levels: list[Level] = []
    wanted = lattice.coarse()
    while True:
        before = len(asked)
        asked.update(dict.fromkeys(wanted))
        known = lattice.placed(judge([lattice.shapes[place] for place in wanted]))
        best = _best((known[place] for place in asked), budget, workload.tokens)
        levels.append(Level(len(asked) - before, best))
        say(levels[-1])
        open_places = _open(known, asked, best, budget, workload.tokens)
        centres = [place for place in (_nearest(known, budget, workload.tokens), lattice.place(best)) if place]
        wanted, step = lattice.next(centres, step, open_places)
        if not wanted:
            break
    lowest = min((known[place].badness for place in open_places), default=None)
    gap = 0.0 if best is None or lowest is None else max(best.badness - lowest, 0.0)
    return Descent(tuple(known[place] for place in asked), tuple(levels), gap)


@dataclass(frozen=True)
class _Lattice:
    """All shapes by their place; where engines refuse some, places are missing."""

    shapes: dict[Place, Shape]
    places: dict[tuple[int, Any], Place]
    depths: int
    widths: int

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> _Lattice:
        depths = sorted({shape.depth for shape in shapes}, reverse=True)
        widths = sorted({shape.width for shape in shapes}, reverse=True)
        row, column = {d: i for i, d in enumerate(depths)}, {w: j for j, w in enumerate(widths)}
        places = {(shape.depth, shape.width): (row[shape.depth], column[shape.width]) for shape in shapes}
        return cls({places[s.depth, s.width]: s for s in shapes}, places, len(depths), len(widths))

    @property
    def coarse_step(self) -> Place:
        """Half the distance between places of the coarse grid."""
        return max((self.depths - 1 + 3) // 4, 1), max((self.widths - 1 + 3) // 4, 1)

    def coarse(self) -> list[Place]:
        """Both ends and the middle of depth and width."""
        rows, columns = ({0, count // 2, count - 1} for count in (self.depths, self.widths))
        found = [(i, j) for i in sorted(rows) for j in sorted(columns) if (i, j) in self.shapes]
        return found or list(self.shapes)[:1]

    def placed(self, found: Sequence[Candidate]) -> dict[Place, Candidate]:
        """Candidates by their places."""
        return {self.places[c.shape.depth, c.shape.width]: c for c in found}

    def place(self, candidate: Candidate | None) -> Place | None:
        """Where a candidate's shape stands."""
        return None if candidate is None else self.places[candidate.shape.depth, candidate.shape.width]

    def next(self, centres: Sequence[Place], step: Place, open_places: set[Place]) -> tuple[list[Place], Place]:
        """The next level's places: around the centres, at a finer step than before; none where the finest has none."""
        while True:
            finest = step == (1, 1)
            around = {
                (i + di * step[0], j + dj * step[1]) for i, j in centres for di in (-1, 0, 1) for dj in (-1, 0, 1)
            }
            wanted = sorted(around & open_places)
            step = max(step[0] // 2, 1), max(step[1] // 2, 1)
            if wanted or finest:
                return wanted, step


def _best(found: Iterable[Candidate], budget: Budget, tokens: int) -> Candidate | None:
    fitting = (candidate for candidate in found if not budget.exceeded(candidate, tokens))
    return min(fitting, key=lambda candidate: preference(candidate, budget, tokens), default=None)


def _nearest(known: dict[Place, Candidate], budget: Budget, tokens: int) -> Place:
    """Where the best stands by what is known or predicted; the one that exceeds the budget least where none fits."""

    def order(place: Place) -> tuple[float, tuple[float, float, float, int]]:
        candidate = known[place]
        return max(budget.worst(candidate, tokens)[0], 1.0), preference(candidate, budget, tokens)

    return min(known, key=order)


def _open(
    known: dict[Place, Candidate], asked: Iterable[Place], best: Candidate | None, budget: Budget, tokens: int
) -> set[Place]:
    """The places that were not asked for and could hold a better shape than the best one known."""
    tried = set(asked)
    too_large = {
        place
        for place in tried
        if any(limit.quantity.name != "loss" and limit.factor(known[place], tokens) > 1 for limit in budget.limits)
    }
    border = [(i, j) for i, j in too_large if not any((a >= i and b >= j) and (a, b) != (i, j) for a, b in too_large)]
    return {
        (i, j)
        for (i, j), candidate in known.items()
        if (i, j) not in tried
        and (best is None or candidate.badness < best.badness)
        and not any(i <= a and j <= b for a, b in border)
    }
