"""Progress on standard error: a bar on a terminal, nothing otherwise, and short remarks unless told to be quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Where long work reports to. ``quiet`` silences remarks and bars alike."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of ``total`` steps with the time left; the value is the function that advances it by one."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task(label, total=total)
            yield lambda: shown.advance(task)
