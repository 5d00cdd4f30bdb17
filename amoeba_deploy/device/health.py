"""Whether an engine works where it is: it gives the tokens of its self-test, as fast as it was built to be.

It runs in a process of its own, so that an engine that ends its process, or never answers, has failed and no more:
``python -m amoeba_deploy.device.health FOLDER TOLERANCE``, which prints one JSON object. A TOLERANCE of ``-`` measures
nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.device.slots import CURRENT
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed

TOLERANCE = 0.25
"""How far, as a share, a median may exceed the budget that a bundle was built for."""
TIMEOUT = 900.0
"""Seconds after which an engine that has not answered has failed."""
MEASURE_SECONDS = 1.0
"""For which an engine is measured, after at least a few runs."""


@dataclass(frozen=True)
class HealthCheck:
    """What a health check asks for."""

    tolerance: float | None = TOLERANCE
    """None: latency is not measured."""
    command: str | None = None
    """A command of the user's that must end with status 0, too."""
    timeout: float = TIMEOUT
    selftest: bool = True
    """False only for engines that nothing here can open; then ``command`` is the whole check."""


@dataclass(frozen=True)
class Health:
    """What was found of an engine that works."""

    selftest_tokens: int | None
    metric: str | None = None
    """The budget's metric, where there is a budget and it was measured."""
    measured_ms: float | None = None
    limit_ms: float | None = None

    def text(self) -> str:
        """The same for people."""
        if self.selftest_tokens is None:
            return "the health command succeeded"
        said = f"{self.selftest_tokens} self-test tokens equal"
        if self.metric is None:
            return said
        return f"{said}, {self.metric.upper()} {self.measured_ms:.3g} ms (measured, at most {self.limit_ms:.3g} ms)"


def check_health(root: Path, folder: Path, wanted: HealthCheck) -> Health:
    """Check the engine of a bundle in a process of its own, then by the user's command.

    Args:
        root: the device's folder, in which the user's command runs.
        folder: the bundle, as ``ROOT/current`` names it.
        wanted: what to ask for.

    Raises:
        VerificationFailed: the engine gives other tokens, is too slow, ends its process or does not answer; or the
            user's command fails.
    """
    health = _checked_apart(folder, wanted) if wanted.selftest else Health(None)
    if wanted.command is not None:
        command = shlex.split(wanted.command)
        _run(command, f"the health command '{wanted.command}'", wanted.timeout, cwd=root, bundle=folder)
    return health


def check_command(root: Path, command: str | None) -> None:
    """Raise BadInput where a health command of the user's cannot be started; it is not run by a shell.

    What lies below ``current`` comes with a bundle, and is looked for when that is there.
    """
    if command is None:
        return
    how = "it is not run by a shell: give a program and its arguments, or --health \"sh -c '...'\""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"--health: {command!r} cannot be read ({error}); {how}") from None
    if not words or not words[0]:
        raise BadInput(f"--health: the command is empty; {how}")
    name = words[0]
    place = Path(name) if "/" not in name else root / name
    if place.is_relative_to(root / CURRENT):
        return
    if shutil.which(str(place)) is None:
        what = "is not executable" if place.is_file() and "/" in name else "is not found"
        raise BadInput(f"--health: {name!r} {what}, so the command cannot start; {how}")


def _checked_apart(folder: Path, wanted: HealthCheck) -> Health:
    tolerance = "-" if wanted.tolerance is None else repr(wanted.tolerance)
    command = [sys.executable, "-m", __name__, str(folder), tolerance]
    text = _run(command, "its engine", wanted.timeout, cwd=None, bundle=folder)
    try:
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
        failed = found.pop("failed", None)
        if failed is None:
            return Health(**found)
    except (ValueError, IndexError, TypeError, AttributeError):
        failed = "its engine's process printed no result"
    raise VerificationFailed(str(failed))


def _run(command: list[str], what: str, timeout: float, cwd: Path | None, bundle: Path) -> str:
    """Run a command in a process group of its own; its standard output. Raises VerificationFailed where it fails."""
    environment = {**os.environ, "AMOEBA_BUNDLE": str(bundle)}
    pipe = subprocess.PIPE
    try:
        started = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
    except (OSError, IndexError) as error:
        raise VerificationFailed(f"{what} does not start ({error})") from None
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise VerificationFailed(f"{what} did not answer in {timeout:g} s") from None
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()
    if started.returncode:
        last = (err.strip().splitlines() or out.strip().splitlines() or ["no message"])[-1]
        raise VerificationFailed(f"{what} ended with {_ending(started.returncode)}: {last}")
    return out


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status > 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def probe(folder: Path, tolerance: float | None) -> Health:
    """Open the engine of a bundle in this process, run its self-test, and measure it where it has a budget.

    Raises:
        VerificationFailed: it gives other tokens or is too slow.
        AmoebaError: it cannot be opened.
    """
    from amoeba_deploy.bundle import open_engine, read_manifest
    from amoeba_deploy.selftest import check, read_selftest

    manifest = read_manifest(folder)
    engine, test = open_engine(folder, manifest), read_selftest(folder)
    count = check(engine, test, str(folder))
    metric, ms = manifest["budget"]["metric"], manifest["budget"]["ms"]
    if tolerance is None or ms is None:
        return Health(count)
    vocabulary = 1 + max(*test.prompt, *test.tokens)
    measured, limit = _measured(engine, vocabulary, manifest["workload"], metric), ms * (1 + tolerance)
    if measured > limit:
        raise VerificationFailed(
            f"its {metric.upper()} is {measured:.3g} ms (measured here), more than its budget of {ms:g} ms and "
            f"{tolerance:.0%} allow"
        )
    return Health(count, metric, measured, limit)


def _measured(engine: Any, vocabulary: int, entries: Mapping[str, int], metric: str) -> float:
    """The median of a metric in milliseconds."""
    from amoeba_deploy.profiles.measure import Subject, measure
    from amoeba_deploy.profiles.workload import Workload

    workload = Workload(**entries)
    deadline = time.perf_counter() + MEASURE_SECONDS
    timing = measure([Subject(lambda: engine)], vocabulary, workload, deadline=deadline)[0]
    if metric == "e2e":
        return timing.ttft_ms + (workload.tokens - 1) * timing.tpot_ms
    return timing.ttft_ms if metric == "ttft" else timing.tpot_ms


def main(arguments: list[str]) -> None:
    """Check one engine and print what was found."""
    folder, tolerance = arguments
    try:
        found = vars(probe(Path(folder), None if tolerance == "-" else float(tolerance)))
    except AmoebaError as error:
        found = {"failed": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
