"""Baselines: the figures of a project's targets at one time, in a file that lies in the repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json, whole_file, write_json
from amoeba_deploy.project.result import Result

BASELINE_FORMAT = "amoeba.baseline/1"


def read_baseline(file: Path) -> dict[str, Any]:
    """The stored figures by target; raises BadInput where the file is damaged."""
    targets = read_json(file, BASELINE_FORMAT).get("targets")
    if not isinstance(targets, dict) or not all(isinstance(entry, dict) for entry in targets.values()):
        raise BadInput(f"{file}: lacks 'targets'; write it again with 'amoeba build --save-baseline'")
    return targets


def write_baseline(file: Path, results: Sequence[Result], before: Mapping[str, Any]) -> None:
    """Write the figures of some targets over those that are stored; what was not built this time stays."""
    figures = {result.name: dict(result.figures) for result in results if result.good and result.figures is not None}
    targets = dict(sorted({**before, **figures}.items()))
    with whole_file(file, force=True) as work:
        write_json(work, {"format": BASELINE_FORMAT, "tool": f"amoeba-deploy {__version__}", "targets": targets})
