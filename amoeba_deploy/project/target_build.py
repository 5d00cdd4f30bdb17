"""One target: the first of its flows and precisions that can be built here and fits, built into the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import check_precision
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.exported import export_answer
from amoeba_deploy.extraction_store import ExtractionStore
from amoeba_deploy.profiles.device import LOCAL, load_device
from amoeba_deploy.profiles.machine import fingerprint
from amoeba_deploy.profiles.shipped import shipped_tables
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.asked import search_options, shape_of
from amoeba_deploy.project.cache import BuildCache, Entry
from amoeba_deploy.project.config import Loaded, Target
from amoeba_deploy.project.figures import figures_of, machines_of
from amoeba_deploy.project.inputs import Inputs
from amoeba_deploy.request import Answer, Request
from amoeba_deploy.space import Space


@dataclass(frozen=True)
class Preference:
    """A flow and a precision to try; None leaves the choice to the device's file."""

    flow: str | None
    precision: str | None

    def __str__(self) -> str:
        return f"{self.flow or 'any flow'} {self.precision or 'in its first precision'}"


def preferences(target: Target) -> Iterator[Preference]:
    """What to try in turn: the flows in their order, each in the precisions that it has in theirs."""
    flows: Sequence[str | None] = target.flow or [None]
    precisions: Sequence[str | None] = target.precision or [None]
    for flow in flows:
        for precision in precisions:
            if flow is None or precision is None or _has(flow, precision):
                yield Preference(flow, precision)


def _without(target: Target) -> list[str]:
    """The flows that have none of the target's precisions."""
    if not target.precision:
        return []
    return [flow for flow in target.flow if not any(_has(flow, precision) for precision in target.precision)]


def _has(flow: str, precision: str) -> bool:
    backend = load_backend(flow)
    return backend.takes.own_name(precision) in backend.precisions()


def build_target(
    checkpoint: Checkpoint,
    loaded: Loaded,
    name: str,
    inputs: Inputs,
    cache: BuildCache,
    store: ExtractionStore,
    progress: Progress,
) -> Entry:
    """Build a target into the cache, whose lock of the target's key is held.

    Raises:
        AmoebaError: none of its flows and precisions can be built here and fits, or the build fails.
    """
    target = loaded.targets[name]
    request, answer, passed = _first_that_fits(checkpoint, loaded, target, progress)
    text = None if target.verify_text is None else loaded.path(target.verify_text)
    with tempfile.TemporaryDirectory(prefix="amoeba-build-") as work:
        bundle = Path(work, "bundle")
        done = export_answer(
            checkpoint,
            request,
            bundle,
            force=False,
            verify=target.verify,
            text=text,
            answer=answer,
            store=store,
        )
        facts = {
            "target": name,
            "inputs": dict(inputs.values),
            "figures": figures_of(bundle, _machines(request, loaded, target)),
            "remarks": [*passed, *answer.remarks],
            "cannot_run": done.export.cannot_run,
            "seconds": done.seconds,
        }
        return cache.store(inputs.key, bundle, facts)


def _first_that_fits(
    checkpoint: Checkpoint, loaded: Loaded, target: Target, progress: Progress
) -> tuple[Request, Answer, list[str]]:
    """The answer of the first preference that has one, and why earlier ones were passed over."""
    options, shape = search_options(loaded, target), shape_of(loaded, target)
    load_device(options["device"])
    tried = list(preferences(target))
    if not tried:
        for flow in target.flow:
            check_precision(load_backend(flow), target.precision[0])
    failures: list[tuple[Preference, AmoebaError]] = []
    for wanted in tried:
        asked = {**options, "flow": wanted.flow, "precision": wanted.precision}
        try:
            request = Request.of(Space.of_checkpoint(checkpoint), asked, progress, shape)
            answer = request.answer()
        except AmoebaError as error:
            failures.append((wanted, error))
            continue
        passed = [f"passed over {flow}: it has none of these precisions" for flow in _without(target)]
        return request, answer, passed + [f"passed over {other}: {error}" for other, error in failures]
    first = failures[0][1]
    if len(failures) == 1:
        raise first
    said = "; ".join(f"{wanted}: {error}" for wanted, error in failures)
    raise type(first)(f"none of its flows and precisions can be built: {said}")


def _machines(request: Request, loaded: Loaded, target: Target) -> Sequence[str]:
    """The fingerprints of the machines whose measurements a request's latencies come from."""
    device = request.target.device.name
    if target.table:
        return machines_of([loaded.path(file) for file in target.table])
    if device == LOCAL:
        return [fingerprint()]
    return machines_of(shipped_tables(device, request.space.architecture.digest))
