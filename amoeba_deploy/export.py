"""Export: search a shape for a device, extract it, lower it, verify the engine, and bundle it."""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__
from amoeba_deploy.backends import load_backend
from amoeba_deploy.bundle import ENGINE, MEASURED, MEASURED_FORMAT, write_manifest
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.files import whole_folder, write_json
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.plan import Plan
from amoeba_deploy.profiles.machine import fingerprint, machine_facts
from amoeba_deploy.profiles.measure import Timing, measure
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.selftest import record, write_selftest
from amoeba_deploy.verification import STEPS, Verification, prompt_ids, verify_artefact

LOCAL_REPEATS = 9


@dataclass
class Phases:
    """Seconds that each phase of an export took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)


@dataclass(frozen=True)
class Order:
    """What to build: the plan, the engine, and the facts for the manifest (device, budget, prediction, quality)."""

    plan: Plan
    flow: str
    precision: str
    workload: Workload
    context: int
    on_this_machine: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Export:
    """A finished bundle: where it is, how it was verified, and what was measured if it was built for this machine."""

    path: Path
    verification: Verification | None
    timing: Timing | None
    bytes: int

    def verified_json(self) -> dict[str, Any] | None:
        """The ``verified`` entry of the JSON output."""
        if self.verification is None:
            return None
        measured = None if self.timing is None else round(self.timing.tpot_ms, 4)
        return self.verification.to_json() | {"measured_tpot_ms": measured}


def export(
    checkpoint: Checkpoint, order: Order, output: Path, *, force: bool, verify: bool, phases: Phases, progress: Progress
) -> Export:
    """Build one bundle; nothing stands under ``output`` until it is complete.

    Raises:
        BadInput: the output exists already, or the backend refuses the subnet.
        VerificationFailed: the engine does not compute what the subnet does.
    """
    backend = load_backend(order.flow)
    inputs = (checkpoint.path, checkpoint.model.path)
    with whole_folder(output, force, inputs) as folder, tempfile.TemporaryDirectory(prefix="amoeba-dense-") as work:
        engine = folder / ENGINE
        engine.mkdir()
        progress.say(f"building {order.flow} {order.precision} of {order.plan.shape}")
        with phases.phase("build"):
            subnet = lower_plan(checkpoint, order.plan, backend, order.precision, order.context, engine, Path(work))
        verification, timing = None, None
        with phases.phase("verify"):
            if verify:
                progress.say("verifying against transformers")
                verification = verify_artefact(backend, subnet, engine, order.precision, order.context)
        opened = backend.open(engine, order.precision)
        with phases.phase("measure"):
            if order.on_this_machine:
                progress.say("measuring")
                timing = measure([opened], subnet.architecture.vocabulary, order.workload, LOCAL_REPEATS)[0]
        with phases.phase("bundle"):
            ids = prompt_ids(subnet, order.context)
            opened.reset()
            scale = float(abs(opened.feed(ids)).max())
            tolerance = verification.rounding if verification else backend.tolerance(order.precision) * scale
            steps = min(STEPS, order.context - ids.shape[1])
            write_selftest(folder, record(opened, tuple(ids[0].tolist()), steps, tolerance))
            for file in subnet.tokenizer_files():
                shutil.copyfile(file, folder / file.name)
            write_json(folder / MEASURED, _measured(verification, timing, order))
            write_manifest(folder, manifest_facts(checkpoint, order))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Export(output, verification, timing, size)


def manifest_facts(checkpoint: Checkpoint, order: Order) -> dict[str, Any]:
    """The manifest's entries that follow from what was built; nothing of time or measurement."""
    toolchain = load_backend(order.flow).toolchain()
    return {
        "tool": f"amoeba-deploy {__version__}",
        **checkpoint.origin(),
        "flow": order.flow,
        "precision": order.precision,
        "engine_versions": toolchain.versions,
        "context": order.context,
        "workload": {"batch": order.workload.batch, "prompt": order.workload.prompt, "tokens": order.workload.tokens},
        **order.facts,
        "shape": order.plan.shape.to_json(),
        "plan": order.plan.to_json()["blocks"],
        "steps": [],
    }


def _measured(verification: Verification | None, timing: Timing | None, order: Order) -> dict[str, Any]:
    return {
        "format": MEASURED_FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_facts() | {"fingerprint": fingerprint()},
        "verified": None if verification is None else verification.to_json(),
        "timing": None
        if timing is None
        else {
            "ttft_ms": round(timing.ttft_ms, 4),
            "tpot_ms": round(timing.tpot_ms, 4),
            "p10": round(timing.p10, 4),
            "p90": round(timing.p90, 4),
            "repeats": timing.repeats,
            "prompt": order.workload.prompt,
        },
    }
