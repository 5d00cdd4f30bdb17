"""Run a command of a device again and again, ended before another durable system call each time; see the tests of it.

``python crashing.py '{"template": DEVICE, "place": FOLDER, "arguments": [...]}'``: for every n a copy of the device
becomes FOLDER/n, and a process of its own runs ``amoeba bundle ARGUMENTS`` on it and ends before the n-th call. Prints
how many calls there are; the command ran to its end with no n of these.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Whatever a command imports is imported once, before any process is split off.
import model_signing.verifying  # noqa: F401
import sigstore_models.bundle.v1  # noqa: F401
from bundles import copy_device
from click.testing import CliRunner

from amoeba_deploy.backends import onnx  # noqa: F401
from amoeba_deploy.cli import main
from amoeba_deploy.delivery import signing  # noqa: F401
from amoeba_deploy.device import durable, health

CALLS = ("open", "write", "fsync", "replace", "symlink", "rename", "unlink", "mkdir")
ENDED, DONE = 77, 0


class Counting:
    """The module ``os``, but for an end of the process before the n-th of some calls."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            if self.left == 0:
                os._exit(ENDED)
            self.left -= 1
            return real(*arguments, **named)

        return call


def run_one(root: Path, arguments: list[str], last: int) -> int:
    """The status of a process that runs the command; its health check is done there, too."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    vars(durable)["os"] = Counting(last)
    # The engine is opened by the process that the tests start; here only the order of changes is looked at.
    health._checked_apart = lambda *_: health.Health(1)  # type: ignore[assignment]
    CliRunner().invoke(main, ["bundle", *arguments, "--root", str(root), "--quiet"])
    os._exit(DONE)


def run_all(template: Path, place: Path, arguments: list[str]) -> int:
    """Every n in turn, until the command runs to its end."""
    number = 0
    while True:
        root = copy_device(template, place / str(number))
        if run_one(root, arguments, number) != ENDED:
            return number
        number += 1


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    print(run_all(Path(work["template"]), Path(work["place"]), work["arguments"]))
