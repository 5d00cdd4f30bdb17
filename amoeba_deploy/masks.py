"""Masks: what every block keeps at a few given widths, where a checkpoint knows no scores.

The authors' released checkpoint holds such masks, one set a width, with the biases that compensate for what they
remove. Only these widths can be derived from it, and the full one, which needs neither mask nor bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.plan import BlockPlan, Plan, block_plan
from amoeba_deploy.shape import Shape, format_width
from amoeba_deploy.tensors import NUMPY_OF, read_header

FULL = Fraction(1)
BIASED = ("o_proj", "down_proj")
"""The matrices behind which compensating biases are added."""
Biases = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class BlockMask:
    """One block at one width: 1 for each kept key/value head [G] and neuron [F], and the biases [d] of ``BIASED``."""

    heads: NDArray[np.uint8]
    neurons: NDArray[np.uint8]
    biases: Biases | None = None

    def tensors(self, index: int, width: Fraction) -> dict[str, NDArray[Any]]:
        """The arrays by the names that selection.safetensors gives them."""
        name = format_width(width)
        found: dict[str, NDArray[Any]] = {
            f"blocks.{index}.masks.{name}.heads": self.heads,
            f"blocks.{index}.masks.{name}.neurons": self.neurons,
        }
        for matrix, bias in zip(BIASED, self.biases or (), strict=False):
            found[f"blocks.{index}.bias.{name}.{matrix}"] = bias
        return found


@dataclass(frozen=True)
class Masks:
    """The masks of all blocks of the full model, by width; all widths are below 1 and descend."""

    by_width: Mapping[Fraction, tuple[BlockMask, ...]]

    @property
    def widths(self) -> tuple[Fraction, ...]:
        """The widths that can be derived, widest first."""
        return (FULL, *self.by_width)

    @property
    def biased(self) -> bool:
        """Whether compensating biases are known."""
        return all(mask.biases is not None for masks in self.by_width.values() for mask in masks)

    @property
    def whole_blocks(self) -> bool:
        """Whether every block keeps both attention and feed-forward at every width."""
        return all(m.heads.any() and m.neurons.any() for masks in self.by_width.values() for m in masks)

    def _at(self, shape: Shape) -> tuple[BlockMask, ...] | None:
        """The masks of a shape, None for the full width; raises BadInput where there are none."""
        known = ", ".join(format_width(width) for width in self.widths)
        if shape.policy != "adaptive":
            raise BadInput(
                f"the policy {shape.policy} needs scores, and this checkpoint holds masks of the policy adaptive; "
                f"leave out --policy"
            )
        if shape.width not in self.widths:
            raise BadInput(
                f"the width {format_width(shape.width)} has no masks in this checkpoint; the widths that it can "
                f"derive are {known}"
            )
        return self.by_width.get(shape.width)

    def plan(self, architecture: Architecture, shape: Shape, kept_blocks: Sequence[int]) -> Plan:
        """The exact units that the masks keep."""
        masks = self._at(shape)
        blocks = []
        for index in kept_blocks:
            heads, neurons = range(architecture.kv_heads), range(architecture.neurons)
            if masks is not None:
                kept = np.flatnonzero(masks[index].heads), np.flatnonzero(masks[index].neurons)
                blocks.append(block_plan(architecture, index, *(indices.tolist() for indices in kept)))
            else:
                blocks.append(block_plan(architecture, index, heads, neurons))
        return Plan(shape, tuple(blocks))

    def counts(self, architecture: Architecture, shape: Shape) -> list[tuple[int, int]]:
        """How many key/value heads and neurons each block of the full model keeps."""
        masks = self._at(shape)
        if masks is None:
            return [(architecture.kv_heads, architecture.neurons)] * architecture.depth
        return [(int(mask.heads.sum()), int(mask.neurons.sum())) for mask in masks]

    def biases(self, block: BlockPlan, width: Fraction) -> Biases:
        """The compensating biases of one block of a plan at a width below 1; raises BadInput where none are known."""
        found = self.by_width[width][block.index].biases
        if found is None:
            raise BadInput("this checkpoint holds masks without compensating biases; derive it with --bias off")
        return found

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays by their names in selection.safetensors."""
        depth = len(next(iter(self.by_width.values()), ()))
        return {
            name: array
            for index in range(depth)
            for width, masks in self.by_width.items()
            for name, array in masks[index].tensors(index, width).items()
        }


def read_masks(file: Path, architecture: Architecture, widths: Sequence[Fraction]) -> Masks:
    """The masks in ``selection.safetensors`` at the widths that selection.json names, checked against a model's sizes.

    Raises:
        BadInput: one is missing or of another size, holds anything but 0 and 1, or a block keeps nothing; a bias is
            not finite, or only some are there; or the file holds anything else.
    """
    infos, _ = read_header(file)
    data = file.read_bytes()  # not mapped, as for scores
    sizes, used = architecture, set()

    def array(name: str, length: int, dtype: str) -> NDArray[Any]:
        info = infos.get(name)
        if info is None or info.shape != (length,) or info.dtype != dtype:
            raise BadInput(f"{file}: lacks '{name}' as {length} numbers of {dtype}; it is not of this model")
        used.add(name)
        values: NDArray[Any] = np.frombuffer(data[info.offset : info.offset + info.length], NUMPY_OF[dtype])
        if dtype == "U8" and values.max(initial=0) > 1:
            raise BadInput(f"{file}: '{name}' holds other numbers than 0 and 1; import it again")
        if dtype == "F32" and not np.isfinite(values).all():
            raise BadInput(f"{file}: '{name}' holds numbers that are not finite; import it again")
        return values

    biased = any(".bias." in name for name in infos)

    def block(index: int, width: Fraction) -> BlockMask:
        name = format_width(width)
        heads = array(f"blocks.{index}.masks.{name}.heads", sizes.kv_heads, "U8")
        neurons = array(f"blocks.{index}.masks.{name}.neurons", sizes.neurons, "U8")
        if not (heads.any() or neurons.any()):
            raise BadInput(f"{file}: block {index} keeps neither heads nor neurons at width {name}; import it again")
        if not biased:
            return BlockMask(heads, neurons)
        first, second = (array(f"blocks.{index}.bias.{name}.{matrix}", sizes.hidden, "F32") for matrix in BIASED)
        return BlockMask(heads, neurons, (first, second))

    masks = Masks({width: tuple(block(index, width) for index in range(sizes.depth)) for width in widths})
    if set(infos) - used:
        raise BadInput(f"{file}: holds '{min(set(infos) - used)}', which its selection.json does not name")
    return masks
