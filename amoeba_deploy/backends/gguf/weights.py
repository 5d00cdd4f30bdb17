"""The tensors of a file: of which of the model's rows each is made, and back again.

A tensor is made a few rows at a time, so that any size passes through some megabytes of memory. Every change can be
undone, so that what a file holds can be compared with what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.gguf.arches import Arch, file_arch, tensor_name
from amoeba_deploy.backends.gguf.rotary import factors, pair_order
from amoeba_deploy.extraction.ragged import BlockSizes
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.rotary import inverse_frequencies, turning
from amoeba_deploy.tensors import as_float32

Floats = NDArray[np.float32]
_AT_ONCE = 4 << 20
"""Numbers made at once."""


@dataclass(frozen=True)
class Held:
    """One tensor of the file, in float32 before it is rounded to the file's type."""

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    """The model's tensor; None where ``constant`` fills it."""
    first: int = 0
    """Where its rows begin in the model's tensor, which may hold others too."""
    order: NDArray[np.int64] | None = None
    """For each row of a head the row of the model's that it is; as long as a head."""
    scale: Floats | float = 1.0
    """What rows are multiplied by: one number, or one for each row of a head, in the model's order."""
    plus: float = 0.0
    """What is added before."""
    constant: float | Floats = 0.0

    def parts(self, model: ModelFolder) -> Iterator[Floats]:
        """Its values, some rows after the other."""
        rows = self.shape[0]
        if self.source is None:
            yield np.ascontiguousarray(np.broadcast_to(np.asarray(self.constant, np.float32), self.shape))
            return
        whole, dtype = model.tensors.raw(self.source), model.tensors.info(self.source).dtype
        head = 1 if self.order is None else len(self.order)
        step = max(_AT_ONCE // math.prod(self.shape[1:]) // head, 1) * head
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield self._changed(as_float32(whole[self.first + begin : self.first + end], dtype))

    def _changed(self, found: Floats) -> Floats:
        if self.plus:
            found = found + np.float32(self.plus)
        if np.any(np.asarray(self.scale) != 1):
            found = found * self._row_scale(found)
        if self.order is not None:
            heads = found.reshape(-1, len(self.order), *found.shape[1:])
            found = heads[:, self.order].reshape(found.shape)
        return np.ascontiguousarray(found)

    def _row_scale(self, found: Floats) -> Floats:
        scale = np.asarray(self.scale, np.float32)
        if scale.ndim == 0:
            return scale
        repeated = np.tile(scale, len(found) // len(scale))
        return repeated.reshape(-1, *[1] * (found.ndim - 1))

    def undone(self, found: Floats) -> Floats:
        """The model's rows from the whole tensor as the file holds it."""
        if self.order is not None:
            heads = found.reshape(-1, len(self.order), *found.shape[1:])
            back = np.empty_like(heads)
            back[:, self.order] = heads
            found = back.reshape(found.shape)
        if np.any(np.asarray(self.scale) != 1):
            found = found / self._row_scale(found)
        return found - np.float32(self.plus) if self.plus else found


def file_blocks(model: ModelFolder) -> tuple[BlockSizes, ...]:
    """The sizes of each block as the file states them.

    A block without attention gets one head of zeros where llama.cpp's ``deci`` would go wrong without any: in the first
    block, from which it takes whether the model attends at all, and where o_proj's bias is all that is left.
    """
    sizes = model.architecture
    blocks = model.blocks or (BlockSizes(sizes.heads, sizes.kv_heads, sizes.neurons),) * sizes.depth
    return tuple(
        BlockSizes(1, 1, block.neurons)
        if not block.heads and (index == 0 or "self_attn.o_proj.bias" in model.block_shapes(index))
        else block
        for index, block in enumerate(blocks)
    )


def held_tensors(model: ModelFolder, attention_scale: float = 1.0, norm_plus: float = 0.0) -> list[Held]:
    """All tensors of a model's file, in the order in which decoding reads them.

    Args:
        model: the dense or ragged subnet.
        attention_scale: what scores must be multiplied by beyond what llama.cpp's graph does.
        norm_plus: what the family adds to its norms' tensors.
    """
    sizes, blocks = model.architecture, file_blocks(model)
    arch = file_arch(sizes, blocks)
    table = (sizes.vocabulary, sizes.hidden)
    found = [Held("token_embd.weight", table, "model.embed_tokens.weight")]
    turns = factors(sizes.rope, sizes.head_dim, sizes.context) if arch.factored else None
    if turns is not None:
        found.append(Held("rope_freqs.weight", turns.shape, constant=turns))
    writer = _Blocks(model, arch, attention_scale, norm_plus)
    for index, block in enumerate(blocks):
        found += writer.block(index, block)
    found.append(Held("output_norm.weight", (sizes.hidden,), "model.norm.weight", plus=norm_plus))
    if not sizes.tied:
        found.append(Held("output.weight", table, "lm_head.weight"))
    return found


@dataclass(frozen=True)
class _Blocks:
    model: ModelFolder
    arch: Arch
    attention_scale: float
    norm_plus: float

    def block(self, index: int, block: BlockSizes) -> Iterator[Held]:
        """The tensors of one block, in the order of the model's own."""
        model = self.model
        own = model.block_shapes(index)
        sizes = model.architecture if model.blocks is None else model.blocks[index].of(model.architecture)
        for name, shape in own.items():
            source = f"model.layers.{index}.{name}"
            fused = [matrix for matrix, (whole, _) in model.family.fused.items() if name == f"{whole}.weight"]
            for matrix in fused:
                _, rows = model.family.matrix_rows(sizes, matrix)
                shape = (rows.stop - rows.start, sizes.hidden)
                yield self._held(index, f"{matrix}.weight", source, shape, rows.start)
            if not fused:
                yield self._held(index, name, source, shape)
        if block.heads and "self_attn.o_proj.weight" not in own:
            yield from self._no_attention(index, block, own)

    def _held(self, index: int, name: str, source: str, shape: tuple[int, ...], first: int = 0) -> Held:
        sizes, stem = self.model.architecture, name.rpartition(".")[0]
        turned = self.arch.interleaved and stem in ("self_attn.q_proj", "self_attn.k_proj")
        order = pair_order(sizes.rope, sizes.head_dim) if turned else None
        # A factor on scores goes into the queries' norm, or else into the queries.
        scaled = stem == ("self_attn.q_norm" if sizes.qk_norm else "self_attn.q_proj")
        plus = self.norm_plus if stem.endswith("norm") else 0.0
        scale = self._query_scale() if scaled else 1.0
        return Held(tensor_name(self.arch, index, name), shape, source, first, order, scale, plus)

    def _query_scale(self) -> Floats | float:
        """Factors on the rows of a query head: of scores, and of cosines and sines of both queries and keys."""
        sizes = self.model.architecture
        if not self.arch.factored:
            return self.attention_scale
        _, length = inverse_frequencies(sizes.rope, sizes.head_dim, sizes.context, np.float64)
        if length == 1:
            return self.attention_scale
        scale = np.full(sizes.head_dim, self.attention_scale, np.float32)
        scale[: turning(sizes.rope, sizes.head_dim)] *= length**2
        return scale

    def _no_attention(self, index: int, block: BlockSizes, own: dict[str, tuple[int, ...]]) -> Iterator[Held]:
        """One head that gives zeros, in a block that has none."""
        sizes = self.model.architecture
        wide = sizes.head_dim * block.heads
        shapes = {f"self_attn.{part}_proj.weight": (wide, sizes.hidden) for part in "qkv"}
        shapes["self_attn.o_proj.weight"] = (sizes.hidden, wide)
        for name, shape in shapes.items():
            yield Held(tensor_name(self.arch, index, name), shape)
        if "input_layernorm.weight" not in own:
            name = tensor_name(self.arch, index, "input_layernorm.weight")
            yield Held(name, (sizes.hidden,), constant=1.0)


def model_tensor(held: Sequence[Held], source: str, values: Callable[[str], Floats]) -> Floats:
    """A tensor of the model from those of the file that hold its rows; ``values`` gives a tensor of the file."""
    parts = sorted((part for part in held if part.source == source), key=lambda part: part.first)
    return np.concatenate([part.undone(values(part.name)) for part in parts])
