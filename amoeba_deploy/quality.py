"""How good every shape is: ``quality.json``, measured for a grid of shapes and interpolated between them.

What was measured stays as it is; what is interpolated never gets better where something is removed. Beside the means
``quality.safetensors`` holds the loss of every row of text and whether every question was answered right, so that two
shapes can be compared in pairs (``comparison.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json, write_json
from amoeba_deploy.interpolation import over_shapes
from amoeba_deploy.monotone import HeldOut, Measured, Rows, covers, held_out, levelled, rows_of
from amoeba_deploy.plan import Steps, sized, subnet_widths
from amoeba_deploy.quality_pairs import read_pairs, write_pairs
from amoeba_deploy.shape import Policy, Shape, parse_width

QUALITY_FORMAT = "amoeba.quality/1"
WIDTHS = tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4))
"""Widths of the grid on which quality is measured."""
STEPPED_GROUPS = 8
REFERENCE_PRECISION = "fp32"
MEASURED, INTERPOLATED = "measured", "interpolated"
UNMEASURED_PRECISION = "fp32 (this precision not measured)"


@dataclass(frozen=True)
class QualityRow:
    """What was measured of one shape in one precision: loss and accuracy with standard errors, over n questions.

    ``losses`` [rows of text] and ``right`` [questions] are what the means are of, where that was kept.
    """

    shape: Shape
    precision: str
    loss: float
    loss_error: float
    accuracy: float | None
    questions: int
    losses: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    right: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    @property
    def accuracy_error(self) -> float | None:
        """Standard error of the accuracy over questions."""
        if self.accuracy is None or self.questions < 2:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (self.questions - 1))


@dataclass(frozen=True)
class QualityValue:
    """The loss of a shape, and whether it was measured, interpolated, or belongs to another precision."""

    metric: Literal["loss", "parameters_kept"]
    value: float
    source: str
    losses: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """Of a measured loss, that of every row of the text, where that is known."""


@dataclass(frozen=True)
class Quality:
    """All measured rows of a checkpoint, and the text that they were measured on."""

    architecture: Architecture
    multiple: int
    bias: bool
    text: dict[str, Any]
    rows: tuple[QualityRow, ...]

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that were measured."""
        return tuple(dict.fromkeys(row.precision for row in self.rows))

    @cached_property
    def minimum_width(self) -> Fraction:
        """The narrowest width that was measured; narrower shapes would only be guesses."""
        return min(row.shape.width for row in self.rows)

    @cached_property
    def minimum_depth(self) -> int:
        """The smallest depth that was measured."""
        return min(row.shape.depth for row in self.rows)

    @cached_property
    def _losses(self) -> dict[str, Measured]:
        found: dict[str, dict[tuple[int, float], float]] = {}
        for row in self.rows:
            found.setdefault(row.precision, {})[row.shape.depth, float(row.shape.width)] = row.loss
        return dict(found)

    @cached_property
    def _surfaces(self) -> dict[str, Rows]:
        """Of each precision the levelled rows that losses are interpolated from."""
        return {precision: rows_of(levelled(losses)) for precision, losses in self._losses.items()}

    def _known(self, precision: str) -> str:
        """The precision whose rows stand for one."""
        return precision if precision in self._losses else REFERENCE_PRECISION

    def held_out(self, precision: str) -> HeldOut | None:
        """How far an interpolated loss is off in a precision; None where too few rows were measured to tell."""
        return held_out(self._losses[self._known(precision)])

    def covers(self, shape: Shape, precision: str) -> bool:
        """Whether a shape lies between measured rows; the loss of another is that of the nearest of them."""
        return covers(self._surfaces[self._known(precision)], shape.depth, float(shape.width))

    def _subnet(self, shape: Shape) -> Architecture | Shape:
        """What a shape is measured as: under the uniform policy its sizes, which several widths share."""
        return (
            shape
            if shape.policy == "adaptive"
            else sized(self.architecture, shape, Steps.of(self.architecture, self.multiple))
        )

    @cached_property
    def _measured(self) -> dict[tuple[str, Architecture | Shape], QualityRow]:
        return {(row.precision, self._subnet(row.shape)): row for row in self.rows}

    def _row_of(self, subnet: Architecture | None, precision: str) -> QualityRow | None:
        """The measurement of a subnet of exactly some sizes."""
        for (measured_in, own), row in self._measured.items():
            if measured_in == precision and isinstance(own, Architecture) and _sizes(own) == _sizes(subnet):
                return row
        return None

    def loss(self, shape: Shape, precision: str, subnet: Architecture | None = None) -> QualityValue:
        """The loss of a shape in a precision, and where the figure is from.

        Widths that keep the same numbers of heads and neurons are the same subnet and share its measurement.
        ``subnet``: the sizes that the shape has for an engine with steps of its own; where nobody measured those, the
        figure is that of the width that keeps as many parameters.
        """
        used = self._known(precision)
        own = self._subnet(shape)
        other = subnet is not None and isinstance(own, Architecture) and _sizes(subnet) != _sizes(own)
        row = self._measured.get((used, own)) if not other else self._row_of(subnet, used)
        width = float(shape.width) if not other else _width_of(subnet, self.architecture)
        value = row.loss if row else over_shapes(self._surfaces[used], shape.depth, width)
        source = UNMEASURED_PRECISION if used != precision else MEASURED if row else INTERPOLATED
        return QualityValue("loss", value, source, row.losses if row else None)


def _sizes(subnet: Architecture | None) -> tuple[int, int, int] | None:
    """What a uniform shape decides: blocks, key/value heads and neurons."""
    return None if subnet is None else (subnet.depth, subnet.kv_heads, subnet.neurons)


def _width_of(subnet: Architecture | None, full: Architecture) -> float:
    """The share of a block's matrices that a subnet keeps: the width at which each of them is cut alike."""
    assert subnet is not None
    return subnet.block_matrix_parameters / full.block_matrix_parameters


def grid(
    architecture: Architecture,
    minimum_depth: int,
    widths: Sequence[Fraction],
    multiple: int,
    policy: Policy = "uniform",
) -> list[Shape]:
    """The shapes whose quality is measured: every depth at each of the widths, and at both sides of each head step.

    Neurons go a few at a time and quality changes smoothly with them. A key/value group is a large part of a block
    where there are few, so quality jumps where one more is removed, and a line across that jump would be far off:
    with at most ``STEPPED_GROUPS`` groups the widest and the narrowest width of every number of groups are added.
    """
    depths = range(architecture.depth, minimum_depth - 1, -1)
    if policy == "adaptive":
        return [Shape(depth, width, policy) for depth in depths for width in sorted(widths, reverse=True)]
    steps = Steps.of(architecture, multiple)
    chosen = list(widths)
    if architecture.kv_heads <= STEPPED_GROUPS:
        by_groups: dict[int, list[Fraction]] = {}
        for width in subnet_widths(architecture, min(widths), steps):
            by_groups.setdefault(sized(architecture, Shape(1, width), steps).kv_heads, []).append(width)
        chosen += [width for legal in by_groups.values() for width in (legal[0], legal[-1])]
    distinct: dict[Architecture, Fraction] = {}
    for width in chosen:
        distinct.setdefault(sized(architecture, Shape(1, width), steps), width)
    ordered = sorted(distinct.values(), reverse=True)
    return [Shape(depth, width) for depth in depths for width in ordered]


def write_quality(folder: Path, quality: Quality) -> None:
    """Write ``quality.json``, and ``quality.safetensors`` where rows and questions are known one by one."""
    rows = [
        {
            **row.shape.to_json(),
            "multiple": quality.multiple,
            "bias": "on" if quality.bias else "off",
            "precision": row.precision,
            "loss": round(row.loss, 6),
            "loss_se": round(row.loss_error, 6),
            "accuracy": row.accuracy,
            "accuracy_se": None if row.accuracy_error is None else round(row.accuracy_error, 6),
            "n": row.questions,
        }
        for row in quality.rows
    ]
    head = {"format": QUALITY_FORMAT, "metric": "loss", "direction": "min", "text": quality.text}
    write_json(folder / "quality.json", head | {"rows": rows})
    write_pairs(folder, [row.losses for row in quality.rows], [row.right for row in quality.rows])


def read_quality(
    folder: Path, architecture: Architecture, multiple: int, policy: Policy = "uniform", bias: bool = False
) -> Quality | None:
    """The quality that a checkpoint folder holds, or None where none was measured; raises BadInput where damaged.

    Every row must be of the checkpoint's own multiple, policy and choice of compensating biases.
    """
    file = folder / "quality.json"
    if not file.exists():
        return None
    value = read_json(file, QUALITY_FORMAT)
    own = policy, "on" if bias else "off", multiple
    try:
        rows = tuple(
            QualityRow(
                Shape(row["depth"], parse_width(str(row["width"])), row["policy"]),
                str(row["precision"]),
                float(row["loss"]),
                float(row["loss_se"]),
                row["accuracy"],
                int(row["n"]),
            )
            for row in value["rows"]
        )
        text = dict(value["text"])
        settings = {(row["policy"], row["bias"], row["multiple"]) for row in value["rows"]}
        if (value["metric"], value["direction"]) != ("loss", "min") or settings - {own}:
            raise ValueError
        if not all(type(row.shape.depth) is int and row.shape.depth <= architecture.depth for row in rows):
            raise ValueError
        if not all(math.isfinite(row.loss) and math.isfinite(row.loss_error) for row in rows):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, BadInput):
        raise BadInput(
            f"{file}: a row lacks an entry or holds a value that does not fit this checkpoint; measure again"
        ) from None
    if not any(row.precision == REFERENCE_PRECISION for row in rows):
        raise BadInput(f"{file}: has no row in {REFERENCE_PRECISION}; measure quality again")
    losses, right = read_pairs(folder, [row.loss for row in rows], [row.questions for row in rows])
    found = zip(rows, losses, right, strict=True)
    rows = tuple(replace(row, losses=own, right=answered) for row, own, answered in found)
    return Quality(architecture, multiple, bias, text, rows)
