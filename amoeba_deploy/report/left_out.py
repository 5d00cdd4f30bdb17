"""How well latencies are predicted: every measured shape from the others, as if it had not been measured."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_deploy.profiles.curve import Curve, HeldOut
from amoeba_deploy.report.case import Case


@dataclass(frozen=True)
class LeftOut:
    """One measured shape: its latency in milliseconds, and what the other shapes' measurements predict of it."""

    shape: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Prediction:
    """One engine's figure, TPOT or TTFT, over all measured shapes."""

    device: str
    engine: str
    metric: str
    points: tuple[LeftOut, ...]
    error: HeldOut | None
    """None where too few shapes are measured to leave one out."""


def predictions_of(case: Case) -> list[Prediction]:
    """Of a case of one engine; empty where its latencies are estimated."""
    request = case.request
    target, space = request.target, request.space
    (flow, precision) = pair = case.pairs[0]
    rows = None if request.table is None else target.rows(request.table, flow, precision)
    if rows is None or not rows.rows:
        return []
    steps = space.steps(*pair)
    model = rows.model(lambda shape: space.sized(shape, steps).mean, flow, precision, target.workload)
    names = {sizes: str(row.shape) for sizes, row in model.rows.items()}

    def of(metric: str, curve: Curve) -> Prediction:
        points = tuple(LeftOut(names[sizes], value, predicted) for sizes, value, predicted in curve.left_out)
        return Prediction(target.device.name, f"{flow} {precision}", metric, points, curve.held_out)

    return [of("TPOT", model.tpot), of("TTFT", model.ttft)]
