"""The process that opens engines and times them, so that an engine which ends its process ends no more than this one.

Engines take turns as everywhere (``measure``). Every run is a line of the results before the next begins; which item
is under way stands in the file ``current``, so that the runner knows whose fault an end was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Counts, Engine, Ids
from amoeba_deploy.errors import AmoebaError, ToolchainMissing
from amoeba_deploy.profiles.kit.form import Item, Kit, read_kit
from amoeba_deploy.profiles.kit.results import FILE, RESULTS, Journal, State
from amoeba_deploy.profiles.measure import OPEN_SHARE, ROOM_SHARE, Run, Stopped, Subject, measure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CURRENT = "current"
"""Names the item that is under way; missing where none is."""


def current_file(folder: Path) -> Path:
    """Where a kit's runner says which item is under way."""
    return folder / RESULTS / CURRENT


def free_memory() -> int:
    """Bytes that new programs may take, as the system says; half of all where it does not."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def error_of(error: Exception) -> dict[str, object]:
    """What a line of the results says of a failure."""
    if isinstance(error, AmoebaError):
        return {"error": str(error), "error_code": error.exit_code}
    if isinstance(error, ModuleNotFoundError):
        missing = f"the Python package {error.name} is not installed; run pip install {error.name}"
        return {"error": missing, "error_code": ToolchainMissing.exit_code}
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return {"error": f"unexpected {type(error).__name__}: {said:.300}", "error_code": 1}


class _Watched:
    """An engine that says that it is under way before every run."""

    def __init__(self, engine: Engine, mark: Callable[[], None]) -> None:
        self._engine, self._mark = engine, mark

    def reset(self) -> None:
        self._mark()
        self._engine.reset()

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        return self._engine.feed(ids, lengths)


class Worker:
    """Measures items until all are done or failed, or the time is up."""

    def __init__(self, folder: Path, kit: Kit, journal: Journal, seconds: float, alone: bool) -> None:
        self.folder, self.kit, self.journal = folder, kit, journal
        self._deadline = time.perf_counter() + seconds
        self._room = 0.0 if alone else ROOM_SHARE * free_memory()
        self._parent = os.getppid()
        self._current = current_file(folder)

    def _mark(self, item: Item) -> None:
        if os.getppid() != self._parent:  # the runner was killed; the next one goes on from here
            os._exit(1)
        self._current.write_text(item.id)

    def _open(self, item: Item) -> Engine:
        self._mark(item)
        where, batch = self.folder / item.artefact, self.kit.workload.batch
        engine = load_backend(item.flow).open(where, item.precision, context=self.kit.context, batch=batch)
        return _Watched(engine, partial(self._mark, item))

    def _record(self, items: list[Item], number: int, run: Run, stopped: Stopped | None) -> None:
        line = {"record": "run", "item": items[number].id, "first_s": round(run.first, 9)}
        line["steps_s"] = [round(step, 9) for step in run.steps]
        line |= {} if run.energy_j is None else {"energy_j": run.energy_j}
        self.journal.add(line | ({} if stopped is None else {"stopped": stopped}))
        self._current.unlink()

    def work(self) -> None:
        """Measure what is left; an item that fails is left out, and the others go on."""
        while True:
            states = self.journal.read().states
            items = [item for item in self.kit.items if wanted(item, states[item.id])]
            if not items:
                return
            subjects = [Subject(partial(self._open, item), round(OPEN_SHARE * item.bytes)) for item in items]
            try:
                measure(
                    subjects,
                    self.kit.vocabulary,
                    self.kit.workload,
                    None,
                    self._deadline,
                    room=self._room,
                    seed=self.kit.seed,
                    known=[states[item.id].runs for item in items],
                    record=partial(self._record, items),
                )
            except Exception as error:  # an engine's own; the next item may still work
                if not self._current.is_file():
                    raise
                failed = self._current.read_text()
                self.journal.add({"record": "failed", "item": failed, **error_of(error)})
                self._current.unlink()


def wanted(item: Item, state: State) -> bool:
    """Whether an item is still to be timed here."""
    return not item.commands and state.stopped is None and not state.settled


def main(folder: Path, seconds: float, alone: bool, descriptor: int) -> int:
    """Work on the kit in a folder, with the runner's open file of results."""
    kit, file = read_kit(folder), folder / RESULTS / FILE
    Worker(folder, kit, Journal(file, descriptor), seconds, alone).work()
    return 0
