"""Latency tables: what was measured of one model architecture on one device, in one JSON file.

A row holds one shape of one flow and precision under one workload. Shapes without a row are predicted from those of
their flow, precision and workload (``latency_model``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.files import read_json, whole_file, write_json
from amoeba_deploy.profiles.latency_model import LatencyModel
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

TABLE_FORMAT = "amoeba.latency-table/1"


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
                or not _between(row.tpot_least, row.tpot_ms, row.tpot_most)
                or not _between(row.ttft_least, row.ttft_ms, row.ttft_most)
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


def _between(least: float | None, value: float, most: float | None) -> bool:
    """Whether a median lies between the fastest and the slowest run, as far as they are known."""
    return least is None or most is None or least <= value <= most
