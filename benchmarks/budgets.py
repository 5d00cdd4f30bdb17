"""Does what is built keep its prediction? ``python -m benchmarks.budgets [--only onnx,gguf] [--budgets 5]``.

For each engine that runs on a CPU: ``amoeba profile``, then ``amoeba export --device local --latency ...`` for budgets
spread evenly between the fastest and the slowest measured shape, each command in a process of its own, as a user runs
them. Beside the predicted TPOT and its interval stands what the exported engine was measured at when it was built.

The last lines compare what the engines choose: the best shapes within one budget that several of them can keep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError

ENGINES = [
    *("torch fp32", "onnx fp32", "onnx int8", "onnx int4", "gguf fp32", "gguf q8_0", "gguf q4_k_m"),
    *("openvino fp32", "openvino int8", "openvino int4"),
]


def amoeba(cache: Path, *arguments: str) -> dict[str, Any]:
    """One command's JSON."""
    command = [sys.executable, "-m", "amoeba_deploy", *arguments, "--json", "--quiet"]
    environment = os.environ | {"AMOEBA_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise AmoebaError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def exported(cache: Path, work: Path, engine: str, ms: float) -> tuple[dict[str, Any], float]:
    """What export answers within a budget, and the TPOT that it measured of the engine."""
    flow, precision = engine.split()
    target = work / f"{flow}-{precision}-{ms:.3f}"
    names = ("--device", "local", "--flow", flow, "--precision", precision)
    answer = amoeba(cache, "export", *names, "--latency", f"{ms:.4f}ms", "--no-verify", "-o", str(target))
    timing = json.loads((target / "measured.json").read_text())["timing"]
    return answer, float(timing["tpot_ms"])


def best_shape(cache: Path, engine: str, ms: float) -> str:
    """The best shape of an engine within a budget, a dash where none fits."""
    flow, precision = engine.split()
    names = ("--device", "local", "--flow", flow, "--precision", precision)
    try:
        shape = amoeba(cache, "search", *names, "--latency", f"{ms:.4f}ms")["shape"]
    except AmoebaError:
        return "-"
    return f"{shape['depth']}x{shape['width']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="flows, or flows and precisions, separated by commas")
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--profile-budget", default="90s", help="of amoeba profile, for each engine")
    parser.add_argument("--table", type=Path, help="keep what was measured in this file")
    asked = parser.parse_args()
    only = [part.strip() for part in asked.only.split(",") if part.strip()]
    kept = total = 0
    ranges: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, cache = Path(folder), Path(folder) / "cache"
        print(
            f"{'engine':14} {'budget':>8}  {'shape':10} {'predicted TPOT, interval':28} {'source':12} measured  off by"
        )
        for engine in ENGINES:
            flow, precision = engine.split()
            if only and engine not in only and flow not in only:
                continue
            profiled = amoeba(
                cache, "profile", "--flow", flow, "--precision", precision, "--budget", asked.profile_budget
            )
            rows = json.loads(Path(profiled["path"]).read_text())["rows"]
            times = [row["tpot_ms"] for row in rows if (row["flow"], row["precision"]) == (flow, precision)]
            ranges[engine] = low, high = min(times), max(times)
            for number in range(asked.budgets):
                ms = low + (high - low) * (number + 0.6) / asked.budgets
                answer, measured = exported(cache, work, engine, ms)
                predicted = answer["predicted"]
                bottom, top = predicted.get("tpot_interval_ms", (0.0, 0.0))
                off = measured / predicted["tpot_ms"] - 1
                good = abs(off) <= 0.1 or bottom <= measured <= top
                kept, total = kept + good, total + 1
                shape = f"{answer['shape']['depth']}x{answer['shape']['width']}"
                said = f"{predicted['tpot_ms']:7.3f} ms ({bottom:.3f} to {top:.3f})"
                line = f"{engine:14} {ms:5.2f} ms  {shape:10} {said:28} {predicted['source']:12} {measured:8.3f}"
                print(f"{line}  {off:+6.1%}" + ("" if good else "  outside"), flush=True)
            if asked.table is not None:
                asked.table.write_bytes(Path(profiled["path"]).read_bytes())
        print(f"{kept} of {total} are within 10 % of the prediction or inside its interval")
        print("\nthe best shape within one budget, by engine")
        low, high = min(one[0] for one in ranges.values()), max(one[1] for one in ranges.values())
        for step in range(1, 8):
            ms = low * (high / low) ** (step / 8)
            chosen = [f"{engine} {best_shape(cache, engine, ms)}" for engine in ranges]
            print(f"{ms:5.2f} ms  " + ", ".join(chosen), flush=True)


if __name__ == "__main__":
    main()
