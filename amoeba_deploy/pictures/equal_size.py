"""Latency at equal size: how it falls as a model loses whole blocks, and as it loses as much in the width of all.

AmoebaLLM's Figure 1 (Fu et al., NeurIPS 2024) in one picture: where the two lines of an engine part, shapes of equal
size are not equally fast, and the lower line is the better way to shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.pictures.section import REFERENCE, Panel, load_altair, panel, series_colour, significant
from amoeba_deploy.profiles.prediction import Source

HEIGHT = 300
WAYS = ("fewer blocks", "narrower blocks")


@dataclass(frozen=True)
class SizePoint:
    """One shape: which way it is smaller, the share of block parameters that it keeps, and its latency as a share."""

    engine: str
    way: str
    shape: str
    kept: float
    relative: float
    ms: float
    source: Source


def equal_size_panel(title: str, latency: str, points: Sequence[SizePoint]) -> Panel:
    """One panel with two lines an engine; ``latency`` names what is relative to the whole model's.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    rows = [
        {
            "engine": point.engine,
            "way": point.way,
            "shape": point.shape,
            "kept": significant(point.kept, 4),
            "relative": significant(point.relative, 4),
            "ms": significant(point.ms),
            "source": point.source,
        }
        for point in points
    ]
    percent = alt.Axis(format="%")
    ends = alt.Scale(zero=False, nice=False, padding=10)
    x = alt.X("kept:Q", title="block parameters kept (share)", scale=ends, axis=percent)
    y = alt.Y("relative:Q", title=f"{latency} (% of the whole model's)", scale=alt.Scale(zero=False), axis=percent)
    names = list(dict.fromkeys(point.engine for point in points))
    colour = alt.Color("engine:N", **series_colour(alt, names))
    dashes = alt.Scale(domain=list(WAYS), range=[[1, 0], [6, 4]])
    key = alt.Legend(symbolType="stroke", symbolSize=400, symbolStrokeWidth=2)
    way = alt.StrokeDash("way:N", title="with", scale=dashes, legend=key)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, color=colour)
    tooltip: list[Any] = [
        alt.Tooltip("shape:N", title="shape"),
        alt.Tooltip("engine:N", title="engine"),
        alt.Tooltip("kept:Q", title="parameters kept", format=".1%"),
        alt.Tooltip("ms:Q", title="ms", format=".4~g"),
        alt.Tooltip("relative:Q", title="of the whole", format=".1%"),
        alt.Tooltip("source:N", title="latency"),
    ]
    least = min(row["kept"] for row in rows)  # type: ignore[type-var]
    ideal = alt.Chart(alt.Data(values=[{"kept": share, "relative": share} for share in (least, 1.0)]))
    chart = alt.layer(
        ideal.mark_line(strokeDash=[2, 3], strokeWidth=1, style=[REFERENCE]).encode(x=x, y=y),
        base.mark_line(strokeWidth=2).encode(strokeDash=way),
        base.mark_point(filled=True, size=36).encode(tooltip=tooltip),
    ).properties(height=HEIGHT)
    return panel(title, chart)
