"""Is the engine worth it, and is the subnet? ``python -m benchmarks.engines [--threads 1]``.

A random Llama of 105 million parameters (vocabulary 8192) and a subnet with half of its block parameters, in eager
PyTorch and in ONNX Runtime fp32, int8 and int4, measured interleaved in one run. Beside each decode time stands its
physical limit: the bytes that it reads over the memory bandwidth that this machine reaches when it sums an array.
Also: how long writing the fp32 engine takes, and that it adds no weight bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine, options_for
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.profiles.measure import measure
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape
from benchmarks.models import llama_config, random_model

CONTEXT = 512
KINDS = [("torch", "fp32"), ("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int4")]


def half_plan(sizes: Architecture) -> Plan:
    """Ten of fourteen blocks, and 0.7 of heads and neurons in each: half of the block parameters."""
    heads, neurons = round(0.7 * sizes.kv_heads), round(0.7 * sizes.neurons / 32) * 32
    blocks = tuple(block_plan(sizes, i, range(heads), range(neurons)) for i in range(round(0.71 * sizes.depth)))
    return Plan(Shape.parse(f"{len(blocks)}x0.7"), blocks)


def bandwidth(threads: int) -> float:
    """Bytes a second that ``threads`` threads read when they sum a large array with PyTorch; the best of ten."""
    import torch

    torch.set_num_threads(threads)
    array = torch.ones(2**27)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        array.sum()
        best = max(best, array.nbytes / (time.perf_counter() - began))
    return best


def build(model: ModelFolder, flow: str, precision: str, folder: Path, threads: int) -> Engine:
    """The engine of one kind, in place where it can be."""
    backend = load_backend(flow)
    output = model.path if backend.weight_dtype(precision) else folder / f"{flow}-{precision}"
    output.mkdir(exist_ok=True, parents=True)
    before = {file: file.stat().st_size for file in output.iterdir()}
    began = time.perf_counter()
    backend.lower(model, output, precision, options_for(backend, CONTEXT))
    spent = time.perf_counter() - began
    added = sum(file.stat().st_size - before.get(file, 0) for file in output.iterdir())
    print(f"  {flow} {precision}: lowered in {spent:.3f} s, {added / 1e6:.3f} MB written")
    return backend.open(output, precision, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines and subnets side by side.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        full = random_model(Path(work, "full"), llama_config())
        Path(work, "half").mkdir()
        extract(full, half_plan(full.architecture), Path(work, "half"))
        half = ModelFolder(Path(work, "half"))
        # Warm the emitter's imports, so that the time printed is the lowering's.
        import onnx  # noqa: F401

        engines, limits = {}, {}
        speed = bandwidth(arguments.threads)
        for name, model in (("full", full), ("half", half)):
            sizes = model.architecture
            blocks = sizes.depth * sizes.block_parameters
            print(f"{name}: {sizes.parameters / 1e6:.1f} M parameters, {blocks / 1e6:.1f} M in blocks")
            for flow, precision in KINDS:
                engines[name, flow, precision] = build(
                    model, flow, precision, Path(work, name + "-engines"), arguments.threads
                )
                limits[name, flow, precision] = 1e3 * load_backend(flow).storage(precision).read_bytes(sizes) / speed
        found = measure(list(engines.values()), 8192, Workload(), arguments.repeats)
        report(dict(zip(engines, found, strict=True)), limits, speed, arguments.threads)


def report(found: dict, limits: dict, speed: float, threads: int) -> None:  # type: ignore[type-arg]
    """Times, ratios to eager PyTorch and to the full model, and the share of the memory bandwidth."""
    print(f"\n{threads} thread(s), memory read at {speed / 1e9:.1f} GB/s; prefill of 128 tokens, decode of 31")
    print("model  engine        prefill ms  decode ms  vs torch  vs full  limit ms  share of bandwidth")
    for (name, flow, precision), timing in found.items():
        torch, full = found[name, "torch", "fp32"].tpot_ms, found["full", flow, precision].tpot_ms
        limit = limits[name, flow, precision]
        print(
            f"{name:6} {flow + ' ' + precision:13} {timing.ttft_ms:10.1f} {timing.tpot_ms:10.2f} "
            f"{torch / timing.tpot_ms:8.2f}x {full / timing.tpot_ms:7.2f}x {limit:9.2f} {limit / timing.tpot_ms:19.0%}"
        )
    ratios = np.array([found["full", f, p].tpot_ms / found["half", f, p].tpot_ms for f, p in KINDS])
    print(f"half against full, decode: {ratios.min():.2f}x to {ratios.max():.2f}x over the engines")


if __name__ == "__main__":
    main()
