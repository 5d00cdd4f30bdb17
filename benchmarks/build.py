"""What a build costs that has nothing to do: ``python -m benchmarks.build``.

A project of 20 targets of the embedded checkpoint is built once; then the same command again, whole processes,
interleaved with ``amoeba --version`` (the floor: the command's own start) and with one that restores every output from
the cache beside ``cp -r`` of the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICES = ("raspberry-pi-5", "apple-m2", "orin-nx", "snapdragon-8-elite")
SHAPES = ("6x0.5", "7x0.75", "8x1", "10x0.5", "12x0.75")


def project(folder: Path) -> None:
    """An amoeba.toml of 20 targets."""
    targets = [
        f'[targets."{device}-{shape}"]\ndevice = "{device}"\nshape = "{shape}"\n'
        for device in DEVICES
        for shape in SHAPES
    ]
    common = '[defaults]\nflow = ["onnx"]\nprecision = ["int8"]\nverify = false\n'
    (folder / "amoeba.toml").write_text(common + "\n".join(targets))


def seconds(command: list[str], folder: Path) -> float:
    """How long a whole process takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a build that has nothing to do.")
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    amoeba = [sys.executable, "-m", "amoeba_deploy"]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        os.environ["AMOEBA_CACHE"] = str(folder / "cache")
        project(folder)
        first = seconds([*amoeba, "build", "--quiet"], folder)
        print(f"first build of {len(DEVICES) * len(SHAPES)} targets: {first:.1f} s")
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            for name, command in (
                ("amoeba --version", [*amoeba, "--version"]),
                ("unchanged", [*amoeba, "build", "--quiet"]),
                ("cp -r", ["cp", "-r", "dist", "copy"]),
            ):
                times.setdefault(name, []).append(seconds(command, folder))
            shutil.rmtree(folder / "copy")
            shutil.rmtree(folder / "dist")
            times.setdefault("restored", []).append(seconds([*amoeba, "build", "--quiet"], folder))
        medians = {name: statistics.median(found) for name, found in times.items()}
        floor, copied = medians["amoeba --version"], medians["cp -r"]
        size = sum(file.stat().st_size for file in (folder / "dist").rglob("*") if file.is_file())
        print(f"amoeba --version             {1e3 * floor:7.0f} ms  the floor")
        print(f"unchanged build              {1e3 * medians['unchanged']:7.0f} ms  {medians['unchanged'] / floor:.1f}x")
        print(f"cp -r of {size / 1e6:5.1f} MB           {1e3 * copied:7.0f} ms")
        print(f"build restored from the cache {1e3 * medians['restored']:6.0f} ms  {medians['restored'] / copied:.1f}x")


if __name__ == "__main__":
    main()
