"""What became of a target in a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from amoeba_deploy.errors import AmoebaError

State = Literal["unchanged", "restored", "built", "failed", "skipped", "would build", "would restore"]
UNEXPECTED = 1
"""The exit code of a failure that nobody foresaw."""


@dataclass(frozen=True)
class Result:
    """A target's state and why, its figures, and those of its last build."""

    name: str
    device: str
    state: State
    output: Path
    reason: str
    """Why it was built, or not; of a failure what went wrong."""
    seconds: float = 0.0
    figures: Mapping[str, Any] | None = None
    before: Mapping[str, Any] | None = None
    """The figures of the last build of this project, where one is known."""
    remarks: tuple[str, ...] = ()
    exit_code: int = 0
    signed: int | None = None
    """The release that it was signed as this time."""
    pushed: Mapping[str, Any] | None = None
    """Where it was pushed to this time."""

    @property
    def good(self) -> bool:
        """Whether its bundle is what it should be, or would be."""
        return self.state not in ("failed", "skipped")

    def failed(self, error: Exception) -> Result:
        """The same target, which failed after all."""
        known = isinstance(error, AmoebaError)
        said = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, AmoebaError) else UNEXPECTED
        return replace(self, state="failed", reason=said, exit_code=code)

    def to_json(self) -> dict[str, Any]:
        """The entry of ``build --json``."""
        return {
            "target": self.name,
            "device": self.device,
            "state": self.state,
            "reason": self.reason,
            "bundle": str(self.output) if self.good else None,
            "seconds": round(self.seconds, 3),
            "figures": None if self.figures is None else dict(self.figures),
            "before": None if self.before is None else dict(self.before),
            "remarks": list(self.remarks),
            "exit_code": self.exit_code,
            "signed": self.signed,
            "pushed": None if self.pushed is None else dict(self.pushed),
        }
