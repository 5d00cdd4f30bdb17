"""Sections: a heading, a sentence of explanation, and the charts below it; and what all charts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.errors import ToolchainMissing
from amoeba_deploy.profiles.prediction import Interval, Metric, Prediction

PLOT_WIDTH = "plot_width"
"""The parameter of every specification that holds the width of the plot in pixels: marks that need room ask for it."""

METRIC_TITLES = {
    "tpot": "time per output token (ms)",
    "ttft": "time to first token (ms)",
    "e2e": "end-to-end time (ms)",
}
HALO, LABEL, REFERENCE = "halo", "label", "reference"
"""Styles of text and of lines to compare with, which the configuration of a page or an image fills."""
SOURCES = ("measured", "interpolated", "estimated")

Spec = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One chart: its title, and its Vega-Lite specification without width, configuration and schema."""

    title: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """Charts that belong together, side by side where there is room."""

    heading: str
    caption: str
    panels: tuple[Panel, ...]


def load_altair() -> Any:
    """Altair; raises ToolchainMissing where it or what renders its charts is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ToolchainMissing(
            f"{error.name} is not installed, and pictures need it; run pip install 'amoeba-deploy[plot]'"
        ) from None
    return altair


def panel(title: str, chart: Any) -> Panel:
    """A panel of an Altair chart. Altair's own configuration is left to the page, and so is the schema's address."""
    spec = chart.to_dict()
    return Panel(title, {key: value for key, value in spec.items() if key not in ("$schema", "config")})


def series_name(flow: str, precision: str) -> str:
    """How legends call a flow in a precision."""
    return f"{flow} {precision}"


def series_colour(alt: Any, names: Sequence[str]) -> dict[str, Any]:
    """What every colour encoding of engines shares: one colour each, the same in all panels, and a line in the key."""
    legend = alt.Legend(symbolOpacity=1, symbolType="square", symbolStrokeWidth=0, symbolSize=90)
    return {"title": "engine", "scale": alt.Scale(domain=list(dict.fromkeys(names))), "legend": legend}


_RING = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0ZM-.6,0A.6,.6,0,1,0,.6,0A.6,.6,0,1,0,-.6,0Z"
CROSS = "M-1,-.7L-.7,-1L0,-.3L.7,-1L1,-.7L.3,0L1,.7L.7,1L0,.3L-.7,1L-1,.7L-.3,0Z"
"""The outline of what stands for an estimate."""


def source_shape(alt: Any) -> Any:
    """Where a latency is from: a disc where measured, a ring where interpolated, a cross where estimated."""
    scale = alt.Scale(domain=list(SOURCES), range=["circle", _RING, CROSS])
    return alt.Shape("source:N", title="latency", scale=scale, legend=alt.Legend(symbolOpacity=1, symbolSize=60))


def labels(base: Any, encoding: Mapping[str, Any], **place: Any) -> list[Any]:
    """Text that can be read over other marks: first its outline in the colour of the paper, then itself."""
    return [base.mark_text(style=[style], **place).encode(**encoding) for style in (HALO, LABEL)]


def interval_of(prediction: Prediction, metric: Metric, tokens: int) -> Interval | None:
    """The interval of a metric; of E2E, as wide as if both parts erred the same way."""
    tpot, ttft = prediction.tpot_interval, prediction.ttft_interval
    if metric == "tpot":
        return tpot
    if metric == "ttft":
        return ttft
    if tpot is None or ttft is None:
        return None
    return ttft[0] + (tokens - 1) * tpot[0], ttft[1] + (tokens - 1) * tpot[1]


def significant(value: float, digits: int = 5) -> float:
    """A number as specifications hold it: more digits are of no use in a picture and swell the file."""
    return float(f"{value:.{digits}g}")


def logarithmic(values: Sequence[float]) -> bool:
    """Whether an axis should be: the largest of its values, all positive, is ten times the smallest or more."""
    return min(values) > 0 and max(values) >= 10 * min(values)
