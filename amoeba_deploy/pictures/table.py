"""The sections of a latency table: curves and heatmaps of every flow and precision in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from amoeba_deploy.pictures.curves import curves_of, curves_section
from amoeba_deploy.pictures.heatmap import Predict, heatmap_of, heatmap_section
from amoeba_deploy.pictures.section import Section
from amoeba_deploy.profiles.prediction import Metric
from amoeba_deploy.shape import Shape


def table_sections(
    predictors: Mapping[tuple[str, str], Predict],
    tokens: int,
    shapes: Sequence[Shape],
    metrics: Sequence[Metric] = ("tpot", "ttft"),
) -> list[Section]:
    """Curves and heatmaps, for each metric.

    Args:
        predictors: for each flow and precision the function that gives a shape its latency, such as a table's
            ``predictor`` makes.
        tokens: generated tokens of the workload; of use for E2E only.
        shapes: what to draw, the measured ones among them.
        metrics: what to draw of each.

    Raises:
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    sections = []
    for metric in metrics:
        each = [(flow, precision, metric, tokens, shapes, predict) for (flow, precision), predict in predictors.items()]
        sections.append(curves_section(metric, [curve for one in each for curve in curves_of(*one)]))
        sections.append(heatmap_section(metric, [heatmap_of(*one) for one in each]))
    return sections
