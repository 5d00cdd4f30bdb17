"""The documentation: commands that it shows exist and print what it says, examples run, the site builds."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import amoeba_deploy
from amoeba_deploy.checkpoint import EMBEDDED
from amoeba_deploy.cli import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import transcripts  # noqa: E402

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)


def shown_commands(page: Path) -> list[list[str]]:
    """Every amoeba command in the code blocks of a page, in words."""
    found = []
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            command = line.strip().removeprefix("$ ")
            if not command.startswith("amoeba ") or "..." in command:
                continue
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                continue
            ends = [place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")]
            found.append(words[1 : ends[0]] if ends else words[1:])
    return found


def unknown_in(words: list[str]) -> str | None:
    """The first word that is no command or option of amoeba; None where all are."""
    command: Any = main
    context = click.Context(main)
    options: set[str] = set()
    for place, word in enumerate(words):
        inside = getattr(command, "commands", {})
        if isinstance(command, click.Group) and not word.startswith("-"):
            if word not in command.list_commands(context):
                return " ".join(words[: place + 1])
            command = command.get_command(context, word)
        elif word in inside:
            command = inside[word]
        options = {"-h", "--help"}
        for option in command.params:
            options |= {*option.opts, *option.secondary_opts}
        if word.startswith("--"):
            name = word.partition("=")[0]
            parents = {n for option in main.params for n in option.opts}
            if name not in options | parents:
                return f"{' '.join(words[:place])} {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    assert [wrong for words in shown_commands(page) if (wrong := unknown_in(words))] == []


def test_the_check_of_commands_can_fail() -> None:
    assert unknown_in(["search", "--latncy", "40ms"]) == "search --latncy"
    assert unknown_in(["serch"]) == "serch"
    assert unknown_in(["bundle", "verfy", "x"]) == "bundle verfy"
    assert unknown_in(["profile", "kit", "--device", "orin-nx"]) is None
    assert sum(len(shown_commands(page)) for page in PAGES) > 100


def modules() -> list[str]:
    """Every module of the package that can be imported here; files that run elsewhere are left out."""
    found = []
    for info in pkgutil.walk_packages(amoeba_deploy.__path__, "amoeba_deploy."):
        if ".kit." not in info.name and not info.name.endswith("__main__"):
            found.append(info.name)
    return found


def test_examples_in_docstrings_run() -> None:
    tried = 0
    for name in modules():
        source = Path(importlib.util.find_spec(name).origin or "")  # type: ignore[union-attr]
        if ">>> " not in source.read_text(encoding="utf-8"):
            continue
        outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert outcome.failed == 0, name
        tried += outcome.attempted
    assert tried > 10


PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def of_checkpoints() -> list[tuple[str, str]]:
    """The scripts of pages that begin with a checkpoint."""
    blocks = [(page.name, block) for page in PAGES for block in PYTHON.findall(page.read_text(encoding="utf-8"))]
    return [(name, block) for name, block in blocks if "amoeba_deploy.open(" in block]


@pytest.mark.parametrize(("page", "script"), of_checkpoints(), ids=[name for name, _ in of_checkpoints()])
def test_scripts_that_begin_with_a_checkpoint_run(page: str, script: str, tmp_path: Path) -> None:
    """On the embedded checkpoint, in a shape that it has."""
    own = re.sub(r"\"checkpoint\"|\"CHECKPOINT\"", repr(str(EMBEDDED)), script).replace("24x0.75", "8x0.75")
    code = f"import amoeba_deploy\n{own}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a model folder to a verified engine and an installed bundle, each command as the page has it."""
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reader"
    folder.mkdir()
    transcripts.prepared(folder)
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    shown = [one for one in transcripts.commands_of(page) if one.runs]
    assert len(shown) > 15
    for one in shown:
        printed = transcripts.run(one.command, folder)
        assert "(exit code" not in printed, f"{one.command}\n{printed}"
        assert transcripts.missing(one, printed) == [], f"{one.command}\n{printed}"
    assert "verified" in page


def test_the_comparison_of_transcripts_can_fail() -> None:
    shown = transcripts.Shown("x", "engine: 14 files intact, 27 self-test tokens equal\n")
    assert transcripts.missing(shown, "engine: 13 files intact, 31 self-test tokens equal\n") == []
    assert transcripts.missing(shown, "engine: 13 files intact\n") == [
        "engine: # files intact, # self-test tokens equal"
    ]


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run(
        [*map(str, command), str(ROOT / "docs"), str(site)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scripts = r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"'](?:https?:)?//"
    styles = r"<link[^>]*rel=[\"']stylesheet[\"'][^>]*href=[\"'](?:https?:)?//"
    loads = re.compile(f"{scripts}|{styles}")
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page
    commands = (site / "cli.html").read_text(encoding="utf-8")
    for name in ("select", "tune", "export", "report"):
        assert f"amoeba {name}" in commands
    assert "amoeba export --device orin-nx --latency 40ms" in commands
    assert "amoeba_deploy.open" in (site / "api.html").read_text(encoding="utf-8")
