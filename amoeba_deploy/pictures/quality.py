"""Quality over depth and width: a heatmap of the loss in each precision that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.pictures.heatmap import Cells, share
from amoeba_deploy.pictures.section import Panel, Section, load_altair, panel, significant
from amoeba_deploy.shape import Shape

NUMBER_WIDTH = 38
"""Pixels that a cell needs to hold a loss."""


@dataclass(frozen=True)
class LossCell:
    """One shape's loss, where it is from, and its standard error where it was measured."""

    shape: Shape
    loss: float
    source: str
    error: float | None


def quality_section(precisions: Mapping[str, Sequence[LossCell]]) -> Section:
    """One panel a precision, each with its own scale of colours.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    caption = (
        "The loss in nats a token of each shape; darker is worse. Shapes with a dot were measured, the others are "
        "interpolated between them."
    )
    panels = tuple(_panel(alt, precision, cells) for precision, cells in precisions.items() if cells)
    return Section("Quality, by depth and width", caption, panels)


def _panel(alt: Any, precision: str, cells: Sequence[LossCell]) -> Panel:
    losses = [cell.loss for cell in cells]
    middle = (min(losses) + max(losses)) / 2
    rows = [
        {
            "shape": str(cell.shape),
            "depth": cell.shape.depth,
            "width": share(cell.shape.width),
            "value": significant(cell.loss, 6),
            "label": f"{cell.loss:.3f}",
            "source": cell.source,
            "error": "not known" if cell.error is None else f"{cell.error:.4f}",
            "dark": cell.loss > middle,
        }
        for cell in cells
    ]
    tooltip = [
        alt.Tooltip("shape:N", title="shape"),
        alt.Tooltip("value:Q", title="loss", format=".4f"),
        alt.Tooltip("error:N", title="standard error"),
        alt.Tooltip("source:N", title="quality"),
    ]
    widths = sorted({cell.shape.width for cell in cells}, reverse=True)
    return panel(precision, Cells(rows, widths, "loss (nats a token)", ".4~f", NUMBER_WIDTH).chart(alt, tooltip))
