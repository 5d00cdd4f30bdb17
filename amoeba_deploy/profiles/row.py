"""One measurement of a latency table: a shape of one flow and precision under one workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amoeba_deploy.profiles.measure import Measurement, Peak, is_known
from amoeba_deploy.profiles.prediction import Interval
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape, parse_width, width_to_json


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, sizes in bytes."""

    flow: str
    precision: str
    depth: int
    width: float | str
    policy: str
    batch: int
    prompt: int
    tokens: int
    ttft_ms: float
    tpot_ms: float
    p10: float
    p90: float
    repeats: int
    peak_memory_bytes: int
    artifact_bytes: int
    ttft_p10: float | None = None
    ttft_p90: float | None = None
    ttft_error: float | None = None
    """Half the width of the median's 95 % confidence interval, as a share of the median; None where nobody told."""
    tpot_error: float | None = None
    ttft_least: float | None = None
    """The fastest and the slowest run; of TPOT, by the medians over their tokens."""
    ttft_most: float | None = None
    tpot_least: float | None = None
    tpot_most: float | None = None
    noisy: bool = False
    """Whether the machine was too noisy for a confident median."""
    stopped: str | None = None
    """Why no further repeat was made: ``confident``, ``budget`` or ``repeats``."""
    prompt_rate: float | None = None
    """Tokens a second of the prompt, the mean over repeats, and below it the standard deviation; so for output."""
    prompt_rate_sd: float | None = None
    token_rate: float | None = None
    token_rate_sd: float | None = None
    gpu_memory_bytes: int | None = None
    energy_per_token_j: float | None = None
    """Joules a generated token, of the GPU alone."""
    context: int | None = None
    """Positions that the engine provided for."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of the engine's own that were not at their defaults."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a table holds one row of: flow, precision, shape, workload, context and settings."""
        shape = self.depth, self.width, self.policy
        settings = tuple(sorted(self.settings.items()))
        return (self.flow, self.precision, *shape, self.batch, self.prompt, self.tokens, self.context or 0, settings)

    @property
    def shape(self) -> Shape:
        """The shape that was measured."""
        return Shape(self.depth, parse_width(str(self.width)))

    @property
    def workload(self) -> Workload:
        """The workload that it was measured under."""
        return Workload(self.batch, self.prompt, self.tokens)

    @property
    def tpot_confident(self) -> bool:
        """Whether the median is known to within ``PRECISE``, with 95 % confidence."""
        return self._confident(self.tpot_error)

    @property
    def ttft_confident(self) -> bool:
        """The same of TTFT."""
        return self._confident(self.ttft_error)

    def _confident(self, error: float | None) -> bool:
        return error is not None and is_known(error, self.repeats)

    @property
    def tpot_interval(self) -> Interval | None:
        """Between which times it lies when it is measured another time; None where the row does not tell.

        The wider of the median's confidence interval and the spread of what was timed. Of a median that is not known
        well that reaches from the fastest run to the slowest: a machine whose speed changes while it is measured shows
        all of them another time.
        """
        ends = (self.p10, self.p90), (self.tpot_least, self.tpot_most)
        return _interval(self.tpot_ms, self.tpot_error, self.tpot_confident, *ends)

    @property
    def ttft_interval(self) -> Interval | None:
        """The same of TTFT."""
        ends = (self.ttft_p10, self.ttft_p90), (self.ttft_least, self.ttft_most)
        return _interval(self.ttft_ms, self.ttft_error, self.ttft_confident, *ends)


Ends = tuple[float | None, float | None]


def _interval(value: float, error: float | None, confident: bool, percentiles: Ends, runs: Ends) -> Interval | None:
    low, high = percentiles
    if error is None or low is None or high is None:
        return None
    # Runs that were far slower than their median make its interval wider than itself; no time is negative.
    below = value * (1 - error) if error < 1 else value / (1 + error)
    low, high = min(low, below), max(high, value * (1 + error))
    least, most = runs
    if confident or least is None or most is None:
        return low, high
    return min(low, least), max(high, most)


def make_row(
    flow: str,
    precision: str,
    shape: Shape,
    workload: Workload,
    times: tuple[float, float, float, float, int],
    sizes: tuple[int, int],
    **more: Any,
) -> Row:
    """A row from (ttft, tpot, p10, p90, repeats), (peak memory, artefact bytes) and any of the other entries."""
    *milliseconds, repeats = times
    ttft, tpot, low, high = (round(value, 4) for value in milliseconds)
    return Row(
        flow,
        precision,
        shape.depth,
        width_to_json(shape.width),
        shape.policy,
        workload.batch,
        workload.prompt,
        workload.tokens,
        ttft,
        tpot,
        low,
        high,
        repeats,
        *sizes,
        **more,
    )


def measured_row(
    flow: str,
    precision: str,
    shape: Shape,
    workload: Workload,
    timing: Measurement,
    peak: Peak,
    artifact_bytes: int,
    *,
    context: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Row:
    """The row of what was measured here; ``settings`` are those of the engine's own that are not at their defaults."""
    kept = [f"{figure}_{name}" for figure in ("ttft", "tpot") for name in ("error", "least", "most")]
    kept += ["ttft_p10", "ttft_p90", "prompt_rate", "prompt_rate_sd", "token_rate", "token_rate_sd"]
    rounded = {name: round(getattr(timing, name), 4) for name in kept}
    energy = None if timing.energy_per_token_j is None else round(timing.energy_per_token_j, 6)
    return make_row(
        flow,
        precision,
        shape,
        workload,
        (timing.ttft_ms, timing.tpot_ms, timing.p10, timing.p90, timing.repeats),
        (peak.memory_bytes, artifact_bytes),
        **rounded,
        noisy=timing.noisy,
        stopped=timing.stopped,
        gpu_memory_bytes=peak.gpu_memory_bytes,
        energy_per_token_j=energy,
        context=context,
        settings=dict(settings or {}),
    )
