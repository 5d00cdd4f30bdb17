"""Pages that show commands with what they print: run them, compare, or write down anew what they print now.

    python tools/transcripts.py docs/tutorial.md            # says where the page differs
    python tools/transcripts.py docs/tutorial.md --write    # puts today's output into the page

Commands stand behind ``$ `` in blocks fenced as ``console``; what follows is their output, of both streams. They run in
order, in a folder of their own that sees the repository's package and tools. Figures and the words that depend on the
machine are not compared.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEN = ("amoeba_deploy", "tools", "docs")
"""What of the repository the commands see."""
SETUP = ("make demo", ". .venv/bin/activate")
"""Commands that have been run where this runs."""
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_PLACE = re.compile(r"(?<!\S)/\S*/(?=tutorial/)")
"""The folder in which a reader works."""
_SOURCE = re.compile(r"\b(measured|interpolated|estimated)\b")
_OF_THE_MACHINE = re.compile(
    r"^  (its quality cannot be told apart|significantly better than)|^measuring \d+ engines|^building \d+ engines"
    r"|^profiling |^note: |tokens/s|^\(exit code"
)
"""Lines that depend on how fast or how busy a machine is."""


@dataclass(frozen=True)
class Shown:
    """One command of a page, and what the page says that it prints."""

    command: str
    output: str

    @property
    def runs(self) -> bool:
        """Whether it is to be run: not what sets the environment up."""
        return self.command not in SETUP


def commands_of(page: str) -> Iterator[Shown]:
    """The commands of a page in order."""
    for block in _BLOCK.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = f"{command}\n{more}"
            yield Shown(command, output)


def run(command: str, folder: Path) -> str:
    """What a command prints, with its exit code where that is not 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "120"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout + (f"(exit code {done.returncode})\n" if done.returncode else "")


def comparable(output: str) -> list[str]:
    """The lines of an output without figures, and without what depends on the machine."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not _OF_THE_MACHINE.search(line)]
    plain = (_SOURCE.sub("SOURCE", _NUMBER.sub("#", _PLACE.sub("", line))) for line in lines)
    return [re.sub(r"\s+", " ", line) for line in plain]


def missing(shown: Shown, printed: str) -> list[str]:
    """The lines of a page that its command does not print; ``...`` stands for any lines.

    What a model says is not compared: one that was tuned on another processor may go on with other words.
    """
    if shown.command.startswith("amoeba run"):
        return []
    found = set(comparable(printed))
    return [line for line in comparable(shown.output) if line != "..." and line not in found]


def prepared(folder: Path) -> Path:
    """A folder in which the commands of a page may run."""
    for name in SEEN:
        (folder / name).symlink_to(ROOT / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    page = asked.page.read_text(encoding="utf-8")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="amoeba-page-") as work:
        folder = prepared(Path(work))
        for shown in commands_of(page):
            if not shown.runs:
                continue
            printed = run(shown.command, folder)
            for line in missing(shown, printed):
                wrong += 1
                print(f"$ {shown.command}\nno longer prints: {line}", file=sys.stderr)
            before = f"$ {shown.command}\n{shown.output}"
            own = printed.replace(f"{folder}/", "")
            kept = "".join(f"{line}\n" for line in own.splitlines() if "tokens/s" not in line)
            page = page.replace(before, f"$ {shown.command}\n{kept}", 1)
    if asked.write:
        asked.page.write_text(page, encoding="utf-8")
    sys.exit(bool(wrong) and not asked.write)


if __name__ == "__main__":
    main()
