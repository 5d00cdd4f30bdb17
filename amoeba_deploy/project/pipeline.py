"""``amoeba build``: every target of a project, after what it needs, and each at most once."""

from __future__ import annotations

import concurrent.futures as futures
import ctypes
import graphlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.errors import AmoebaError, VerificationFailed
from amoeba_deploy.extraction_store import ExtractionStore
from amoeba_deploy.files import check_target
from amoeba_deploy.profiles.machine import threads
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.cache import BuildCache, Entry
from amoeba_deploy.project.config import Loaded, load_project
from amoeba_deploy.project.inputs import Inputs
from amoeba_deploy.project.planned import Planned
from amoeba_deploy.project.result import Result, State
from amoeba_deploy.project.target_build import build_target

UNCHANGED: State = "unchanged"
RESTORED: State = "restored"
BUILT: State = "built"
_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


@dataclass(frozen=True)
class Maker:
    """What makes one target after the other in a process."""

    loaded: Loaded
    cache: BuildCache
    store: ExtractionStore
    progress: Progress

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.loaded.checkpoint)

    def make(self, one: Planned) -> Result:
        """Bring a target's bundle to its output: it is there, or in the cache, or is built; a failure is a result."""
        began = time.perf_counter()
        try:
            done = self._made(one)
        except Exception as error:  # one target's failure is its own
            done = one.result("failed", "").failed(error)
        return replace(done, seconds=time.perf_counter() - began)

    def _made(self, one: Planned) -> Result:
        if one.failure is not None:
            raise one.failure
        assert one.inputs is not None, "a target without a failure has its inputs"
        if one.entry is not None:
            if self.cache.holds(one.entry, one.output):
                return one.result(UNCHANGED, "nothing changed", one.entry)
            try:
                return self._restored(one, one.entry)
            except VerificationFailed:
                return self._built(one, one.inputs, "its bundle in the cache is damaged", drop=True)
        return self._built(one, one.inputs, one.why())

    def _restored(self, one: Planned, entry: Entry) -> Result:
        there = one.output.exists()
        self.cache.hand_out(entry, one.output)
        return one.result(RESTORED, "its output was another" if there else "its output was missing", entry)

    def _built(self, one: Planned, inputs: Inputs, reason: str, drop: bool = False) -> Result:
        """Build a target, unless another build made it meanwhile; ``drop`` what the cache has of it first."""
        check_target(one.output, force=True)
        state: State = RESTORED
        with self.cache.lock(inputs.key):
            if drop:
                self.cache.drop(inputs.key)
            entry = None if one.forced else self.cache.find(inputs.key)
            if entry is None:
                state = BUILT
                entry = build_target(
                    self._checkpoint, self.loaded, one.name, inputs, self.cache, self.store, self.progress
                )
        if not self.cache.holds(entry, one.output):
            self.cache.hand_out(entry, one.output)
        return one.result(state, reason if state == BUILT else "another build made it meanwhile", entry)


class _Prefixed(Progress):
    """Remarks of one of several processes, each with the target's name in front; no bars."""

    def __init__(self, name: str, quiet: bool) -> None:
        super().__init__(quiet)
        self._name = name

    def say(self, text: str) -> None:
        super().say(f"{self._name}: {text}")

    @property
    def on_terminal(self) -> bool:
        return False


@dataclass(frozen=True)
class _Task:
    """A target for another process."""

    config: Path
    one: Planned
    cache: Path
    store: Path
    quiet: bool


def _make_elsewhere(task: _Task) -> Result:
    """Make a target in a process of its own; the error of a failure need not travel, its sentence does."""
    tempfile.tempdir = str(task.store.parent)  # which goes with the build, whatever becomes of this process
    loaded, progress = load_project(task.config), _Prefixed(task.one.name, task.quiet)
    maker = Maker(loaded, BuildCache(task.cache), ExtractionStore(task.store), progress)
    return maker.make(task.one)


def _begin_process(processes: int, parent: int) -> None:
    """Let the libraries of a process use its share of the cores, and end it when the one that began it ends."""
    with suppress(OSError, AttributeError):  # on Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended already, and no signal will come
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that began it ends it
    share = str(max(1, threads() // processes))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, share)


@dataclass
class Build:
    """A build: targets that were planned, and what became of those that are done."""

    loaded: Loaded
    cache: BuildCache
    progress: Progress
    jobs: int = 1
    results: dict[str, Result] = field(default_factory=dict)

    def foreseen(self, planned: Sequence[Planned]) -> list[Result]:
        """What a build would do, without doing it."""
        return [self._foreseen(one) for one in planned]

    def _foreseen(self, one: Planned) -> Result:
        if one.failure is not None:
            return one.result("failed", "").failed(one.failure)
        if one.entry is None:
            return one.result("would build", one.why())
        if self.cache.holds(one.entry, one.output):
            return one.result(UNCHANGED, "nothing changed", one.entry)
        return one.result("would restore", "its output is not what the cache has", one.entry)

    def run(self, planned: Sequence[Planned]) -> list[Result]:
        """Build what is to be built; a target that fails stops only those that need it.

        Targets for this machine are measured on it, so they are built alone, when no other is being built.

        Raises:
            AmoebaError: a process that builds is killed.
            BadInput: the cache cannot be written.
        """
        with ExitStack() as stack:
            work = stack.enter_context(self.cache.workspace())
            store = ExtractionStore(work / "subnets")
            maker = Maker(self.loaded, self.cache, store, self.progress)
            apart = sum(one.entry is None and not one.is_here for one in planned)
            pool = stack.enter_context(_Pool(min(self.jobs, apart))) if min(self.jobs, apart) > 1 else None
            self._run({one.name: one for one in planned}, maker, pool)
        self._remember(planned)
        return [self.results[one.name] for one in planned]

    def _run(self, planned: dict[str, Planned], maker: Maker, pool: _Pool | None) -> None:
        sorter = graphlib.TopologicalSorter({name: one.needs for name, one in planned.items()})
        sorter.prepare()
        alone: list[Planned] = []
        running: dict[futures.Future[Result], Planned] = {}
        while sorter.is_active():
            for name in sorter.get_ready():
                one = planned[name]
                unmet = [need for need in one.needs if not self.results[need].good]
                if unmet:
                    self._keep(one.result("skipped", f"needs {unmet[0]}, which was not built"), sorter)
                    continue
                if one.entry is None and one.failure is None:
                    self.progress.say(f"{name}: building, {one.why()}")
                if pool is not None and one.entry is None and not one.is_here:
                    running[pool.submit(maker, one)] = one
                else:
                    alone.append(one)
            if running:
                done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for each in done:
                    self._keep(_outcome(each, running.pop(each)), sorter)
            elif alone:
                self._keep(maker.make(alone.pop(0)), sorter)

    def _keep(self, result: Result, sorter: graphlib.TopologicalSorter[str]) -> None:
        self.results[result.name] = result
        sorter.done(result.name)
        said = f"built in {result.seconds:.1f} s" if result.state == BUILT else f"{result.state}, {result.reason}"
        self.progress.say(f"{result.name}: {said}")

    def _remember(self, planned: Sequence[Planned]) -> None:
        """What each good target was built from, so that the next build can say what changed."""
        found = {}
        for one in planned:
            result = self.results[one.name]
            if result.good and one.inputs is not None and (one.last or {}).get("key") != one.inputs.key:
                found[one.name] = {"key": one.inputs.key, "inputs": one.inputs.values, "figures": result.figures}
        if found:
            self.cache.remember(self.loaded.file, found)


def _outcome(done: futures.Future[Result], one: Planned) -> Result:
    try:
        return done.result()
    except BrokenProcessPool:
        raise AmoebaError(
            f"the process that built {one.name} or another target ended without a word, as one does that the system "
            f"kills for want of memory; try fewer --jobs"
        ) from None


class _Pool:
    """Processes that build; they end with the block, whatever ends it."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=_begin_process, initargs=(processes, os.getpid())
        )

    def submit(self, maker: Maker, one: Planned) -> futures.Future[Result]:
        """Let a process make a target."""
        folders = maker.cache.folder, maker.store.folder
        return self._pool.submit(_make_elsewhere, _Task(maker.loaded.file, one, *folders, maker.progress.quiet))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
