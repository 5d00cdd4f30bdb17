"""Engines of other packages, as tests need them: entry points without a package, and flows that fail on purpose."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amoeba_deploy import backends
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import Artefact, BuildOptions, Step, Toolchain
from amoeba_deploy.backends.takes import Takes
from amoeba_deploy.backends.torch import TorchBackend, TorchEngine
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder

FINISH = "import pathlib, sys; pathlib.Path('engine', 'finished.bin').write_text(sys.argv[1])"
"""What a step of ``Fake`` runs in a bundle's folder."""


class Fake(TorchBackend):
    """PyTorch under another name: fp32, and whatever else an attribute says."""

    def __init__(self, flow: str = "fake", **changes: Any) -> None:
        self.flow = flow  # type: ignore[misc]
        self.takes = Takes(flow, ("fp32", "bf16"), any_trait=True, **changes.pop("takes", {}))  # type: ignore[misc]
        self.missing: tuple[str, ...] = ()
        self.reason: str | None = None
        self.steps: tuple[Step, ...] = ()
        self.limit: float | None = None
        self.broken: Exception | None = None
        for name, value in changes.items():
            setattr(self, name, value)

    def toolchain(self) -> Toolchain:
        return Toolchain({"fake-runtime": "1.0"}, self.missing, f"pip install {self.flow}-runtime")

    def cannot_run(self, _precision: str, _options: BuildOptions) -> str | None:
        return self.reason

    def refusal(self, subnet: Architecture, precision: str, _options: BuildOptions) -> str | None:
        return self.takes.refusal(subnet, precision)

    def tolerance(self, precision: str) -> float:
        return super().tolerance(precision) if self.limit is None else self.limit

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        if self.broken is not None:
            raise self.broken
        return Artefact(super().lower(model, output, precision, options).folder, precision, self.steps)

    def open(self, artefact: Path, precision: str, threads: int | None = None, **options: Any) -> TorchEngine:
        if self.steps and not (artefact / "finished.bin").is_file():
            raise BadInput(f"{artefact}: has no finished.bin")
        return super().open(artefact, precision, threads, **options)


def finishing(word: str = "done", program: str = sys.executable) -> Step:
    """A step that writes a file into a bundle's engine."""
    return Step("compile the engine", (program, "-c", FINISH, word), needs="a compiler")


def point(name: str, load: Callable[[], Any]) -> Any:
    """An entry point of a package that is not there."""
    return SimpleNamespace(name=name, value=f"{name}_package:BACKEND", dist=None, load=load)


def offer(monkeypatch: pytest.MonkeyPatch, *points: Any) -> None:
    """Let other packages offer flows, beside ``torch`` and ``onnx`` alone of our own."""
    own = {flow: module for flow, module in backends._own_modules().items() if flow in ("torch", "onnx")}
    monkeypatch.setattr(backends, "_own_modules", lambda: own)
    monkeypatch.setattr(backends, "entry_points", lambda *, group: list(points) if group == backends.GROUP else [])


def offer_fake(monkeypatch: pytest.MonkeyPatch, flow: str = "fake", **changes: Any) -> Fake:
    """Offer one such flow; returns its backend."""
    made = Fake(flow, **changes)
    offer(monkeypatch, point(flow, lambda: made))
    return made
