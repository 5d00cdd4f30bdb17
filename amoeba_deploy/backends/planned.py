"""A flow whose rules are known, so that subnets can be cut for it, and that this version does not lower to."""

from __future__ import annotations

from pathlib import Path

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import Artefact, Backend, BuildOptions, Engine, Toolchain
from amoeba_deploy.backends.takes import Takes
from amoeba_deploy.errors import ToolchainMissing
from amoeba_deploy.extraction.native_layouts import deci_blocks
from amoeba_deploy.extraction.ragged import BlockSizes
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan
from amoeba_deploy.precision import StorageFormat


class Planned(Backend):
    """Rules without an engine."""

    def __init__(self, takes: Takes) -> None:
        self.takes, self.flow = takes, takes.flow  # type: ignore[misc]

    def block_sizes(self, plan: Plan, architecture: Architecture, multiple: int) -> tuple[BlockSizes, ...] | None:
        if self.flow == "tensorrt-llm":
            return deci_blocks(plan, architecture, multiple).blocks
        return None

    def storage(self, precision: str) -> StorageFormat:
        return StorageFormat(16, 16, 16, 2, 2)

    def toolchain(self) -> Toolchain:
        return Toolchain({}, (f"a backend for {self.flow}",), "a later version of amoeba-deploy")

    def tolerance(self, precision: str) -> float:
        return 0.1

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        raise ToolchainMissing(f"this version of Amoeba does not lower to '{self.flow}'")

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> Engine:
        raise ToolchainMissing(f"this version of Amoeba does not run '{self.flow}'")
