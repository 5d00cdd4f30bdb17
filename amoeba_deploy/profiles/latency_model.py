"""What a table's rows of one engine under one workload say of every shape: latency, memory and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.profiles.curve import COVERED, Curve
from amoeba_deploy.profiles.prediction import Interval, Prediction, reach
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.statistics import percentile
from amoeba_deploy.shape import Shape


@dataclass(frozen=True)
class LatencyModel:
    """Predictions for the subnets of one model in one flow, precision and workload; times in milliseconds."""

    rows: dict[Architecture, Row]
    """What was measured, by the sizes of the subnet."""
    tpot: Curve
    ttft: Curve
    memory: Curve
    artifact: Curve

    @classmethod
    def fit(cls, rows: Sequence[Row], sizes_of: Callable[[Shape], Architecture]) -> LatencyModel:
        """Fit to at least one row; ``sizes_of`` gives a shape its subnet's sizes, of which equal ones share a row."""
        measured = {sizes_of(row.shape): row for row in rows}

        def curve(name: str, spread: tuple[float, float] = (0.0, 0.0)) -> Curve:
            return Curve([(sizes, max(float(getattr(row, name)), 1e-9)) for sizes, row in measured.items()], spread)

        return cls(
            measured,
            curve("tpot_ms", _spread([(row.tpot_ms, row.tpot_interval) for row in rows])),
            curve("ttft_ms", _spread([(row.ttft_ms, row.ttft_interval) for row in rows])),
            curve("peak_memory_bytes"),
            curve("artifact_bytes"),
        )

    def __call__(self, sizes: Architecture) -> Prediction:
        """What is known of a subnet: measured, interpolated between measured ones, or carried on beyond them.

        What is carried on is called ``estimated``: nothing near it was measured.
        """
        row = self.rows.get(sizes)
        if row is not None:
            return self._measured(row)
        return Prediction(
            self.tpot(sizes),
            self.ttft(sizes),
            round(self.memory(sizes)),
            "interpolated" if self.tpot.inside(sizes) else "estimated",
            self.tpot.interval(sizes),
            self.ttft.interval(sizes),
            self.artifact(sizes),
        )

    def _measured(self, row: Row) -> Prediction:
        """What was measured; where a median is not known well, no interval is narrower than those of other rows.

        They ran on the same machine in turns, and each saw only some of what its speed can be.
        """
        tpot, ttft = row.tpot_interval, row.ttft_interval
        if tpot is not None and not row.tpot_confident:
            tpot = self.tpot.widened(row.tpot_ms, tpot)
        if ttft is not None and not row.ttft_confident:
            ttft = self.ttft.widened(row.ttft_ms, ttft)
        return Prediction(row.tpot_ms, row.ttft_ms, row.peak_memory_bytes, "measured", tpot, ttft, row.artifact_bytes)


def _spread(measured: Sequence[tuple[float, Interval | None]]) -> tuple[float, float]:
    """How far measurements lie below and above what they are of, as logarithms: what nine in ten rows stay within."""
    known = [reach(value, interval) for value, interval in measured if interval is not None]
    if not known:
        return 0.0, 0.0
    below, above = zip(*known, strict=True)
    return percentile(below, COVERED), percentile(above, COVERED)
