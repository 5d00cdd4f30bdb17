"""How long the command takes before it does anything: ``python -m benchmarks.startup``.

``amoeba --help`` and ``amoeba devices`` beside ``python -c "import click"``, whole processes, interleaved. The floor is
the interpreter's own start.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "amoeba --help": [sys.executable, "-m", "amoeba_deploy", "--help"],
    "amoeba devices": [sys.executable, "-m", "amoeba_deploy", "devices"],
}


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - began)
    base = statistics.median(times["python -c 'import click'"][1:])
    for name, found in times.items():
        middle = statistics.median(found[1:])
        print(f"{name:26} {1e3 * middle:7.1f} ms   {middle / base:5.2f}x of importing click")


if __name__ == "__main__":
    main()
