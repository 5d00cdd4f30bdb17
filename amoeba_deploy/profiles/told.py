"""What the user says of a file of measurements that does not say it itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape


@dataclass(frozen=True)
class Told:
    """What the user says of files that do not say it themselves; None where the option was left out."""

    architecture: Architecture | None = None
    """Of the full model that was measured, or that the shape is of."""
    shape: Shape | None = None
    flow: str | None = None
    precision: str | None = None
    batch: int | None = None
    prompt: int | None = None
    tokens: int | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None

    def needed(self, file: Path, name: str) -> Any:
        """One of these, or BadInput with the option that gives it."""
        found = getattr(self, name)
        if found is None:
            option = {"architecture": "--checkpoint or --config", "peak_memory_bytes": "--peak-memory"}
            option |= {"artifact_bytes": "--artifact-size"}
            raise BadInput(f"{file}: does not say its {name}; give {option.get(name, '--' + name)}")
        return found

    def workload(self, file: Path) -> Workload:
        """Batch (1 where left out), prompt and tokens."""
        return Workload(self.batch or 1, self.needed(file, "prompt"), self.needed(file, "tokens"))
