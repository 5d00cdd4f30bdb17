"""Kits and the devices that run them: an interpreter that has numpy and ONNX Runtime, and nothing else of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conftest import amoeba

SHORT = ("--prompt", 8, "--tokens", 4, "--context", 64, "--budget", "0.3s")
"""Each engine gets few runs: the demo's are small, and what is tested is not their speed."""


def bare_python(folder: Path) -> Path:
    """A new virtual environment into which numpy and onnxruntime of this one are linked; no network is needed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python3.*/site-packages"))
    for package in ("numpy", "onnxruntime"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        module = Path(spec.origin).parent
        (site / package).symlink_to(module)
        if (module.parent / f"{package}.libs").is_dir():
            (site / f"{package}.libs").symlink_to(module.parent / f"{package}.libs")
        about = (
            Path(str(distribution(package).locate_file(""))) / f"{package}-{distribution(package).version}.dist-info"
        )
        assert about.is_dir()
        (site / about.name).symlink_to(about)
    return folder / "bin" / "python"


def written(folder: Path, *options: object, shapes: str = "2x0.5,6x0.5", flow: str = "onnx") -> Path:
    """A kit, by the command line; of the demo's checkpoint unless the options say otherwise."""
    asked = ("--device", "raspberry-pi-5", "--flow", flow, "--shapes", shapes, *SHORT, *options)
    done = amoeba("profile", "kit", *asked, "-o", folder, "--json")
    assert done.exit_code == 0, done.output
    return folder


def environment(**more: str) -> dict[str, str]:
    """What a device's shell has: no path of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def start(python: Path, kit: Path, *options: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a kit to its end."""
    command = [str(python), str(kit / "run.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**more), cwd="/")


def results(kit: Path) -> Path:
    """The file of a kit's results."""
    return kit / "results" / "results.jsonl"


def lines(kit: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of the results, of one kind where it is named."""
    found = [json.loads(line) for line in results(kit).read_text().splitlines()]
    return [line for line in found if kind is None or line.get("record") == kind]


def imported(kit: Path, table: Path, device: str = "raspberry-pi-5", *options: object) -> Any:
    """The result of importing a kit's results."""
    return amoeba("profile", "import", kit, "--device", device, "-o", table, *options)
