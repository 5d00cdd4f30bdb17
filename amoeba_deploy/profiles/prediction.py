"""What is known of a shape's speed and memory on a device, and where it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Metric = Literal["tpot", "ttft", "e2e"]
Interval = tuple[float, float]
Source = Literal["measured", "interpolated", "estimated"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times in milliseconds: TPOT per generated token, TTFT for the prompt; and the memory that a run needs."""

    tpot_ms: float
    ttft_ms: float
    memory_bytes: int
    source: Source
    tpot_interval: Interval | None = None
    """Low and high end in milliseconds between which a measurement is expected, nine times in ten; None: not known."""
    ttft_interval: Interval | None = None
    artifact_bytes: float | None = None
    """Size of the engine's files, where it was measured or predicted from measurements."""

    def value(self, metric: Metric, tokens: int) -> float:
        """One metric in milliseconds; E2E, for ``tokens`` generated tokens, is TTFT + (tokens - 1) x TPOT."""
        if metric == "tpot":
            return self.tpot_ms
        if metric == "ttft":
            return self.ttft_ms
        return self.ttft_ms + (tokens - 1) * self.tpot_ms


def reach(value: float, interval: Interval) -> tuple[float, float]:
    """How far an interval reaches below and above a value, as logarithms."""
    low, high = interval
    return math.log(value / max(low, 1e-9)), math.log(high / value)
