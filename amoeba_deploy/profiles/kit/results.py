"""``results.jsonl``: what the runner measured, one line a fact, each on the disk before the next run begins.

The first line is the head: which kit, device and model, and the kit's items. Lines are only ever added, so whatever
ends the runner costs the run under way and no more: a line that the end cut short is dropped. docs/profile_kit.md
describes all kinds of lines.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.kit.form import Item, Kit, read_head
from amoeba_deploy.profiles.measure import Run
from amoeba_deploy.profiles.workload import Workload

RESULTS_FORMAT = "amoeba.profile-results/1"
RESULTS, FILE = "results", "results.jsonl"
"""The folder in a kit, and the file in it."""
REPORTS = "reports"
"""Of engines' own tools, in the folder of results."""
INTERRUPTIONS = 3
"""So often may all of the runner have ended while an item ran, before the item is taken for the reason."""


@dataclass
class State:
    """What is known of one item."""

    runs: list[Run] = field(default_factory=list)
    stopped: str | None = None
    memory: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    error: str | None = None
    error_code: int | None = None
    interrupted: int = 0

    @property
    def measured(self) -> bool:
        """Whether everything is known of it."""
        return self.report is not None or (self.stopped is not None and self.memory is not None)

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to do for it."""
        return self.measured or self.error is not None

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one line."""
        kind = record["record"]
        if kind == "run":
            energy = record.get("energy_j")
            self.runs.append(Run(float(record["first_s"]), tuple(map(float, record["steps_s"])), energy))
            self.stopped = record.get("stopped", self.stopped)
        elif kind == "memory":
            self.memory = record
        elif kind == "report":
            self.report = record
        elif kind == "failed":
            self.error, self.error_code = str(record["error"]), int(record["error_code"])
        elif kind == "interrupted":
            self.interrupted += 1


@dataclass(frozen=True)
class Results:
    """All of a results file."""

    head: Mapping[str, Any]
    items: tuple[Item, ...]
    sizes: Mapping[str, int]
    workload: Workload
    context: int
    sessions: tuple[Mapping[str, Any], ...]
    states: Mapping[str, State]
    """By the items' ids."""


def results_file(path: Path) -> Path:
    """The file of results: itself, or that in a folder of results or in a kit."""
    inner = [path / FILE, path / RESULTS / FILE]
    return next((file for file in inner if file.is_file()), path)


def read_results(file: Path) -> Results:
    """A results file up to its last whole line.

    Raises:
        BadInput: it is none, or a line in it is damaged.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    number = 1
    try:
        head = json.loads(lines[0])
        if head["format"] != RESULTS_FORMAT:
            raise BadInput(
                f"{file}: has format {head['format']!r:.60} where {RESULTS_FORMAT!r} was expected; this version reads "
                f"no other"
            )
        items, sizes, workload, context = read_head(head)
        states = {item.id: State() for item in items}
        sessions = []
        for line in lines[1:]:
            number += 1
            record = json.loads(line)
            if record["record"] == "session":
                sessions.append(record)
            elif record["record"] == "again":
                states[_known(record, states)] = State()
            elif "item" in record:
                states[_known(record, states)].add(record)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise BadInput(f"{file}: line {number} is not one of a kit's results; copy the file again") from None
    return Results(head, items, sizes, workload, context, tuple(sessions), states)


def _known(record: Mapping[str, Any], states: Mapping[str, State]) -> str:
    if record["item"] not in states:
        raise ValueError
    return str(record["item"])


class Journal:
    """The results file of a kit, open for adding; one runner at a time."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self.descriptor = file, descriptor

    @classmethod
    def open(cls, folder: Path, kit: Kit, digest: str, waiting: Callable[[], None]) -> Journal:
        """Make the results of a kit, or go on with them.

        ``waiting`` is called where another runner is at work on them, whose end is then awaited.

        Raises:
            BadInput: they are of another kit, or damaged.
        """
        file = folder / RESULTS / FILE
        file.parent.mkdir(exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.set_inheritable(descriptor, True)
        with suppress(OSError):  # of file systems without locks, where nobody can tell
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        journal = cls(file, descriptor)
        journal._cut_torn_line()
        if not os.fstat(descriptor).st_size:
            journal.add({"format": RESULTS_FORMAT, "kit": digest, "tool": kit.tool, **kit.head()})
        elif read_results(file).head.get("kit") != digest:
            raise BadInput(f"{file}: holds the results of another kit; move {file.parent} away and run again")
        return journal

    def _cut_torn_line(self) -> None:
        whole = self.file.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self.descriptor, whole)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one line; it is on the disk when this returns."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        os.write(self.descriptor, line.encode())
        os.fsync(self.descriptor)

    def read(self) -> Results:
        """What it holds now."""
        return read_results(self.file)


def failures(results: Results) -> Iterator[tuple[Item, State]]:
    """The items that failed."""
    return ((item, results.states[item.id]) for item in results.items if results.states[item.id].error is not None)


def unfinished(results: Results) -> Sequence[Item]:
    """The items of which not everything is known, and that did not fail."""
    states = results.states
    return [item for item in results.items if not states[item.id].measured and states[item.id].error is None]
