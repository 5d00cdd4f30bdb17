"""How figures read in a report: with their units, where they are from, and the range where that is known."""

from __future__ import annotations

from amoeba_deploy.console import amount
from amoeba_deploy.pictures.section import METRIC_TITLES
from amoeba_deploy.profiles.prediction import Interval, Metric
from amoeba_deploy.report.case import Case, Step
from amoeba_deploy.search import Candidate
from amoeba_deploy.search.quantity import three_digits

LOSS = "loss"


def milliseconds(value: float, interval: Interval | None = None) -> str:
    """A latency, and between which a measurement is expected."""
    between = "" if interval is None else f" ({three_digits(interval[0])} to {three_digits(interval[1])})"
    return f"{three_digits(value)} ms{between}"


def quality_name(candidate: Candidate) -> str:
    """What the quality is of."""
    return LOSS if candidate.quality.metric == LOSS else "block parameters kept"


def quality_text(candidate: Candidate) -> str:
    """The quality alone."""
    value = candidate.quality.value
    return f"{value:.4f}" if candidate.quality.metric == LOSS else f"{value:.1%}"


def percent(share: float) -> str:
    """A share of something measured."""
    return f"{share:.1%}"


def metric_title(metric: Metric) -> str:
    """A latency in words."""
    return METRIC_TITLES[metric].removesuffix(" (ms)")


def facts(case: Case, candidate: Candidate) -> list[tuple[str, str]]:
    """What is known of a choice, each with its name."""
    prediction = candidate.prediction
    own = [("E2E", milliseconds(case.latency(candidate)))] if case.request.budget.metric == "e2e" else []
    return [
        *own,
        ("TPOT", milliseconds(prediction.tpot_ms, prediction.tpot_interval)),
        ("TTFT", milliseconds(prediction.ttft_ms, prediction.ttft_interval)),
        ("latency is", prediction.source),
        ("memory", amount(prediction.memory_bytes)),
        ("size", amount(candidate.artifact_bytes)),
        (quality_name(candidate), f"{quality_text(candidate)}, {candidate.quality.source}"),
    ]


def reason(case: Case, step: Step) -> str:
    """Why a search chooses this and nothing else."""
    metric = case.request.budget.metric.upper()
    if step.binding is None:
        said = "The best of all shapes fits."
    else:
        bind = "keep" if " and " in step.binding else "keeps"
        said = f"{step.binding[0].upper()}{step.binding[1:]} {bind} better shapes out."
    if step.alike:
        others = "one other" if step.alike == 1 else f"{step.alike} others"
        said += f" Its loss cannot be told apart from that of {others} within the budget; it has the lowest {metric}."
    return said


def nothing_fits(case: Case) -> str:
    """What is said below the first budget that any shape fits."""
    best, metric = case.steps[0].best, case.request.budget.metric.upper()
    return (
        f"No shape fits this budget. The closest is {best.shape} in {best.flow} {best.precision}: {metric} "
        f"{milliseconds(case.latency(best))} ({best.prediction.source})."
    )
