"""Run a command of a device again and again, with a fault at another durable system call each time.

``python crashing.py '{"template": DEVICE, "place": FOLDER, "arguments": [...], "fault": "end"}'``: for every n a copy
of the device becomes FOLDER/n, and a process runs ``amoeba bundle ARGUMENTS`` on it. Before its n-th call it ends, or,
by the fault "full", the disk is full from then on. Prints how many calls there are.
"""

from __future__ import annotations

import errno
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
ENDED, WRONG, DONE = 77, 78, 0


class Faulty:
    """The module ``os``, but for a fault at the n-th of some calls."""

    def __init__(self, last: int, fault: str) -> None:
        self.left, self.fault, self.reached = last, fault, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **named)  # to read, or to sync
            if self.left == 0 and self.fault == "end":
                os._exit(ENDED)
            if self.left == 0 and needs_room(name):
                self.reached = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[-1]))
            self.left = max(0, self.left - 1)
            return real(*arguments, **named)

        return call


def needs_room(name: str) -> bool:
    """Whether a call can fail on a full disk."""
    return name in ("open", "write", "symlink", "mkdir")


def run_one(root: Path, arguments: list[str], last: int, fault: str) -> int:
    """The status of a process that runs the command; its health check is done there, too."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    faulty = vars(durable)["os"] = Faulty(last, fault)
    # The engine is opened by the process that the tests start; here only the order of changes is looked at.
    health._checked_apart = lambda *_: health.Health(1)  # type: ignore[assignment]
    done = CliRunner().invoke(main, ["bundle", *arguments, "--root", str(root), "--quiet"])
    said = done.stderr.splitlines()
    if faulty.reached and (done.exit_code not in (2, 5) or len(said) != 1 or "No space left" not in said[0]):
        print(done.exit_code, done.output, file=sys.stderr, flush=True)
        os._exit(WRONG)
    os._exit(ENDED if faulty.reached else DONE)


def run_all(template: Path, place: Path, arguments: list[str], fault: str) -> int:
    """Every n in turn, until the command runs to its end."""
    number = 0
    while True:
        root = copy_device(template, place / str(number))
        status = run_one(root, arguments, number, fault)
        if status == WRONG:
            sys.exit(f"at call {number}")
        if status != ENDED:
            return number
        number += 1


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    print(run_all(Path(work["template"]), Path(work["place"]), work["arguments"], work["fault"]))
