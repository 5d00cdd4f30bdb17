"""The profiler: builds engines of some shapes on this machine, measures them in turn, and fills a latency table.

A few shapes are measured (by default the corners and middles of depth and width); the table interpolates the rest.
Tables of this machine are kept in the cache folder, one for each machine and model architecture.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Backend, Engine, check_precision, options_for
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import cache_folder, folder_bytes
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.plan import Steps
from amoeba_deploy.profiles.machine import fingerprint, machine_facts, threads
from amoeba_deploy.profiles.measure import Timing, measure, peak_memory
from amoeba_deploy.profiles.table import Row, Table, make_row, read_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape

LOCAL = "local"
REPEATS = 9
BUDGET_SECONDS = 300.0


@dataclass(frozen=True)
class Built:
    """One engine under measurement."""

    flow: str
    precision: str
    shape: Shape
    folder: Path
    engine: Engine


def _ends_and_middle(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys((values[0], values[len(values) // 2], values[-1])))


def default_shapes(checkpoint: Checkpoint) -> list[Shape]:
    """Largest, middle and smallest depth, each at the widest, middle and narrowest width."""
    shapes = checkpoint.shapes()
    depths = sorted({shape.depth for shape in shapes}, reverse=True)
    widths = sorted({shape.width for shape in shapes}, reverse=True)
    return [Shape(depth, width) for depth in _ends_and_middle(depths) for width in _ends_and_middle(widths)]


def corner_shapes(checkpoint: Checkpoint) -> list[Shape]:
    """Largest and smallest depth at the widest and the narrowest width."""
    shapes = checkpoint.shapes()
    depths, widths = {shape.depth for shape in shapes}, {shape.width for shape in shapes}
    corners = [(d, w) for d in (max(depths), min(depths)) for w in (max(widths), min(widths))]
    return [Shape(*corner) for corner in dict.fromkeys(corners)]


def local_table_file(checkpoint: Checkpoint) -> Path:
    """Where this machine's measurements of this architecture are cached."""
    return cache_folder() / "tables" / f"{fingerprint()}-{checkpoint.architecture.digest[:16]}.json"


def local_table(checkpoint: Checkpoint) -> Table | None:
    """This machine's cached table, unless there is none or an engine has changed its version since."""
    file = local_table_file(checkpoint)
    if not file.exists():
        return None
    table = read_table(file)
    return table if table.facts.get("engines") == engine_versions() else None


def engine_versions() -> dict[str, str]:
    """Versions of all engines' packages that are installed, and of the tool."""
    from amoeba_deploy.backends import flow_names

    versions: dict[str, str] = {"amoeba-deploy": __version__}
    for flow in flow_names():
        with suppress(AmoebaError):  # another package's flow that cannot be loaded
            versions |= load_backend(flow).toolchain().versions
    return dict(sorted(versions.items()))


def empty_table(checkpoint: Checkpoint, context: int, device: str = LOCAL) -> Table:
    """A table with this machine's header and no rows; ``device`` is what this machine is called in the catalogue."""
    facts = {
        "machine": machine_facts() | {"fingerprint": fingerprint(), "threads": threads()},
        "engines": engine_versions(),
        "tool": f"amoeba-deploy {__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "context": context,
    }
    return Table(device, checkpoint.architecture.digest, facts, ())


def _build(
    checkpoint: Checkpoint, flow: str, precision: str, shape: Shape, context: int, batch: int, folder: Path
) -> Built:
    backend = load_backend(flow)
    artefact, work = folder / "engine", folder / "dense"
    artefact.mkdir(parents=True)
    work.mkdir()
    plan = checkpoint.plan(shape, steps_of(checkpoint, backend, precision))
    lower_plan(checkpoint, plan, backend, precision, options_for(backend, context, batch), artefact, work)
    return Built(flow, precision, shape, artefact, backend.open(artefact, precision, context=context, batch=batch))


def steps_of(checkpoint: Checkpoint, backend: Backend, precision: str) -> Steps:
    """The numbers of heads and neurons of a checkpoint's subnets that an engine takes."""
    return backend.takes.steps(checkpoint.architecture, checkpoint.multiple, precision, checkpoint.bias)


def _row(built: Built, timing: Timing, vocabulary: int, workload: Workload, context: int) -> Row:
    memory = peak_memory(built.flow, built.precision, built.folder, vocabulary, workload, context)
    size = folder_bytes(built.folder)
    return make_row(built.flow, built.precision, built.shape, workload, astuple(timing), (memory, size))


def refusal_of(
    checkpoint: Checkpoint, flow: str, precision: str, shapes: Sequence[Shape], context: int, batch: int
) -> str | None:
    """The first of the shapes that cannot be measured here in a flow and precision, with the reason, or None."""
    backend = load_backend(flow)
    options = options_for(backend, context, batch)
    for shape in shapes:
        sizes = checkpoint.sized(shape, steps_of(checkpoint, backend, precision))
        refused = backend.refusal(sizes, precision, options) or backend.cannot_run(precision, options)
        if refused:
            return f"the shape {shape}: {refused}"
    return None


def profile(
    checkpoint: Checkpoint,
    combinations: Sequence[tuple[str, str]],
    shapes: Sequence[Shape],
    workload: Workload,
    context: int,
    *,
    repeats: int = REPEATS,
    budget: float = BUDGET_SECONDS,
    device: str = LOCAL,
    progress: Progress,
) -> Table:
    """Measure shapes on this machine.

    Args:
        checkpoint: what the engines are built from.
        combinations: (flow, precision) pairs.
        shapes: the shapes to measure in each of them.
        workload: batch, prompt and tokens.
        context: positions that the engines provide for.
        repeats: runs of each engine after its warm-up.
        device: the name that the table gives this machine.
        budget: seconds after which no further repeat begins; three are always done.
        progress: told of every build and run.

    Raises:
        BadInput: a flow has no such precision, or refuses a shape.
    """
    for flow, precision in combinations:
        check_precision(load_backend(flow), precision)
        refused = refusal_of(checkpoint, flow, precision, shapes, context, workload.batch)
        if refused:
            raise BadInput(f"the flow '{flow}' refuses {refused}")
    table = empty_table(checkpoint, context, device)
    vocabulary = checkpoint.architecture.vocabulary
    deadline = time.perf_counter() + budget
    with tempfile.TemporaryDirectory(prefix="amoeba-profile-") as work:
        wanted = [(flow, precision, shape) for flow, precision in combinations for shape in shapes]
        with progress.bar("build", len(wanted)) as step:
            built = []
            for number, (flow, precision, shape) in enumerate(wanted):
                folder = Path(work) / str(number)
                built.append(_build(checkpoint, flow, precision, shape, context, workload.batch, folder))
                step()
        with progress.bar("measure", len(built) * repeats) as step:
            timings = measure([b.engine for b in built], vocabulary, workload, repeats, deadline, step)
        with progress.bar("memory", len(built)) as step:
            rows = []
            for one, timing in zip(built, timings, strict=True):
                rows.append(_row(one, timing, vocabulary, workload, context))
                step()
    return table.merged(rows)
