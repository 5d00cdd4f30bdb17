"""Which blocks to keep at every depth, by dynamic programming over single blocks (AmoebaLLM, section 3.2).

Cell (n, m) holds the best choice that removes m units among the n *last* candidates, all earlier ones kept:

    cell(n, m) = the better of   cell(n-1, m)                       the n-th candidate stays
                                 cell(n-1, m-1) plus the n-th one   measured by running the shrunken model

A tie keeps the first. The last units are never candidates (``keep_last``). Only the second option is measured, all
cells of one column n together: in them everything before the n-th candidate is the untouched model. What a new set has
to beat is known before it is measured.

With a beam of K a cell holds its K best sets instead of one, and each of them is extended; K = 1 is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.stage1.blocks import Units
from amoeba_deploy.stage1.removal import Removed, Remover, Trial, describe, total

Ranked = list[tuple[Removed, float]]
"""The best sets of a cell, best first, each with its metric's sum over the calibration data (lower is better)."""


@dataclass
class Column:
    """All cells of one column: ``cells[m]`` is the best that removes m of the last ``candidates`` candidates."""

    candidates: int = 0
    cells: list[Ranked] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The column as JSON values; ``from_json`` reads it back exactly."""
        return {"candidates": self.candidates, "cells": [[[list(r), c] for r, c in cell] for cell in self.cells]}

    def fits(self, candidates: int, removals: int, beam: int) -> bool:
        """Whether this can be a column of a table with so many candidates: sets of the right sizes, finite sums."""
        n = self.candidates
        if not 1 <= n <= candidates or len(self.cells) != min(n, removals) + 1:
            return False
        own = range(candidates - n, candidates)
        return all(
            1 <= len(cell) <= beam
            and all(
                len(removed) == m and list(removed) == sorted(set(removed) & set(own)) and math.isfinite(cost)
                for removed, cost in cell
            )
            for m, cell in enumerate(self.cells)
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Column:
        """A column from what ``to_json`` gave; raises KeyError, TypeError or ValueError where it is none."""
        cells = [[(tuple(int(u) for u in removed), float(cost)) for removed, cost in cell] for cell in value["cells"]]
        return cls(int(value["candidates"]), cells)


def removals_of_column(n: int, removals: int) -> range:
    """The numbers of removed units whose cells in column n are measured."""
    return range(1, min(n, removals) + 1)


def naive_evaluations(units: int, removals: int, keep_last: int) -> int:
    """Unit evaluations of the plain recurrence: every cell runs the whole shrunken model of units - m units."""
    return sum(units - m for n in range(1, units - keep_last + 1) for m in removals_of_column(n, removals))


def prefix_evaluations(units: int, removals: int, keep_last: int) -> int:
    """Unit evaluations when each cell starts from the untouched model's states in front of its candidate."""
    return sum(n + keep_last - m for n in range(1, units - keep_last + 1) for m in removals_of_column(n, removals))


def check_finite(removed: Removed, cost: float, units: Units) -> None:
    """Raise BadInput, naming the removed units, where a metric is not a finite number."""
    if not math.isfinite(cost):
        without = f"the model without {describe(removed, units)}" if removed else "the full model"
        raise BadInput(f"{without} gives logits that are not finite on the calibration data; its weights are damaged")


def next_column(remover: Remover, column: Column, removals: int, keep_last: int, beam: int, units: Units) -> Column:
    """The column with one candidate more.

    Raises:
        BadInput: a set of blocks gives logits that are not finite.
    """
    n = column.candidates + 1
    boundary = remover.units - keep_last - n
    kept: list[Ranked] = [column.cells[m] if m < len(column.cells) else [] for m in range(min(n, removals) + 1)]
    trials: list[Trial] = []
    owners: list[int] = []
    for m in removals_of_column(n, removals):
        limit = kept[m][-1][1] if len(kept[m]) == beam else math.inf
        for removed, _ in column.cells[m - 1]:
            trials.append(Trial((boundary, *removed), limit))
            owners.append(m)
    cells = [list(cell) for cell in kept]
    for m, trial, costs in zip(owners, trials, remover.costs(boundary, trials), strict=True):
        cost = total(costs)
        check_finite(trial.removed, cost, units)
        if cost < trial.limit:
            cells[m].append((trial.removed, cost))
    # Sorting is stable and those without the new candidate come first, so that a tie keeps the candidate.
    return Column(n, [sorted(cell, key=lambda entry: entry[1])[:beam] for cell in cells])


def choose(
    remover: Remover,
    removals: int,
    keep_last: int,
    full_cost: float,
    *,
    units: Units = "block",
    beam: int = 1,
    start: Column | None = None,
    done: Callable[[Column], None] = lambda _: None,
) -> list[tuple[Removed, float]]:
    """For m = 0 .. removals the units to remove, and the metric's sum without them.

    Args:
        remover: measures sets of removed units.
        removals: the most units to remove.
        keep_last: units at the end that are never removed.
        full_cost: the metric's sum of the whole model.
        units: what a unit is.
        beam: sets kept a cell.
        start: a column to go on from, where an earlier run was interrupted.
        done: told of every finished column.

    Raises:
        BadInput: more units are to be removed than there are candidates, or logits are not finite.
    """
    candidates = remover.units - keep_last
    if not 0 <= removals <= candidates or keep_last < 0:
        raise BadInput(
            f"{removals} of {remover.units} cannot be removed while the last {keep_last} are kept; raise --min-depth"
        )
    column = start or Column(0, [[((), full_cost)]])
    while column.candidates < candidates:
        column = next_column(remover, column, removals, keep_last, beam, units)
        done(column)
    return [column.cells[m][0] for m in range(removals + 1)]
