"""Which blocks, heads and neurons shapes keep, small enough for a page: every block's pattern is held once.

Plans are nested: what a block keeps at a width does not depend on the depth. So a pattern is of a block at a width, and
a shape is a list of blocks with their patterns. Neurons are many; a pattern says of each of some equal parts of them
how large a share is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.plan import BlockPlan, Steps
from amoeba_deploy.shape import Shape

MOST_PARTS = 64
FULL = 9
"""How a part is written of which all neurons are kept; 0 where none is."""


@dataclass(frozen=True)
class Pattern:
    """What a block keeps of its query heads, a 1 or 0 each, and of each part of its neurons, a digit up to ``FULL``."""

    heads: str
    neurons: str
    count: int
    """Neurons that are kept."""


@dataclass(frozen=True)
class Kept:
    """The units that the shapes of some engines keep."""

    engines: tuple[str, ...]
    blocks: int
    heads: int
    neurons: int
    patterns: tuple[Pattern, ...]
    shapes: dict[str, list[tuple[int, int]]]
    """Of each shape the kept blocks in order, each with the number of its pattern."""

    def to_json(self) -> dict[str, Any]:
        """What the page's script draws from."""
        return {
            "blocks": self.blocks,
            "heads": self.heads,
            "neurons": self.neurons,
            "patterns": [[one.heads, one.neurons, one.count] for one in self.patterns],
            "shapes": {name: list(map(list, blocks)) for name, blocks in self.shapes.items()},
        }


def kept_units(checkpoint: Checkpoint, steps: Steps, shapes: Iterable[Shape], engines: Iterable[str]) -> Kept:
    """The units that some of a checkpoint's shapes keep, where an engine takes such numbers of them."""
    full = checkpoint.architecture
    deepest = max(checkpoint.selection.depths)
    numbers: dict[Pattern, int] = {}
    at_width: dict[Any, dict[int, int]] = {}
    found: dict[str, list[tuple[int, int]]] = {}
    for shape in shapes:
        if shape.width not in at_width:
            plan = checkpoint.plan(Shape(deepest, shape.width, shape.policy), steps)
            patterns = {block.index: _pattern(block, full.heads, full.neurons) for block in plan.blocks}
            at_width[shape.width] = {b: numbers.setdefault(p, len(numbers)) for b, p in patterns.items()}
        own = checkpoint.selection.choice(shape.depth).kept
        found[str(shape)] = [(index, at_width[shape.width][index]) for index in own]
    return Kept(tuple(engines), full.depth, full.heads, full.neurons, tuple(numbers), found)


def _pattern(block: BlockPlan, heads: int, neurons: int) -> Pattern:
    own, parts = set(block.heads), min(neurons, MOST_PARTS)
    edges = [part * neurons // parts for part in range(parts + 1)]
    kept = set(block.neurons)
    shares = [
        sum(neuron in kept for neuron in range(low, high)) / (high - low) for low, high in itertools.pairwise(edges)
    ]
    digits = "".join(str(round(share * FULL)) for share in shares)
    return Pattern("".join("01"[head in own] for head in range(heads)), digits, len(kept))
