"""Do all engines say the same, and what does each precision cost?

``python -m benchmarks.engine_quality [CHECKPOINT] --text FILE --shapes 12x1,6x0.5,9x0.75:adaptive [--flows onnx]``

Every shape of a checkpoint is built in every flow and precision that runs here. For each: whether its 64 greedy tokens
after a prompt are those of eager PyTorch in fp32, and its perplexity on a text beside that of the unquantised subnet.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import Backend, Engine, Ids, options_for
from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.evaluation import text_loss, text_rows
from amoeba_deploy.generation import Timings, chosen_tokens, greedy
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.plan import Plan
from amoeba_deploy.quality_measurement import engine_logits
from amoeba_deploy.shape import Policy, Shape
from amoeba_deploy.verification import prompt_ids

TOKENS = 64


def tokens_of(engine: Engine, prompt: list[int]) -> list[int]:
    """The greedy tokens after a prompt; nothing stops them."""
    return list(chosen_tokens(engine, prompt, TOKENS, set(), Timings(), greedy))


def plan_for(checkpoint: Checkpoint, text: str, backend: Backend, precision: str) -> Plan:
    """The plan of ``DEPTHxWIDTH`` or ``DEPTHxWIDTH:adaptive`` in sizes that an engine takes."""
    shape, _, named = text.partition(":")
    policy: Policy = "adaptive" if named == "adaptive" else "uniform"
    steps = backend.takes.steps(checkpoint.architecture, checkpoint.multiple, precision, checkpoint.bias)
    return checkpoint.plan(Shape.parse(shape, policy), steps)


def measure(checkpoint: Checkpoint, text: str, flow: str, precision: str, rows: Ids, context: int) -> str:
    """One line of the table."""
    backend = load_backend(flow)
    options = options_for(backend, context)
    unable = backend.cannot_run(precision, options)
    if unable:
        return f"left out: {unable}"
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        engine, dense = Path(work, "engine"), Path(work, "dense")
        engine.mkdir()
        dense.mkdir()
        plan = plan_for(checkpoint, text, backend, precision)
        subnet, artefact = lower_plan(checkpoint, plan, backend, precision, options, engine, dense)
        plain = load_backend("torch").open(subnet.path, "fp32")
        prompt = prompt_ids(subnet, context)[0].tolist()
        wanted, before = tokens_of(plain, prompt), text_loss(engine_logits(plain), rows).loss
        opened = backend.open(engine, precision, context=context)
        found, after = tokens_of(opened, prompt), text_loss(engine_logits(opened), rows).loss
    same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), TOKENS)
    size = f"{plan.widest[0]} heads, {plan.widest[1]} neurons at most"
    rise = math.exp(after - before) - 1
    noted = f"; {artefact.notes[0]}" if artefact.notes else ""
    change = f"{math.exp(before):9.4f} -> {math.exp(after):9.4f} {rise:+8.2%}"
    return f"{same:3} of {TOKENS} tokens equal   {change}   {size}{noted}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Text and perplexity of every engine.")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--flows")
    parser.add_argument("--precisions")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens to measure on")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    sizes = checkpoint.architecture
    context = min(sizes.context, 512)
    rows = text_rows(arguments.text, checkpoint.model.tokenizer(), min(256, context))[: arguments.rows]
    print(f"{checkpoint.name}: perplexity on {rows.size} tokens of {arguments.text.name}, unquantised -> engine")
    for text in arguments.shapes.split(","):
        for flow in arguments.flows.split(",") if arguments.flows else flow_names():
            precisions = load_backend(flow).precisions()
            named = arguments.precisions.split(",") if arguments.precisions else precisions
            for precision in [p for p in precisions if p in named]:
                try:
                    line = measure(checkpoint, text, flow, precision, rows, context)
                except AmoebaError as error:
                    line = f"left out: {error}"
                print(f"{text:16} {flow:14} {precision:8} {line}", flush=True)


if __name__ == "__main__":
    main()
