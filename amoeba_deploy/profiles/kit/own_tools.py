"""Items that the engine's own command measures: it is run where it is on the PATH, and its report is kept as it is."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, ToolchainMissing
from amoeba_deploy.files import sha256_of
from amoeba_deploy.profiles.kit.form import Item, Kit
from amoeba_deploy.profiles.kit.results import REPORTS, RESULTS
from amoeba_deploy.profiles.llama_bench import llama_bench_command
from amoeba_deploy.profiles.measure import tree_peak

REPORT = "report.json"
"""What an engine's last command leaves beside the folder that it runs in."""
_REPEATS = ("-r", "9")
_POLL_SECONDS = 0.05


def by_llama_bench(item: Item, kit: Kit) -> tuple[str, ...] | None:
    """llama-bench's command for an item that we cannot open for want of llama-cpp-python, where it can stand in."""
    if item.flow != "gguf" or item.commands or find_spec("llama_cpp") or not shutil.which("llama-bench"):
        return None
    return None if kit.workload.batch != 1 else (*llama_bench_command("", kit.workload), *_REPEATS)


def run_llama_bench(folder: Path, item: Item, command: Sequence[str]) -> dict[str, Any]:
    """Measure a gguf file by llama-bench; returns the line for the results.

    Raises:
        AmoebaError: it failed.
    """
    file = next((folder / item.artefact).glob("*.gguf"))
    words = [str(file) if word == "" else word for word in command]
    report = _report_file(folder, item)
    peak = _run(words, folder, report)
    return _line(folder, item, report, "llama-bench", peak)


def run_commands(folder: Path, item: Item, say: Callable[[str], None]) -> dict[str, Any]:
    """Run an item's commands beside its artefact, which they know as ``engine``; returns the line for the results.

    Raises:
        ToolchainMissing: a command is not on the PATH.
        AmoebaError: one failed, or left no report.
    """
    missing = sorted({command[0] for command in item.commands if shutil.which(command[0]) is None})
    if missing:
        raise ToolchainMissing(f"{item}: {', '.join(missing)} is not on the PATH; install it, or start its container")
    beside = folder / RESULTS / "commands" / item.id
    here = beside / "kit"
    shutil.rmtree(beside, ignore_errors=True)
    here.mkdir(parents=True)
    (here / "engine").symlink_to((folder / item.artefact).absolute())
    peak = 0
    for command in item.commands:
        say(f"{item}: {' '.join(command)}")
        peak = _run(command, here, beside / "output.txt")
    if not (beside / REPORT).is_file():
        raise AmoebaError(f"{item}: {item.commands[-1][0]} ended well and left no {REPORT}; see {beside}/output.txt")
    report = _report_file(folder, item)
    shutil.copyfile(beside / REPORT, report)
    return _line(folder, item, report, item.commands[-1][0], peak)


def _report_file(folder: Path, item: Item) -> Path:
    found = folder / RESULTS / REPORTS / f"{item.id}.json"
    found.parent.mkdir(exist_ok=True)
    return found


def _line(folder: Path, item: Item, report: Path, tool: str, peak: int) -> dict[str, Any]:
    name = report.relative_to(folder / RESULTS).as_posix()
    head = {"record": "report", "item": item.id, "file": name, "sha256": sha256_of(report), "tool": tool}
    return {**head, "memory_bytes": peak}


def _run(command: Sequence[str], where: Path, output: Path) -> int:
    """Run a command with its standard output in a file; returns the peak bytes of it and what it started."""
    with output.open("wb") as stream, output.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, cwd=where, stdout=stream, stderr=log, stdin=subprocess.DEVNULL)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, tree_peak(process.pid))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        lines = output.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        said = lines[-1] if lines else "it said nothing"
        raise AmoebaError(f"{command[0]} ended with status {process.returncode}: {said:.300}")
    return peak
