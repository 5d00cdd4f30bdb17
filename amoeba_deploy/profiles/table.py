"""Latency tables: what was measured of one model architecture on one device, in one JSON file.

A row holds one shape of one flow and precision under one workload. Shapes without a row are predicted from those of
their flow, precision and workload (``latency_model``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.files import read_json, whole_file, write_json
from amoeba_deploy.profiles.latency_model import LatencyModel
from amoeba_deploy.profiles.measure import Measurement, Peak
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape, parse_width, width_to_json

TABLE_FORMAT = "amoeba.latency-table/1"


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


@dataclass(frozen=True)
class Table:
    """All rows measured of one architecture on one device, and the facts in the header."""

    device: str
    architecture_digest: str
    facts: dict[str, Any]
    rows: tuple[Row, ...]

    def flows(self, workload: Workload) -> set[tuple[str, str]]:
        """The flows and precisions that have rows for a workload."""
        return {(row.flow, row.precision) for row in self.rows if row.workload == workload}

    def selected(self, context: int, settings: Mapping[str, str]) -> Table:
        """The rows of engines that provide for ``context`` positions, or for nobody knows how many, with ``settings``.

        ``settings`` are those that are not at their defaults.
        """
        rows = (r for r in self.rows if r.context in (None, context) and dict(r.settings) == dict(settings))
        return replace(self, rows=tuple(rows))

    def merged(self, rows: Iterable[Row]) -> Table:
        """The table with further rows; a newer row replaces the one of the same shape, flow, precision, workload."""
        together = {row.key: row for row in (*self.rows, *rows)}
        order = sorted(together, key=lambda k: (*k[:2], -k[2], -float(Fraction(str(k[3]))), *k[4:]))
        return Table(self.device, self.architecture_digest, self.facts, tuple(together[k] for k in order))

    def model(
        self, sizes_of: Callable[[Shape], Architecture], flow: str, precision: str, workload: Workload
    ) -> LatencyModel:
        """What the rows of a flow, precision and workload say of every shape.

        ``sizes_of`` gives a shape its subnet's sizes; shapes of equal sizes share a row.

        Raises:
            LatencyUnknown: nothing was measured for this flow, precision and workload.
        """
        rows = [r for r in self.rows if (r.flow, r.precision, r.workload) == (flow, precision, workload)]
        if not rows:
            raise LatencyUnknown(
                f"the table of '{self.device}' has nothing measured for {flow} in {precision} at --batch "
                f"{workload.batch} --prompt {workload.prompt} --tokens {workload.tokens}; run 'amoeba profile'"
            )
        return LatencyModel.fit(rows, sizes_of)

    def predictor(
        self, sizes_of: Callable[[Shape], Architecture], flow: str, precision: str, workload: Workload
    ) -> Callable[[Shape], Prediction]:
        """The function that gives each shape its latency by ``model``; raises LatencyUnknown as that does."""
        model = self.model(sizes_of, flow, precision, workload)
        return lambda shape: model(sizes_of(shape))


def write_table(file: Path, table: Table, force: bool = False) -> None:
    """Write a table as one JSON file; raises BadInput where the file exists and ``force`` is not set."""
    defaults = {each.name: each.default for each in fields(Row) if each.default is not MISSING} | {"settings": {}}
    rows = [{k: v for k, v in asdict(row).items() if k not in defaults or v != defaults[k]} for row in table.rows]
    head = {"format": TABLE_FORMAT, "device": table.device, "architecture": table.architecture_digest}
    with whole_file(file, force) as work:
        write_json(work, head | table.facts | {"rows": rows})


def read_table(file: Path) -> Table:
    """Read a table; raises BadInput where it is damaged or a row lacks an entry."""
    value = read_json(file, TABLE_FORMAT)
    try:
        rows = tuple(Row(**row) for row in value["rows"])
        for row in rows:
            if (
                not (0 < row.ttft_ms < math.inf and 0 < row.tpot_ms < math.inf)
                or min(row.peak_memory_bytes, row.artifact_bytes) < 0
            ):
                raise ValueError
            _ = row.shape, row.workload
            if row.policy != "uniform":
                raise ValueError
        device, digest = str(value["device"]), str(value["architecture"])
    except (KeyError, TypeError, ValueError, BadInput):
        raise BadInput(f"{file}: a row lacks an entry or holds a value that cannot be; profile again") from None
    facts = {k: v for k, v in value.items() if k not in ("format", "device", "architecture", "rows")}
    return Table(device, digest, facts, rows)
