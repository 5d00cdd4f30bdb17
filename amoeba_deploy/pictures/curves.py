"""Curves: how latency falls as blocks are removed, and as all blocks are made narrower, relative to the whole model.

AmoebaLLM's Figure 1 (Fu et al., NeurIPS 2024) is why: the two fall differently on each device and in each engine, so
the best balance of depth and width does too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amoeba_deploy.pictures.heatmap import Predict
from amoeba_deploy.pictures.section import (
    METRIC_TITLES,
    REFERENCE,
    Panel,
    Section,
    load_altair,
    panel,
    series_colour,
    series_name,
    significant,
    source_shape,
)
from amoeba_deploy.profiles.prediction import Metric, Source
from amoeba_deploy.shape import Shape

HEIGHT = 300
MOST_MARKS = 16
"""Points that a line shows one by one."""
Axis = Literal["depth", "width"]
_AXES: dict[Axis, str] = {
    "depth": "depth kept, at full width (share of blocks)",
    "width": "width kept, at full depth (share of heads and neurons)",
}


@dataclass(frozen=True)
class CurvePoint:
    """One shape: the share that it keeps, its latency in milliseconds, the same as a share of the whole model's."""

    shape: str
    share: float
    ms: float
    relative: float
    source: Source


@dataclass(frozen=True)
class Curve:
    """One flow and precision along depth or width."""

    flow: str
    precision: str
    axis: Axis
    points: tuple[CurvePoint, ...]


def curves_of(
    flow: str, precision: str, metric: Metric, tokens: int, shapes: Sequence[Shape], predict: Predict
) -> list[Curve]:
    """The curve along depth, of the widest shapes, and the one along width, of the deepest; none of a single point."""
    if not shapes:
        return []
    whole = max(shapes, key=lambda shape: (shape.depth, shape.width))
    along: dict[Axis, list[Shape]] = {
        "depth": [shape for shape in shapes if shape.width == whole.width],
        "width": [shape for shape in shapes if shape.depth == whole.depth],
    }
    reference = predict(whole).value(metric, tokens)
    curves = []
    for axis, own in along.items():
        points = []
        for shape in sorted(dict.fromkeys(own)):
            prediction = predict(shape)
            share = shape.depth / whole.depth if axis == "depth" else float(shape.width / whole.width)
            ms = prediction.value(metric, tokens)
            points.append(CurvePoint(str(shape), share, ms, ms / reference, prediction.source))
        if len(points) > 1:
            curves.append(Curve(flow, precision, axis, tuple(points)))
    return curves


def curves_section(metric: Metric, curves: Sequence[Curve]) -> Section:
    """A panel for depth and one for width, with a line a flow and precision.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    title = METRIC_TITLES[metric].removesuffix(" (ms)")
    caption = (
        f"How the {title} falls as blocks are removed, and as all are made narrower, relative to the whole model. On "
        f"the dashed line a model of half the size takes half the time."
    )
    names = [series_name(curve.flow, curve.precision) for curve in curves]
    panels = []
    for axis in _AXES:
        own = [curve for curve in curves if curve.axis == axis]
        if own:
            panels.append(_panel(alt, axis, title, own, names))
    return Section(f"{title[0].upper()}{title[1:]}, relative to the whole model", caption, tuple(panels))


def _panel(alt: Any, axis: Axis, title: str, curves: Sequence[Curve], names: Sequence[str]) -> Panel:
    rows = [
        {
            "engine": series_name(curve.flow, curve.precision),
            "shape": point.shape,
            "share": significant(point.share, 4),
            "relative": significant(point.relative, 4),
            "ms": significant(point.ms),
            "source": point.source,
        }
        for curve in curves
        for point in curve.points
    ]
    least = min(significant(point.share, 4) for curve in curves for point in curve.points)
    percent = alt.Axis(format="%")
    ends = alt.Scale(zero=False, nice=False, padding=10)
    x = alt.X("share:Q", title=_AXES[axis], scale=ends, axis=percent)
    y = alt.Y("relative:Q", title=f"{title} (% of the whole model's)", scale=alt.Scale(zero=False), axis=percent)
    colour = alt.Color("engine:N", **series_colour(alt, names))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, color=colour)
    ideal = alt.Chart(alt.Data(values=[{"share": share, "relative": share} for share in (least, 1.0)]))
    tooltip = [
        alt.Tooltip("shape:N", title="shape"),
        alt.Tooltip("engine:N", title="engine"),
        alt.Tooltip("ms:Q", title="ms", format=".4~g"),
        alt.Tooltip("relative:Q", title="of the whole", format=".1%"),
        alt.Tooltip("source:N", title="latency"),
    ]
    # Where a line has many points, only those that were measured stand out on it; the others still answer the pointer.
    few = max(len(curve.points) for curve in curves) <= MOST_MARKS
    seen = alt.value(1) if few else alt.condition("datum.source === 'measured'", alt.value(1), alt.value(0))
    chart = alt.layer(
        ideal.mark_line(strokeDash=[5, 4], strokeWidth=1, style=[REFERENCE]).encode(x=x, y=y),
        base.mark_line(strokeWidth=1.5),
        base.mark_point(filled=True, size=45).encode(shape=source_shape(alt), tooltip=tooltip, opacity=seen),
    ).properties(height=HEIGHT)
    return panel(f"By {axis}", chart)
