"""How MLC-LLM runs on this machine: its own command, or a Python interpreter that imports it.

Our own interpreter needs neither mlc_llm nor tvm. ``$AMOEBA_MLC_PYTHON`` names an interpreter that has both; without
it the command ``mlc_llm`` on the PATH is used, and the interpreter that it starts with runs compiled models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from amoeba_deploy.backends.backend import Toolchain
from amoeba_deploy.errors import AmoebaError

PYTHON = "AMOEBA_MLC_PYTHON"
"""The environment variable that names an interpreter in which mlc_llm and tvm can be imported."""
COMMAND = "mlc_llm"
INSTALL = (
    "pip install --pre -f https://mlc.ai/wheels mlc-llm-nightly-cpu mlc-ai-nightly-cpu in an environment of its own, "
    f"and set {PYTHON} to its python"
)
DRIVER = Path(__file__).with_name("driver.py")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Tool:
    """What runs MLC's commands, and which interpreter (None where it is not known) runs what they compiled."""

    command: tuple[str, ...]
    python: str | None

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        what: str,
        folder: Path,
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        """Run one of MLC's commands in a folder, behind ``prefix``.

        Raises:
            AmoebaError: it failed or was killed; the message ends with the last line of its output.
        """
        try:
            done = subprocess.run(
                [*prefix, *self.command, name, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                check=False,
                cwd=folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment),
            )
        except OSError as error:
            raise AmoebaError(f"{self.command[0]} cannot be started ({error.strerror}); set {PYTHON}") from None
        if done.returncode == 0:
            return
        said = last_line(done.stdout.decode("utf-8", "replace"))
        if done.returncode < 0:
            died = signal.Signals(-done.returncode).name
            raise AmoebaError(f"mlc_llm {name} was killed by {died} {what}, after '{said}'; nothing was written")
        raise AmoebaError(f"mlc_llm {name} failed {what}: {said}")


def last_line(output: str) -> str:
    """The last line of some output that says something, without colours."""
    lines = [_COLOURS.sub("", line).strip() for line in output.replace("\r", "\n").splitlines()]
    said = [line for line in lines if line and not line.startswith("note: ")]
    return said[-1] if said else "it said nothing"


def find_tool() -> Tool | None:
    """What runs MLC here; None where nothing does."""
    named = os.environ.get(PYTHON)
    if named:
        return Tool((named, str(DRIVER)), named)
    command = shutil.which(COMMAND)
    return Tool((command,), _interpreter(Path(command))) if command else None


def _interpreter(script: Path) -> str | None:
    """The Python that a script starts with, where its first line names one."""
    with script.open("rb") as stream:
        first = stream.readline(4096)
    words = first[2:].decode("utf-8", "replace").split() if first.startswith(b"#!") else []
    if not words or "python" not in Path(words[-1]).name:
        return None
    return shutil.which(words[-1])


@cache
def _versions(python: str, _modified: float) -> dict[str, str]:
    """What an interpreter has of tvm and mlc_llm; nothing where it does not run."""
    try:
        done = subprocess.run([python, str(DRIVER), "versions"], capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (OSError, ValueError, IndexError):
        return {}
    return {str(name): str(value) for name, value in found.items()}


def toolchain() -> Toolchain:
    """Versions of tvm and mlc_llm, asked of their interpreter once; what is missing, and how to get it."""
    tool = find_tool()
    if tool is None:
        return Toolchain({}, (f"{COMMAND} (neither on the PATH nor by {PYTHON})",), INSTALL)
    if tool.python is None:  # a command that is no Python script: what it is made of it does not tell
        return Toolchain({COMMAND: "unknown"}, (), INSTALL)
    found = shutil.which(tool.python)
    versions = _versions(found, Path(found).stat().st_mtime) if found else {}
    missing = tuple(f"{name} (not importable by {tool.python})" for name in ("tvm", COMMAND) if name not in versions)
    if missing and os.environ.get(PYTHON) is None:
        # The command itself may know better where its packages lie.
        return Toolchain({COMMAND: "unknown"} | versions, (), INSTALL)
    return Toolchain(dict(sorted(versions.items())), missing, INSTALL)
