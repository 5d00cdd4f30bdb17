"""Projects that tests build: an amoeba.toml in a folder, a cache of its own, and the command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from amoeba_deploy.cli import main

SMALL = 'device = "raspberry-pi-5"\nshape = "6x0.5"\nflow = ["onnx"]\nprecision = ["int8"]\nverify = false\n'
"""A target that is built in about a second."""
TWO = f"[targets.first]\n{SMALL}\n[targets.second]\n{SMALL.replace('6x0.5', '7x0.5')}"


@dataclass(frozen=True)
class Project:
    """A folder with an amoeba.toml; commands run as if in it."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "amoeba.toml"

    def write(self, text: str) -> Project:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(text, encoding="utf-8")
        return self

    def run(self, *arguments: object, **environment: str) -> Result:
        command = ["build", "--config", str(self.config), *map(str, arguments)]
        return CliRunner().invoke(main, command, env=environment)

    def build(self, *arguments: object, code: int = 0, **environment: str) -> dict[str, Any]:
        """What ``build --json`` prints."""
        result = self.run(*arguments, "--json", "--quiet", **environment)
        assert result.exit_code == code, result.output
        value: dict[str, Any] = json.loads(result.stdout)
        return value

    def states(self, *arguments: object, code: int = 0) -> dict[str, str]:
        """The state of every target of a build."""
        return {each["target"]: each["state"] for each in self.build(*arguments, code=code)["targets"]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with two small targets, and an empty cache."""
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    return Project(tmp_path / "project").write(TWO)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
