"""Quality over shapes in every precision that was measured: what was measured, with its error, and what is between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.quality import INTERPOLATED, MEASURED, Quality, QualityRow
from amoeba_deploy.shape import Shape


@dataclass(frozen=True)
class ShapeQuality:
    """One shape in one precision; an error and an accuracy only where they were measured."""

    shape: Shape
    loss: float
    source: str
    error: float | None = None
    accuracy: float | None = None
    accuracy_error: float | None = None
    questions: int = 0


def qualities_of(checkpoint: Checkpoint, quality: Quality) -> dict[str, list[ShapeQuality]]:
    """By precision every shape of a checkpoint, deepest and widest first.

    A subnet that several widths name goes by the name that searches give it.
    """
    return {precision: list(_of_precision(checkpoint, quality, precision)) for precision in quality.precisions}


def _of_precision(checkpoint: Checkpoint, quality: Quality, precision: str) -> Iterator[ShapeQuality]:
    shapes = {_identity(checkpoint, shape): shape for shape in checkpoint.shapes()}
    measured: dict[Shape, QualityRow] = {}
    for row in quality.rows:
        if row.precision == precision:
            measured[shapes.get(_identity(checkpoint, row.shape), row.shape)] = row
    between = [s for s in shapes.values() if s not in measured and quality.covers(s, precision)]
    for shape in sorted((*measured, *between), key=lambda s: (-s.depth, -s.width)):
        row_of = measured.get(shape)
        if row_of is None:
            yield ShapeQuality(shape, quality.loss(shape, precision).value, INTERPOLATED)
        else:
            accuracy = row_of.accuracy, row_of.accuracy_error, row_of.questions
            yield ShapeQuality(shape, row_of.loss, MEASURED, row_of.loss_error, *accuracy)


def _identity(checkpoint: Checkpoint, shape: Shape) -> object:
    """What the shapes of one subnet share."""
    return checkpoint.sized(shape) if shape.policy == "uniform" else shape
