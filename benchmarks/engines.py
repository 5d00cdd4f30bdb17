"""Is the engine worth it, and is the subnet? ``python -m benchmarks.engines [--threads 1] [--only onnx,gguf]``.

A random Llama of 105 million parameters (vocabulary 8192) and a subnet with half of its block parameters, in every
engine that runs here, each in a process of its own, measured interleaved in one run. Beside each decode time stands its
physical limit: the bytes that it reads over the memory bandwidth that this machine reaches when it sums an array. Also:
how long each engine takes to build, and what is written.

The graph that onnxruntime-genai's own model builder makes of the same models is measured beside ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.extraction.folder import copy_model, extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.profiles.measure import Timing
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.shape import Shape
from benchmarks.models import add_empty_tokenizer, llama_config, random_model
from benchmarks.workers import Worker, measured

CONTEXT = 512
VOCABULARY = 8192
PROCESSES = 5


@dataclass(frozen=True)
class Kind:
    """An engine, a precision, and settings of the engine's own."""

    flow: str
    precision: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Its name in the table."""
        return " ".join((self.flow, self.precision, *(value for _, value in self.settings if value != "none")))


_BARE = (("tokenizer", "none"),)
_BUILDER = (("emitter", "oga"),)
TORCH = Kind("torch", "fp32")
KINDS = [
    TORCH,
    Kind("torch-compile", "fp32"),
    Kind("onnx", "fp32"),
    Kind("onnx", "fp32", _BUILDER),
    Kind("onnx", "int8"),
    Kind("onnx", "int4"),
    Kind("onnx", "int4", _BUILDER),
    Kind("gguf", "q8_0", _BARE),
    Kind("gguf", "q4_k_m", _BARE),
    Kind("openvino", "fp32"),
    Kind("openvino", "bf16"),
    Kind("openvino", "int8"),
    Kind("openvino", "int4"),
    Kind("executorch", "fp32"),
]


@dataclass(frozen=True)
class Built:
    """One engine of one model, and the milliseconds that reading its weights takes at least."""

    model: str
    kind: Kind
    output: Path
    worker: Worker
    limit_ms: float


def half_plan(sizes: Architecture) -> Plan:
    """Ten of fourteen blocks, and 0.7 of heads and neurons in each: half of the block parameters.

    Neurons in multiples of 256, which all engines' quantised rows take.
    """
    heads, neurons = round(0.7 * sizes.kv_heads), round(0.7 * sizes.neurons / 256) * 256
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


def build(name: str, model: ModelFolder, kind: Kind, folder: Path, threads: int, speed: float) -> Built | None:
    """The engine of one kind, in place where it can be; None, with the reason printed, where it does not run here."""
    try:
        backend = load_backend(kind.flow)
        options = options_for(backend, CONTEXT, settings=dict(kind.settings))
        refused = backend.cannot_run(kind.precision, options) or ", ".join(backend.toolchain().missing)
        if refused:
            raise AmoebaError(refused)
        dtype = backend.folder_dtype(kind.precision, options)
        output = folder / kind.label.replace(" ", "-")
        if dtype == "float32" and not kind.settings:
            output = model.path
        else:
            output.mkdir(parents=True)
            if kind.settings == _BUILDER:
                copied = folder / "with-tokenizer" / kind.precision
                copied.mkdir(parents=True)
                copy_model(model, copied, "float32")
                add_empty_tokenizer(copied)
                model = ModelFolder(copied)
            elif dtype:
                copy_model(model, output, dtype)
                model = ModelFolder(output)
        before = {file: file.stat().st_size for file in output.rglob("*")}
        began = time.perf_counter()
        backend.lower(model, output, kind.precision, options)
        spent = time.perf_counter() - began
        added = sum(file.stat().st_size - before.get(file, 0) for file in output.rglob("*") if file.is_file())
        print(f"  {kind.label:20} built in {spent:7.3f} s, {added / 1e6:8.3f} MB written", flush=True)
        worker = Worker(kind.flow, kind.precision, output, VOCABULARY, Workload(), threads, CONTEXT)
    except AmoebaError as error:
        print(f"  {kind.label:20} left out: {error}", flush=True)
        return None
    read = backend.storage(kind.precision).read_bytes(model.architecture)
    return Built(name, kind, output, worker, 1e3 * read / speed)


def report(built: Sequence[Built], found: Sequence[tuple[Timing, float]], speed: float, threads: int) -> None:
    """Times, ratios to eager PyTorch and to the full model, and the share of the memory bandwidth."""
    times = {(one.model, one.kind): timing for one, (timing, _) in zip(built, found, strict=True)}
    print(f"\n{threads} thread(s), memory read at {speed / 1e9:.1f} GB/s; prefill of 128 tokens, decode of 31")
    print(
        "model  engine               prefill ms  vs torch  decode ms  vs torch  vs full  limit ms  share of bandwidth  "
        "processor s"
    )
    for one, (timing, processor) in zip(built, found, strict=True):
        torch, full = times[one.model, TORCH], times.get(("full", one.kind))
        against = f"{full.tpot_ms / timing.tpot_ms:7.2f}x" if full else f"{'':8}"
        print(
            f"{one.model:6} {one.kind.label:20} {timing.ttft_ms:10.1f} {torch.ttft_ms / timing.ttft_ms:8.2f}x "
            f"{timing.tpot_ms:10.2f} {torch.tpot_ms / timing.tpot_ms:8.2f}x {against} {one.limit_ms:9.2f} "
            f"{one.limit_ms / timing.tpot_ms:19.0%} {processor:12.2f}"
        )
    halves = [one.kind for one in built if one.model == "half" and ("full", one.kind) in times]
    ratios = np.array([times["full", kind].tpot_ms / times["half", kind].tpot_ms for kind in halves])
    print(f"half against full, decode: {ratios.min():.2f}x to {ratios.max():.2f}x over the engines")


def compare_graphs(built: Sequence[Built], threads: int, repeats: int) -> None:
    """Our ONNX graph and the builder's of the full model, each opened several times in turn.

    Where a process's memory happens to lie makes its decode a tenth faster or slower for as long as it lives, so one
    process of each says nothing of a difference of a few per cent.
    """
    of = {(one.kind.precision, bool(one.kind.settings)): one for one in built if one.kind.flow == "onnx"}
    for precision in ("fp32", "int4"):
        ours, theirs = of.get((precision, False)), of.get((precision, True))
        if ours is None or theirs is None:
            continue
        workers = [
            Worker("onnx", precision, one.output, VOCABULARY, Workload(), threads, CONTEXT)
            for _ in range(PROCESSES)
            for one in (ours, theirs)
        ]
        found = [timing for timing, _ in measured(workers, repeats)]
        for worker in workers:
            worker.close()
        ratios = []
        for name in ("ttft_ms", "tpot_ms"):
            own, other = (np.median([getattr(timing, name) for timing in found[first::2]]) for first in (0, 1))
            ratios.append(other / own)
        print(
            f"our ONNX graph against the builder's, {precision}, medians of {PROCESSES} processes each: prefill "
            f"{ratios[0]:.2f}x, decode {ratios[1]:.2f}x as fast"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Engines and subnets side by side.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", help="flows to measure beside torch, separated by commas")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(",")) | {"torch"} if arguments.only else None
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        full = random_model(Path(work, "full"), llama_config())
        Path(work, "half").mkdir()
        extract(full, half_plan(full.architecture), Path(work, "half"))
        half = ModelFolder(Path(work, "half"))
        # Warm the imports, so that the time printed is the lowering's.
        quiet_imports()
        for name in ("onnx", "onnxruntime_genai.models.builder"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

        built: list[Built] = []
        speed = bandwidth(arguments.threads)
        for name, model in (("full", full), ("half", half)):
            sizes = model.architecture
            blocks = sizes.depth * sizes.block_parameters
            print(f"{name}: {sizes.parameters / 1e6:.1f} M parameters, {blocks / 1e6:.1f} M in blocks")
            for kind in KINDS:
                if wanted is None or kind.flow in wanted:
                    one = build(name, model, kind, Path(work, f"{name}-engines"), arguments.threads, speed)
                    built += [one] if one else []
        found = measured([one.worker for one in built], arguments.repeats)
        for one in built:
            one.worker.close()
        report(built, found, speed, arguments.threads)
        compare_graphs([one for one in built if one.model == "full"], arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
