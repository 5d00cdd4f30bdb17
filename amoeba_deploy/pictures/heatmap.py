"""Heatmaps: latency over depth and width, each shape a cell, with a dot in those that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from amoeba_deploy.pictures.section import (
    METRIC_TITLES,
    PLOT_WIDTH,
    Panel,
    Section,
    interval_of,
    load_altair,
    panel,
    series_name,
    significant,
)
from amoeba_deploy.profiles.prediction import Interval, Metric, Prediction, Source
from amoeba_deploy.shape import Shape

Predict = Callable[[Shape], Prediction]
"""Gives a shape its latency."""
_Number = TypeVar("_Number", int, Fraction)

MOST_COLUMNS = 24
MOST_ROWS = 32
CELL_HEIGHT = 24
NUMBER_WIDTH = 34
"""Pixels that a cell needs to hold its number."""


@dataclass(frozen=True)
class Cell:
    """One shape's latency in milliseconds, and where it is from."""

    shape: Shape
    ms: float
    source: Source
    interval: Interval | None = None


@dataclass(frozen=True)
class Heatmap:
    """All cells of one flow and precision."""

    flow: str
    precision: str
    cells: tuple[Cell, ...]


def heatmap_of(
    flow: str, precision: str, metric: Metric, tokens: int, shapes: Sequence[Shape], predict: Predict
) -> Heatmap:
    """The heatmap of some shapes; of more depths or widths than fit, all measured ones and others evenly between."""
    found = {shape: predict(shape) for shape in dict.fromkeys(shapes)}
    measured = [shape for shape, prediction in found.items() if prediction.source == "measured"]
    depths = _some({s.depth for s in found}, {s.depth for s in measured}, MOST_ROWS)
    widths = _some({s.width for s in found}, {s.width for s in measured}, MOST_COLUMNS)
    cells = []
    for shape, prediction in found.items():
        if shape.depth in depths and shape.width in widths:
            interval = interval_of(prediction, metric, tokens)
            cells.append(Cell(shape, prediction.value(metric, tokens), prediction.source, interval))
    return Heatmap(flow, precision, tuple(cells))


def _some(values: Iterable[_Number], always: set[_Number], most: int) -> set[_Number]:
    """At most ``most`` of the values, evenly spread, and those that are always among them."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return set(ordered)
    step = (len(ordered) - 1) / (most - 1)
    return always | {ordered[round(number * step)] for number in range(most)}


def heatmap_section(metric: Metric, heatmaps: Sequence[Heatmap]) -> Section:
    """One panel a flow and precision, each with its own scale of colours.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    title = METRIC_TITLES[metric]
    caption = (
        f"The {title.removesuffix(' (ms)')} in milliseconds of each shape; darker is slower. "
        f"Shapes with a dot were measured, the others are interpolated or estimated."
    )
    panels = tuple(_panel(alt, each, title) for each in heatmaps if each.cells)
    return Section(title[0].upper() + title[1:].removesuffix(" (ms)") + ", by depth and width", caption, panels)


def _panel(alt: Any, heatmap: Heatmap, title: str) -> Panel:
    depths = sorted({cell.shape.depth for cell in heatmap.cells}, reverse=True)
    widths = [_share(width) for width in sorted({cell.shape.width for cell in heatmap.cells}, reverse=True)]
    times = [cell.ms for cell in heatmap.cells]
    rows = [_row(cell) | {"dark": cell.ms > (min(times) + max(times)) / 2} for cell in heatmap.cells]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("width:O", title="width kept (share)", sort=widths, axis=alt.Axis(labelAngle=0, grid=False)),
        y=alt.Y("depth:O", title="depth (blocks)", sort=depths, axis=alt.Axis(grid=False)),
        tooltip=[
            alt.Tooltip("shape:N", title="shape"),
            alt.Tooltip("ms:Q", title="ms", format=".4~g"),
            alt.Tooltip("source:N", title="latency"),
            *([alt.Tooltip("range:N", title="expected (ms)")] if any("range" in row for row in rows) else []),
        ],
    )
    colour = alt.Color(
        "ms:Q",
        title=title,
        scale=alt.Scale(scheme="viridis", reverse=True, zero=False, nice=False),
        legend=alt.Legend(gradientLength=180, gradientThickness=10, tickCount=4, format="~r"),
    )
    on_cell = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#101010"))
    room = f"{PLOT_WIDTH} / {len(widths)} >= {NUMBER_WIDTH}"
    numbers = base.mark_text(baseline="middle", fontSize=10, opacity=alt.ExprRef(f"{room} ? 1 : 0"))
    dots = base.transform_filter("datum.source === 'measured'").mark_point(
        shape="circle",
        filled=True,
        size=14,
        xOffset=alt.ExprRef(f"{room} ? -({PLOT_WIDTH} / {len(widths)}) / 2 + 6 : 0"),
        yOffset=alt.ExprRef(f"{room} ? {6 - CELL_HEIGHT / 2:g} : 0"),
    )
    chart = alt.layer(
        base.mark_rect().encode(color=colour),
        numbers.encode(text="label:N", color=on_cell),
        dots.encode(color=on_cell),
    ).properties(height=CELL_HEIGHT * len(depths))
    return panel(series_name(heatmap.flow, heatmap.precision), chart)


def _row(cell: Cell) -> dict[str, Any]:
    row = {
        "shape": str(cell.shape),
        "depth": cell.shape.depth,
        "width": _share(cell.shape.width),
        "ms": significant(cell.ms),
        "label": _short(cell.ms),
        "source": cell.source,
    }
    if cell.interval is not None:
        row["range"] = f"{_short(cell.interval[0])} to {_short(cell.interval[1])}"
    return row


def _share(width: Fraction) -> str:
    """A width as axes show it: exact names such as 43/86 take too much room."""
    return f"{float(width):.4g}"


def _short(ms: float) -> str:
    """At least two digits, in at most four characters up to ten seconds."""
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.1f}" if ms >= 9.95 else f"{ms:.2f}"
