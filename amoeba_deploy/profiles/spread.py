"""Which shapes to measure: a few from which all others can be predicted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from amoeba_deploy.shape import Shape

SPREAD = 12
"""Shapes that are measured where nobody says otherwise."""


def _ends_and_middle(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys((values[0], values[len(values) // 2], values[-1])))


def _axes(shapes: Sequence[Shape]) -> tuple[list[int], list[Shape]]:
    """The depths, and one shape a width, each the largest first."""
    depths = sorted({shape.depth for shape in shapes}, reverse=True)
    widths = {shape.width: shape for shape in shapes}
    return depths, [widths[width] for width in sorted(widths, reverse=True)]


def corner_shapes(shapes: Sequence[Shape]) -> list[Shape]:
    """Largest and smallest depth at the widest and the narrowest width."""
    depths, widths = _axes(shapes)
    wanted = itertools.product((depths[0], depths[-1]), (widths[0], widths[-1]))
    return list(dict.fromkeys(Shape(depth, shape.width, shape.policy) for depth, shape in wanted))


def grid_shapes(shapes: Sequence[Shape]) -> list[Shape]:
    """Largest, middle and smallest depth, each at the widest, middle and narrowest width."""
    depths, widths = _axes(shapes)
    wanted = itertools.product(_ends_and_middle(depths), _ends_and_middle(widths))
    return [Shape(depth, shape.width, shape.policy) for depth, shape in wanted]


def spread_shapes(shapes: Sequence[Shape], count: int = SPREAD) -> list[Shape]:
    """The corners, and further shapes each as far as can be from all before it, over depth and width.

    This is the greedy maximin design (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985): at
    most twice as far from any shape as the best choice of as many. Ties go to the deeper, then the wider shape.
    """
    if len(shapes) <= count:
        return list(shapes)
    depths, widths = _axes(shapes)
    deep, wide = max(depths[0] - depths[-1], 1), max(float(widths[0].width - widths[-1].width), 1e-9)

    def distance(left: Shape, right: Shape) -> float:
        return ((left.depth - right.depth) / deep) ** 2 + (float(left.width - right.width) / wide) ** 2

    chosen = corner_shapes(shapes)[:count]
    ordered = sorted(shapes, key=lambda shape: (-shape.depth, -shape.width))
    nearest = {shape: min(distance(shape, taken) for taken in chosen) for shape in ordered}
    while len(chosen) < count:
        farthest = max(ordered, key=lambda shape: round(nearest[shape], 9))
        chosen.append(farthest)
        nearest = {shape: min(away, distance(shape, farthest)) for shape, away in nearest.items()}
    return chosen
