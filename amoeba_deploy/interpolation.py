"""Interpolation over shapes: linear along width, then linear along depth, clamped outside what was measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

Point = tuple[float, float]


def along(points: Sequence[Point], x: float) -> float:
    """The value at ``x`` on the line through points (x, y) sorted by x; the nearest end's value outside."""
    position = bisect_left(points, (x,))
    if position == 0:
        return points[0][1]
    if position == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[position - 1], points[position]
    return low + (high - low) * (x - left) / (right - left)


def over_shapes(rows: Mapping[int, Sequence[Point]], depth: int, width: float) -> float:
    """The value at a depth and width, from the points (width, value), sorted by width, of each measured depth."""
    columns = [(float(measured), along(points, width)) for measured, points in sorted(rows.items())]
    return along(columns, float(depth))
