"""The search per block: measure rises, solve, and measure the true loss of what was found beside uniform shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, Ids, text_rows
from amoeba_deploy.extraction.folder import check_plan
from amoeba_deploy.per_block.candidates import baselines, on_selected_depths, uniform_choices
from amoeba_deploy.per_block.costs import BlockCosts, BlockMemory, check_costs
from amoeba_deploy.per_block.evolutionary import GENERATIONS, best_within, evolve
from amoeba_deploy.per_block.exact import solve, supported_front
from amoeba_deploy.per_block.options import (
    MOST_OPTIONS,
    BlockOption,
    block_options,
    option_steps,
    options_plan,
)
from amoeba_deploy.per_block.problem import Constraint, Problem, Solution, dropped_at_most
from amoeba_deploy.per_block.surrogate import Rises, measure_rises, plan_loss
from amoeba_deploy.plan import Plan, write_plan
from amoeba_deploy.progress import Progress

Method = Literal["evolutionary", "exact"]
Kind = Literal["uniform", "exact", "evolutionary", "selected"]


@dataclass(frozen=True)
class Found:
    """One plan that a way of searching came to, with its surrogate loss and, once measured, its true ones.

    ``held_out`` is the true loss on another text, where one was given.
    """

    kind: Kind
    plan: Plan
    options: tuple[BlockOption, ...]
    ms: float
    surrogate: float
    true: float | None = None
    held_out: float | None = None

    @property
    def error(self) -> float | None:
        """By how much the true loss exceeds the surrogate one, in nats."""
        return None if self.true is None else self.true - self.surrogate


@dataclass(frozen=True)
class BlockSearchResult:
    """What a search per block found within a budget."""

    checkpoint: str
    flow: str
    precision: str
    budget_ms: float
    method: Method
    rises: Rises
    uniform: tuple[Found, ...]
    """The uniform shapes of least surrogate loss and of least known loss that fit; one where they are the same."""
    exact: Found
    evolved: Found | None
    """The best of the evolutionary front within the budget."""
    selected: Found | None
    """The exact optimum where only the selection's sets of blocks may be kept, whose own losses are measured."""
    front: tuple[tuple[float, float], ...]
    """Milliseconds and surrogate loss: the evolutionary front, or with the method exact the convex one."""
    seconds: dict[str, float]

    @property
    def finalists(self) -> tuple[Found, ...]:
        """All plans whose true loss was measured."""
        return (*self.uniform, self.exact, *(one for one in (self.evolved, self.selected) if one is not None))

    @property
    def best(self) -> Found:
        """The plan of least true loss; of equal ones the faster."""
        return min(self.finalists, key=lambda f: (f.true if f.true is not None else f.surrogate, f.ms))

    @property
    def best_uniform(self) -> Found | None:
        """The uniform shape of least true loss, None where none fits."""
        return min(self.uniform, key=lambda f: (f.true if f.true is not None else f.surrogate, f.ms), default=None)

    @property
    def evolutionary_gap(self) -> float | None:
        """By how much the evolutionary choice's surrogate loss exceeds the exact optimum, in nats."""
        return None if self.evolved is None else self.evolved.surrogate - self.exact.surrogate

    def write_plan(self, file: Path, force: bool = False) -> None:
        """Write the best plan as a plan file, which ``--shape`` takes wherever it takes a shape."""
        write_plan(file, self.best.plan, force)

    def to_json(self) -> dict[str, Any]:
        """JSON values of the whole answer, the best plan included."""
        return {
            "checkpoint": self.checkpoint,
            "flow": self.flow,
            "precision": self.precision,
            "budget": {"metric": "tpot", "ms": self.budget_ms},
            "method": self.method,
            "surrogate": {
                "whole_loss": round(self.rises.whole, 6),
                "options": len(self.rises.options),
                "measured": self.rises.measured,
                "text": self.rises.facts,
            },
            "uniform": [_found_json(one) for one in self.uniform],
            "exact": _found_json(self.exact),
            "evolutionary": None
            if self.evolved is None
            else _found_json(self.evolved) | {"gap": round(self.evolutionary_gap or 0.0, 6)},
            "selected": None if self.selected is None else _found_json(self.selected),
            "best": self.best.kind,
            "plan": self.best.plan.to_json(),
            "front": [{"tpot_ms": round(ms, 6), "surrogate_loss": round(loss, 6)} for ms, loss in self.front],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def _found_json(found: Found) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "shape": found.plan.shape.to_json(),
        "blocks": [[option.kv_heads, option.neurons] for option in found.options],
        "tpot_ms": round(found.ms, 6),
        "surrogate_loss": round(found.surrogate, 6),
        "true_loss": rounded(found.true),
        "surrogate_error": rounded(found.error),
        "held_out_loss": rounded(found.held_out),
    }


def search_blocks(
    checkpoint: Checkpoint,
    text: Path,
    cost: BlockCosts,
    budget_ms: float,
    *,
    flow: str,
    precision: str,
    context: int | None = None,
    settings: dict[str, str] | None = None,
    memory: BlockMemory | None = None,
    memory_bytes: float | None = None,
    method: Method = "evolutionary",
    minimum_depth: int | None = None,
    minimum_width: Fraction | None = None,
    most_options: int = MOST_OPTIONS,
    rows: int | None = None,
    sequence: int = SEQUENCE,
    held_out: Path | None = None,
    seed: int = 0,
    generations: int = GENERATIONS,
    progress: Progress,
) -> BlockSearchResult:
    """Find the plan of least surrogate loss within a latency budget, and measure what it really loses.

    Args:
        checkpoint: what to cut; its whole model must fit in memory in float32.
        text: calibration text on which rises and true losses are measured.
        cost: the additive latency model of the engine.
        budget_ms: the most milliseconds a token.
        flow: the engine that the plan is for; it must take blocks of different widths.
        precision: one of its precisions.
        context: positions that the engine provides for; the model's own where left out.
        settings: the engine's own.
        memory: the additive memory model, where ``memory_bytes`` bounds memory too.
        memory_bytes: the most bytes.
        method: ``exact`` solves the surrogate exactly; ``evolutionary`` runs NSGA-II beside that, for a front and for
            its gap to the optimum.
        minimum_depth: the fewest blocks kept; the fewest that the selection covers where left out.
        minimum_width: the narrowest option beside dropping a block; the checkpoint's where left out.
        most_options: of a block.
        rows: of the text; 16, or as many as it has, where left out.
        sequence: tokens a row.
        held_out: another text, on all of which the finalists are measured too.
        seed: of the evolutionary search.
        generations: of it; a run takes time in proportion.
        progress: told of what takes long.

    Raises:
        BadInput: the engine takes blocks of one width only (the message names flows that take varying ones), the
            checkpoint holds masks, or a text is too short.
        NoShapeFits: no plan is within the budgets; the message names the least possible.
    """
    if not budget_ms > 0 or (memory is None) != (memory_bytes is None):
        raise BadInput(f"the budget {budget_ms:g} ms must be more than zero, and memory needs a model and a budget")
    backend = load_backend(flow)
    built = options_for(backend, context or checkpoint.architecture.context, settings=settings)
    unsorted = block_options(checkpoint, flow, precision, built, minimum_width, most_options)
    # In order of cost, which the evolutionary search needs; to drop a block comes first.
    options = tuple(sorted(unsorted, key=lambda option: (_block_ms(cost, option), option)))
    depth = checkpoint.minimum_depth if minimum_depth is None else minimum_depth
    if not 1 <= depth <= checkpoint.architecture.depth:
        raise BadInput(f"the fewest blocks kept, {depth}, must be 1 to {checkpoint.architecture.depth}")
    constraints = _constraints(checkpoint, options, cost, budget_ms, memory, memory_bytes, depth)
    seconds: dict[str, float] = {}
    _require_possible(constraints, options)
    began = time.perf_counter()
    rises = measure_rises(checkpoint, options, text, rows=rows, sequence=sequence, progress=progress)
    seconds["surrogate"] = time.perf_counter() - began
    problem = Problem(rises.rises, constraints)
    began = time.perf_counter()
    exact = solve(problem)
    seconds["exact"] = time.perf_counter() - began
    shapes = uniform_choices(checkpoint, options, option_steps(checkpoint, backend, precision), problem)
    evolved: Solution | None = None
    if method == "evolutionary":
        began = time.perf_counter()
        front = evolve(problem, [choices for _, choices in shapes], seed=seed, generations=generations)
        evolved = best_within(front, problem)
        seconds["evolutionary"] = time.perf_counter() - began
    else:
        front = supported_front(problem)

    def found(kind: Kind, solution: Solution, plan: Plan | None = None) -> Found:
        chosen = tuple(options[choice] for choice in solution.choices)
        made = plan or options_plan(checkpoint, chosen)
        return Found(kind, made, chosen, solution.used[0], rises.whole + solution.rise)

    finalists = [found("exact", exact)]
    if evolved is not None:
        finalists.append(found("evolutionary", evolved))
    selected = on_selected_depths(checkpoint, problem, rises)
    if selected is not None:
        solution, base = selected
        finalists.append(replace(found("selected", solution), surrogate=base + solution.rise))
    fitting = [(shape, Solution.of(problem, choices)) for shape, choices in shapes if problem.fits(choices)]
    steps = option_steps(checkpoint, backend, precision)
    uniform = [found("uniform", s, checkpoint.plan(shape, steps)) for shape, s in baselines(checkpoint, fitting)]
    for one in finalists:
        check_plan(checkpoint.model, one.plan)
        refused = backend.refusal(one.plan.subnet(checkpoint.architecture), precision, built)
        if refused:
            raise BadInput(f"the plan found cannot be lowered to {flow} {precision}: {refused}")
    began = time.perf_counter()
    everyone = [*uniform, *finalists]
    with progress.bar("true losses", len(everyone)) as step:
        true = _TrueLosses(checkpoint, text, rises, held_out)
        measured = []
        for one in everyone:
            measured.append(true.of(one))
            step(str(one.plan.shape))
    seconds["true"] = time.perf_counter() - began
    return BlockSearchResult(
        checkpoint.name,
        flow,
        precision,
        budget_ms,
        method,
        rises,
        tuple(one for one in measured if one.kind == "uniform"),
        next(one for one in measured if one.kind == "exact"),
        next((one for one in measured if one.kind == "evolutionary"), None),
        next((one for one in measured if one.kind == "selected"), None),
        tuple((one.used[0], rises.whole + one.rise) for one in front),
        seconds,
    )


def _block_ms(cost: BlockCosts, option: BlockOption) -> float:
    return -1.0 if option.dropped else check_costs(cost, option.kv_heads, option.neurons)


def _constraints(
    checkpoint: Checkpoint,
    options: Sequence[BlockOption],
    cost: BlockCosts,
    budget_ms: float,
    memory: BlockMemory | None,
    memory_bytes: float | None,
    depth: int,
) -> tuple[Constraint, ...]:
    blocks = checkpoint.architecture.depth
    ms = [0.0 if option.dropped else cost.block_ms(option.kv_heads, option.neurons) for option in options]
    found = [Constraint("TPOT", "ms", np.tile(ms, (blocks, 1)), budget_ms, cost.fixed_ms)]
    if memory is not None and memory_bytes is not None:
        sizes = [0.0 if option.dropped else memory.block_bytes(option.kv_heads, option.neurons) for option in options]
        found.append(Constraint("memory", "bytes", np.tile(sizes, (blocks, 1)), memory_bytes, memory.fixed_bytes))
    found.append(dropped_at_most(np.array([option.dropped for option in options]), blocks, depth))
    return tuple(found)


def _require_possible(constraints: tuple[Constraint, ...], options: Sequence[BlockOption]) -> None:
    """Raise NoShapeFits before anything is measured where no plan is within the budgets."""
    blocks = len(constraints[0].costs)
    solve(Problem(np.zeros((blocks, len(options))), constraints))


class _TrueLosses:
    """Losses of plans as they are extracted, on the rows that rises were measured on and on a held-out text."""

    def __init__(self, checkpoint: Checkpoint, text: Path, rises: Rises, held_out: Path | None) -> None:
        self.checkpoint = checkpoint
        tokenizer, length = checkpoint.model.tokenizer(), rises.facts["sequence"]
        self.rows: list[Ids] = [text_rows(text, tokenizer, length)[: rises.facts["rows"]]]
        self.rows += [] if held_out is None else [text_rows(held_out, tokenizer, length)]

    def of(self, found: Found) -> Found:
        """The same with its true losses."""
        true, *other = plan_loss(self.checkpoint, found.plan, *self.rows)
        return replace(found, true=true, held_out=other[0] if other else None)
