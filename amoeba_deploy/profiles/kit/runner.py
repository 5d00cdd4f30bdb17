"""The runner of a kit, on the device: checks the files, measures, goes on where an earlier start ended.

It only watches. Engines are opened in processes of their own (``worker``, and one for the memory of each), and all that
is known lies in the results (``results``) the moment it is known.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.files import system_refusal
from amoeba_deploy.profiles.kit import own_tools, worker
from amoeba_deploy.profiles.kit.form import PACKAGE, RUN, Item, Kit, check_files, kit_digest, read_kit
from amoeba_deploy.profiles.kit.results import INTERRUPTIONS, Journal, Results, State, failures, unfinished
from amoeba_deploy.profiles.kit.worker import current_file, error_of
from amoeba_deploy.profiles.machine import conditions, fingerprint, machine_facts, threads
from amoeba_deploy.profiles.measure import peak_memory, summary


def say(text: str) -> None:
    """One line of progress."""
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


class Runner:
    """One start of a kit's runner."""

    def __init__(self, folder: Path, kit: Kit, journal: Journal, budget: float) -> None:
        self.folder, self.kit, self.journal = folder, kit, journal
        self._deadline = time.monotonic() + budget

    def _states(self) -> dict[str, State]:
        return dict(self.journal.read().states)

    def _fail(self, item: str, **failure: Any) -> None:
        self.journal.add({"record": "failed", "item": item, **failure})

    def session(self, kind: str) -> None:
        """Record the machine and its state, at the start or at the end."""
        now = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - datetime.UTC is newer than Python 3.9
        line: dict[str, Any] = {"record": kind, "date": now.isoformat(timespec="seconds"), "conditions": conditions()}
        if kind == "session":
            machine = machine_facts() | {"fingerprint": fingerprint(), "threads": threads()}
            line |= {"machine": machine, "python": platform.python_version(), "engines": self._versions()}
        self.journal.add(line)

    def _versions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for flow in dict.fromkeys(item.flow for item in self.kit.items):
            found |= load_backend(flow).toolchain().versions
        return dict(sorted(found.items()))

    def settle_earlier(self, redo: Sequence[str] | None) -> None:
        """Forget what is to be measured again, and take note of the item at which an earlier start ended.

        What lacked its engine's package is tried again by itself.
        """
        states = self._states()
        for item in self.kit.items:
            asked = redo is not None and (not redo or item.id in redo)
            untried = states[item.id].error_code == ToolchainMissing.exit_code
            if asked or untried:
                self.journal.add({"record": "again", "item": item.id})
        current = current_file(self.folder)
        if not current.is_file():
            return
        item_id = current.read_text()
        current.unlink()
        if item_id not in states or states[item_id].settled:
            return
        self.journal.add({"record": "interrupted", "item": item_id})
        if states[item_id].interrupted + 1 >= INTERRUPTIONS:
            self._fail(
                item_id,
                error=f"the runner or the machine ended {INTERRUPTIONS} times while it ran, often for want of memory",
                error_code=1,
            )

    def measure_engines(self) -> None:
        """Time all engines that are opened here, in a process that is started again where an engine ended it."""
        self._by_llama_bench()
        alone = False
        while any(worker.wanted(item, self._states()[item.id]) for item in self.kit.items):
            code = self._work(alone)
            if code == 0:
                return
            current = current_file(self.folder)
            if not current.is_file():
                raise AmoebaError(f"the process that measures ended with status {code} and no item under way")
            item_id = current.read_text()
            current.unlink()
            if code == -signal.SIGKILL and not alone:
                say("the process that measures was killed, often for want of memory; going on one engine at a time")
                alone = True
                continue
            self._fail(item_id, error=f"its process ended with {_ending(code)}", error_code=1)
            say(f"{item_id}: its process ended with {_ending(code)}")

    def _work(self, alone: bool) -> int:
        """Run a worker, saying what it finishes; returns its exit status."""
        seconds = max(self._deadline - time.monotonic(), 0.0)
        command = [sys.executable, str(self.folder / RUN), "--worker", f"{seconds:.3f}", str(int(alone))]
        descriptor = self.journal.descriptor
        said = {item_id for item_id, state in self._states().items() if state.stopped or state.error}
        process = subprocess.Popen([*command, str(descriptor)], pass_fds=(descriptor,))
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                for item in self.kit.items:
                    state = self._states()[item.id]
                    if item.id not in said and (state.stopped or state.error):
                        said.add(item.id)
                        say(self._line(item, state))
                if process.poll() is not None:
                    return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _line(self, item: Item, state: State) -> str:
        if state.error is not None:
            return f"{item}: failed: {state.error}"
        if not state.runs:
            return f"{item}: by {(state.report or {}).get('tool', 'its own tool')}; its report is kept"
        found = summary(state.runs, self.kit.workload)
        first, each = (f"{ms:.2f} ms ± {error:.1%}" for ms, error in _medians(found))
        return f"{item}: TTFT {first}, TPOT {each}; {len(state.runs)} runs, then {state.stopped or 'not finished'}"

    def _by_llama_bench(self) -> None:
        for item in self.kit.items:
            command = own_tools.by_llama_bench(item, self.kit)
            if command is None or self._states()[item.id].settled:
                continue
            say(f"{item}: llama-cpp-python is not here; measuring by llama-bench")
            self._reported(item, partial(own_tools.run_llama_bench, self.folder, item, command))

    def run_commands(self) -> None:
        """Measure the items that only their engine's own commands measure."""
        for item in self.kit.items:
            if item.commands and not self._states()[item.id].settled:
                self._reported(item, partial(own_tools.run_commands, self.folder, item, say))

    def _reported(self, item: Item, run: Callable[[], dict[str, Any]]) -> None:
        try:
            self.journal.add(run())
        except Exception as error:  # a tool's own; the next item may still work
            self._fail(item.id, **error_of(error))
        say(self._line(item, self._states()[item.id]))

    def measure_memory(self) -> None:
        """The peak memory of every engine that was timed, each in a fresh process."""
        for item in self.kit.items:
            state = self._states()[item.id]
            if state.settled or state.stopped is None:
                continue
            artefact, numbers = self.folder / item.artefact, (self.kit.vocabulary, self.kit.workload, self.kit.context)
            try:
                peak = peak_memory(item.flow, item.precision, artefact, *numbers)
                self.journal.add({"record": "memory", "item": item.id, **asdict(peak)})
                say(f"{item}: {peak.memory_bytes / 1e6:.0f} MB of memory at most")
            except AmoebaError as error:
                self._fail(item.id, **error_of(error))
                say(f"{item}: failed: {error}")

    def print_results(self) -> None:
        """One line an item on standard output."""
        for item in self.kit.items:
            print(self._line(item, self._states()[item.id]))


def _medians(found: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    return (found.ttft_ms, found.ttft_error), (found.tpot_ms, found.tpot_error)


def _ending(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    name = signal.Signals(-code).name
    return f"{name}, often for want of memory" if name == "SIGKILL" else name


def outcome(results: Results) -> AmoebaError | None:
    """What a start ends with: nothing where everything was measured."""
    failed, left = list(failures(results)), unfinished(results)
    if failed:
        item, state = failed[0]
        codes = {state.error_code for _, state in failed}
        kind = ToolchainMissing if codes == {ToolchainMissing.exit_code} else AmoebaError
        return kind(f"{len(failed)} of {len(results.items)} items failed; the first: {item}: {state.error}")
    if left:
        return AmoebaError(f"{len(left)} of {len(results.items)} items are not finished; run it again")
    return None


def run(folder: Path, budget: float | None, redo: Sequence[str] | None) -> None:
    """Measure a kit; raises what ``outcome`` says, or what is wrong with the kit."""
    kit = read_kit(folder)
    say(f"checking {len(kit.files)} files")
    check_files(folder, kit)
    unknown = sorted(set(redo or ()) - {item.id for item in kit.items})
    if unknown:
        raise BadInput(f"the kit has no item '{unknown[0]}'; it has {', '.join(item.id for item in kit.items)}")
    waiting = "another run of this kit is under way; waiting for its end"
    journal = Journal.open(folder, kit, kit_digest(folder), lambda: say(waiting))
    runner = Runner(folder, kit, journal, budget or kit.budget)
    runner.settle_earlier(redo)
    runner.session("session")
    try:
        runner.measure_engines()
        runner.run_commands()
        runner.measure_memory()
    finally:
        with suppress(OSError):
            current_file(folder).unlink()
    runner.session("ended")
    runner.print_results()
    wrong = outcome(journal.read())
    if wrong:
        raise wrong


def main(folder: Path, arguments: Sequence[str]) -> int:
    """The command line of ``run.py``; returns its exit status."""
    if list(arguments[:1]) == ["--worker"]:
        seconds, alone, descriptor = arguments[1:]
        return worker.main(folder, float(seconds), alone == "1", int(descriptor))
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Measure the engines in this folder. What is measured is kept in results/; a run that was ended "
        "goes on where it was.",
    )
    budget, redo = "time after which no run begins  [default: the kit's own]", "measure again: these items, or all"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=budget)
    parser.add_argument("--redo", nargs="*", metavar="ITEM", help=redo)
    asked = parser.parse_args(arguments)
    package = str(folder / PACKAGE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        run(folder, asked.budget, asked.redo)
    except AmoebaError as error:
        say(f"run.py: {error}")
        return error.exit_code
    except OSError as error:
        say(f"run.py: {system_refusal(error)}")
        return BadInput.exit_code
    except KeyboardInterrupt:
        say("run.py: interrupted; run it again to go on")
        return 1
    return 0
