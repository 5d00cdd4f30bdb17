"""The front: quality over latency of every shape considered, the best of each engine, the budget and the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.pictures.section import (
    METRIC_TITLES,
    Panel,
    Section,
    interval_of,
    labels,
    load_altair,
    logarithmic,
    panel,
    series_colour,
    series_name,
    significant,
    source_shape,
)
from amoeba_deploy.profiles.prediction import Interval, Metric, Source
from amoeba_deploy.search import Budget, Candidate

HEIGHT = 340
SPARSE_SIZE, CROWDED_SIZE, CROWD = 50, 10, 200
"""Square pixels of a front's points where there are few, and where there are as many as a crowd or more."""
AXIS_SHARE = 0.2
"""Of the width: a name left of a point that is nearer to the axis would run into it."""
_LOWER_IS_BETTER = ("loss", "perplexity")
_QUALITY_TITLES = {
    "loss": "loss (nats a token, lower is better)",
    "perplexity": "perplexity (lower is better)",
    "accuracy": "accuracy (share, higher is better)",
    "parameters_kept": "block parameters kept (share)",
}


@dataclass(frozen=True)
class Point:
    """One shape in one flow and precision; ``latency_ms`` and its interval are of the metric that is drawn."""

    shape: str
    flow: str
    precision: str
    latency_ms: float
    tpot_ms: float
    ttft_ms: float
    memory_bytes: float
    weight_bytes: float
    quality: float
    quality_source: str
    source: Source
    interval: Interval | None = None

    @property
    def series(self) -> str:
        """Flow and precision."""
        return series_name(self.flow, self.precision)


@dataclass(frozen=True)
class Front:
    """All points of one device, the budget in milliseconds of the metric if there is one, and the point chosen."""

    device: str
    metric: Metric
    budget_ms: float | None
    quality_metric: str
    points: tuple[Point, ...]
    chosen: Point | None = None

    @property
    def lower_is_better(self) -> bool:
        """Of the quality."""
        return self.quality_metric in _LOWER_IS_BETTER

    def best_points(self, series: str) -> list[Point]:
        """The points of a series that no other is at least as fast and as good as, fastest first."""
        sign = 1 if self.lower_is_better else -1
        found: list[Point] = []
        own = (point for point in self.points if point.series == series)
        for point in sorted(own, key=lambda p: (p.latency_ms, sign * p.quality, p.weight_bytes, p.shape)):
            if not found or sign * point.quality < sign * found[-1].quality:
                found.append(point)
        return found


def front_of(device: str, found: Sequence[Candidate], best: Candidate | None, budget: Budget, tokens: int) -> Front:
    """The front of a search: ``found`` is all that was considered, ``best`` what was chosen.

    A search's own result holds the candidates within the budget and the front; where no more is at hand, give these.
    """
    metric = budget.metric
    points = {candidate: _point(candidate, metric, tokens) for candidate in dict.fromkeys(found)}
    chosen = None if best is None else points.setdefault(best, _point(best, metric, tokens))
    quality = next(iter(points)).quality.metric if points else "loss"
    return Front(device, metric, budget.ms, quality, tuple(points.values()), chosen)


def _point(candidate: Candidate, metric: Metric, tokens: int) -> Point:
    prediction = candidate.prediction
    return Point(
        str(candidate.shape),
        candidate.flow,
        candidate.precision,
        prediction.value(metric, tokens),
        prediction.tpot_ms,
        prediction.ttft_ms,
        prediction.memory_bytes,
        candidate.weight_bytes,
        candidate.quality.value,
        candidate.quality.source,
        prediction.source,
        interval_of(prediction, metric, tokens),
    )


def front_section(fronts: Sequence[Front]) -> Section:
    """One panel a device.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    alt = load_altair()
    names = sorted({point.series for front in fronts for point in front.points})
    caption = (
        "Every shape that was considered, and for each engine the best quality within a latency. Filled circles were "
        "measured, hollow ones interpolated between measurements, crosses estimated."
    )
    if any(front.chosen is not None and front.chosen.interval for front in fronts):
        caption += " The bar through the chosen shape is where a measurement is expected nine times in ten."
    return Section("Quality and latency", caption, tuple(_panel(alt, front, names) for front in fronts))


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "shape": point.shape,
            "engine": point.series,
            "latency": significant(point.latency_ms),
            "tpot": significant(point.tpot_ms),
            "ttft": significant(point.ttft_ms),
            "memory": significant(point.memory_bytes / 1e9, 4),
            "size": significant(point.weight_bytes / 1e9, 4),
            "quality": significant(point.quality, 6),
            "quality_source": point.quality_source,
            "source": point.source,
        }
        for point in points
    ]


def _panel(alt: Any, front: Front, names: Sequence[str]) -> Panel:
    best = [point for name in names for point in front.best_points(name)]
    scale = "log" if logarithmic([point.latency_ms for point in front.points]) else "linear"
    x = {"title": METRIC_TITLES[front.metric], "scale": alt.Scale(type=scale, zero=False, nice=False, padding=12)}
    title = _QUALITY_TITLES.get(front.quality_metric, front.quality_metric)
    y = alt.Y("quality:Q", title=title, scale=alt.Scale(zero=False))
    marks = _Marks(alt, x, y, series_colour(alt, names), front)
    layers = [marks.all_points(), marks.steps(best), marks.best_points(best), *marks.budget(), *marks.choice()]
    return panel(_title(front), alt.layer(*layers).properties(height=HEIGHT))


def _title(front: Front) -> str:
    chosen = front.chosen
    if chosen is None:
        return front.device
    return f"{front.device}: {chosen.shape} in {chosen.series}, {chosen.latency_ms:.3g} ms ({chosen.source})"


@dataclass(frozen=True)
class _Marks:
    """The layers of one panel."""

    alt: Any
    along: dict[str, Any]
    """Title and scale of the latency."""
    y: Any
    colour: dict[str, Any]
    """Title and scale of the engines."""
    front: Front

    @property
    def x(self) -> Any:
        """The latency of a row."""
        return self.alt.X("latency:Q", **self.along)

    def _base(self, rows: list[dict[str, Any]]) -> Any:
        return self.alt.Chart(self.alt.Data(values=rows))

    def _points(self, rows: list[dict[str, Any]], size: int, opacity: float) -> Any:
        alt = self.alt
        return (
            self._base(rows)
            .mark_point(size=size, filled=True, opacity=opacity)
            .encode(
                x=self.x,
                y=self.y,
                color=alt.Color("engine:N", **self.colour),
                shape=source_shape(alt),
                tooltip=self._tooltip(),
            )
        )

    def _tooltip(self) -> list[Any]:
        alt = self.alt
        metric = self.front.metric
        own = [alt.Tooltip("latency:Q", title="E2E (ms)", format=".4~g")] if metric == "e2e" else []
        return [
            alt.Tooltip("shape:N", title="shape"),
            alt.Tooltip("engine:N", title="engine"),
            *own,
            alt.Tooltip("tpot:Q", title="TPOT (ms)", format=".4~g"),
            alt.Tooltip("ttft:Q", title="TTFT (ms)", format=".4~g"),
            alt.Tooltip("source:N", title="latency"),
            alt.Tooltip("quality:Q", title=self.front.quality_metric.replace("_", " "), format=".4~g"),
            alt.Tooltip("quality_source:N", title="quality"),
            alt.Tooltip("memory:Q", title="memory (GB)", format=".3~g"),
            alt.Tooltip("size:Q", title="weights (GB)", format=".3~g"),
        ]

    def all_points(self) -> Any:
        """Everything considered, faint."""
        return self._points(_rows(self.front.points), size=18, opacity=0.4)

    def steps(self, best: Sequence[Point]) -> Any:
        """What quality a latency buys: a step down or up at each point of a front."""
        line = self._base(_rows(best)).mark_line(interpolate="step-after", strokeWidth=1.5)
        return line.encode(x=self.x, y=self.y, color=self.alt.Color("engine:N", **self.colour))

    def best_points(self, best: Sequence[Point]) -> Any:
        """The points of the fronts."""
        size = max(CROWDED_SIZE, min(SPARSE_SIZE, CROWD * CROWDED_SIZE / max(len(best), 1)))
        return self._points(_rows(best), size=round(size), opacity=1.0)

    def budget(self) -> list[Any]:
        """A rule at the budget, and its value."""
        if self.front.budget_ms is None:
            return []
        base = self._base([{"latency": self.front.budget_ms, "label": f"budget {self.front.budget_ms:g} ms"}])
        low = self._position(self.front.budget_ms) < 0.6
        place = {"align": "left" if low else "right", "dx": 5 if low else -5, "baseline": "top", "dy": 3}
        rule = base.mark_rule(strokeDash=[5, 4], strokeWidth=1.25).encode(x=self.x)
        return [rule, *labels(base, {"x": self.x, "y": self.alt.value(0), "text": "label:N"}, **place)]

    def choice(self) -> list[Any]:
        """A ring around the chosen point, its name, and its interval as a thin bar."""
        chosen = self.front.chosen
        if chosen is None:
            return []
        row = _rows([chosen])[0]
        layers = []
        if chosen.interval is not None:
            ends = {"low": significant(chosen.interval[0]), "high": significant(chosen.interval[1])}
            bar = self._base([row | ends]).mark_rule(strokeWidth=1.5)
            tooltip = [self.alt.Tooltip(f"{end}:Q", title=f"{end} end (ms)", format=".4~g") for end in ends]
            span = self.alt.X("low:Q", **self.along)
            layers.append(bar.encode(x=span, x2="high:Q", y=self.y, tooltip=tooltip))
        ring = self._base([row]).mark_point(size=190, strokeWidth=2, filled=False, shape="circle")
        layers.append(ring.encode(x=self.x, y=self.y, tooltip=self._tooltip()))
        # On the side where the front has no points, faster and better, unless the axis is there.
        better = 16 if self.front.lower_is_better else -16
        free = (
            {"align": "right", "dx": -8, "dy": better}
            if self._position(chosen.latency_ms) > AXIS_SHARE
            else {
                "align": "left",
                "dx": 8,
                "dy": -better,
            }
        )
        name = {"x": self.x, "y": self.y, "text": "shape:N"}
        return [*layers, *labels(self._base([row]), name, fontWeight="bold", **free)]

    def _position(self, latency: float) -> float:
        """Where a latency is on the axis: 0 at its low end, 1 at its high end."""
        values = [point.latency_ms for point in self.front.points] + [latency]
        low, high = min(values), max(values)
        if low == high:
            return 0.5
        if logarithmic(values):
            return math.log(latency / low) / math.log(high / low)
        return (latency - low) / (high - low)
