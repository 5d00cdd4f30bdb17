"""What ``run`` and ``evaluate`` open: a bundle's engine, or a model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.bundle import ENGINE, MANIFEST, open_engine, read_manifest, require_runnable
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families import read_architecture
from amoeba_deploy.model_folder import ModelFolder, read_config


@dataclass(frozen=True)
class Subject:
    """An opened engine, the folder with its tokenizer and config, and what it is."""

    engine: Engine
    folder: Path
    flow: str
    precision: str
    context: int


@dataclass(frozen=True)
class Found:
    """A bundle or a model folder that is not opened yet: its texts can be read before its engine is loaded."""

    folder: Path
    flow: str
    precision: str
    context: int
    engine: Callable[[], Engine]

    def open(self) -> Subject:
        """Open its engine; raises BadInput where it is damaged."""
        return Subject(self.engine(), self.folder, self.flow, self.precision, self.context)


def find_subject(path: Path) -> Found:
    """A bundle, to be opened through its engine, or a model folder, through the torch flow in float32.

    Raises:
        BadInput: the path is neither, or a bundle's engine was built for another machine or version.
        ToolchainMissing: a bundle's engine does not run here, or steps of it are still to be run.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        require_runnable(path, manifest)
        folder = text_folder(path, path / ENGINE)
        context = int(manifest.get("context") or read_architecture(read_config(folder)).context)
        opened = partial(open_engine, path, manifest)
        return Found(folder, manifest["flow"], manifest["precision"], context, opened)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path}: is neither a bundle nor a model folder")
    model = ModelFolder(path)
    model.check_shapes()
    return Found(path, "torch", "fp32", model.architecture.context, partial(load_backend("torch").open, path, "fp32"))


def text_folder(bundle: Path, engine: Path) -> Path:
    """Where a bundle's tokenizer, config and generation settings lie: beside the manifest, or with the engine."""
    return bundle if (bundle / "tokenizer.json").is_file() and (bundle / "config.json").is_file() else engine
