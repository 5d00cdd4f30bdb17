"""The methods of Table 1: what each removes, at equal block parameters, and how each is tuned.

* LLM-Pruner: heads and neurons by Taylor importance, every block alike (its own recipe leaves the first and last blocks
  whole, which this does not);
* FLAP: heads and neurons by the fluctuation of activations, one threshold over all blocks, and compensating biases;
* Shortened LLaMA: whole blocks, by the perplexity without each;
* Amoeba: blocks by dynamic programming and widths by FLAP's scores, tuned once for all shapes; the shape of a ratio is
  the one with the lowest loss on calibration text among those with as many parameters;
* Amoeba tuned alone: the same shape, tuned by itself.

All are tuned for as many steps on the same rows; all but Amoeba with one LoRA, at the one shape. Whole blocks reach few
ratios, so each ratio is moved to the nearest that they reach, and all methods are held to that, within one per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Steps
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import DepthChoice, Selection
from amoeba_deploy.shape import Policy, Shape
from amoeba_deploy.stage1.calibration import read_calibration
from amoeba_deploy.stage1.importance import WidthMethod
from amoeba_deploy.stage1.pipeline import DepthMethod, Stage1
from amoeba_deploy.stage1.pipeline import Settings as SelectionSettings

TOLERANCE = 0.01
"""By how much the parameters of methods may differ, as a share."""
GRID = 400
"""Widths that are tried, in steps of one over this."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what is selected by what, and what is tuned for it."""

    name: str
    depth: DepthMethod | None
    width: WidthMethod | None
    policy: Policy = "uniform"
    bias: bool = False
    once: bool = False
    """Whether one tuning serves all ratios."""


METHODS = (
    Method("LLM-Pruner", None, "taylor"),
    Method("FLAP", None, "flap", "adaptive", bias=True),
    Method("Shortened LLaMA", "shortened-ppl", None),
    Method("Amoeba", "dp", "flap", once=True),
    Method("Amoeba tuned alone", "dp", "flap"),
)


def reachable(ratio: float, depth: int) -> float:
    """The ratio nearest to one that whole blocks reach.

    >>> [round(reachable(ratio, 12), 3) for ratio in (0.8, 0.65, 0.5)]
    [0.833, 0.667, 0.5]
    """
    return max(1, round(ratio * depth)) / depth


def select(model: ModelFolder, method: Method, text: str, samples: int, sequence: int) -> Selection:
    """What a method selects on a calibration text; blocks in order of depth where it removes none."""
    sizes = model.architecture
    calibration = read_calibration(text, model.tokenizer(), sizes.context, samples=samples, sequence=sequence)
    lowest = max(1, int(sizes.depth * 0.4))
    settings = SelectionSettings(
        depth_method=method.depth or "dp", width_method=method.width or "flap", minimum_depth=lowest
    )
    stage = Stage1(model, calibration, calibration, settings, Progress(quiet=True))
    whole = {sizes.depth: DepthChoice(tuple(range(sizes.depth)), 0.0)}
    depths = whole if method.depth is None else stage.depths()[0]
    return Selection(model.digest, depths, stage.widths(), {})


def kept_share(selection: Selection, sizes: Architecture, shape: Shape, steps: Steps) -> float:
    """The share of the full model's block parameters that a shape keeps: no embedding, no head."""
    kept = sum(part.block_parameters for part in selection.parts(sizes, shape, steps))
    return kept / (sizes.depth * sizes.block_parameters)


def shapes_at(selection: Selection, sizes: Architecture, method: Method, ratio: float, steps: Steps) -> list[Shape]:
    """The shapes of a method that keep a ratio within the tolerance: for each depth the width that comes nearest."""
    found = []
    for depth in sorted(selection.depths, reverse=True):
        widths = [Fraction(1)] if method.width is None else [Fraction(n, GRID) for n in range(GRID // 4, GRID + 1)]
        near = _nearest(selection, sizes, [Shape(depth, width, method.policy) for width in widths], ratio, steps)
        if near is not None:
            found.append(near)
    return found


def _nearest(
    selection: Selection, sizes: Architecture, shapes: Sequence[Shape], ratio: float, steps: Steps
) -> Shape | None:
    shares = [(abs(kept_share(selection, sizes, shape, steps) / ratio - 1), -shape.width, shape) for shape in shapes]
    off, _, best = min(shares, key=lambda one: one[:2])
    return best if off <= TOLERANCE else None


def tuning_settings(common: Any, method: Method, shape: Shape | None) -> Any:
    """How a method is tuned: for all shapes, or with one LoRA at one shape."""
    own = replace(common, policy=method.policy, bias=method.bias)
    return own if method.once else replace(own, adapter="lora", shape=str(shape))
