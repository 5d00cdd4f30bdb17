"""How far off are predicted latencies? ``python -m benchmarks.prediction [--only onnx,gguf] [--held-out 12] [--all]``.

The shape space is a grid of 10 depths and 8 widths of a random Llama of 35 million parameters. Of each engine a dozen
shapes are measured, as ``amoeba profile`` chooses them; from them the others are predicted, and some of the others (or
``--all`` 68) are measured too. Beside the errors stands the noise floor: every held-out shape is built and measured
twice in the same run, in random turns with all others, and the second measurement is "predicted" by the first.

The physical limit of a prediction is that floor. Memory bandwidth and FLOP/s do not bound it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.files import write_json
from amoeba_deploy.profiles.latency_model import LatencyModel
from amoeba_deploy.profiles.profiler import Item, measured_rows
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.source import ConfigSource
from amoeba_deploy.profiles.spread import SPREAD, spread_shapes
from amoeba_deploy.profiles.statistics import percentile
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.shape import Shape
from benchmarks.models import llama_config

CONTEXT = 256
ENGINES = [
    *("onnx fp32", "onnx int8", "onnx int4", "gguf q8_0", "gguf q4_k_m"),
    *("openvino fp32", "openvino int8", "openvino int4", "torch fp32", "torch-compile fp32", "executorch fp32"),
]


def grid(depth: int) -> list[Shape]:
    """10 depths and 8 widths, from the whole model to half of it."""
    depths = [depth - step * depth // 20 for step in range(10)]
    return [Shape(d, Fraction(16 - w, 16)) for d in depths for w in range(8)]


def errors(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Median and 90th percentile of the relative errors."""
    found = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return statistics.median(found), percentile(found, 0.9)


def compare(source: ConfigSource, engine: str, shapes: list[Shape], held_out: int, budget: float) -> None:
    """Measure one engine and print its lines."""
    flow, precision = engine.split()
    workload, backend = Workload(1, 128, 32), load_backend(flow)
    chosen = spread_shapes(shapes)
    others = [shape for shape in shapes if shape not in chosen]
    held = random.Random(0).sample(others, min(held_out, len(others)))
    options = options_for(backend, CONTEXT)
    items = [Item(flow, precision, shape, options) for shape in (*chosen, *held, *held)]
    rows = measured_rows(source, items, workload, None, time.perf_counter(), Progress(), least=budget)
    known, first, second = rows[: len(chosen)], rows[len(chosen) : len(chosen) + len(held)], rows[-len(held) :]
    steps = source.steps(backend, precision)
    model = LatencyModel.fit(known, lambda shape: source.sized(shape, steps))
    for name, curve in (("tpot_ms", model.tpot), ("ttft_ms", model.ttft)):

        def values(of: Sequence[Row], name: str = name) -> list[float]:
            return [float(getattr(row, name)) for row in of]

        both = [(a + b) / 2 for a, b in zip(values(first), values(second), strict=True)]
        sizes = [source.sized(row.shape, steps) for row in first]
        middle, high = errors([curve(each) for each in sizes], both)
        floor, floor_high = errors(values(first), values(second))
        intervals = [curve.interval(each) or (0.0, 0.0) for each in sizes]
        inside = sum(low <= value <= top for (low, top), value in zip(intervals, both, strict=True))
        said = f"{curve.kind:12}" if curve.held_out is None else f"{curve.kind:12} {curve.held_out.median:6.1%}"
        print(
            f"{engine:20} {name[:4].upper()}  {min(values(rows)):7.2f} .. {max(values(rows)):7.2f} ms  {middle:6.1%}  "
            f"{high:6.1%}  {inside:3d} of {len(held)}  {floor:6.1%}  {floor_high:6.1%}  {said}",
            flush=True,
        )
    noisy = sum(row.noisy for row in rows)
    if noisy:
        print(f"{engine:20} {noisy} of {len(rows)} medians are not known to within 3 %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="flows, or flows and precisions, separated by commas")
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--all", action="store_true", help="measure all shapes of the grid")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of measuring for each engine")
    asked = parser.parse_args()
    quiet_imports()
    only = [part.strip() for part in asked.only.split(",") if part.strip()]
    config = llama_config(depth=20, hidden=384, heads=6, kv_heads=6, neurons=1024, vocabulary=4096)
    shapes = grid(20)
    print(
        f"{SPREAD} of {len(shapes)} shapes measured, others predicted; held-out errors, and the noise floor beside them"
    )
    print(
        f"{'engine':20} {'':4}  {'measured':22}  {'median':6}  {'p90':6}  {'inside':8}  {'floor':6}  {'p90':6}  model"
    )
    with tempfile.TemporaryDirectory() as work:
        write_json(Path(work) / "config.json", config)
        source = ConfigSource.of(Path(work) / "config.json", "random Llama")
        for engine in ENGINES:
            if not only or engine in only or engine.split()[0] in only:
                compare(source, engine, shapes, len(shapes) if asked.all else asked.held_out, asked.budget)


if __name__ == "__main__":
    main()
