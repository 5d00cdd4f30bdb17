"""tools/delivery.sh, the way of an engine from a target list to a device, runs as docs/delivery.md shows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTCOMES = (
    ("torch: absent transformers: absent onnxruntime: there", 1),
    ("(release 1, signed by key.pub) now, in slot a; ", 1),
    ("(release 2, signed by key.pub) now, in slot b; ", 1),
    ("already, nothing was done", 1),
    ("was built for the device orin-nx, and this one is raspberry-pi-5", 1),
    ("is release 1, and this device had release 2 already", 1),
    ("is signed by none of the trusted keys", 1),
    ("is not what was signed: engine/weights.int8.safetensors is changed", 1),
    ("is not healthy here: ", 1),
    ("what ran before runs again\n(exit code 5)", 1),
    ("the switch to slot a was not confirmed and is undone", 1),
    ("(release 5, signed by key.pub) now, in slot a; ", 1),
    ("(release 2, signed by key.pub) again, in slot b; ", 1),
    (" teacher.\n", 3),
)
"""What must stand in the transcript, and how often."""


def missing(text: str) -> list[str]:
    """What a transcript lacks, or has too often."""
    return [outcome for outcome, count in OUTCOMES if text.count(outcome) != count]


def test_the_documents_transcript_has_every_outcome() -> None:
    text = (ROOT / "docs" / "delivery.md").read_text(encoding="utf-8")
    assert missing(text) == []
    assert "wrote: " not in text


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="no docker-registry: see tools/install_test_servers"
)
def test_a_delivery_is_played_through(tmp_path: Path) -> None:
    for name in ("tools", "amoeba_deploy", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path)
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.owner() == tmp_path.owner() and folder != Path("/") and "pytest" in folder.name:
            folder.chmod(0o755)
    command = ["sh", "tools/delivery.sh", str(Path(sys.executable).parent)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert missing(done.stdout) == [], done.stdout
    assert "wrote: " not in done.stdout
    shown = re.findall(r"^# (.+)$", (ROOT / "docs" / "delivery.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert re.findall(r"^# (.+)$", done.stdout, re.MULTILINE) == shown
