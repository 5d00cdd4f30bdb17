"""Plans: exactly which blocks, heads and neurons a subnet keeps.

A plan is an immutable value. It is made from a shape and the importance scores of a selection, or read from a file;
either way extraction does what it says and nothing else. Plans of one selection are nested: narrower ones keep a
subset of what wider ones keep, because every width keeps the best-scored units of one fixed ranking.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import whole_file, write_json
from amoeba_deploy.shape import Shape, distinct_widths, kept_units, nearest_count, parse_width

PLAN_FORMAT = "amoeba.plan/1"
SUBNET_FORMAT = "amoeba.subnet/1"
"""subnet.json of a dense subnet: its plan, and more."""
NEURON_MULTIPLE = 32
"""Neurons are kept in multiples of this unless an engine asks for another."""


@dataclass(frozen=True)
class BlockPlan:
    """What one kept block keeps: its index in the full model, and ascending indices of its units.

    A block may lack its attention (no heads) or its feed-forward (no neurons), not both.
    """

    index: int
    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The kept blocks in order, and the shape that they were chosen for."""

    shape: Shape
    blocks: tuple[BlockPlan, ...]

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Indices of the kept blocks in the full model, ascending."""
        return tuple(block.index for block in self.blocks)

    @property
    def widest(self) -> tuple[int, int]:
        """The most key/value heads and the most neurons that any block keeps."""
        return max(len(b.kv_heads) for b in self.blocks), max(len(b.neurons) for b in self.blocks)

    @property
    def whole_blocks(self) -> bool:
        """Whether every kept block keeps both its attention and its feed-forward."""
        return all(block.kv_heads and block.neurons for block in self.blocks)

    @property
    def is_ragged(self) -> bool:
        """Whether blocks differ in width."""
        return len({(len(b.kv_heads), len(b.neurons)) for b in self.blocks}) > 1

    def subnet(self, architecture: Architecture) -> Architecture:
        """The sizes of the dense subnet, every block as wide as the widest."""
        kv_heads, neurons = self.widest
        return architecture.subnet(len(self.blocks), kv_heads, neurons)

    def width_reached(self, architecture: Architecture) -> float:
        """The share of the kept blocks' matrix parameters that is kept."""
        sizes = [architecture.subnet(1, len(b.kv_heads), len(b.neurons)) for b in self.blocks]
        return sum(s.block_matrix_parameters for s in sizes) / (architecture.block_matrix_parameters * len(sizes))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; ``read_plan`` reads it back to an equal plan."""
        blocks = [
            {"index": b.index, "kv_heads": list(b.kv_heads), "heads": list(b.heads), "neurons": list(b.neurons)}
            for b in self.blocks
        ]
        return {"format": PLAN_FORMAT, "shape": self.shape.to_json(), "blocks": blocks}


def block_plan(architecture: Architecture, index: int, groups: Iterable[int], neurons: Iterable[int]) -> BlockPlan:
    """The plan of one block from its kept key/value groups; query heads follow from them."""
    kept = sorted(int(group) for group in groups)
    heads = [group * architecture.group + member for group in kept for member in range(architecture.group)]
    return BlockPlan(index, tuple(kept), tuple(heads), tuple(sorted(int(neuron) for neuron in neurons)))


def best_units(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Ascending indices of the ``count`` best scores [n]; of equal scores the lower index is kept."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    return np.sort(order[:count]).astype(np.int64)


Scores = Callable[[int], tuple[NDArray[Any], NDArray[Any]]]
"""For a block index the scores of its key/value groups [G] and neurons [F]; higher is better."""
BlockRatios = tuple[Fraction, Fraction]
"""The shares of a block's key/value groups and of its neurons that are kept."""


@dataclass(frozen=True)
class Ranking:
    """All blocks' groups and neurons in one order, best first: what the adaptive policy cuts by one threshold.

    ``blocks`` and ``groups`` say for each place whose unit stands there and whether it is a group; ``reached`` the
    matrix parameters of all units up to it.
    """

    architecture: Architecture
    blocks: NDArray[np.int64]
    groups: NDArray[np.bool_]
    reached: NDArray[np.int64]

    @classmethod
    def of(cls, architecture: Architecture, scores: Scores) -> Ranking:
        """Rank the units of the full model, whatever is kept of its depth, so that plans are nested in both.

        Of equal scores the lower block comes first, in it groups before neurons, then the lower index.
        """
        sizes, d = architecture, architecture.hidden
        per_block = sizes.kv_heads + sizes.neurons
        group, neuron = 2 * (sizes.group + 1) * sizes.head_dim * d, 3 * d
        ranked = np.concatenate([np.concatenate(scores(index)) for index in range(sizes.depth)]).astype(np.float64)
        if sizes.head_rule == "all":  # no group is prunable: all come first and weigh nothing
            group = 0
            ranked.reshape(sizes.depth, per_block)[:, : sizes.kv_heads] = np.inf
        weights = np.tile([group] * sizes.kv_heads + [neuron] * sizes.neurons, sizes.depth)
        order = np.argsort(-ranked, kind="stable")
        blocks, places = np.divmod(order, per_block)
        return cls(sizes, blocks, places < sizes.kv_heads, np.cumsum(weights[order]))

    def ratios(self, width: Fraction) -> list[BlockRatios]:
        """What each block of the full model keeps where the best units are kept until they reach ``width`` of all
        matrix parameters (FLAP's AL-AM, arXiv 2312.11983, section 3.3)."""
        sizes = self.architecture
        wanted = -(-width.numerator * int(self.reached[-1]) // width.denominator)
        kept = slice(int(np.searchsorted(self.reached, wanted)) + 1)
        blocks, is_group = self.blocks[kept], self.groups[kept]
        groups = np.bincount(blocks[is_group], minlength=sizes.depth)
        neurons = np.bincount(blocks[~is_group], minlength=sizes.depth)
        return [
            (Fraction(int(g), sizes.kv_heads), Fraction(int(n), sizes.neurons))
            for g, n in zip(groups, neurons, strict=True)
        ]


@dataclass(frozen=True)
class Steps:
    """The numbers of units that a block may keep: ``groups`` of key/value heads, neurons in multiples."""

    groups: tuple[int, ...]
    multiple: int

    @classmethod
    def of(cls, architecture: Architecture, multiple: int = NEURON_MULTIPLE) -> Steps:
        """The finest steps of a model: every number of groups that its family's stock class holds."""
        full, hidden, rule = architecture.kv_heads, architecture.hidden, architecture.head_rule
        groups = range(full if rule == "all" else 1, full + 1)
        legal = (count for count in groups if rule != "divides" or hidden % (count * architecture.group) == 0)
        return cls(tuple(legal) or (full,), multiple)

    def kept(self, architecture: Architecture, groups: Fraction, neurons: Fraction) -> tuple[int, int]:
        """How many groups and neurons ratios of them keep: the nearest that may be kept."""
        count = nearest_count(self.groups, architecture.kv_heads, groups)
        return count, kept_units(architecture.neurons, neurons, self.multiple)

    def edges(self, architecture: Architecture) -> set[Fraction]:
        """The widths at which what is kept may change."""
        neighbours = zip(self.groups, self.groups[1:])  # noqa: B905 - kits import this under Python 3.9
        halves = {Fraction(a + b, 2 * architecture.kv_heads) for a, b in neighbours}
        steps = range(architecture.neurons // self.multiple + 2)
        return halves | {Fraction(2 * step + 1, 2) * self.multiple / architecture.neurons for step in steps}


def block_counts(
    architecture: Architecture, shape: Shape, steps: Steps, ranking: Callable[[], Ranking]
) -> list[tuple[int, int]]:
    """How many groups and neurons each block of the full model keeps; ``ranking`` is asked for under ``adaptive``."""
    if shape.policy == "adaptive" and shape.width != 1:
        return [steps.kept(architecture, *ratios) for ratios in ranking().ratios(shape.width)]
    return [steps.kept(architecture, shape.width, shape.width)] * architecture.depth


def make_plan(
    architecture: Architecture,
    shape: Shape,
    kept_blocks: Sequence[int],
    scores: Scores,
    steps: Steps | None = None,
    *,
    ranking: Ranking | None = None,
    without_attention: Sequence[int] = (),
    without_feed_forward: Sequence[int] = (),
) -> Plan:
    """The plan of a shape under its policy.

    Args:
        architecture: sizes of the full model.
        shape: what to keep; its depth is ``len(kept_blocks)`` where all of them are whole.
        kept_blocks: ascending block indices, from the selection.
        scores: of every block; ``adaptive`` compares those of all blocks, removed ones too.
        steps: the numbers of units that a block may keep; any number of groups where left out.
        ranking: that of ``scores``, where it is already known.
        without_attention: kept blocks of which no attention is kept.
        without_feed_forward: kept blocks of which no feed-forward is kept.
    """
    steps = steps or Steps.of(architecture)
    counts = block_counts(architecture, shape, steps, lambda: ranking or Ranking.of(architecture, scores))
    blocks = []
    for index in kept_blocks:
        head_scores, neuron_scores = scores(index)
        groups, neurons = counts[index]
        kept_groups = best_units(head_scores, 0 if index in without_attention else groups)
        kept_neurons = best_units(neuron_scores, 0 if index in without_feed_forward else neurons)
        blocks.append(block_plan(architecture, index, kept_groups, kept_neurons))
    return Plan(shape, tuple(blocks))


def subnet_widths(architecture: Architecture, minimum: Fraction, steps: Steps | None = None) -> list[Fraction]:
    """All widths from ``minimum`` to 1 that give different subnets, widest first, each by its shortest name."""
    chosen = steps or Steps.of(architecture)
    return distinct_widths(lambda width: chosen.kept(architecture, width, width), chosen.edges(architecture), minimum)


def sized(architecture: Architecture, shape: Shape, steps: Steps | None = None) -> Architecture:
    """The sizes of the subnet that a uniform shape asks for; no weights or scores are needed."""
    chosen = steps or Steps.of(architecture)
    return architecture.subnet(shape.depth, *chosen.kept(architecture, shape.width, shape.width))


def _indices(entry: Mapping[str, Any], key: str, limit: int, where: str) -> tuple[int, ...]:
    values = entry.get(key)
    if not isinstance(values, list) or any(type(v) is not int for v in values):
        raise BadInput(f"{where}: '{key}' must be a list of whole numbers")
    if sorted(set(values)) != values or any(not 0 <= value < limit for value in values):
        raise BadInput(f"{where}: '{key}' must ascend without repeats within 0..{limit - 1}")
    return tuple(values)


def plan_from_json(value: Any, architecture: Architecture, where: str) -> Plan:
    """The plan in parsed JSON, checked against the model's sizes.

    Raises:
        BadInput: it is not a plan, or keeps what the model does not have, or query heads without their group.
    """
    if not isinstance(value, dict) or value.get("format") not in (PLAN_FORMAT, SUBNET_FORMAT):
        raise BadInput(f"{where}: is neither a plan of format {PLAN_FORMAT} nor the {SUBNET_FORMAT} of a subnet")
    entries, head = value.get("blocks"), value.get("shape")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"{where}: 'blocks' must be a list of at least one block")
    order = _indices({"index": [entry.get("index") for entry in entries]}, "index", architecture.depth, where)
    blocks = []
    for index, entry in zip(order, entries, strict=True):
        here = f"{where}, block {index}"
        groups = _indices(entry, "kv_heads", architecture.kv_heads, here)
        heads = _indices(entry, "heads", architecture.heads, here)
        block = block_plan(architecture, index, groups, _indices(entry, "neurons", architecture.neurons, here))
        if block.heads != heads:
            raise BadInput(f"{here}: 'heads' must be the query heads of the kept key/value heads, all of them")
        if not (groups or block.neurons):
            raise BadInput(f"{here}: keeps neither heads nor neurons; leave the block out")
        blocks.append(block)
    if not isinstance(head, dict) or head.get("policy") not in ("uniform", "adaptive"):
        raise BadInput(f"{where}: 'shape' must name depth, width and policy")
    sublayers = sum(bool(block.kv_heads) + bool(block.neurons) for block in blocks)
    depth = head.get("depth")
    legal = {-(-sublayers // 2)} | ({len(blocks)} if head["policy"] == "adaptive" else set())
    if type(depth) is not int or depth not in legal:
        raise BadInput(f"{where}: 'shape' says {depth} blocks and the plan has {sublayers / 2:g}")
    if not all(Plan(Shape(1, Fraction(1)), tuple(blocks)).widest):
        raise BadInput(f"{where}: no block keeps its attention, or none its feed-forward; keep at least one of each")
    return Plan(Shape(depth, parse_width(str(head.get("width"))), head["policy"]), tuple(blocks))


def write_plan(file: Path, plan: Plan, force: bool = False) -> None:
    """Write a plan file, which ``--shape`` takes; raises BadInput where the file exists and ``force`` is not set."""
    with whole_file(file, force) as work:
        write_json(work, plan.to_json())


def read_plan(path: Path, architecture: Architecture) -> Plan:
    """A plan file, as ``extract --plan-only`` prints it; raises BadInput where it is not one of this model."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as a plan ({error})") from None
    return plan_from_json(value, architecture, str(path))
