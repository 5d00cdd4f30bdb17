"""The interface that every backend has, and the engine that it opens.

A backend lowers a dense subnet (a Hugging Face folder) to an artefact folder, says beforehand what it refuses, and
opens the artefact as an engine that is fed token ids. Nothing outside a backend's module knows its engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.ragged import Layout
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.precision import StorageFormat

Ids = NDArray[np.int64]

EXACT_TOLERANCE = 1e-5
"""Of engines that compute in float32, as a share of the reference's largest logit: sums differ in their order only.
The most seen over all families was 2e-6."""


@dataclass(frozen=True)
class Toolchain:
    """Versions of an engine's packages as installed; ``missing`` are those that are not; ``install`` gets them."""

    versions: dict[str, str]
    missing: tuple[str, ...]
    install: str


class Engine(Protocol):
    """A built model with a key/value cache. Feeding ids appends them to what was fed since the last reset."""

    def reset(self) -> None:
        """Forget everything fed so far."""

    def feed(self, ids: Ids) -> NDArray[np.float32]:
        """Logits [batch, n, vocabulary] in float32 for new ids [batch, n]; the batch stays the same until a reset."""
        ...


class Backend(Protocol):
    """What Amoeba asks of an engine family."""

    flow: str

    def precisions(self) -> tuple[str, ...]:
        """The precisions that it lowers to, best quality first."""
        ...

    def layouts(self) -> tuple[Layout, ...]:
        """The layouts of a subnet that it lowers: ``uniform``, and ``ragged`` where blocks may differ in size."""
        ...

    def storage(self, precision: str) -> StorageFormat:
        """How a precision stores weights and cache."""
        ...

    def toolchain(self) -> Toolchain:
        """What of its toolchain is installed; nothing is imported."""
        ...

    def refusal(self, subnet: Architecture, precision: str, context: int) -> str | None:
        """Why it cannot lower this subnet, as half a sentence, or None. Asked before any work is done."""
        ...

    def weight_dtype(self, precision: str) -> str | None:
        """The dtype of the folder that it can use in place as an artefact, or None where it stores weights its way."""
        ...

    def tolerance(self, precision: str) -> float:
        """The largest logit difference from the reference that passes, as a share of the reference's largest logit."""
        ...

    def lower(self, model: ModelFolder, output: Path, precision: str, context: int) -> None:
        """Write the artefact of a dense subnet into ``output``, which may be the model's own folder.

        In the model's own folder the weights are used in place, and must be of ``weight_dtype``.
        """
        ...

    def open(self, artefact: Path, precision: str, threads: int | None = None) -> Engine:
        """The engine of an artefact, with so many threads (all cores where left out)."""
        ...

    def open_exact(self, artefact: Path, precision: str) -> Engine | None:
        """The same graph and weights with all activations in float32; None where ``open`` already computes so.

        Verification holds it to ``EXACT_TOLERANCE``, so that the rounding of activations hides no mistake.
        """
        ...

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        """A folder that transformers loads with the weights that the artefact really computes with.

        The model's own where nothing was quantised; else ``output``, filled with dequantised weights.
        """
        ...


def check_precision(backend: Backend, precision: str) -> None:
    """Raise BadInput where a backend does not know a precision."""
    if precision not in backend.precisions():
        raise BadInput(
            f"the flow '{backend.flow}' has no precision '{precision}'; it has {', '.join(backend.precisions())}"
        )


def installed_versions(packages: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Versions of the packages that are installed, and the names of those that are not."""
    from importlib.metadata import PackageNotFoundError, version

    found, missing = {}, []
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    return found, tuple(missing)
