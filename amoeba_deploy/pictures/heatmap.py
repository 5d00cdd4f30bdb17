"""Heatmaps: a figure over depth and width, each shape a cell that shows by a mark where the figure is from.

A dot stands in what was measured, a cross in what was estimated, nothing in what lies between measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from amoeba_deploy.pictures.section import (
    CROSS,
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
        f"Shapes with a dot were measured, those with a cross estimated, the others interpolated between measurements."
    )
    panels = tuple(_panel(alt, each, title) for each in heatmaps if each.cells)
    return Section(title[0].upper() + title[1:].removesuffix(" (ms)") + ", by depth and width", caption, panels)


def _panel(alt: Any, heatmap: Heatmap, title: str) -> Panel:
    widths = {cell.shape.width for cell in heatmap.cells}
    times = [cell.ms for cell in heatmap.cells]
    rows = [_row(cell) | {"dark": cell.ms > (min(times) + max(times)) / 2} for cell in heatmap.cells]
    tooltip = [
        alt.Tooltip("shape:N", title="shape"),
        alt.Tooltip("value:Q", title="ms", format=".4~g"),
        alt.Tooltip("source:N", title="latency"),
        *([alt.Tooltip("range:N", title="expected (ms)")] if any("range" in row for row in rows) else []),
    ]
    drawn = Cells(rows, tuple(sorted(widths, reverse=True)), title, "~r", NUMBER_WIDTH)
    return panel(series_name(heatmap.flow, heatmap.precision), drawn.chart(alt, tooltip))


@dataclass(frozen=True)
class Cells:
    """What every heatmap draws: rows with ``depth``, ``width``, ``value``, its ``label``, its ``source`` and ``dark``
    where the colour under it is."""

    rows: Sequence[dict[str, Any]]
    widths: Sequence[Fraction]
    """Widest first."""
    title: str
    format: str
    """Of the numbers in the key to the colours."""
    number_width: int
    """Pixels that a cell needs to hold its number."""

    def chart(self, alt: Any, tooltip: Sequence[Any]) -> Any:
        """A chart whose darkest cells have the highest values."""
        depths = sorted({row["depth"] for row in self.rows}, reverse=True)
        widths = list(dict.fromkeys(share(width) for width in self.widths))
        base = alt.Chart(alt.Data(values=list(self.rows))).encode(
            x=alt.X("width:O", title="width kept (share)", sort=widths, axis=alt.Axis(labelAngle=0, grid=False)),
            y=alt.Y("depth:O", title="depth (blocks)", sort=depths, axis=alt.Axis(grid=False)),
            tooltip=list(tooltip),
        )
        colour = alt.Color(
            "value:Q",
            title=self.title,
            scale=alt.Scale(scheme="viridis", reverse=True, zero=False, nice=False),
            legend=alt.Legend(gradientLength=180, gradientThickness=10, tickCount=4, format=self.format),
        )
        on_cell = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#101010"))
        column = f"{PLOT_WIDTH} / {len(widths)}"
        room = f"{column} >= {self.number_width}"
        numbers = base.mark_text(baseline="middle", fontSize=10, opacity=alt.ExprRef(f"{room} ? 1 : 0"))
        marks = [
            base.transform_filter(f"datum.source === '{source}'").mark_point(
                shape=shape,
                filled=True,
                size=size,
                xOffset=alt.ExprRef(f"{room} ? -({column}) / 2 + 6 : 0"),
                yOffset=alt.ExprRef(f"{room} ? {6 - CELL_HEIGHT / 2:g} : 0"),
            )
            for source, shape, size in (("measured", "circle", 14), ("estimated", CROSS, 22))
            if any(row["source"] == source for row in self.rows)
        ]
        return alt.layer(
            base.mark_rect().encode(color=colour),
            numbers.encode(text="label:N", color=on_cell),
            *(mark.encode(color=on_cell) for mark in marks),
        ).properties(height=CELL_HEIGHT * len(depths))


def _row(cell: Cell) -> dict[str, Any]:
    row = {
        "shape": str(cell.shape),
        "depth": cell.shape.depth,
        "width": share(cell.shape.width),
        "value": significant(cell.ms),
        "label": _short(cell.ms),
        "source": cell.source,
    }
    if cell.interval is not None:
        row["range"] = f"{_short(cell.interval[0])} to {_short(cell.interval[1])}"
    return row


def share(width: Fraction) -> str:
    """A width as axes show it: exact names such as 43/86 take too much room."""
    return f"{float(width):.4g}"


def _short(ms: float) -> str:
    """At least two digits, in at most four characters up to ten seconds."""
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.1f}" if ms >= 9.95 else f"{ms:.2f}"
