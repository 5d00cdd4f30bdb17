"""How long a latency takes to look up: ``python -m benchmarks.table_query [--depth 32]``.

A table of a dozen rows of a model of LLaMA2-7B's sizes, written to a file and read back: what reading it, fitting the
model to its rows, and one query of a shape that was not measured take, and all shapes of the space one after another.
Beside the query stands its floor, one lookup of the shape in a dictionary. The rows follow a formula: how fast a query
is does not depend on what was measured, how well it predicts is what ``benchmarks.prediction`` shows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amoeba_deploy.families import read_architecture
from amoeba_deploy.plan import Steps, sized
from amoeba_deploy.profiles.row import make_row
from amoeba_deploy.profiles.source import config_shapes
from amoeba_deploy.profiles.spread import spread_shapes
from amoeba_deploy.profiles.table import Table, read_table, write_table
from amoeba_deploy.profiles.workload import Workload
from benchmarks.models import llama_config

RUNS = 9
WORKLOAD = Workload(1, 128, 32)


def timed(work: Callable[[], Any], times: int = 1) -> float:
    """Seconds that one call takes, the median of ``RUNS`` times ``times`` calls."""
    found = []
    for _ in range(RUNS):
        began = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - began) / times)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    asked = parser.parse_args()
    config = llama_config(asked.depth, hidden=4096, heads=32, kv_heads=32, neurons=11008, vocabulary=32000)
    full = read_architecture(config)
    steps = Steps.of(full)
    shapes = config_shapes(full, steps)
    sizes = {shape: sized(full, shape, steps) for shape in shapes}
    rows = []
    for number, shape in enumerate(spread_shapes(shapes)):
        tpot = 0.5 + sizes[shape].depth * (0.05 + sizes[shape].block_parameters / 1e9) * (1 + 0.02 * (number % 3))
        rows.append(make_row("onnx", "fp32", shape, WORKLOAD, (9 * tpot, tpot, tpot, 1.1 * tpot, 9), (10**9, 10**9)))
    unmeasured = next(shape for shape in shapes if shape not in [row.shape for row in rows])
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "table.json"
        write_table(file, Table("somewhere", full.digest, {}, tuple(rows)))
        table = read_table(file)
        predictor = table.predictor(sizes.__getitem__, "onnx", "fp32", WORKLOAD)
        floor = timed(lambda: sizes[unmeasured], 10_000)
        query = timed(lambda: predictor(unmeasured), 1_000)
        reading = timed(lambda: read_table(file))
        fitting = timed(lambda: table.predictor(sizes.__getitem__, "onnx", "fp32", WORKLOAD))
        everything = timed(lambda: [predictor(shape) for shape in shapes])
    print(f"{len(rows)} rows, {len(shapes)} shapes, a model of {full.depth} blocks")
    print(f"reading the table           {1e3 * reading:9.3f} ms")
    print(f"fitting its rows, once      {1e3 * fitting:9.3f} ms")
    print(f"one query                   {1e3 * query:9.3f} ms  {query / floor:7.0f}x of a lookup in a dictionary")
    print(f"all {len(shapes):4d} shapes             {1e3 * everything:9.3f} ms")


if __name__ == "__main__":
    main()
