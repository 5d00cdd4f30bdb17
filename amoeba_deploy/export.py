"""Export: search a shape for a device, extract it, lower it, verify the engine, and bundle it."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Artefact, BuildOptions, Engine
from amoeba_deploy.backends.torch import torch_reference
from amoeba_deploy.bundle import ENGINE, MEASURED, MEASURED_FORMAT, write_manifest
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.extraction.folder import copy_files, other_files
from amoeba_deploy.extraction_store import ExtractionStore
from amoeba_deploy.files import folder_bytes, whole_folder, write_json
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.plan import Plan
from amoeba_deploy.profiles.machine import fingerprint, machine_facts
from amoeba_deploy.profiles.measure import Measurement, Subject, measure
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.selftest import record, write_selftest
from amoeba_deploy.verification import STEPS, Verification, prompt_ids, verify_artefact

MEASURE_SECONDS = 20.0
"""After which the finished engine is not run again, however noisy the machine is."""


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
    options: BuildOptions
    on_this_machine: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Export:
    """A finished bundle: where it is, how it was verified, and what was measured if it was built for this machine."""

    path: Path
    verification: Verification | None
    timing: Measurement | None
    bytes: int
    artefact: Artefact
    cannot_run: str | None
    """Why the engine cannot run on this machine, where it cannot: then it was not verified here."""

    def verified_json(self) -> dict[str, Any] | None:
        """The ``verified`` entry of the JSON output."""
        if self.verification is None:
            return None
        measured = None if self.timing is None else round(self.timing.tpot_ms, 4)
        return self.verification.to_json() | {"measured_tpot_ms": measured}


def export(
    checkpoint: Checkpoint,
    order: Order,
    output: Path,
    *,
    force: bool,
    verify: bool,
    text: Path | None = None,
    phases: Phases,
    progress: Progress,
    store: ExtractionStore | None = None,
) -> Export:
    """Build one bundle; nothing stands under ``output`` until it is complete.

    Verification measures perplexity on ``text``, or on what the subnet writes itself.

    Raises:
        BadInput: the output exists already, or the backend refuses the subnet.
        VerificationFailed: the engine does not compute what the subnet does.
    """
    backend, options = load_backend(order.flow), order.options
    cannot_run = backend.cannot_run(order.precision, options)
    inputs = (checkpoint.path, checkpoint.model.path)
    with whole_folder(output, force, inputs) as folder, tempfile.TemporaryDirectory(prefix="amoeba-dense-") as work:
        engine = folder / ENGINE
        engine.mkdir()
        progress.say(f"building {order.flow} {order.precision} of {order.plan.shape}")
        with phases.phase("build"):
            subnet, artefact = lower_plan(
                checkpoint, order.plan, backend, order.precision, options, engine, Path(work), store
            )
        unfinished = cannot_run or artefact.steps
        verification, timing = None, None
        with phases.phase("verify"):
            if verify and not unfinished:
                progress.say("verifying against transformers")
                verification = verify_artefact(backend, subnet, engine, order.precision, options, text)
        with phases.phase("measure"):
            if order.on_this_machine and not unfinished:
                progress.say("measuring")
                vocabulary, deadline = subnet.architecture.vocabulary, time.perf_counter() + MEASURE_SECONDS

                def timed() -> Engine:
                    return backend.open(engine, order.precision, context=options.context, batch=options.batch)

                timing = measure([Subject(timed)], vocabulary, order.workload, deadline=deadline)[0]
        if unfinished:
            # What the subnet itself gives is what its engine must give on the device.
            opened: Engine = torch_reference(subnet.path)
        else:
            # On one thread it gives the same bits on a machine of any number of cores.
            count = 1 if backend.own_threads else None
            opened = backend.open(engine, order.precision, count, context=options.context, batch=options.batch)
        with phases.phase("bundle"):
            ids = prompt_ids(subnet, options.context)
            opened.reset()
            scale = float(abs(opened.feed(ids)).max())
            tolerance = verification.rounding if verification else backend.tolerance(order.precision) * scale
            steps = min(STEPS, options.context - ids.shape[1])
            write_selftest(folder, record(opened, tuple(ids[0].tolist()), steps, tolerance))
            copy_files(subnet, (subnet.path / "config.json", *other_files(subnet)), folder)
            write_json(folder / MEASURED, _measured(verification, timing, order))
            write_manifest(folder, manifest_facts(checkpoint, order, artefact, verification))
        size = folder_bytes(folder)
    return Export(output, verification, timing, size, artefact, cannot_run)


def manifest_facts(
    checkpoint: Checkpoint, order: Order, artefact: Artefact, verification: Verification | None
) -> dict[str, Any]:
    """The manifest's entries that follow from what was built; nothing of time or measurement."""
    backend, options = load_backend(order.flow), order.options
    toolchain = backend.toolchain()
    return {
        "tool": f"amoeba-deploy {__version__}",
        **checkpoint.origin(),
        "flow": order.flow,
        "precision": order.precision,
        "engine_versions": toolchain.versions,
        "identity": backend.identity(order.precision, options).to_json(),
        "settings": dict(options.settings),
        "context": options.context,
        "workload": {"batch": order.workload.batch, "prompt": order.workload.prompt, "tokens": order.workload.tokens},
        **order.facts,
        "shape": order.plan.shape.to_json(),
        "plan": order.plan.to_json()["blocks"],
        "engine": dict(artefact.facts),
        "verified": None if verification is None else verification.rule(backend.tolerance(order.precision)),
        "steps": [step.to_json() for step in artefact.steps],
        "usage": [command.to_json() for command in artefact.usage],
    }


def _measured(verification: Verification | None, timing: Measurement | None, order: Order) -> dict[str, Any]:
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
