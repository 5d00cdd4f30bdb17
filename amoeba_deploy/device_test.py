"""One run on a device that tells whether an engine works there: built, finished, checked, measured, and reported.

Every item (a precision in a shape) runs in a process of its own, so that an engine which ends its process ends its own
item alone. The report is a latency table (profiles/table.py) whose rows are the items that passed; its header says of
every item what came out. ``amoeba profile import`` reads it.

``tools/test_device.py`` is its command line. As a module it runs one item:
``python -m amoeba_deploy.device_test ITEM.json RESULT.json``.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Backend, check_precision, chosen_settings, options_for, require_toolchain
from amoeba_deploy.bundle import ENGINE, finish_bundle, open_engine, read_manifest, run_selftest, run_step
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint, open_checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.export import Order, Phases, export
from amoeba_deploy.files import folder_bytes, read_json_object, write_json
from amoeba_deploy.lowering import extract_for
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.machine import own_chips
from amoeba_deploy.profiles.measure import Subject, measure, peak_memory
from amoeba_deploy.profiles.profiler import empty_table
from amoeba_deploy.profiles.row import Row, measured_row
from amoeba_deploy.profiles.source import CheckpointSource
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import BlockScores, DepthChoice, Selection, write_selection
from amoeba_deploy.shape import Shape, format_width
from amoeba_deploy.verification import verify_artefact

REPEATS = 5
ITEM_SECONDS = 3600.0
"""After which an item is ended; engines that compile on a small board take many minutes."""
PASSED, REFUSED, FAILED = "passed", "refused", "failed"


@dataclass(frozen=True)
class Settings:
    """What a test is told: the engine, the precisions (all where none), and what is measured."""

    flow: str
    precisions: tuple[str, ...] = ()
    device: str = LOCAL
    workload: Workload = field(default_factory=Workload)
    context: int | None = None
    repeats: int = REPEATS
    engine: Mapping[str, str] = field(default_factory=dict)
    """The engine's own settings."""


@dataclass(frozen=True)
class Item:
    """One engine to test: everything that the process that tests it needs to know."""

    checkpoint: str | None
    flow: str
    precision: str
    depth: int
    width: str
    workload: Workload
    context: int
    repeats: int
    engine: Mapping[str, str]

    @property
    def shape(self) -> Shape:
        """The shape to build."""
        return Shape(self.depth, Fraction(self.width))

    def __str__(self) -> str:
        return f"{self.flow} {self.precision} {self.shape}"

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Item:
        """The item of ``to_json``."""
        return cls(**{**value, "workload": Workload(**value["workload"])})


def checkpoint_of(model: Path | None, work: Path) -> Checkpoint:
    """The checkpoint to build from: the embedded one, a checkpoint's folder, or one made in ``work`` of a plain model.

    A plain model's blocks and units are kept from the first one on: of a test only sizes matter, not quality.
    """
    if model is None or (model / "amoeba.json").is_file() or not (model / "config.json").is_file():
        return open_checkpoint(model)
    opened, chosen, made = ModelFolder(model.absolute()), work / "selection", work / "checkpoint"
    chosen.mkdir()
    made.mkdir()
    sizes = opened.architecture
    order = [-np.arange(n, dtype=np.float32) for n in (sizes.kv_heads, sizes.neurons)]
    means = [np.zeros(n, np.float32) for n in (sizes.heads * sizes.head_dim, sizes.neurons)]
    blocks = (BlockScores(*order, *means),) * sizes.depth
    depths = {depth: DepthChoice(tuple(range(depth)), 0.0) for depth in range(sizes.depth, (sizes.depth - 1) // 2, -1)}
    facts = {"depth_method": "first", "metric": "loss", "seconds": 0.0}
    write_selection(chosen, Selection(opened.digest, depths, blocks, facts))
    return create_checkpoint(str(opened.path), chosen, made, name=model.name)


def whole_and_half(checkpoint: Checkpoint) -> list[Shape]:
    """The full model, and half of its depth and width, as far as the checkpoint goes down."""
    full = checkpoint.architecture.depth
    half = Shape(max(checkpoint.minimum_depth, full // 2), max(checkpoint.minimum_width, Fraction(1, 2)))
    return list(dict.fromkeys([Shape(full, Fraction(1)), half]))


def require_testable(flow: str) -> Backend:
    """The backend of a flow whose engines can be tested on a device.

    Raises:
        BadInput: the flow is not known.
        ToolchainMissing: its toolchain is not installed, or only tools of its own run its engines.
    """
    backend = load_backend(flow)
    if not backend.opens:
        raise ToolchainMissing(
            f"the flow '{flow}' cannot be tested here, for only tools of its own run its engines; build one with "
            f"'amoeba export', measure it by the commands under 'usage' in its manifest, and read their report with "
            f"'amoeba profile import'"
        )
    require_toolchain(backend)
    return backend


def examine_device(
    checkpoint: Checkpoint, path: Path | None, settings: Settings, seconds: float, progress: Progress
) -> Table:
    """Test every precision in every shape; the table's facts hold ``items``, what came out of each.

    Raises:
        BadInput: a flow, precision or setting is not known, or the workload does not fit in the context.
        ToolchainMissing: what ``require_testable`` raises.
    """
    backend = require_testable(settings.flow)
    checkpoint.require_whole_blocks()
    checkpoint.require_scores()
    precisions = tuple(backend.takes.own_name(p) for p in settings.precisions) or backend.precisions()
    for precision in precisions:
        check_precision(backend, precision)
    workload, context = (
        settings.workload,
        settings.workload.context_for(checkpoint.architecture.context, settings.context),
    )
    options_for(backend, context, workload.batch, settings=settings.engine)
    where, rest = None if path is None else str(path.absolute()), (workload, context, settings.repeats, settings.engine)
    items = [
        Item(where, settings.flow, precision, shape.depth, str(shape.width), *rest)
        for precision in precisions
        for shape in whole_and_half(checkpoint)
    ]
    rows, results = [], []
    for item in items:
        progress.say(f"testing {item}")
        result = in_own_process(item, seconds)
        progress.say(f"{item}: {result['outcome']}" + (f" ({result['error']})" if result["error"] else ""))
        row = result.pop("row")
        rows += [] if row is None else [Row(**row)]
        results.append(result)
    table = empty_table(checkpoint, context, settings.device)
    about = {"kind": "device test", "flow": settings.flow, **checkpoint.origin(), "settings": dict(settings.engine)}
    facts = table.facts | {"test": about, "device_facts": device_facts(), "items": results}
    return Table(table.device, table.architecture_digest, facts, ()).merged(rows)


def in_own_process(item: Item, seconds: float) -> dict[str, Any]:
    """Test an item in a process of its own; a process that crashes or hangs is a failure of that item."""
    with tempfile.TemporaryDirectory(prefix="amoeba-device-") as work:
        asked, told = Path(work) / "item.json", Path(work) / "result.json"
        write_json(asked, item.to_json())
        command = [sys.executable, "-m", "amoeba_deploy.device_test", str(asked), str(told)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return _blank(item) | {"error": f"took longer than {seconds:g} s and was ended"}
        if told.is_file():
            return read_json_object(told)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return _blank(item) | {"error": f"its process ended with {how}: {last}"}


def _blank(item: Item) -> dict[str, Any]:
    head = {
        "flow": item.flow,
        "precision": item.precision,
        "depth": item.depth,
        "width": format_width(Fraction(item.width)),
    }
    unknown = dict.fromkeys(("error", "error_code", "verified", "selftest_tokens", "identity", "row"))
    return head | {"outcome": FAILED, "stage": "build", "steps": [], "seconds": {}} | unknown


def examine_item(item: Item, work: Path) -> dict[str, Any]:
    """Build, finish, check and measure one engine in the empty folder ``work``; says how far it came and why not on."""
    found = _blank(item)
    try:
        _go_through(item, work, found)
        found["outcome"] = PASSED
    except AmoebaError as error:
        found |= {"error": str(error).replace(str(work), "BUNDLE"), "error_code": error.exit_code}
    except Exception as error:  # an engine's own; the next item may still work
        said = next(iter(str(error).splitlines()), "no message")
        found |= {"error": f"unexpected {type(error).__name__}: {said}", "error_code": 1}
    return found


def _go_through(item: Item, work: Path, found: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(None if item.checkpoint is None else Path(item.checkpoint))
    backend, phases, quiet = load_backend(item.flow), Phases(), Progress(quiet=True)
    found["seconds"] = phases.seconds
    options = options_for(backend, item.context, item.workload.batch, settings=item.engine)
    found["identity"] = backend.identity(item.precision, options).to_json()
    steps = CheckpointSource(checkpoint).steps(backend, item.precision)
    refused = backend.refusal(checkpoint.sized(item.shape, steps), item.precision, options)
    if refused:
        found["outcome"] = REFUSED
        raise BadInput(f"the flow '{item.flow}' refuses {item.shape} in {item.precision}: {refused}")
    plan = checkpoint.plan(item.shape, steps)
    facts = {"device": LOCAL, "budget": None, "predicted": None, "quality": None, "table": None}
    order = Order(plan, item.flow, item.precision, item.workload, options, False, facts)
    bundle = work / "bundle"
    done = export(checkpoint, order, bundle, force=False, verify=True, phases=phases, progress=quiet)
    found["verified"] = None if done.verification is None else done.verification.to_json()
    found["stage"] = "finish"

    def step(entry: Mapping[str, str]) -> None:
        record = dict(entry)
        found["steps"].append(record)
        with phases.phase("steps"):
            run_step(bundle, entry)
        record["done"] = "yes"

    finish_bundle(bundle, step)
    if done.verification is None and done.cannot_run is None:
        found["stage"] = "verify"
        with phases.phase("verify"):
            (dense := work / "dense").mkdir()
            subnet = extract_for(checkpoint, plan, backend, item.precision, options, dense)
            verified = verify_artefact(backend, subnet, bundle / ENGINE, item.precision, options)
        found["verified"] = verified.to_json()
    found["stage"] = "selftest"
    manifest = read_manifest(bundle)
    with phases.phase("selftest"):
        found["selftest_tokens"] = run_selftest(bundle, manifest)
    found["stage"] = "measure"
    vocabulary, artefact = checkpoint.architecture.vocabulary, bundle / ENGINE
    with phases.phase("measure"):
        subject = Subject(partial(open_engine, bundle, manifest))
        timing = measure([subject], vocabulary, item.workload, item.repeats)[0]
    found["stage"] = "memory"
    with phases.phase("memory"):
        peak = peak_memory(item.flow, item.precision, artefact, vocabulary, item.workload, item.context)
    size = folder_bytes(artefact)
    names = item.flow, item.precision, item.shape
    settings = chosen_settings(backend, options)
    row = measured_row(*names, item.workload, timing, peak, size, context=item.context, settings=settings)
    found |= {"stage": "done", "row": asdict(row)}


def device_facts() -> dict[str, Any]:
    """What is known of the machine beside its processor: system, chips, GPUs with their drivers, JetPack's release."""
    facts: dict[str, Any] = {"system": platform.platform(), "python": platform.python_version()}
    facts["chips"] = list(own_chips())
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]):
        told = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["gpus"] = told.stdout.strip().splitlines() if told.returncode == 0 else []
    release = Path("/etc/nv_tegra_release")
    if release.is_file():
        facts["jetson"] = release.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
    return facts


def failure(items: Sequence[Mapping[str, Any]]) -> AmoebaError | None:
    """What a test ends with: nothing where all that the engine takes passed, else an error with its exit code."""
    failed = [item for item in items if item["outcome"] == FAILED]
    passed = [item for item in items if item["outcome"] == PASSED]
    if not failed and passed:
        return None
    first = (failed or list(items))[0]
    said = f"{len(failed)} of {len(items)} items failed" if failed else "the engine refuses every shape"
    said += f"; the first: {first['flow']} {first['precision']} {first['depth']}x{first['width']}: {first['error']}"
    codes = {item["error_code"] for item in failed or items}
    if VerificationFailed.exit_code in codes:
        return VerificationFailed(said)
    kinds = {kind.exit_code: kind for kind in (BadInput, ToolchainMissing)}
    return kinds.get(codes.pop(), AmoebaError)(said) if len(codes) == 1 else AmoebaError(said)


def main(arguments: Sequence[str]) -> None:
    """Test one item, as ``in_own_process`` asks for it."""
    asked, told = map(Path, arguments)
    with tempfile.TemporaryDirectory(prefix="amoeba-item-") as work:
        result = examine_item(Item.of(read_json_object(asked)), Path(work))
    part = told.with_suffix(".part")
    write_json(part, result)
    part.replace(told)


if __name__ == "__main__":
    main(sys.argv[1:])
