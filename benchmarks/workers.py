"""Engines under measurement, each in a process of its own.

Threads of one engine keep spinning after their work and slow the next one down where they share a process. So every
engine is a worker that runs once for each line that it is sent, and answers with its times; the parent takes them in
turn. Run as a module it is the worker: ``python -m benchmarks.workers FLOW PRECISION ARTEFACT VOCABULARY PROMPT TOKENS
THREADS CONTEXT``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.profiles.measure import Run, Timing, run_once, summary
from amoeba_deploy.profiles.workload import Workload


@dataclass(frozen=True)
class Work:
    """A run, and the seconds of processor time that it took."""

    run: Run
    processor: float


class Worker:
    """One engine in its own process."""

    def __init__(
        self, flow: str, precision: str, artefact: Path, vocabulary: int, workload: Workload, threads: int, context: int
    ) -> None:
        arguments = (flow, precision, artefact, vocabulary, workload.prompt, workload.tokens, threads, context)
        limited = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | limited,
        )  # fmt: skip
        self.name = f"{flow} {precision}"
        self.workload = workload
        self._answer()

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AmoebaError(f"the worker of {self.name} ended with status {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        if "error" in answer:
            raise AmoebaError(f"{self.name}: {answer['error']}")
        return answer

    def run(self) -> Work:
        """Run once: prefill and decode."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._answer()
        return Work(Run(answer["first"], tuple(answer["steps"])), answer["processor"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(workers: Sequence[Worker], repeats: int) -> list[tuple[Timing, float]]:
    """Timings of workers taken in turn, after a warm-up of each, and the processor seconds of a median run."""
    for worker in workers:
        worker.run()
    runs: list[list[Work]] = [[] for _ in workers]
    for _ in range(repeats):
        for worker, done in zip(workers, runs, strict=True):
            done.append(worker.run())
    return [
        (summary([one.run for one in done], worker.workload), sorted(one.processor for one in done)[len(done) // 2])
        for worker, done in zip(workers, runs, strict=True)
    ]


def main(arguments: list[str]) -> None:
    """Answer each line of standard input with one run, as JSON; the first answer says that the engine is open."""
    flow, precision, artefact, vocabulary, prompt, tokens, threads, context = arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints
    try:
        engine = load_backend(flow).open(Path(artefact), precision, int(threads), context=int(context))
    except AmoebaError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        before = time.process_time()
        run = run_once(engine, int(vocabulary), Workload(1, int(prompt), int(tokens)))
        told = {"first": run.first, "steps": run.steps, "processor": time.process_time() - before}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
