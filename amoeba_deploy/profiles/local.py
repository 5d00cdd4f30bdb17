"""The device ``local``: this machine, profiled on first use and remembered in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import require_toolchain
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import check_new_file
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.profiles.profiler import (
    BUDGET_SECONDS,
    LOCAL,
    REPEATS,
    corner_shapes,
    default_shapes,
    local_table,
    local_table_file,
    profile,
    refusal_of,
)
from amoeba_deploy.profiles.table import Table, write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape


def ready_combinations(flows: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Flow and precision pairs to profile: those asked for, or those of the flows that the device ``local`` lists.

    Raises:
        ToolchainMissing: a flow asked for, or every flow, lacks its toolchain.
        BadInput: no flow has a precision asked for.
    """
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


def shapes_named(checkpoint: Checkpoint, text: str) -> list[Shape]:
    """The shapes of ``--shapes``: ``corners``, ``grid``, or a list."""
    if text in ("corners", "grid"):
        return corner_shapes(checkpoint) if text == "corners" else default_shapes(checkpoint)
    shapes = [Shape.parse(part) for part in text.split(",")]
    for shape in shapes:
        checkpoint.plan(shape)
    return shapes


def profile_to(
    checkpoint: Checkpoint,
    flows: Sequence[str],
    precisions: Sequence[str],
    shapes: str,
    workload: Workload,
    context: int | None,
    *,
    repeats: int = REPEATS,
    budget: float = BUDGET_SECONDS,
    output: Path | None = None,
    device: str = LOCAL,
    force: bool = False,
    progress: Progress,
) -> tuple[Table, Path]:
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
    checkpoint.require_whole_blocks()
    checkpoint.require_scores()
    pairs = ready_combinations(flows, precisions)
    positions = workload.context_for(checkpoint.architecture.context, context)
    wanted = shapes_named(checkpoint, shapes)
    if not precisions:
        pairs = _without_refused(checkpoint, pairs, wanted, positions, workload.batch, progress)
    table = profile(
        checkpoint, pairs, wanted, workload, positions, repeats=repeats, budget=budget, device=device, progress=progress
    )
    if output is not None:
        write_table(output, table, force)
        return table, output
    known = local_table(checkpoint)
    together = known.merged(table.rows) if known else table
    file = local_table_file(checkpoint)
    write_table(file, together, force=True)
    return together, file


def _without_refused(
    checkpoint: Checkpoint,
    pairs: Sequence[tuple[str, str]],
    shapes: Sequence[Shape],
    context: int,
    batch: int,
    progress: Progress,
) -> list[tuple[str, str]]:
    """The pairs that can be measured here, where nobody named the others; those are said.

    Raises:
        BadInput: none can.
    """
    kept = []
    for flow, precision in pairs:
        refused = refusal_of(checkpoint, flow, precision, shapes, context, batch)
        if refused:
            progress.say(f"left out {flow} {precision}: it refuses {refused}")
        else:
            kept.append((flow, precision))
    if not kept:
        flows = ", ".join(dict.fromkeys(flow for flow, _ in pairs))
        raise BadInput(f"no precision of {flows} can be measured here; the reasons stand above")
    return kept


def table_with(
    checkpoint: Checkpoint, pairs: Sequence[tuple[str, str]], workload: Workload, context: int, progress: Progress
) -> Table:
    """This machine's table with rows for all pairs under a workload; what is missing is measured now."""
    table = local_table(checkpoint)
    missing = [pair for pair in pairs if table is None or pair not in table.flows(workload)]
    for flow, group in itertools.groupby(missing, key=lambda pair: pair[0]):
        precisions = [precision for _, precision in group]
        progress.say(f"profiling {flow} {', '.join(precisions)} on this machine (first use; remembered afterwards)")
        table, _ = profile_to(checkpoint, [flow], precisions, "grid", workload, context, progress=progress)
    assert table is not None, "a request names at least one flow"
    return table
