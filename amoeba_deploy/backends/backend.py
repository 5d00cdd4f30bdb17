"""The interface that every backend has, and the engine that it opens.

A backend lowers a dense subnet (a Hugging Face folder) to an artefact folder, says beforehand what it refuses, and
opens the artefact as an engine that is fed token ids. Nothing outside a backend's module knows its engine.
"""

from __future__ import annotations

import difflib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.takes import Takes
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.ragged import BlockSizes, Layout
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan
from amoeba_deploy.precision import StorageFormat

Ids = NDArray[np.int64]
Counts = NDArray[np.int64]
Where = Literal["device", "host"]
"""Where a step runs."""

EXACT_TOLERANCE = 1e-5
"""Of engines that compute in float32, as a share of the reference's largest logit: sums differ in their order only.
The most seen over all families was 2e-6."""
_ALLOWED_RISES = ((32, 1e-3), (16, 0.05), (8, 0.1), (0, 1.0))
"""Bits a weight has at least, and how far perplexity may rise above the unquantised subnet's, as a share of it."""


@dataclass(frozen=True)
class Toolchain:
    """Versions of an engine's packages as installed; ``missing`` are those that lowering lacks; ``install`` gets them.

    What only running an engine lacks is told by ``Backend.cannot_run``.
    """

    versions: dict[str, str]
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Setting:
    """A choice that is one engine's own: its value where none is given, what it does, and the values there are."""

    default: str
    help: str
    choices: tuple[str, ...] = ()
    """Empty: a whole number of at least 1."""

    def check(self, flow: str, name: str, value: str) -> str:
        """The value itself; raises BadInput where it is none of this setting's."""
        whole = value.isascii() and value.isdigit() and int(value) >= 1
        if value in self.choices or (not self.choices and whole):
            return value
        wanted = ", ".join(self.choices) or "a whole number of at least 1"
        raise BadInput(f"the flow '{flow}' has no {name}={value}; it takes {wanted}")


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for: positions, sequences at once, the device's chip, and the engine's own settings."""

    context: int
    batch: int = 1
    chip: str | None = None
    """The architecture of the device as its file spells it, such as ``sm_87``; None for this machine."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Every setting of the engine by its name; made complete by ``options_for``."""

    def number(self, name: str) -> int:
        """A setting that is a whole number."""
        return int(self.settings[name])


@dataclass(frozen=True)
class Command:
    """A command for the bundle's folder, and what must be installed where it runs."""

    does: str
    command: tuple[str, ...]
    needs: str = ""

    def to_json(self) -> dict[str, str]:
        """The entry in a manifest."""
        return {"does": self.does, "command": shlex.join(self.command), "needs": self.needs}


@dataclass(frozen=True)
class Step(Command):
    """A command without which the engine is not finished. It must end by itself: ``amoeba bundle finish`` waits."""

    where: Where = "device"
    """``host``: on another machine than the device, before the steps there; the whole bundle is then copied over."""

    def to_json(self) -> dict[str, str]:
        return {**super().to_json(), "where": self.where}


@dataclass(frozen=True)
class Artefact:
    """What lowering wrote: steps to finish it, notes for the user, facts for the manifest, and how to use it."""

    folder: Path
    precision: str
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that follow from the build alone: no times, no paths of this machine."""
    usage: tuple[Command, ...] = ()
    """Commands of the engine's own tools that serve or measure the finished engine; nothing here runs them."""


@dataclass(frozen=True)
class Identity:
    """What a built engine is valid for: it runs where all of this holds."""

    precision: str
    batch: int
    context: int
    versions: Mapping[str, str]
    """Versions of the packages that it was built with."""
    bound: tuple[str, ...] = ()
    """Those of them that must be the same to run it."""
    chip: str | None = None
    """The architecture that its code is for; None where it is for any."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Whatever else binds it, such as JetPack's version."""

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``identity``."""
        return {
            "precision": self.precision,
            "batch": self.batch,
            "context": self.context,
            "versions": dict(self.versions),
            "bound": list(self.bound),
            "chip": self.chip,
            **({"more": dict(self.more)} if self.more else {}),
        }


class Engine(Protocol):
    """A built model with a key/value cache. Feeding ids appends them to what was fed since the last reset."""

    def reset(self) -> None:
        """Forget everything fed so far."""

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        """Logits [batch, n, vocabulary] in float32 for new ids [batch, n]; the batch stays the same until a reset.

        Rows of different lengths are filled up on the right: ``lengths`` [batch] says how many ids of each row are
        real (at least 1; all n where left out). What fills up is forgotten at once, and its logits mean nothing.
        """
        ...


class Backend(ABC):
    """What Amoeba asks of an engine family. What is not abstract has the answer of an engine without the matter."""

    flow: ClassVar[str]
    """The name that users write; its module's, with hyphens."""
    takes: ClassVar[Takes]
    """Which subnets it takes, as data."""
    settings: ClassVar[Mapping[str, Setting]] = {}
    """Choices that only this engine has."""
    own_threads: ClassVar[bool] = True
    """Whether engines of one process may differ in threads; False where the first decides, or change is dear."""
    opens: ClassVar[bool] = True
    """Whether ``open`` gives an engine anywhere; False where only the engine's own tools run what is built."""

    def precisions(self) -> tuple[str, ...]:
        """The precisions that it lowers to, best quality first."""
        return self.takes.precisions

    def layouts(self, subnet: Architecture, precision: str, options: BuildOptions) -> tuple[Layout, ...]:
        """The layouts in which it lowers a subnet: ``uniform``, and ``ragged`` where blocks may differ in size."""
        return ("uniform", "ragged") if self.takes.varying else ("uniform",)

    def block_sizes(self, plan: Plan, architecture: Architecture, multiple: int) -> tuple[BlockSizes, ...] | None:
        """The sizes that it wants a ragged plan's blocks padded to, neurons in multiples; None where it takes any."""
        return None

    @abstractmethod
    def storage(self, precision: str) -> StorageFormat:
        """How a precision stores weights and cache."""

    @abstractmethod
    def toolchain(self) -> Toolchain:
        """What of its toolchain is installed; nothing is imported."""

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        """Why what it builds cannot run on this machine, as half a sentence, or None. Lowering may still work."""
        return None

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        """What an engine that is built now is valid for."""
        return Identity(precision, options.batch, options.context, self.toolchain().versions)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        """Why it cannot lower this subnet, as half a sentence, or None. Asked before any work is done."""
        return self.takes.refusal(subnet, precision)

    def folder_dtype(self, precision: str, options: BuildOptions) -> str | None:
        """The dtype of the folder that it can use in place as an artefact, or None where it stores weights its way."""
        return None

    @abstractmethod
    def tolerance(self, precision: str) -> float:
        """The largest logit difference from the reference that passes, as a share of the reference's largest logit."""

    def allowed_rise(self, precision: str) -> float:
        """How far the perplexity of a right engine may be above the unquantised subnet's, as a share of that."""
        bits = self.storage(precision).matrix_bits
        return next(rise for least, rise in _ALLOWED_RISES if bits >= least)

    @abstractmethod
    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        """Write the artefact of a dense subnet into ``output``, which may be the model's own folder.

        In the model's own folder the weights are used in place, and must be of ``folder_dtype``.

        Raises:
            BadInput: it refuses the subnet.
            ToolchainMissing: a package or tool is not installed.
        """

    @abstractmethod
    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> Engine:
        """The engine of an artefact.

        Args:
            artefact: the folder that ``lower`` filled.
            precision: the one it was lowered in.
            threads: how many compute; all cores where left out.
            context: the most positions that will be fed; what it was built for where left out.
            batch: the most sequences that will be fed at once.

        Raises:
            BadInput: the folder holds no such artefact, or a damaged one.
            ToolchainMissing: it cannot run here.
        """

    def bench(self, precision: str, options: BuildOptions, prompt: int, tokens: int) -> tuple[Command, ...]:
        """Commands of the engine's own tools that measure an artefact; none where it has no such tools, or needs none.

        They are for a folder in which the artefact is ``engine``, and the last leaves ``../report.json``, in a form
        that ``amoeba profile import`` reads.
        """
        return ()

    def open_exact(self, artefact: Path, precision: str) -> Engine | None:
        """The same graph and weights with all activations in float32; None where ``open`` already computes so.

        Verification holds it to ``EXACT_TOLERANCE``, so that the rounding of activations hides no mistake.
        """
        return None

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path | None:
        """A folder that transformers loads with the weights that the artefact really computes with.

        The model's own where nothing was quantised; else ``output``, filled with dequantised weights. None where they
        cannot be had: then the engine is held to its perplexity alone.
        """
        return model.path


def check_precision(backend: Backend, precision: str) -> None:
    """Raise BadInput where a backend does not know a precision."""
    backend.takes.check_precision(precision)


def options_for(
    backend: Backend,
    context: int,
    batch: int = 1,
    chip: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> BuildOptions:
    """Complete options of a backend, its settings checked and the others at their defaults.

    Raises:
        BadInput: the engine has no such setting, or the setting no such value.
    """
    asked = dict(settings or {})
    for name in asked:
        if name not in backend.settings:
            close = difflib.get_close_matches(name, backend.settings, 1)
            known = f"it has {', '.join(backend.settings)}" if backend.settings else "it has none"
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise BadInput(f"the flow '{backend.flow}' has no setting '{name}'; {known}{hint}")
    found = {
        name: setting.check(backend.flow, name, asked.get(name, setting.default))
        for name, setting in backend.settings.items()
    }
    return BuildOptions(context, batch, chip, found)


def chosen_settings(backend: Backend, options: BuildOptions) -> dict[str, str]:
    """The settings of an engine's own that are not at their defaults."""
    return {name: value for name, value in options.settings.items() if value != backend.settings[name].default}


def require_legal(backend: Backend, model: ModelFolder, precision: str, options: BuildOptions) -> None:
    """What ``lower`` asks first: raises BadInput where a backend refuses a model, ToolchainMissing where it cannot."""
    backend.takes.check_precision(precision)
    refused = backend.refusal(model.architecture, precision, options)
    if refused:
        raise BadInput(f"the flow '{backend.flow}' cannot lower {model.path} in {precision}: {refused}")
    require_toolchain(backend)


def require_toolchain(backend: Backend) -> None:
    """Raise ToolchainMissing, with how to get it, where something that lowering needs is not installed."""
    toolchain = backend.toolchain()
    if toolchain.missing:
        names = ", ".join(toolchain.missing)
        raise ToolchainMissing(
            f"the flow '{backend.flow}' needs {names}, which is not installed; run {toolchain.install}"
        )


def installed_versions(packages: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Versions of the packages that are installed, and the names of those that are not."""
    from importlib.metadata import PackageNotFoundError, version

    found, missing = {}, []
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    return found, tuple(missing)


def refuse_lengths(lengths: Counts | None, ids: Ids, flow: str) -> None:
    """Raise BadInput where rows of different lengths are fed to an engine that takes only equal ones."""
    if lengths is not None and bool((np.asarray(lengths) != ids.shape[1]).any()):
        raise BadInput(f"the flow '{flow}' takes rows of one length only; feed them one by one")
