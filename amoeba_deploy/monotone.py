"""A figure over shapes that must not fall where something is removed: what noise there is, is levelled out.

Loss is measured with noise, and now and then a smaller subnet comes out better than a larger one. Interpolation from
such rows would let a search prefer shapes that only look better, so the rows that contradict each other are first
replaced by the monotone values nearest to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from amoeba_deploy.interpolation import Point, over_shapes

Measured = Mapping[tuple[int, float], float]
"""Values by depth and width."""
Rows = dict[int, list[Point]]
"""Of each depth the points (width, value), sorted by width: what ``over_shapes`` reads."""


@dataclass(frozen=True)
class HeldOut:
    """How far interpolation is off at rows that it was not given: the median and the largest absolute error."""

    median: float
    worst: float
    rows: int
    """How many were held out, each in turn."""

    def to_json(self) -> dict[str, float]:
        """The entry ``held_out``."""
        return {"median": round(self.median, 6), "worst": round(self.worst, 6)}


def levelled(values: Measured) -> dict[tuple[int, float], float]:
    """The nearest values that do not fall as depth or width shrinks, by the largest change that any of them needs.

    Isotonic regression under the uniform norm: each value becomes the mean of the largest among those of shapes that
    keep at least as much in both, and the smallest among those that keep at most as much (Stout, Strict L-infinity
    Isotonic Regression, 2012, section 2, "Basic"). One pass is exact, any set of shapes will do, and a value that
    contradicts no other stays as it is.
    """
    shapes = list(values)
    depths, widths = (np.array(axis, dtype=np.float64) for axis in zip(*shapes, strict=True))
    found = np.array([values[shape] for shape in shapes])
    larger = (depths[None, :] >= depths[:, None]) & (widths[None, :] >= widths[:, None])
    least = np.where(larger, found[None, :], -np.inf).max(axis=1)
    most = np.where(larger.T, found[None, :], np.inf).min(axis=1)
    # A value between its neighbours is both ends itself: their mean must not round it.
    means = np.where(least == most, found, (least + most) / 2)
    return dict(zip(shapes, means.tolist(), strict=True))


def rows_of(values: Measured) -> Rows:
    """Values in the form that ``over_shapes`` reads."""
    rows: Rows = {}
    for (depth, width), value in sorted(values.items()):
        rows.setdefault(depth, []).append((width, value))
    return rows


def held_out(values: Measured) -> HeldOut | None:
    """The error of levelled interpolation at each row, from all the others; None where no row can be held out.

    Rows at the ends of their depth's widths are not: a search interpolates nothing there.
    """
    errors = []
    for depth, points in rows_of(values).items():
        for width, value in points[1:-1]:
            others = {shape: other for shape, other in values.items() if shape != (depth, width)}
            errors.append(abs(over_shapes(rows_of(levelled(others)), depth, width) - value))
    return HeldOut(median(errors), max(errors), len(errors)) if errors else None


def covers(rows: Mapping[int, Sequence[Point]], depth: int, width: float) -> bool:
    """Whether a shape lies between rows, so that interpolation need not clamp it to the nearest."""
    widths = [point for points in rows.values() for point, _ in points]
    return min(rows) <= depth <= max(rows) and min(widths) <= width <= max(widths)
