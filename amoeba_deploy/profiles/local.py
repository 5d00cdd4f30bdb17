"""The device ``local``: this machine, profiled on first use and remembered in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import ALL, flow_names, load_backend
from amoeba_deploy.backends.backend import options_for, require_toolchain
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import check_new_file
from amoeba_deploy.profiles.bench_words import Form, bench_text
from amoeba_deploy.profiles.device import LOCAL, load_device
from amoeba_deploy.profiles.latency_model import LatencyModel
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.profiler import (
    BUDGET_SECONDS,
    Pair,
    local_table,
    local_table_file,
    profile,
    refusal_of,
)
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.source import Source
from amoeba_deploy.profiles.spread import corner_shapes, grid_shapes, spread_shapes
from amoeba_deploy.profiles.table import Table, write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape

RULES: Mapping[str, Callable[[Sequence[Shape]], list[Shape]]] = {
    "spread": spread_shapes,
    "corners": corner_shapes,
    "grid": grid_shapes,
}
"""How to choose shapes to measure, by name."""


@dataclass(frozen=True)
class Profiled:
    """What was measured: the whole table that it went into, that table's file, and the engines and workload."""

    source: Source
    table: Table
    file: Path
    rows: tuple[Row, ...]
    """Those of this time."""
    pairs: tuple[Pair, ...]
    workload: Workload
    context: int
    settings: Mapping[str, str]

    def _sizes(self, flow: str, precision: str) -> Callable[[Shape], Architecture]:
        steps = self.source.steps(load_backend(flow), precision)
        return lambda shape: self.source.sized(shape, steps)

    def models(self) -> dict[str, LatencyModel]:
        """How all other shapes are predicted, by flow and precision."""
        own = self.table.selected(self.context, self.settings)
        return {
            f"{flow} {precision}": own.model(self._sizes(flow, precision), flow, precision, self.workload)
            for flow, precision in self.pairs
        }

    def predictors(self) -> dict[Pair, Callable[[Shape], Prediction]]:
        """The latency of any shape, by flow and precision."""
        own = self.table.selected(self.context, self.settings)
        return {pair: own.predictor(self._sizes(*pair), *pair, self.workload) for pair in self.pairs}

    def shapes(self) -> list[Shape]:
        """The whole shape space, and what was measured beside it."""
        measured = [row.shape for row in self.table.rows if (row.flow, row.precision) in self.pairs]
        return list(dict.fromkeys([*self.source.shapes(), *measured]))

    def bench_text(self, form: Form) -> str:
        """The rows of this time in llama-bench's words."""
        sizes = {row.key: self._sizes(row.flow, row.precision)(row.shape) for row in self.rows}
        return bench_text(self.table, self.rows, sizes, form)


def ready_combinations(flows: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Flow and precision pairs to profile: those asked for, or those of the flows that the device ``local`` lists.

    ``all`` stands for every flow whose toolchain is here.

    Raises:
        ToolchainMissing: a flow asked for lacks its toolchain.
        BadInput: no flow has a precision asked for, or ``all`` stands beside others.
    """
    if ALL in flows:
        if len(flows) > 1:
            raise BadInput(f"--flow {ALL} names every flow already; leave the others out")
        wanted: Sequence[str] = flow_names()
    else:
        for flow in flows:
            require_toolchain(load_backend(flow))
        wanted = flows or [preference.flow for preference in load_device(LOCAL).flows]
    ready = [flow for flow in dict.fromkeys(wanted) if not load_backend(flow).toolchain().missing]
    pairs = []
    for flow in ready:
        own = {load_backend(flow).takes.own_name(precision) for precision in precisions}
        pairs += [(flow, p) for p in load_backend(flow).precisions() if not own or p in own]
    unknown = {p for p in precisions if not any(load_backend(f).takes.own_name(p) == q for f, q in pairs)}
    if unknown or not pairs:
        raise BadInput(f"no flow in {', '.join(ready)} has the precision {', '.join(sorted(unknown))}")
    return pairs


def shapes_named(source: Source, text: str, flow: str, precision: str) -> list[Shape]:
    """The shapes of ``--shapes``: those that a rule chooses of all that an engine takes, or a list.

    Shapes of a list that are the same subnet for the engine are measured once.
    """
    steps = source.steps(load_backend(flow), precision)
    if text in RULES:
        return RULES[text](source.shapes(steps))
    distinct: dict[Architecture, Shape] = {}
    for shape in (Shape.parse(part) for part in text.split(",")):
        source.check(shape)
        distinct.setdefault(source.sized(shape, steps), shape)
    return list(distinct.values())


def profile_to(
    source: Source,
    flows: Sequence[str],
    precisions: Sequence[str],
    shapes: str,
    workload: Workload,
    context: int | None,
    *,
    repeats: int | None = None,
    budget: float = BUDGET_SECONDS,
    settings: Mapping[str, str] | None = None,
    output: Path | None = None,
    device: str = LOCAL,
    force: bool = False,
    progress: Progress,
) -> Profiled:
    """Measure, and write a table file: ``output``, or this machine's table in the cache with the new rows added.

    ``device`` names this machine in a table that is written for others to use, by its name or its device file; the
    cache knows it as ``local``.
    """
    if device.endswith(".toml"):
        device = load_device(device).name
    if device != LOCAL and output is None:
        raise BadInput(f"--device {device} names the machine in a table for others; give -o FILE to write it to")
    if output is not None:
        check_new_file(output, force)
    pairs = ready_combinations(flows, precisions)
    if settings and len({flow for flow, _ in pairs}) > 1:
        raise BadInput("--set is of one engine, and several flows would be measured; name one with --flow")
    positions = workload.context_for(source.architecture.context, context)
    wanted: Mapping[Pair, Sequence[Shape]] = {pair: shapes_named(source, shapes, *pair) for pair in pairs}
    if not precisions or ALL in flows:
        wanted = _without_refused(source, wanted, positions, workload.batch, settings, progress)
    table = profile(
        source,
        wanted,
        workload,
        positions,
        repeats=repeats,
        budget=budget,
        device=device,
        settings=settings,
        progress=progress,
    )
    rows, file = table.rows, output or local_table_file(source)
    if output is None:
        table = remember(source, table)
    else:
        write_table(output, table, force)
    pairs = list(wanted)
    chosen = dict(rows[0].settings)
    return Profiled(source, table, file, rows, tuple(pairs), workload, positions, chosen)


def remember(source: Source, table: Table) -> Table:
    """Add what was measured to this machine's table in the cache; returns the whole of it."""
    known = local_table(source)
    if known is not None:
        facts = table.facts | {"runs": [*known.facts.get("runs", []), *table.facts.get("runs", [])]}
        table = replace(known, facts=facts).merged(table.rows)
    write_table(local_table_file(source), table, force=True)
    return table


def _without_refused(
    source: Source,
    wanted: Mapping[Pair, Sequence[Shape]],
    context: int,
    batch: int,
    settings: Mapping[str, str] | None,
    progress: Progress,
) -> dict[Pair, Sequence[Shape]]:
    """What can be measured here, where nobody named the precisions; the others are said.

    Raises:
        BadInput: nothing can.
    """
    kept = {}
    for (flow, precision), shapes in wanted.items():
        options = options_for(load_backend(flow), context, batch, settings=settings)
        refused = refusal_of(source, flow, precision, shapes, options)
        if refused:
            progress.say(f"left out {flow} {precision}: it refuses {refused}")
        else:
            kept[flow, precision] = shapes
    if not kept:
        flows = ", ".join(dict.fromkeys(flow for flow, _ in wanted))
        raise BadInput(f"no precision of {flows} can be measured here; the reasons stand above")
    return kept
