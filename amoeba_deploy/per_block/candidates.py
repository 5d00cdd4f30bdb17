"""What the exact plan is compared with: uniform shapes, and plans on the selection's own sets of kept blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.per_block.exact import solve
from amoeba_deploy.per_block.options import DROPPED, BlockOption
from amoeba_deploy.per_block.problem import Choices, Problem, Solution
from amoeba_deploy.per_block.surrogate import Rises
from amoeba_deploy.plan import Steps
from amoeba_deploy.shape import Shape


def uniform_choices(
    checkpoint: Checkpoint, options: Sequence[BlockOption], steps: Steps, problem: Problem
) -> list[tuple[Shape, Choices]]:
    """The checkpoint's uniform shapes whose width is among the options, with what each block takes."""
    places = {option: place for place, option in enumerate(options)}
    dropped = places[DROPPED]
    lowest = problem.constraints[-1]
    found = []
    for shape in (Shape(s.depth, s.width, "uniform") for s in checkpoint.shapes(steps)):
        place = places.get(BlockOption(*steps.kept(checkpoint.architecture, shape.width, shape.width)))
        kept = set(checkpoint.selection.choice(shape.depth).kept)
        if place is None:
            continue
        choices = tuple(place if index in kept else dropped for index in range(problem.blocks))
        if lowest.used(choices) <= lowest.allowed:
            found.append((shape, choices))
    return found


def baselines(checkpoint: Checkpoint, fitting: Sequence[tuple[Shape, Solution]]) -> list[tuple[Shape, Solution]]:
    """Of uniform shapes that fit that of least surrogate loss, and that of least known loss, where losses are known."""
    if not fitting:
        return []
    first = min(fitting, key=lambda pair: (pair[1].rise, pair[1].used[0]))
    quality = checkpoint.quality
    if quality is None or checkpoint.policy != "uniform":
        return [first]
    known = min(fitting, key=lambda pair: (quality.loss(pair[0], "fp32").value, pair[1].used[0]))
    return [first] if known[0] == first[0] else [first, known]


def on_selected_depths(checkpoint: Checkpoint, problem: Problem, rises: Rises) -> tuple[Solution, float] | None:
    """The best plan that keeps the blocks of one of the selection's depths, and the loss that its rises are added to.

    Rises of several dropped blocks do not add up well: what a block does depends on which others are there. So each
    depth starts from the measured loss of its kept blocks, and only rises of narrower blocks are added.
    """
    dropped = rises.options.index(DROPPED)
    best: tuple[Solution, float] | None = None
    for depth, base in rises.depths.items():
        kept = set(checkpoint.selection.choice(depth).kept)
        own = problem.rises.copy()
        for index in range(problem.blocks):
            if index in kept:
                own[index, dropped] = np.inf
            else:
                own[index] = np.where(np.arange(problem.options) == dropped, 0.0, np.inf)
        try:
            found = solve(Problem(own, problem.constraints))
        except NoShapeFits:
            continue
        if best is None or base + found.rise < best[0].rise + best[1]:
            best = found, base
    return best
