"""What stage 1 costs: ``python -m benchmarks.selection_speed``.

Depth: the dynamic programming against the same recurrence evaluated plainly, every cell on the whole shrunken model,
in batches and one sequence at a time; the processor's time, interleaved in one run. The models have 16 blocks: the
embedded one with its middle blocks twice, which behaves like a trained model, and one with random weights, where
all sets are about equally good and hardly any can be given up early. The floor is the untouched model's pass over the
data and one evaluation of the output head a cell, which no order of work can save.

Width: the pass that takes the statistics against a plain forward pass over the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy.checkpoint import open_checkpoint
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.stage1.blocks import ResidentBlocks
from amoeba_deploy.stage1.calibration import Batch, running_batch
from amoeba_deploy.stage1.depth import Column, choose, naive_evaluations, prefix_evaluations
from amoeba_deploy.stage1.importance import activation_moments, merge_batches
from amoeba_deploy.stage1.removal import LocalRemover, Trial, total
from benchmarks.models import llama_config, random_model

BLOCKS, REMOVALS, KEEP_LAST = 16, 8, 0
MEMORY = 4 * 10**9
DEMO = Path(__file__).parent.parent / "amoeba_deploy" / "demo"


def deepened_demo() -> Any:
    """The embedded model with blocks 4 to 7 twice: 16 blocks."""
    model = load_torch_model(open_checkpoint().model.path)
    layers = model.model.layers
    order = [*range(8), *range(4, 12)]
    model.model.layers = torch.nn.ModuleList(layers[i] for i in order)
    model.config.num_hidden_layers = len(order)
    return model


def demo_rows(rows: int, length: int) -> list[list[int]]:
    """The first rows of the validation text."""
    text = (DEMO / "validation.txt").read_text(encoding="utf-8")
    ids = open_checkpoint().model.tokenizer().encode(text, add_special_tokens=False).ids
    return [ids[i * length : (i + 1) * length] for i in range(rows)]


def plain_choose(model: Any, rows: list[list[int]], at_once: int) -> list[tuple[int, ...]]:
    """The recurrence as it stands: each cell runs the stock model without the removed blocks over all rows."""
    layers, tokens = model.model.layers, torch.tensor(rows)

    def loss(removed: tuple[int, ...]) -> float:
        model.model.layers = torch.nn.ModuleList(layers[i] for i in range(BLOCKS) if i not in removed)
        model.config.num_hidden_layers = BLOCKS - len(removed)
        found = 0.0
        with torch.inference_mode():
            for part in tokens.split(at_once):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
                wanted = part[:, 1:].flatten()
                found += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
        return found

    best: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {(0, 0): ((), loss(()))}
    for n in range(1, BLOCKS - KEEP_LAST + 1):
        best[n, 0] = best[n - 1, 0]
        for m in range(1, min(n, REMOVALS) + 1):
            removed = (BLOCKS - KEEP_LAST - n, *best[n - 1, m - 1][0])
            entry = (removed, loss(removed))
            kept = best.get((n - 1, m))
            best[n, m] = kept if kept is not None and kept[1] <= entry[1] else entry
    model.model.layers, model.config.num_hidden_layers = layers, BLOCKS
    return [best[BLOCKS - KEEP_LAST, m][0] for m in range(REMOVALS + 1)]


def ours(model: Any, batches: list[Batch], counts: dict[str, float]) -> list[tuple[int, ...]]:
    """The project's own dynamic programming; ``counts`` gets its block evaluations."""
    remover = LocalRemover(ResidentBlocks(model), batches, "loss", "block", MEMORY)
    full = total(remover.costs(BLOCKS, [Trial(())])[0])
    found = choose(remover, REMOVALS, KEEP_LAST, full, start=Column(0, [[((), full)]]))
    tokens, work = sum(batch.tokens for batch in batches), remover.work
    counts |= {"measured": work.tokens / tokens, "given up": work.given_up, "cells": work.trials - 1}
    return [removed for removed, _ in found]


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median processor seconds of each way, run in turn, and what each gave the last time."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    given = {}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            given[name] = way()
            spent[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in spent.items()}, given


def depth(name: str, model: Any, rows: list[list[int]], repeats: int) -> None:
    """Print one model's comparison."""
    at_once = max(1, 4096 // len(rows[0]))
    batches = [running_batch(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    counts: dict[str, float] = {}
    head = ResidentBlocks(model)

    def floor() -> None:
        remover = LocalRemover(head, batches, "loss", "block", MEMORY)
        for _ in range(int(counts["cells"])):
            remover.costs(BLOCKS, [Trial(())])

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(model, batches, counts),
        "plain, batched": lambda: plain_choose(model, rows, at_once),
        "plain, one sequence at a time": lambda: plain_choose(model, rows, 1),
        "floor: untouched pass and heads": floor,
    }
    spent, given = interleaved(ways, repeats)
    naive, prefix = (f(BLOCKS, REMOVALS, KEEP_LAST) for f in (naive_evaluations, prefix_evaluations))
    print(f"\n{name}: {BLOCKS} blocks, up to {REMOVALS} removed, {len(rows)} rows of {len(rows[0])} tokens")
    print(
        f"  block evaluations: {counts['measured']:.0f} (prefix cache alone {prefix}, plain {naive}); "
        f"{counts['given up']:.0f} of {counts['cells']:.0f} cells given up early"
    )
    for way, seconds in spent.items():
        print(f"  {way:32} {seconds:8.2f} s of processor   {seconds / spent['ours']:6.2f}x ours")
    same = given["ours"] == given["plain, batched"] == given["plain, one sequence at a time"]
    print(f"  same sets for every depth: {'yes' if same else 'NO'}")


def width(name: str, model: Any, rows: list[list[int]], repeats: int) -> None:
    """Print what the statistics add to a forward pass."""
    at_once = max(1, 4096 // len(rows[0]))
    batches = [running_batch(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    blocks = ResidentBlocks(model)

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.model(input_ids=batch.ids, use_cache=False)

    ways: dict[str, Callable[[], Any]] = {
        "plain forward pass": plain,
        "width pass": lambda: merge_batches(activation_moments(blocks, batches, MEMORY)),
    }
    spent, _ = interleaved(ways, max(5, repeats))
    ratio = spent["width pass"] / spent["plain forward pass"]
    print(f"{name}: width pass {ratio:.2f}x the processor time of a plain forward pass over the same tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage 1 against plain ways, side by side.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = demo_rows(arguments.rows, arguments.length)
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        sizes = llama_config(BLOCKS, 256, 8, 4, 512, 1024)
        folder: ModelFolder = random_model(Path(work, "random"), sizes)
        models = {"embedded, deepened": deepened_demo(), "random": load_torch_model(folder.path)}
        for name, model in models.items():
            depth(name, model, rows, arguments.repeats)
        print()
        for name, model in models.items():
            width(name, model, rows, arguments.repeats)


if __name__ == "__main__":
    main()
