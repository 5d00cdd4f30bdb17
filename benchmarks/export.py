"""How long an export takes and what share of it is the tool's own work: ``python -m benchmarks.export``.

The embedded checkpoint is exported for orin-nx and, after the first profile, for this machine, as whole processes. The
tool's own work is the search, the plan and the manifest; the rest builds, verifies and measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OWN = ("search", "bundle")


def run(device: str, folder: Path, cache: Path) -> tuple[float, dict[str, float]]:
    """Seconds of one whole export, and of its phases."""
    command = [sys.executable, "-m", "amoeba_deploy", "export", "--device", device, "--latency", "40ms", "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "-o", str(folder)], check=True, capture_output=True, text=True,
        env=os.environ | {"AMOEBA_CACHE": str(cache)},
    )  # fmt: skip
    return time.perf_counter() - began, json.loads(done.stdout)["seconds"]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        for name, device in (("orin-nx", "orin-nx"), ("local, first", "local"), ("local, after", "local")):
            whole, phases = run(device, Path(work, name.replace(", ", "-")), Path(work, "cache"))
            own = sum(phases.get(phase, 0.0) for phase in OWN)
            shown = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
            print(f"{name:13} {whole:6.2f} s whole process; own work {own:.3f} s = {own / whole:.1%}  ({shown})")


if __name__ == "__main__":
    main()
