"""Prediction against measurement: every point on the diagonal would be predicted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.pictures.section import (
    REFERENCE,
    Panel,
    Section,
    load_altair,
    logarithmic,
    panel,
    series_colour,
    significant,
)

HEIGHT = 320


@dataclass(frozen=True)
class Pair:
    """One figure in milliseconds as predicted and as measured; ``what`` was, in which engine."""

    what: str
    engine: str
    predicted: float
    measured: float


def prediction_section(panels: Sequence[tuple[str, Sequence[Pair]]], caption: str) -> Section:
    """One panel for each title.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    names = sorted({pair.engine for _, pairs in panels for pair in pairs})
    drawn = tuple(_panel(alt, title, pairs, names) for title, pairs in panels if pairs)
    return Section("Prediction against measurement", caption, drawn)


def _panel(alt: Any, title: str, pairs: Sequence[Pair], names: Sequence[str]) -> Panel:
    rows = [
        {
            "what": pair.what,
            "engine": pair.engine,
            "predicted": significant(pair.predicted),
            "measured": significant(pair.measured),
            "off": significant(pair.predicted / pair.measured - 1, 3),
        }
        for pair in pairs
    ]
    values = [significant(value) for pair in pairs for value in (pair.predicted, pair.measured)]
    ends = [min(values), max(values)]
    scale = alt.Scale(type="log" if logarithmic(values) else "linear", zero=False, nice=False, padding=12, domain=ends)
    x = alt.X("measured:Q", title="measured (ms)", scale=scale)
    y = alt.Y("predicted:Q", title="predicted (ms)", scale=scale)
    exact = alt.Chart(alt.Data(values=[{"measured": end, "predicted": end} for end in ends]))
    tooltip = [
        alt.Tooltip("what:N", title="shape"),
        alt.Tooltip("engine:N", title="engine"),
        alt.Tooltip("measured:Q", title="measured (ms)", format=".4~g"),
        alt.Tooltip("predicted:Q", title="predicted (ms)", format=".4~g"),
        alt.Tooltip("off:Q", title="off by", format="+.1%"),
    ]
    colour = alt.Color("engine:N", **series_colour(alt, names))
    points = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=55, opacity=0.85)
    chart = alt.layer(
        exact.mark_line(strokeDash=[5, 4], strokeWidth=1, style=[REFERENCE]).encode(x=x, y=y),
        points.encode(x=x, y=y, color=colour, tooltip=tooltip),
    ).properties(height=HEIGHT)
    return panel(title, chart)
