"""Latencies of this machine for a request: what its table lacks is measured now and remembered.

A search wants a grid of shapes, a shape that was named wants only itself. An engine with settings of its own is
measured for a named shape alone.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from amoeba_deploy.backends import load_backend
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.files import folder_bytes
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.plan import Plan
from amoeba_deploy.profiles.local import profile_to
from amoeba_deploy.profiles.measure import measure, peak_memory
from amoeba_deploy.profiles.profiler import (
    REPEATS,
    corner_shapes,
    empty_table,
    local_table,
    local_table_file,
    steps_of,
)
from amoeba_deploy.profiles.table import Row, Table, make_row, write_table
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape
from amoeba_deploy.target import Target

Pair = tuple[str, str]


def searched_table(checkpoint: Checkpoint, target: Target, progress: Progress) -> Table:
    """This machine's table with rows for a search: at least the largest and smallest depth and width of every pair.

    Pairs without them are profiled over a grid of shapes.

    Raises:
        LatencyUnknown: an engine with settings of its own has no rows.
    """
    missing = [pair for pair in target.pairs if not _covers(checkpoint, target, pair)]
    for flow, precision in missing:
        if target.own_settings(flow):
            own = ", ".join(f"{name}={value}" for name, value in target.own_settings(flow).items())
            raise LatencyUnknown(
                f"nothing is measured on this machine for {flow} in {precision} with {own}; run "
                f"'{target.measure_command(flow, precision)}', or export one --shape, which is measured by itself"
            )
    _profile(checkpoint, target, missing, "grid", progress)
    return _table(checkpoint, target)


def named_table(checkpoint: Checkpoint, target: Target, plans: Sequence[Plan], progress: Progress) -> Table:
    """This machine's table with a row for a named shape, by its plan in every pair of the target.

    Where the shapes around it are measured it is interpolated; else it is measured, and no other.

    Raises:
        LatencyUnknown: an engine cannot run here.
        BadInput: it refuses the shape.
    """
    missing: list[Pair] = []
    for (flow, precision), plan in zip(target.pairs, plans, strict=True):
        table = local_table(checkpoint)
        shapes = [] if table is None else [row.shape for row in target.rows(table, flow, precision).rows]
        steps = steps_of(checkpoint, load_backend(flow), precision)
        measured = {checkpoint.sized(shape, steps) for shape in shapes}
        uniform = Shape(plan.shape.depth, plan.shape.width)
        if checkpoint.sized(uniform, steps) in measured or _covers(checkpoint, target, (flow, precision)):
            continue
        if target.own_settings(flow):
            remember(checkpoint, [_measured(checkpoint, target, flow, precision, plan, progress)], target.context)
        else:
            missing.append((flow, precision))
    if missing:
        _profile(checkpoint, target, missing, str(Shape(plans[0].shape.depth, plans[0].shape.width)), progress)
    return _table(checkpoint, target)


def measured_shapes(
    checkpoint: Checkpoint, target: Target, pair: Pair, shapes: Sequence[Shape], progress: Progress
) -> tuple[Table, int]:
    """This machine's table with rows for some shapes in a flow and precision, and how many had to be measured."""
    flow, precision = pair
    steps = steps_of(checkpoint, load_backend(flow), precision)
    table = local_table(checkpoint)
    known = set() if table is None else {checkpoint.sized(r.shape, steps) for r in target.rows(table, *pair).rows}
    missing = [shape for shape in shapes if checkpoint.sized(shape, steps) not in known]
    if missing:
        _profile(checkpoint, target, [pair], ",".join(map(str, missing)), progress, aloud=False)
    return _table(checkpoint, target), len(missing)


def remember(checkpoint: Checkpoint, rows: Sequence[Row], context: int) -> None:
    """Add rows to this machine's table in the cache."""
    known = local_table(checkpoint) or empty_table(checkpoint, context)
    write_table(local_table_file(checkpoint), known.merged(rows), force=True)


def _table(checkpoint: Checkpoint, target: Target) -> Table:
    return local_table(checkpoint) or empty_table(checkpoint, target.context)


def _covers(checkpoint: Checkpoint, target: Target, pair: Pair) -> bool:
    """Whether the corners of depth and width are measured, so that every shape lies between rows."""
    table = local_table(checkpoint)
    if table is None:
        return False
    steps = steps_of(checkpoint, load_backend(pair[0]), pair[1])
    known = {checkpoint.sized(row.shape, steps) for row in target.rows(table, *pair).rows}
    return all(checkpoint.sized(shape, steps) in known for shape in corner_shapes(checkpoint))


def _profile(
    checkpoint: Checkpoint, target: Target, pairs: Sequence[Pair], shapes: str, progress: Progress, aloud: bool = True
) -> None:
    for flow, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        precisions = [precision for _, precision in group]
        if aloud:
            what = "" if shapes == "grid" else f" {shapes} in"
            progress.say(
                f"profiling{what} {flow} {', '.join(precisions)} on this machine (first use; remembered afterwards)"
            )
        profile_to(checkpoint, [flow], precisions, shapes, target.workload, target.context, progress=progress)


def _measured(checkpoint: Checkpoint, target: Target, flow: str, precision: str, plan: Plan, progress: Progress) -> Row:
    """The row of one shape in an engine with settings of its own."""
    backend, options = load_backend(flow), target.options(flow)
    own, uniform = target.own_settings(flow), Shape(plan.shape.depth, plan.shape.width)
    named = f"{flow} {precision} with {', '.join(f'{name}={value}' for name, value in own.items())}"
    refused = backend.refusal(plan.subnet(checkpoint.architecture), precision, options)
    if refused:
        raise BadInput(f"the flow '{flow}' refuses the shape {plan.shape}: {refused}")
    unable = backend.cannot_run(precision, options)
    if unable:
        raise LatencyUnknown(
            f"{named} cannot run on this machine, {unable}, so nothing is known of its speed; name the device that it "
            f"is for with --device"
        )
    progress.say(f"measuring {uniform} in {named} on this machine (first use; remembered afterwards)")
    vocabulary = checkpoint.architecture.vocabulary
    with tempfile.TemporaryDirectory(prefix="amoeba-profile-") as work:
        dense, artefact = Path(work) / "dense", Path(work) / "engine"
        dense.mkdir()
        artefact.mkdir()
        lower_plan(checkpoint, plan, backend, precision, options, artefact, dense)
        engine = backend.open(artefact, precision, context=target.context, batch=target.workload.batch)
        timing = measure([engine], vocabulary, target.workload, REPEATS)[0]
        del engine
        memory = peak_memory(flow, precision, artefact, vocabulary, target.workload, target.context)
        size = folder_bytes(artefact)
    times = timing.ttft_ms, timing.tpot_ms, timing.p10, timing.p90, timing.repeats
    row = make_row(flow, precision, uniform, target.workload, times, (memory, size))
    return replace(row, context=target.context, settings=own)
