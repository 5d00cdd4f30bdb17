"""The selection: what stage 1 learnt about a model, and the folder that keeps it.

For every depth it names the blocks that are kept, and for every block it scores key/value groups and neurons; what was
imported has masks at a few widths instead (masks.py). The folder holds ``selection.json`` and
``selection.safetensors``; docs/formats.md describes both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json, write_json
from amoeba_deploy.masks import Masks, read_masks
from amoeba_deploy.plan import Plan, Ranking, Steps, block_counts, make_plan
from amoeba_deploy.shape import Shape, parse_width, width_to_json
from amoeba_deploy.tensors import array_source, as_float32, read_header, write_tensors

SELECTION_FORMAT = "amoeba.selection/1"
SAFETENSORS_OF = {"float32": "F32", "uint8": "U8"}


@dataclass(frozen=True)
class BlockScores:
    """One block: scores of groups [G] and neurons [F], and means of o_proj's [H*h] and down_proj's [F] inputs."""

    heads: NDArray[np.float32]
    neurons: NDArray[np.float32]
    o_proj_mean: NDArray[np.float32]
    down_proj_mean: NDArray[np.float32]

    def tensors(self, index: int) -> dict[str, NDArray[np.float32]]:
        """The arrays by the names that the file gives them."""
        return {
            f"blocks.{index}.heads": self.heads,
            f"blocks.{index}.neurons": self.neurons,
            f"blocks.{index}.o_proj.mean": self.o_proj_mean,
            f"blocks.{index}.down_proj.mean": self.down_proj_mean,
        }


@dataclass(frozen=True)
class DepthChoice:
    """The blocks kept at one depth, ascending, and the metric that they reached on the calibration data, where known.

    Where attention and feed-forward were removed apart, ``kept`` has every block of which either stays, and a depth
    counts two sublayers as one block.
    """

    kept: tuple[int, ...]
    metric: float | None
    without_attention: tuple[int, ...] = ()
    without_feed_forward: tuple[int, ...] = ()

    @property
    def whole_blocks(self) -> bool:
        """Whether every kept block keeps both its attention and its feed-forward."""
        return not (self.without_attention or self.without_feed_forward)

    def to_json(self) -> dict[str, Any]:
        """The entry of selection.json."""
        partial = {
            "without_attention": list(self.without_attention),
            "without_feed_forward": list(self.without_feed_forward),
        }
        return {"kept": list(self.kept), **({} if self.whole_blocks else partial), "metric": self.metric}


def depth_choice(depth: int, removed: Sequence[int], metric: float, sublayers: bool) -> DepthChoice:
    """What stays of a model of ``depth`` blocks without some units: blocks, or sublayers (2i attention, 2i+1 feed-
    forward of block i)."""
    if not sublayers:
        return DepthChoice(tuple(index for index in range(depth) if index not in removed), metric)
    gone = set(removed)
    kept = tuple(index for index in range(depth) if not {2 * index, 2 * index + 1} <= gone)
    attention = tuple(index for index in kept if 2 * index in gone)
    feed_forward = tuple(index for index in kept if 2 * index + 1 in gone)
    return DepthChoice(kept, metric, attention, feed_forward)


@dataclass(frozen=True)
class Selection:
    """A whole selection: scores of every block, or masks. ``facts`` are the other entries of selection.json: methods,
    calibration, cost."""

    base_digest: str
    depths: dict[int, DepthChoice]
    blocks: tuple[BlockScores, ...]
    facts: dict[str, Any]
    masks: Masks | None = None
    """Where there are some, ``blocks`` is empty."""
    _rankings: dict[Architecture, Ranking] = field(default_factory=dict, compare=False, repr=False)
    _counts: dict[Any, list[tuple[int, int]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def depth(self) -> int:
        """Blocks of the full model."""
        return len(self.blocks) if self.masks is None else max(self.depths)

    @property
    def minimum_depth(self) -> int:
        """The smallest depth for which blocks were chosen."""
        return min(self.depths)

    @property
    def whole_blocks(self) -> bool:
        """Whether every depth keeps whole blocks."""
        masked = self.masks is None or self.masks.whole_blocks
        return masked and all(choice.whole_blocks for choice in self.depths.values())

    def choice(self, depth: int) -> DepthChoice:
        """What is kept at a depth; raises BadInput where the selection does not reach it."""
        if depth not in self.depths:
            known = f"{self.minimum_depth} to {self.depth}"
            if len(self.depths) <= self.depth - self.minimum_depth:
                known = ", ".join(map(str, sorted(self.depths)))
            raise BadInput(
                f"depth {depth} is outside what the selection covers, {known}; "
                f"choose one of those, or select again with a lower --min-depth"
            )
        return self.depths[depth]

    def scores(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a block the scores of its key/value groups [G] and neurons [F]."""
        return self.blocks[index].heads, self.blocks[index].neurons

    def ranking(self, architecture: Architecture) -> Ranking:
        """All units of the model in one order; made once."""
        if architecture not in self._rankings:
            self._rankings[architecture] = Ranking.of(architecture, self.scores)
        return self._rankings[architecture]

    def parts(self, architecture: Architecture, shape: Shape, steps: Steps) -> tuple[Architecture, ...]:
        """The sizes of each kept block of a shape's subnet, without choosing units: cheap enough for every shape."""
        choice = self.choice(shape.depth)
        if self.masks is not None and shape.policy == "adaptive":
            counts = self.masks.counts(architecture, shape)
        else:
            key = architecture, shape.policy, shape.width, steps
            if key not in self._counts:
                self._counts[key] = block_counts(architecture, shape, steps, lambda: self.ranking(architecture))
            counts = self._counts[key]
        kept = {
            index: (
                0 if index in choice.without_attention else counts[index][0],
                0 if index in choice.without_feed_forward else counts[index][1],
            )
            for index in choice.kept
        }
        return tuple(architecture.subnet(1, groups, neurons) for groups, neurons in kept.values())

    def plan(self, architecture: Architecture, shape: Shape, steps: Steps | None = None) -> Plan:
        """The exact units that a shape keeps."""
        choice = self.choice(shape.depth)
        if self.masks is not None:
            return self.masks.plan(architecture, shape, choice.kept)
        return make_plan(
            architecture,
            shape,
            choice.kept,
            self.scores,
            steps,
            ranking=self.ranking(architecture) if shape.policy == "adaptive" else None,
            without_attention=choice.without_attention,
            without_feed_forward=choice.without_feed_forward,
        )


def write_selection(folder: Path, selection: Selection) -> None:
    """Write ``selection.json`` and ``selection.safetensors`` into an existing folder."""
    depths = {str(depth): choice.to_json() for depth, choice in sorted(selection.depths.items(), reverse=True)}
    head = {"format": SELECTION_FORMAT, "base_digest": selection.base_digest, "blocks": selection.depth}
    if selection.masks is not None:
        head["widths"] = [width_to_json(width) for width in selection.masks.by_width]
    write_json(folder / "selection.json", head | selection.facts | {"depth": depths})
    arrays: dict[str, NDArray[Any]] = {}
    for index, block in enumerate(selection.blocks):
        arrays |= {name: array.astype(np.float32) for name, array in block.tensors(index).items()}
    if selection.masks is not None:
        arrays |= selection.masks.tensors()
    sources = {name: array_source(array, SAFETENSORS_OF[array.dtype.name]) for name, array in arrays.items()}
    write_tensors(folder / "selection.safetensors", sources)


def _read_blocks(file: Path, architecture: Architecture) -> tuple[BlockScores, ...]:
    infos, _ = read_header(file)
    data = file.read_bytes()  # not mapped: a file that is cut short later would end the process; it is small

    def array(name: str, length: int) -> NDArray[np.float32]:
        info = infos.get(name)
        if info is None or info.shape != (length,) or info.dtype != "F32":
            raise BadInput(f"{file}: lacks '{name}' as {length} float32 numbers; it is not of this model")
        values = np.frombuffer(data[info.offset : info.offset + info.length], np.float32)
        if not np.isfinite(values).all():
            raise BadInput(f"{file}: '{name}' holds numbers that are not finite; select again")
        return as_float32(values, "F32")

    query = architecture.heads * architecture.head_dim
    return tuple(
        BlockScores(
            array(f"blocks.{index}.heads", architecture.kv_heads),
            array(f"blocks.{index}.neurons", architecture.neurons),
            array(f"blocks.{index}.o_proj.mean", query),
            array(f"blocks.{index}.down_proj.mean", architecture.neurons),
        )
        for index in range(architecture.depth)
    )


def _is_legal(choice: DepthChoice, depth: int, blocks: int) -> bool:
    """Whether block numbers ascend within the model and amount to the depth, two sublayers being one block."""
    lists = choice.kept, choice.without_attention, choice.without_feed_forward
    ascending = all(all(type(i) is int for i in each) and list(each) == sorted(set(each)) for each in lists)
    if not ascending or any(not 0 <= i < blocks for i in choice.kept):
        return False
    kept, attention, feed_forward = map(set, lists)
    apart = attention <= kept and feed_forward <= kept and not attention & feed_forward
    return apart and 2 * len(kept) - len(attention) - len(feed_forward) == 2 * depth


def _read_depths(value: Any, blocks: int, file: Path) -> dict[int, DepthChoice]:
    try:
        depths = {
            int(depth): DepthChoice(
                tuple(entry["kept"]),
                None if entry["metric"] is None else float(entry["metric"]),
                tuple(entry.get("without_attention", ())),
                tuple(entry.get("without_feed_forward", ())),
            )
            for depth, entry in value.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise BadInput(f"{file}: its 'depth' table is malformed; select again") from None
    for depth, choice in depths.items():
        if choice.metric is not None and not math.isfinite(choice.metric):
            raise BadInput(f"{file}: the metric at depth {depth} is not a finite number; select again")
        if not _is_legal(choice, depth, blocks):
            raise BadInput(f"{file}: the blocks kept at depth {depth} are not {depth} ascending block numbers")
    if blocks not in depths:
        raise BadInput(f"{file}: lacks the full depth {blocks}; select again")
    return depths


def read_selection(folder: Path, architecture: Architecture) -> Selection:
    """The selection in a folder, checked against the sizes of the model that it is meant for.

    Raises:
        BadInput: it is missing, damaged, or of a model of other sizes.
    """
    file = folder / "selection.json"
    value = read_json(file, SELECTION_FORMAT)
    if value.get("blocks") != architecture.depth:
        raise BadInput(f"{file}: is for a model of {value.get('blocks')} blocks, this one has {architecture.depth}")
    facts = {k: v for k, v in value.items() if k not in ("format", "base_digest", "blocks", "depth", "widths")}
    digest, depths = str(value.get("base_digest")), _read_depths(value.get("depth"), architecture.depth, file)
    tensors = folder / "selection.safetensors"
    if "widths" not in value:
        if any(choice.metric is None for choice in depths.values()):
            raise BadInput(f"{file}: lacks the metric of a depth; select again")
        return Selection(digest, depths, _read_blocks(tensors, architecture), facts)
    masks = read_masks(tensors, architecture, _read_widths(value["widths"], file))
    return Selection(digest, depths, (), facts, masks)


def _read_widths(value: Any, file: Path) -> list[Fraction]:
    """The widths of masks: below 1, descending."""
    try:
        widths = [parse_width(str(width)) for width in value]
        if widths != sorted(set(widths), reverse=True) or 1 in widths:
            raise ValueError
    except (TypeError, ValueError, BadInput):
        raise BadInput(f"{file}: its 'widths' must be ratios below 1, the widest first; import it again") from None
    return widths
