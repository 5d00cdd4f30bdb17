"""The profiler: builds engines of some shapes on this machine, measures them in turn, and fills a latency table.

A few shapes are measured (by default the corners and as many between them as make a dozen); the table predicts the
rest. Tables of this machine are kept in the cache folder, one for each machine and model architecture.
"""

from __future__ import annotations

import datetime
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from amoeba_deploy import __version__
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import (
    BuildOptions,
    check_precision,
    chosen_settings,
    options_for,
)
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import cache_folder, folder_bytes
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.machine import conditions, fingerprint, machine_facts, threads
from amoeba_deploy.profiles.measure import OPEN_SHARE, ROOM_SHARE, Peak, Subject, measure, peak_memory
from amoeba_deploy.profiles.row import Row, measured_row
from amoeba_deploy.profiles.sizes import SIZES, sizes_to_json
from amoeba_deploy.profiles.source import Source
from amoeba_deploy.profiles.table import Table, read_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape

BUDGET_SECONDS = 240.0
RUNS_SHARE = 0.5
"""Of the budget, what is left for runs however long the engines took to build."""
OWN_BYTES = 1e9
"""What a process that runs an engine takes of memory beside the engine, at most."""
DISK_SHARE = 0.5
"""Of the free disk, what artefacts that are measured together may take."""


class Modelled(Protocol):
    """What a table can be of."""

    @property
    def architecture(self) -> Architecture:
        """Sizes of the full model."""
        ...


Pair = tuple[str, str]
"""A flow and a precision."""


@dataclass(frozen=True)
class Item:
    """One engine to measure."""

    flow: str
    precision: str
    shape: Shape
    options: BuildOptions

    def __str__(self) -> str:
        return f"{self.flow} {self.precision} {self.shape}"


def local_table_file(source: Modelled) -> Path:
    """Where this machine's measurements of this architecture are cached."""
    return cache_folder() / "tables" / f"{fingerprint()}-{source.architecture.digest[:16]}.json"


def local_table(source: Modelled) -> Table | None:
    """This machine's cached rows of engines that have not changed their versions since, or None."""
    file = local_table_file(source)
    if not file.exists():
        return None
    table = read_table(file)
    known, now = table.facts.get("engines", {}), engine_versions()
    if known.get("amoeba-deploy") != now["amoeba-deploy"]:
        return None

    def unchanged(flow: str) -> bool:
        with suppress(AmoebaError):
            return all(known.get(name) == now[name] for name in load_backend(flow).toolchain().versions)
        return False

    return replace(table, rows=tuple(row for row in table.rows if unchanged(row.flow)))


def engine_versions() -> dict[str, str]:
    """Versions of all engines' packages that are installed, and of the tool."""
    from amoeba_deploy.backends import flow_names

    versions: dict[str, str] = {"amoeba-deploy": __version__}
    for flow in flow_names():
        with suppress(AmoebaError):  # another package's flow that cannot be loaded
            versions |= load_backend(flow).toolchain().versions
    return dict(sorted(versions.items()))


def empty_table(source: Modelled, context: int, device: str = LOCAL) -> Table:
    """A table with this machine's header and no rows; ``device`` is what this machine is called in the catalogue."""
    facts = {
        "machine": machine_facts() | {"fingerprint": fingerprint(), "threads": threads()},
        "engines": engine_versions(),
        "tool": f"amoeba-deploy {__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "context": context,
        SIZES: sizes_to_json(source.architecture),
    }
    return Table(device, source.architecture.digest, facts, ())


def refusal_of(source: Source, flow: str, precision: str, shapes: Sequence[Shape], options: BuildOptions) -> str | None:
    """The first of the shapes that cannot be measured here in a flow and precision, with the reason, or None."""
    backend = load_backend(flow)
    for shape in shapes:
        sizes = source.sized(shape, source.steps(backend, precision))
        refused = backend.refusal(sizes, precision, options) or backend.cannot_run(precision, options)
        if refused:
            return f"the shape {shape}: {refused}"
    return None


def profile(
    source: Source,
    wanted: Mapping[Pair, Sequence[Shape]],
    workload: Workload,
    context: int,
    *,
    repeats: int | None = None,
    budget: float = BUDGET_SECONDS,
    device: str = LOCAL,
    settings: Mapping[str, str] | None = None,
    progress: Progress,
) -> Table:
    """Measure shapes on this machine.

    Args:
        source: what the engines are built from.
        wanted: the shapes to measure in each flow and precision.
        workload: batch, prompt and tokens.
        context: positions that the engines provide for.
        repeats: runs of each engine after its warm-up; as many as its medians need where left out.
        budget: seconds after which no further run begins, building included; half of it is left for runs in any case.
        device: the name that the table gives this machine.
        settings: of the engines' own, where a single flow is measured.
        progress: told of every build and run.

    Raises:
        BadInput: a flow has no such precision or setting, or refuses a shape.
    """
    items = []
    for (flow, precision), shapes in wanted.items():
        backend = load_backend(flow)
        check_precision(backend, precision)
        options = options_for(backend, context, workload.batch, settings=settings)
        refused = refusal_of(source, flow, precision, shapes, options)
        if refused:
            raise BadInput(f"the flow '{flow}' refuses {refused}")
        items += [Item(flow, precision, shape, options) for shape in shapes]
    began, before, table = time.perf_counter(), conditions(), empty_table(source, context, device)
    rows: list[Row] = []
    random.Random(0).shuffle(items)  # so that batches differ in nothing but their turn
    for batch in _batches(source, items):
        done = len(rows)
        share = budget * len(batch) / len(items)
        deadline = began + budget * (done + len(batch)) / len(items)
        rows += measured_rows(source, batch, workload, repeats, deadline, progress, RUNS_SHARE * share)
    run = {
        "date": table.facts["date"],
        "engines": [f"{flow} {precision}" for flow, precision in wanted],
        "rows": len(rows),
        "seconds": round(time.perf_counter() - began, 1),
        "budget_seconds": budget,
        "before": before,
        "after": conditions(),
    }
    return replace(table, facts=table.facts | {"runs": [run]}).merged(rows)


def _batches(source: Source, items: Sequence[Item]) -> list[list[Item]]:
    """The items in groups whose artefacts lie on the disk together; one at least is in each."""
    room = DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free
    batches: list[list[Item]] = []
    taken = room
    for item in items:
        storage = load_backend(item.flow).storage(item.precision)
        # While it is built, its dense subnet lies beside it.
        need = 3 * storage.weight_bytes(source.sized(item.shape))
        if taken + need > room:
            batches.append([])
            taken = 0.0
        batches[-1].append(item)
        taken += need
    return batches


def measured_rows(
    source: Source,
    items: Sequence[Item],
    workload: Workload,
    repeats: int | None,
    deadline: float,
    progress: Progress,
    least: float = 0.0,
) -> list[Row]:
    """Build, weigh and measure engines together; one row for each, in their order.

    No run begins after ``deadline``, a ``time.perf_counter()``, nor before ``least`` seconds of measuring are over.
    """
    import psutil

    vocabulary = source.architecture.vocabulary
    with tempfile.TemporaryDirectory(prefix="amoeba-profile-") as work:
        folders = [Path(work) / str(number) for number in range(len(items))]
        progress.say(f"building {len(items)} engines: {_named(items)}")
        with progress.bar("build", len(items)) as step:
            for item, folder in zip(items, folders, strict=True):
                _build(source, item, folder)
                step(str(item))
        sizes = [folder_bytes(folder) for folder in folders]
        room = ROOM_SHARE * psutil.virtual_memory().available
        with progress.bar("memory", len(items)) as step:

            def peak_of(item: Item, folder: Path) -> Peak:
                found = peak_memory(item.flow, item.precision, folder, vocabulary, workload, item.options.context)
                step(str(item))
                return found

            # Most of it is one core importing libraries, and no time is measured: so as many at once as fit.
            fit = room / (OPEN_SHARE * max(sizes) + OWN_BYTES)
            with ThreadPoolExecutor(max(1, min(int(fit), os.cpu_count() or 1))) as pool:
                peaks = list(pool.map(peak_of, items, folders))
        deadline = max(deadline, time.perf_counter() + least)
        left = deadline - time.perf_counter()
        progress.say(f"measuring {len(items)} engines in turn, for {max(left, 0):.0f} s at most if that is enough")
        subjects = [
            Subject(partial(_open, item, folder), round(OPEN_SHARE * size))
            for item, folder, size in zip(items, folders, sizes, strict=True)
        ]
        with progress.bar("measure", len(items)) as step:
            timings = measure(subjects, vocabulary, workload, repeats, deadline, step, room=room)
    rows = []
    for item, timing, peak, size in zip(items, timings, peaks, sizes, strict=True):
        settings = chosen_settings(load_backend(item.flow), item.options)
        names = item.flow, item.precision, item.shape
        context = item.options.context
        rows.append(measured_row(*names, workload, timing, peak, size, context=context, settings=settings))
    return rows


def _named(items: Sequence[Item]) -> str:
    return ", ".join(sorted({f"{item.flow} {item.precision}" for item in items}))


def _build(source: Source, item: Item, artefact: Path) -> None:
    backend = load_backend(item.flow)
    artefact.mkdir()
    with tempfile.TemporaryDirectory(prefix="amoeba-dense-") as dense:
        source.lower(item.shape, backend, item.precision, item.options, artefact, Path(dense))


def _open(item: Item, artefact: Path) -> Any:
    options = item.options
    return load_backend(item.flow).open(artefact, item.precision, context=options.context, batch=options.batch)
