"""Progress on standard error: a bar on a terminal, nothing otherwise, and short remarks unless told to be quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Advances a bar by one step, and changes the text at its end where one is given."""

    def __call__(self, text: str | None = None, /) -> None: ...


class Progress:
    """Where long work reports to. ``quiet`` silences remarks and bars alike."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @property
    def on_terminal(self) -> bool:
        """Whether a bar would be seen."""
        return sys.stderr.isatty()

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar of ``total`` steps, some ``done``, with the time left; the value is the function that advances it."""
        if self.quiet or not self.on_terminal:
            yield lambda _=None: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            *(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[text]}", markup=False),
        )
        # A step may take most of a minute, and rich guesses the time left from the steps of a period.
        with RichProgress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600) as shown:
            task = shown.add_task(label, total=total, completed=done, text="")

            def advance(text: str | None = None) -> None:
                if text is not None:
                    shown.update(task, text=text)
                shown.advance(task)

            yield advance
