"""Measuring engines: time to first token, time per output token, and the memory and energy that running takes.

Engines to be compared are measured in turn: every round runs each of them once, in an order drawn anew, so that a
machine that slows down slows all of them, and none always follows the same other. An engine is done as soon as the 95 %
confidence intervals of its two medians are within ``PRECISE`` of them, or when the time is up; which of the two it was
is kept. Medians of runs are kept, with the 10th and 90th percentile.

Run as a module, it measures the memory of one engine in a process of its own:
``python -m amoeba_deploy.profiles.measure FLOW PRECISION ARTEFACT VOCABULARY BATCH PROMPT TOKENS CONTEXT``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.profiles.gpu import GpuMeter
from amoeba_deploy.profiles.statistics import FEWEST, mean_and_spread, percentile, relative_error
from amoeba_deploy.profiles.workload import Workload

SETTLE_SECONDS = 0.05
"""Pause before each run: threads of the engine that ran before keep spinning for some milliseconds after their work,
which doubled the time to first token of the next engine."""
PRECISE = 0.03
"""Half the width of a median's confidence interval, as a share of it, at which the median is known well enough."""
LEAST_REPEATS = 9
MOST_REPEATS = 99
ALWAYS_REPEATS = 3
"""Runs that every engine gets, however short the time is."""
ROOM_SHARE = 0.5
"""Of the free memory, what engines that are open together may take."""
OPEN_SHARE = 1.5
"""What an open engine takes of memory for each byte of its artefact: some engines pack weights anew."""
VISIT_REPEATS = 3
"""Runs of an engine each time it is opened, where not all engines can be open at once."""

Stopped = Literal["confident", "budget", "repeats"]


def is_known(error: float, repeats: int) -> bool:
    """Whether a median of so many runs is known to within ``PRECISE``, with 95 % confidence."""
    return repeats >= FEWEST and error <= PRECISE


@dataclass(frozen=True)
class Timing:
    """What runs of one engine came to, in milliseconds: medians of TTFT and TPOT, and percentiles of the latter."""

    ttft_ms: float
    tpot_ms: float
    p10: float
    p90: float
    repeats: int


@dataclass(frozen=True)
class Measurement(Timing):
    """The same with all that is known of runs made here.

    A run's TPOT is the median over its tokens; ``p10`` and ``p90`` are of the single tokens of all runs, those of TTFT
    of the runs. ``least`` and ``most`` are of the fastest and the slowest run. The errors are half the widths of the
    medians' 95 % confidence intervals as shares of the medians. Rates, in tokens a second, are means over runs with
    their standard deviations, as llama-bench states them.
    """

    ttft_p10: float
    ttft_p90: float
    ttft_error: float
    tpot_error: float
    ttft_least: float
    ttft_most: float
    tpot_least: float
    tpot_most: float
    stopped: Stopped
    prompt_rate: float
    prompt_rate_sd: float
    token_rate: float
    token_rate_sd: float
    energy_per_token_j: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether the medians are known less well than they should be."""
        return not is_known(max(self.ttft_error, self.tpot_error), self.repeats)


@dataclass(frozen=True)
class Run:
    """Seconds of one prefill and of each token after the first, and the joules of the latter where they are known."""

    first: float
    steps: tuple[float, ...]
    energy_j: float | None = None


@dataclass(frozen=True)
class Subject:
    """An engine to measure: how to open it, and about what it takes of memory while it is open."""

    open: Callable[[], Engine]
    bytes: int = 0


def run_once(engine: Engine, vocabulary: int, workload: Workload, meter: GpuMeter | None = None) -> Run:
    """One prompt and the tokens after it, timed."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (workload.batch, workload.prompt + workload.tokens))
    engine.reset()
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    engine.feed(ids[:, : workload.prompt])
    first = time.perf_counter() - began
    before = meter.energy_j() if meter else None
    steps = []
    for index in range(workload.prompt, workload.prompt + workload.tokens - 1):
        began = time.perf_counter()
        engine.feed(ids[:, index : index + 1])
        steps.append(time.perf_counter() - began)
    after = meter.energy_j() if meter else None
    energy = None if before is None or after is None or not steps else after - before
    return Run(first, tuple(steps or [first]), energy)


def summary(runs: Sequence[Run], workload: Workload, stopped: Stopped = "repeats") -> Measurement:
    """Medians and spreads of the runs of one engine."""
    firsts = [1e3 * run.first for run in runs]
    middles = [1e3 * median(run.steps) for run in runs]
    every = [1e3 * step for run in runs for step in run.steps]
    prompts = mean_and_spread([workload.batch * workload.prompt / run.first for run in runs])
    tokens = mean_and_spread([workload.batch * len(run.steps) / sum(run.steps) for run in runs])
    joules = [run.energy_j / (workload.batch * len(run.steps)) for run in runs if run.energy_j is not None]
    return Measurement(
        ttft_ms=median(firsts),
        tpot_ms=median(middles),
        p10=percentile(every, 0.1),
        p90=percentile(every, 0.9),
        repeats=len(runs),
        ttft_p10=percentile(firsts, 0.1),
        ttft_p90=percentile(firsts, 0.9),
        ttft_error=relative_error(firsts),
        tpot_error=relative_error(middles),
        ttft_least=min(firsts),
        ttft_most=max(firsts),
        tpot_least=min(middles),
        tpot_most=max(middles),
        stopped=stopped,
        prompt_rate=prompts[0],
        prompt_rate_sd=prompts[1],
        token_rate=tokens[0],
        token_rate_sd=tokens[1],
        energy_per_token_j=median(joules) if joules else None,
    )


@dataclass
class _Open:
    """The engines that are open, the longest unused first; no more of them than fit into ``room`` bytes."""

    subjects: Sequence[Subject]
    room: float
    engines: dict[int, Engine] = field(default_factory=dict)

    @property
    def all_fit(self) -> bool:
        return sum(subject.bytes for subject in self.subjects) <= self.room

    def engine(self, number: int) -> tuple[Engine, bool]:
        """An engine, and whether it was opened just now."""
        known = self.engines.pop(number, None)
        if known is None:
            need = self.subjects[number].bytes
            while self.engines and need + sum(self.subjects[other].bytes for other in self.engines) > self.room:
                del self.engines[next(iter(self.engines))]
                gc.collect()
        self.engines[number] = known or self.subjects[number].open()
        return self.engines[number], known is None

    def close(self, number: int) -> None:
        """Let go of an engine that is done."""
        self.engines.pop(number, None)
        gc.collect()


def _verdict(runs: Sequence[Run], repeats: int | None, late: bool) -> Stopped | None:
    """Why an engine is done, or None while it is not."""
    count = len(runs)
    if repeats is None and count >= LEAST_REPEATS:
        errors = relative_error([r.first for r in runs]), relative_error([median(r.steps) for r in runs])
        if max(errors) <= PRECISE:
            return "confident"
    if count >= (repeats or MOST_REPEATS):
        return "repeats"
    return "budget" if late and count >= ALWAYS_REPEATS else None


def measure(
    subjects: Sequence[Subject],
    vocabulary: int,
    workload: Workload,
    repeats: int | None = None,
    deadline: float | None = None,
    step: Callable[[], None] | None = None,
    *,
    room: float = float("inf"),
    seed: int = 0,
    known: Sequence[Sequence[Run]] = (),
    record: Callable[[int, Run, Stopped | None], None] | None = None,
) -> list[Measurement]:
    """Measure engines in turn, each after a warm-up.

    Args:
        subjects: what to measure, in the order of the results.
        vocabulary: ids are drawn from it.
        workload: batch, prompt and tokens.
        repeats: runs of each engine; where left out, as many as their medians need to be precise, at least
            ``LEAST_REPEATS`` and at most ``MOST_REPEATS``.
        deadline: a ``time.perf_counter()`` after which no further run begins, once each engine had ``ALWAYS_REPEATS``.
        step: called when an engine is done.
        room: bytes that open engines may take; where not all fit, they are opened again for each visit.
        seed: of the orders in which engines take turns.
        known: runs of each engine from before, to go on from.
        record: told of every run: which engine's, and why it was the last one, if so.
    """
    opened, order, meter = _Open(subjects, room), random.Random(seed), GpuMeter.of_this_machine()
    visit = 1 if opened.all_fit else VISIT_REPEATS
    runs = [list(done) for done in known] or [[] for _ in subjects]
    verdicts: list[Stopped | None] = [None for _ in subjects]
    while left := [number for number, verdict in enumerate(verdicts) if verdict is None]:
        order.shuffle(left)
        for number in left:
            engine, fresh = opened.engine(number)
            if fresh:
                run_once(engine, vocabulary, workload)
            for _ in range(visit):
                runs[number].append(run_once(engine, vocabulary, workload, meter))
                late = deadline is not None and time.perf_counter() > deadline
                verdicts[number] = _verdict(runs[number], repeats, late)
                if record is not None:
                    record(number, runs[number][-1], verdicts[number])
                if verdicts[number] is not None:
                    break
            del engine
            if verdicts[number] is not None:
                opened.close(number)
                if step is not None:
                    step()
    return [summary(done, workload, verdicts[number] or "repeats") for number, done in enumerate(runs)]


@dataclass(frozen=True)
class Peak:
    """Peak bytes of a process that ran a workload once: resident memory, and memory of GPUs where it used some."""

    memory_bytes: int
    gpu_memory_bytes: int | None


def peak_memory(flow: str, precision: str, artefact: Path, vocabulary: int, workload: Workload, context: int) -> Peak:
    """What a fresh process takes that opens an artefact and runs the workload once."""
    numbers = (vocabulary, workload.batch, workload.prompt, workload.tokens, context)
    command = [sys.executable, "-m", __name__, flow, precision, str(artefact), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AmoebaError(f"the {flow} engine in {precision} failed in a process of its own: {reason}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def own_peak() -> int:
    """Peak resident bytes of this process and of those that it started and that still run: engines of their own.

    Linux keeps it for each address space (VmHWM). ``ru_maxrss`` would not do there: it survives ``exec``, so a child
    never reports less than its parent had.
    """
    if Path("/proc/self/status").exists():
        return tree_peak(os.getpid())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tree_peak(process: int) -> int:
    """Peak resident bytes of a process and of those below it that still run, as Linux keeps them."""
    return sum(_peak_of(each) for each in (process, *_running_below(process)))


def _running_below(process: int) -> list[int]:
    """The processes that one started, and those that they started."""
    started: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; state and parent follow it.
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
        started.setdefault(parent, []).append(int(file.parent.name))
    found = list(started.get(process, ()))
    for child in found:
        found += started.get(child, ())
    return found


def _peak_of(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    line = next((line for line in lines if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else 0


def main(arguments: list[str]) -> None:
    """Run one engine once and print the peaks of this process as one JSON object."""
    flow, precision, artefact, vocabulary, batch, prompt, tokens, context = arguments
    engine = load_backend(flow).open(Path(artefact), precision, context=int(context), batch=int(batch))
    run_once(engine, int(vocabulary), Workload(int(batch), int(prompt), int(tokens)))
    meter = GpuMeter.of_this_machine()
    gpu = meter.memory_bytes() if meter else 0
    print(json.dumps({"memory_bytes": own_peak(), "gpu_memory_bytes": gpu or None}))


if __name__ == "__main__":
    main(sys.argv[1:])
