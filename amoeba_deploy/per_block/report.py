"""How the answer of a search per block looks to people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from amoeba_deploy.console import columns
from amoeba_deploy.per_block.asked import BlockAnswer
from amoeba_deploy.per_block.options import BlockOption
from amoeba_deploy.per_block.pipeline import BlockSearchResult, Found

NAMES = {
    "uniform": "uniform shape",
    "exact": "per block, exact",
    "evolutionary": "per block, NSGA-II",
    "selected": "per block, selected depths",
}


def print_block_answer(answer: BlockAnswer, plan_file: Path | None = None) -> None:
    """Where latencies come from, and what was found."""
    for remark in answer.remarks:
        answer.request.progress.say(f"note: {remark}")
    print_block_search(answer.result, plan_file)


def print_block_search(result: BlockSearchResult, plan_file: Path | None = None) -> None:
    """The finalists with surrogate and true losses, the gap of NSGA-II, and what the best plan keeps."""
    facts = result.rises.facts
    click.echo(
        f"{result.checkpoint} for {result.flow} {result.precision}, TPOT at most {result.budget_ms:g} ms: "
        f"{len(result.rises.options)} options a block"
    )
    click.echo(
        f"  whole model's loss {result.rises.whole:.4f} on {facts['rows']} rows of {facts['sequence']} tokens of "
        f"{facts['text']}; {result.rises.measured} losses measured, the others from the cache"
    )
    held_out = any(found.held_out is not None for found in result.finalists)
    head = ["plan", "shape", "TPOT ms", "surrogate loss", "true loss", "true - surrogate"]
    columns([_row(found, held_out) for found in result.finalists], head + (["held-out loss"] if held_out else []))
    if result.evolutionary_gap is not None:
        click.echo(f"  NSGA-II ends {result.evolutionary_gap:.4g} nats above the exact optimum of the surrogate")
    best, uniform = result.best, result.best_uniform
    if uniform is None:
        click.echo("  no uniform shape fits this budget")
    elif best.kind == "uniform":
        click.echo("  the uniform shape is the better one: per-block widths gain nothing here")
    elif best.true is not None and uniform.true is not None:
        click.echo(f"  per-block widths gain {uniform.true - best.true:.4f} nats over the best uniform shape")
    click.echo(f"  best: {NAMES[best.kind]}, key/value heads x neurons by block: {blocks_text(best.options)}")
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.seconds.items())
    click.echo(f"  {spent}")
    if plan_file is not None:
        click.echo(f"plan: {plan_file}")


def blocks_text(options: Sequence[BlockOption]) -> str:
    """What each block keeps, such as ``4x512 - 2x256``; a dash for a dropped one."""
    return " ".join("-" if option.dropped else f"{option.kv_heads}x{option.neurons}" for option in options)


def _row(found: Found, held_out: bool) -> list[str]:
    def loss(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    row = [NAMES[found.kind], str(found.plan.shape), f"{found.ms:.3f}"]
    row += [f"{found.surrogate:.4f}", loss(found.true), loss(found.error, "+.4f")]
    return row + ([loss(found.held_out)] if held_out else [])
