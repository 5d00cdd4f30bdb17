"""Bundles as a report shows them: what was built, whether it was verified, its speed as predicted and as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import MEASURED, MEASURED_FORMAT, SIGNATURE, verify_files
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import folder_bytes, read_json
from amoeba_deploy.manifest import check_manifest
from amoeba_deploy.shape import shape_text


@dataclass(frozen=True)
class Built:
    """One bundle whose files are intact; latencies in milliseconds."""

    path: Path
    checkpoint: str
    own: bool
    """Whether it was built from the report's own checkpoint."""
    device: str
    shape: str
    flow: str
    precision: str
    bytes: int
    signed: bool
    verified: str
    """As a table says it."""
    workload: tuple[int, int, int]
    tpot_ms: float
    ttft_ms: float
    source: str
    measured_tpot_ms: float | None
    measured_ttft_ms: float | None

    @property
    def engine(self) -> str:
        """Flow and precision."""
        return f"{self.flow} {self.precision}"

    @property
    def off(self) -> float | None:
        """By what share the measured TPOT is above the predicted one."""
        return None if self.measured_tpot_ms is None else self.measured_tpot_ms / self.tpot_ms - 1


def read_built(folder: Path, checkpoint: Checkpoint) -> Built:
    """A bundle's facts; its engine is not run.

    Raises:
        BadInput: the folder is no bundle, or what it says of itself is damaged.
        VerificationFailed: a file is changed, missing or not listed.
    """
    manifest = verify_files(folder)
    check_manifest(manifest, folder)
    measured = read_json(folder / MEASURED, MEASURED_FORMAT) if (folder / MEASURED).is_file() else {}
    predicted, workload = manifest["predicted"], manifest["workload"]
    try:
        shape = shape_text(manifest["shape"])
    except (KeyError, TypeError, AttributeError, BadInput):
        raise BadInput(f"{folder}: its manifest names no shape; get the bundle again") from None
    timing = measured.get("timing")
    if not 0 < predicted["tpot_ms"] < math.inf:
        raise BadInput(f"{folder}: its manifest predicts no time per token; get the bundle again")
    return Built(
        folder,
        manifest["checkpoint"],
        manifest["checkpoint_digest"] == checkpoint.digest,
        manifest["device"],
        shape,
        manifest["flow"],
        manifest["precision"],
        folder_bytes(folder),
        (folder / SIGNATURE).is_file(),
        _verified(folder, measured, bool(manifest["steps"])),
        (workload["batch"], workload["prompt"], workload["tokens"]),
        predicted["tpot_ms"],
        predicted["ttft_ms"],
        predicted["source"],
        _milliseconds(folder, timing, "tpot_ms"),
        _milliseconds(folder, timing, "ttft_ms"),
    )


def _verified(folder: Path, measured: Mapping[str, Any], unfinished: bool) -> str:
    """What is known of the engine's numbers; an engine is not bundled where they were wrong."""
    found = measured.get("verified")
    if found is None:
        return "to be finished on the device" if unfinished else "no"
    if not isinstance(found, Mapping):
        raise _damaged(folder)
    if found.get("held_to_logits", True) is False:
        return "by perplexity"
    error, allowed, tokens = (found.get(name) for name in ("max_logit_error", "tolerance", "greedy_tokens"))
    if not (_number(error) and _number(allowed) and _number(tokens)):
        raise _damaged(folder)
    return f"logits within {error:.2g} (allowed {allowed:.2g}), {tokens} tokens equal"


def _milliseconds(folder: Path, timing: Any, name: str) -> float | None:
    if timing is None:
        return None
    found = timing.get(name) if isinstance(timing, Mapping) else None
    if found is None or not _number(found) or found <= 0:
        raise _damaged(folder)
    return float(found)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _damaged(folder: Path) -> BadInput:
    return BadInput(f"{folder / MEASURED}: an entry of timing or verified is not what it should be; build it again")
