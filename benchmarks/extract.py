"""Extraction against ``cp`` and against transformers' load, slice and save, on generated bf16 Llamas in shards.

Prints, for each size: the time of ``cp`` of the output bytes, which is the physical limit of writing them, the time of
extraction and its ratio to it, with a tuned checkpoint's merge and without; CPU seconds beside those of load-slice-save
through transformers; and the most anonymous memory that the extracting process held. Every run is a process of its own;
runs are interleaved, each reads files that lie in memory, and the minimum of each is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.files import write_json
from amoeba_deploy.tensors import TensorSource, write_model_tensors

WIDTH = "0.75"
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden": 2048, "depth": 9, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
    "1.1B": {"hidden": 2048, "depth": 22, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
    "2.2B": {"hidden": 2048, "depth": 47, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
}
"""TinyLlama's sizes, and its blocks less and more often."""
RANK, EXPERTS = 64, 5


def config_of(size: dict[str, int]) -> dict[str, Any]:
    """The Llama of one of ``SIZES``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["hidden"] // size["heads"],
        "intermediate_size": size["neurons"],
        "vocab_size": size["vocabulary"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model of that config in three shards; its values repeat one random block, which changes no time."""
    folder.mkdir(parents=True)
    sizes, family = read_architecture(config), family_of(config)
    values = (np.random.default_rng(0).integers(0, 1 << 15, 1 << 20) % 0x3F00).astype(np.uint16)

    def source(shape: tuple[int, ...]) -> TensorSource:
        count = int(np.prod(shape))

        def parts() -> Any:
            for begin in range(0, count, len(values)):
                yield values[: min(len(values), count - begin)]

        return TensorSource("BF16", shape, parts)

    sources = {
        name: source((sizes.hidden,) if "norm" in name else (sizes.vocabulary, sizes.hidden))
        for name in family.other_tensors(sizes)
    }
    for index in range(sizes.depth):
        for name, axes in family.block_tensors(sizes).items():
            sources[f"model.layers.{index}.{name}"] = source(tuple(sizes.extent(axis) for axis in axes))
    total = sum(each.length for each in sources.values())
    write_json(folder / "config.json", config)
    write_model_tensors(folder, sources, total // 3 + (100 << 20), {"format": "pt"})


def write_checkpoint(model: Path, folder: Path, tuned: bool) -> None:
    """A checkpoint that refers to the model, with random scores and, where ``tuned``, random adapters."""
    from amoeba_deploy.adapters import matrices, tensor_names, write_adapters
    from amoeba_deploy.model_folder import ModelFolder
    from amoeba_deploy.quality import WIDTHS
    from amoeba_deploy.selection import BlockScores, DepthChoice, Selection, write_selection
    from amoeba_deploy.shape import width_to_json

    opened = ModelFolder(model)
    sizes, rng = opened.architecture, np.random.default_rng(1)

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    folder.mkdir(parents=True)
    query = sizes.heads * sizes.head_dim
    blocks = tuple(
        BlockScores(numbers(sizes.kv_heads), numbers(sizes.neurons), numbers(query), numbers(sizes.neurons))
        for _ in range(sizes.depth)
    )
    depths = {sizes.depth: DepthChoice(tuple(range(sizes.depth)), 1.0)}
    write_selection(folder, Selection(opened.digest, depths, blocks, {"metric": "loss"}))
    head = {
        "format": "amoeba.checkpoint/1",
        "name": "benchmark",
        "base": {"path": str(model), "digest": opened.digest},
        "policy": "uniform",
        "bias": "off",
        "multiple": 32,
        "widths": [width_to_json(width) for width in WIDTHS],
        "adapters": "smol" if tuned else None,
    }
    write_json(folder / "amoeba.json", head)
    if not tuned:
        return
    tensors = {
        "gate.0.weight": numbers(16, sizes.depth + len(WIDTHS)),
        "gate.0.bias": numbers(16),
        "gate.1.weight": numbers(EXPERTS, 16),
        "gate.1.bias": numbers(EXPERTS),
    }
    for block in range(sizes.depth):
        for matrix, (rows, columns) in matrices(sizes).items():
            name_a, name_b = tensor_names(block, matrix)
            tensors |= {name_a: numbers(EXPERTS, RANK, columns), name_b: numbers(EXPERTS, rows, RANK)}
    write_adapters(folder, tensors, rank=RANK, alpha=16, top_k=2, widths=WIDTHS)


class AnonymousMemory(threading.Thread):
    """Watches the most anonymous memory (RssAnon) that this process holds, every five milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.most = max(self.most, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")))


def child(kind: str, source: Path, output: Path) -> dict[str, float]:
    """One run in this process: ``extract`` or ``stock``; seconds without imports and opening, CPU, and memory."""
    watch = AnonymousMemory()
    if kind == "extract":
        from amoeba_deploy.checkpoint import open_checkpoint
        from amoeba_deploy.extraction.folder import extract

        checkpoint = open_checkpoint(source)
        plan = checkpoint.plan_of(f"{checkpoint.architecture.depth}x{WIDTH}")
        output.mkdir()

        def work() -> None:
            extract(checkpoint.model, plan, output, learnt=checkpoint.learnt(plan))

    else:
        import torch
        from transformers import AutoModelForCausalLM, MistralConfig

        plan_file = json.loads((source / "plan.json").read_text())

        def work() -> None:
            model: Any = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.bfloat16)
            config = model.config
            for layer, block in zip(model.model.layers, plan_file["blocks"], strict=True):
                _slice(layer, block, config.head_dim)
            first = plan_file["blocks"][0]
            sizes = {"num_attention_heads": len(first["heads"]), "num_key_value_heads": len(first["kv_heads"])}
            sizes |= {"intermediate_size": len(first["neurons"]), "head_dim": config.head_dim, "sliding_window": None}
            # As extraction does: a Llama refuses 24 heads in a hidden size of 2048.
            model.config = MistralConfig(**(config.to_dict() | sizes | {"model_type": "mistral"}))
            model.save_pretrained(output)

    watch.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    watch.done.set()
    watch.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "memory": watch.most}


def _slice(layer: Any, block: dict[str, list[int]], size: int) -> None:
    """Cut one loaded layer to a plan's units, as a script around transformers would."""
    import torch

    def rows(heads: list[int]) -> torch.Tensor:
        return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()

    attention, mlp = layer.self_attn, layer.mlp
    cuts = [(attention.q_proj, 0, rows(block["heads"])), (attention.o_proj, 1, rows(block["heads"]))]
    cuts += [(linear, 0, rows(block["kv_heads"])) for linear in (attention.k_proj, attention.v_proj)]
    neurons = torch.tensor(block["neurons"])
    cuts += [(mlp.gate_proj, 0, neurons), (mlp.up_proj, 0, neurons), (mlp.down_proj, 1, neurons)]
    for linear, axis, kept in cuts:
        linear.weight = torch.nn.Parameter(linear.weight.data.index_select(axis, kept), requires_grad=False)


def warm(*folders: Path) -> None:
    """Read every file once, so that what is timed reads from memory; some machines soon drop what was not read."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def run_child(kind: str, source: Path, output: Path) -> dict[str, float]:
    """``child`` in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.extract", "--child", kind, str(source), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def copy_time(files: list[Path], output: Path) -> float:
    """Seconds that ``cp`` takes for some files, into a folder that is not there yet."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(output)], check=True)
    return time.perf_counter() - began


def compare(name: str, work: Path, runs: int, against_stock: bool) -> None:
    """Print one size's figures."""
    model = work / "model"
    write_model(model, config_of(SIZES[name]))
    for tuned in (False, True):
        write_checkpoint(model, work / ("tuned" if tuned else "plain"), tuned)
    times: dict[str, list[float]] = {"cp": [], "plain": [], "tuned": [], "stock": []}
    cpu: dict[str, list[float]] = {"plain": [], "tuned": [], "stock": []}
    memory: dict[str, float] = {"plain": 0, "tuned": 0, "stock": 0}
    run_child("extract", work / "plain", work / "out")
    shutil.copytree(work / "out", work / "copied")
    facts = json.loads((work / "copied" / "subnet.json").read_text())
    write_json(work / "plan.json", {"blocks": facts["blocks"]})
    files = sorted((work / "copied").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    kinds = ["plain", "tuned", *(["stock"] if against_stock else [])]
    for _ in range(runs):
        os.sync()
        warm(work / "copied")
        times["cp"].append(copy_time(files, work / "cp"))
        for kind in kinds:
            os.sync()
            source = work if kind == "stock" else work / kind
            warm(model, source)
            found = run_child("stock" if kind == "stock" else "extract", source, work / "out")
            times[kind].append(found["seconds"])
            cpu[kind].append(found["cpu"])
            memory[kind] = max(memory[kind], found["memory"])
    least = {kind: min(values) for kind, values in times.items() if values}
    busy = {kind: min(values) for kind, values in cpu.items() if values}
    print(f"{name}: {size / 1e9:.2f} GB written, minimum of {runs} runs")
    print(f"  cp of the output  {least['cp']:.2f} s, {size / least['cp'] / 1e9:.2f} GB/s: the limit")
    for kind, what in (("plain", "extract"), ("tuned", "extract with merge")):
        print(
            f"  {what:18}{least[kind]:.2f} s, {least[kind] / least['cp']:.2f}x cp, {busy[kind]:.2f} s of CPU, "
            f"{memory[kind] / 1e6:.0f} MB anonymous"
        )
    print(f"  merge costs       {least['tuned'] / least['plain']:.2f}x of extraction without")
    if against_stock:
        print(
            f"  load-slice-save   {least['stock']:.2f} s, {busy['stock']:.2f} s of CPU, "
            f"{busy['stock'] / busy['plain']:.1f}x that of extraction, {memory['stock'] / 1e6:.0f} MB anonymous"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5B,1.1B,2.2B", help="which of the sizes, separated by commas")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (some 15 GB)  [default: a temporary folder]")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        kind, source, output = asked.child
        print(json.dumps(child(kind, Path(source), Path(output))))
        return
    for name in asked.sizes.split(","):
        with tempfile.TemporaryDirectory(prefix="amoeba-extract-", dir=asked.folder) as work:
            compare(name, Path(work), asked.runs, against_stock=name == "1.1B")


if __name__ == "__main__":
    main()
