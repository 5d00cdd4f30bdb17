"""Measuring engines: time to first token, time per output token, and the memory that running takes.

Engines to be compared are measured in turn, one repeat of each after the other, so that a machine that slows down
slows all of them. Medians are kept, with the 10th and 90th percentile of the time per output token.

Run as a module, it measures the memory of one engine in a process of its own:
``python -m amoeba_deploy.profiles.measure FLOW PRECISION ARTEFACT VOCABULARY BATCH PROMPT TOKENS CONTEXT``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.profiles.workload import Workload

SETTLE_SECONDS = 0.05
"""Pause before each run: threads of the engine that ran before keep spinning for some milliseconds after their work,
which doubled the time to first token of the next engine."""


@dataclass(frozen=True)
class Timing:
    """Medians over repeats in milliseconds, the spread of TPOT over all tokens, and the number of repeats."""

    ttft_ms: float
    tpot_ms: float
    p10: float
    p90: float
    repeats: int


def run_once(engine: Engine, vocabulary: int, workload: Workload) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each following token."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (workload.batch, workload.prompt + workload.tokens))
    engine.reset()
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    engine.feed(ids[:, : workload.prompt])
    first = time.perf_counter() - began
    steps = []
    for index in range(workload.prompt, workload.prompt + workload.tokens - 1):
        began = time.perf_counter()
        engine.feed(ids[:, index : index + 1])
        steps.append(time.perf_counter() - began)
    return first, steps or [first]


def timing(runs: Sequence[tuple[float, list[float]]]) -> Timing:
    """Medians of the repeats of one engine. TPOT is the median over the medians of the repeats."""
    firsts = [1e3 * first for first, _ in runs]
    middles = [1e3 * float(np.median(steps)) for _, steps in runs]
    every = 1e3 * np.concatenate([steps for _, steps in runs])
    low, high = np.percentile(every, [10, 90])
    return Timing(float(np.median(firsts)), float(np.median(middles)), float(low), float(high), len(runs))


def measure(
    engines: Sequence[Engine],
    vocabulary: int,
    workload: Workload,
    repeats: int,
    deadline: float | None = None,
    step: Callable[[], None] | None = None,
) -> list[Timing]:
    """Measure engines interleaved, after one warm-up of each.

    Args:
        engines: what to measure, in the order of the results.
        vocabulary: ids are drawn from it.
        workload: batch, prompt and tokens.
        repeats: runs of each engine; fewer, but at least three, when ``deadline`` passes.
        deadline: a ``time.perf_counter()`` after which no further repeat begins.
        step: called after each run.
    """
    for engine in engines:
        run_once(engine, vocabulary, workload)
    runs: list[list[tuple[float, list[float]]]] = [[] for _ in engines]
    for repeat in range(repeats):
        if deadline is not None and repeat >= 3 and time.perf_counter() > deadline:
            break
        for engine, done in zip(engines, runs, strict=True):
            done.append(run_once(engine, vocabulary, workload))
            if step is not None:
                step()
    return [timing(done) for done in runs]


def peak_memory(flow: str, precision: str, artefact: Path, vocabulary: int, workload: Workload, context: int) -> int:
    """Peak resident bytes of a fresh process that opens an artefact and runs the workload once."""
    command = [
        sys.executable,
        "-m",
        "amoeba_deploy.profiles.measure",
        flow,
        precision,
        str(artefact),
        str(vocabulary),
        str(workload.batch),
        str(workload.prompt),
        str(workload.tokens),
        str(context),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AmoebaError(f"the {flow} engine in {precision} failed in a process of its own: {reason}")
    return int(done.stdout.split()[-1])


def own_peak() -> int:
    """Peak resident bytes of this process and of those that it started and that still run: engines of their own.

    Linux keeps it for each address space (VmHWM). ``ru_maxrss`` would not do there: it survives ``exec``, so a child
    never reports less than its parent had.
    """
    import psutil

    if Path("/proc/self/status").exists():
        running = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(_peak_of(process.pid) for process in running)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak_of(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    line = next((line for line in lines if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else 0


def main(arguments: list[str]) -> None:
    """Run one engine once and print the peak of this process's resident memory in bytes."""
    flow, precision, artefact, vocabulary, batch, prompt, tokens, context = arguments
    engine = load_backend(flow).open(Path(artefact), precision, context=int(context), batch=int(batch))
    run_once(engine, int(vocabulary), Workload(int(batch), int(prompt), int(tokens)))
    print(own_peak())


if __name__ == "__main__":
    main(sys.argv[1:])
