"""Does lowering to ONNX take little memory and time? ``python -m benchmarks.onnx_memory [--no-builder]``.

A Llama of 2.2 billion parameters (8.7 GB in float32, zeros that take no disk) is lowered in fp32 in place and in int4,
each in a process of its own whose anonymous memory (RssAnon of /proc/self/status; mapped files are not in it) is read
every few milliseconds. Then a random one of 105 million is lowered to int4, and by onnxruntime-genai's model builder,
interleaved. Printed: seconds, the most anonymous memory beyond what imports take, and bytes written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from benchmarks.models import add_empty_tokenizer, llama_config, random_model

LIMIT = 300e6
"""Bytes of anonymous memory that lowering may take, imports included."""
LARGE = {"depth": 32, "hidden": 2304, "heads": 18, "kv_heads": 6, "neurons": 7168, "vocabulary": 32000}


def empty_model(folder: Path) -> ModelFolder:
    """A model of zeros in a file with holes: any size, almost no disk."""
    config = llama_config(**LARGE)
    sizes, family = read_architecture(config), family_of(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, sizes.hidden)}
    for index in range(sizes.depth):
        for name, axes in family.block_tensors(sizes).items():
            shapes[f"model.layers.{index}.{name}"] = tuple(sizes.extent(axis) for axis in axes)
    shapes["model.norm.weight"] = (sizes.hidden,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        length = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    write_json(folder / "config.json", config)
    return ModelFolder(folder)


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def lowered(source: Path, output: Path, precision: str, emitter: str, connection: Connection) -> None:
    """Lower in this process; sends seconds and the most anonymous memory, all and before lowering."""
    import onnx  # noqa: F401

    from amoeba_deploy.backends.onnx import graph  # noqa: F401

    if emitter == "oga":
        from onnxruntime_genai.models import builder  # noqa: F401
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    backend, began = load_backend("onnx"), time.perf_counter()
    backend.lower(ModelFolder(source), output, precision, options_for(backend, 512, settings={"emitter": emitter}))
    spent = time.perf_counter() - began
    done.set()
    watcher.join()
    connection.send((spent, most, before))


def measured(source: Path, output: Path, precision: str, emitter: str = "own") -> tuple[float, int, int]:
    """Seconds, the most anonymous memory, and that before lowering, of a process that lowers a folder."""
    output.mkdir(exist_ok=True)
    here, there = multiprocessing.get_context("spawn").Pipe()
    arguments = (source, output, precision, emitter, there)
    process = multiprocessing.get_context("spawn").Process(target=lowered, args=arguments)
    process.start()
    there.close()
    try:
        found: tuple[float, int, int] = here.recv()
    finally:
        process.join()
    return found


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of lowering to ONNX.")
    parser.add_argument("--no-builder", action="store_true", help="leave onnxruntime-genai's model builder out")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        model = empty_model(Path(work, "large"))
        print(f"{model.architecture.parameters / 1e9:.2f} billion parameters, {os.cpu_count()} processors")
        for precision, output in (("fp32", model.path), ("int4", Path(work, "large-int4"))):
            before = size(output) if output.exists() else 0
            spent, most, imports = measured(model.path, output, precision)
            written = size(output) - before
            print(
                f"{precision}: {spent:.2f} s, {written / 1e6:.2f} MB written, anonymous memory {most / 1e6:.0f} MB of "
                f"which imports {imports / 1e6:.0f} MB"
            )
            if most > LIMIT:
                raise SystemExit(f"{precision} took more than {LIMIT / 1e6:.0f} MB")
        if not arguments.no_builder:
            compare_builder(Path(work), arguments.repeats)


def compare_builder(work: Path, repeats: int) -> None:
    """Seconds of int4 by the emitter and by onnxruntime-genai's model builder, in turns."""
    small = random_model(work / "small", llama_config())
    add_empty_tokenizer(small.path)
    times: dict[str, list[float]] = {"own": [], "oga": []}
    memory = dict.fromkeys(times, 0)
    for turn in range(repeats):
        for emitter in times:
            spent, most, _ = measured(small.path, work / f"{emitter}-{turn}", "int4", emitter)
            times[emitter].append(spent)
            memory[emitter] = max(memory[emitter], most)
    for emitter, found in times.items():
        print(f"105 M, int4, {emitter}: {median(found):.2f} s, anonymous memory {memory[emitter] / 1e6:.0f} MB")
    print(f"the emitter is {median(times['oga']) / median(times['own']):.1f}x as fast")


if __name__ == "__main__":
    main()
