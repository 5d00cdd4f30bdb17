"""Cutting: the kept rows and columns of one tensor, part by part, with what tuning added to them.

Each axis is cut in units of so many rows: a head owns head_dim of them, a neuron one. Parts of about a megabyte are
read, cut, changed and given to be written, so memory does not grow with the tensor. A tensor of which nothing is cut
and whose dtype stays is not read at all: its bytes are copied by the kernel.

Where a checkpoint is tuned, a matrix W [out, in] carries a low-rank change: its kept part is
W[rows, columns] + B[rows] @ A[:, columns], computed in float32 and rounded once (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture, Dim
from amoeba_deploy.families.family import Axis
from amoeba_deploy.plan import BlockPlan
from amoeba_deploy.tensors import (
    NUMPY_OF,
    Array,
    Part,
    TensorFolder,
    TensorInfo,
    TensorSource,
    as_float32,
    from_float32,
)

_PART_BYTES = 1 << 20
_CHANGED_BYTES = 1 << 18
"""Of parts that are computed on, in float32 and more than one array."""
_MULTIPLIED_ROWS = 256
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Cut:
    """The kept units of one axis, ascending, -1 for a unit of zeros; each owns ``size`` rows of the full tensor."""

    units: NDArray[np.int64]
    size: int

    @property
    def length(self) -> int:
        """Rows that are kept, zeros included."""
        return len(self.units) * self.size

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows of the full tensor, -1 for zeros."""
        rows = self.units[:, None] * self.size + np.arange(self.size)
        return np.where(self.units[:, None] < 0, -1, rows).reshape(-1)

    def behind(self, other: Cut, offset: int) -> Cut:
        """This cut followed by another, whose axis begins ``offset`` rows on in a fused tensor."""
        moved = np.where(other.units < 0, -1, other.units + offset // self.size)
        return Cut(np.concatenate([self.units, moved]), self.size)

    def keeps_all(self, extent: int) -> bool:
        """Whether it keeps an axis of that length as it is."""
        return self.length == extent and bool(np.array_equal(self.units, np.arange(len(self.units))))


@dataclass(frozen=True)
class LowRank:
    """What tuning adds to a matrix [out, in]: b [out, r] @ a [r, in], the scale already in ``b``."""

    a: Matrix
    b: Matrix

    def kept(self, rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None) -> LowRank:
        """The same for kept rows and columns only; -1 gives zeros, None keeps all."""
        a = self.a if columns is None else np.where(columns < 0, np.float32(0), self.a[:, np.maximum(columns, 0)])
        b = self.b if rows is None else np.where(rows[:, None] < 0, np.float32(0), self.b[np.maximum(rows, 0)])
        return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b))


Cuts = Mapping[Dim, Cut]
"""What is kept of each kind of axis; kinds that are not named stay whole."""


def block_cuts(sizes: Architecture, block: BlockPlan, kv_heads: int, heads: int, neurons: int) -> dict[Dim, Cut]:
    """What one block keeps, padded with zeros to so many key/value heads, query heads and neurons.

    Every key/value head owns the same number of the ``heads``; padded query heads stand behind those of their own.
    """

    def padded(units: tuple[int, ...], count: int) -> NDArray[np.int64]:
        return np.array([*units, *[-1] * (count - len(units))], dtype=np.int64)

    groups = padded(block.kv_heads, kv_heads)
    queries = padded((), heads)
    if kv_heads:
        share = heads // kv_heads
        kept = groups[:, None] * sizes.group + np.arange(share)
        kept[(groups < 0)[:, None] | (np.arange(share) >= sizes.group)[None, :]] = -1
        queries = kept.reshape(-1)
    size = sizes.head_dim
    return {
        "query": Cut(queries, size),
        "key_value": Cut(groups, size),
        "neuron": Cut(padded(block.neurons, neurons), 1),
    }


def axis_cut(sizes: Architecture, axis: Axis, cuts: Cuts) -> Cut | None:
    """The cut of one axis of the full model's tensor; None where it stays whole."""
    dims = axis if isinstance(axis, tuple) else (axis,)
    if not all(dim in cuts for dim in dims):
        return None
    found, offset = cuts[dims[0]], sizes.extent(dims[0])
    for dim in dims[1:]:
        found = found.behind(cuts[dim], offset)
        offset += sizes.extent(dim)
    return None if found.keeps_all(offset) else found


def cut_source(
    tensors: TensorFolder,
    name: str,
    cuts: tuple[Cut | None, ...],
    dtype: str,
    change: Callable[[], LowRank | None] = lambda: None,
) -> TensorSource:
    """The source of a tensor's kept part in ``dtype``.

    ``change`` gives what tuning adds to the full matrix, when it is needed; None where nothing.
    """
    info = tensors.info(name)
    shape = tuple(extent if cut is None else cut.length for extent, cut in zip(info.shape, cuts, strict=True))

    def parts() -> Iterator[Part]:
        added = change()
        if added is None and info.dtype == dtype and not any(cuts):
            yield from tensors.whole(info)
            return
        yield from _cut_parts(tensors, info, cuts, dtype, added)

    return TensorSource(dtype, shape, parts)


def _two_axes(shape: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> tuple[int, int, Cut | None, Cut | None]:
    """A tensor as rows and columns: a vector has one column, further axes stay whole."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    return rows, columns, cuts[0] if cuts else None, cuts[1] if len(cuts) > 1 else None


def _cut_parts(
    tensors: TensorFolder, info: TensorInfo, cuts: tuple[Cut | None, ...], dtype: str, added: LowRank | None
) -> Iterator[Part]:
    extent, width, row_cut, column_cut = _two_axes(info.shape, cuts)
    rows = np.arange(extent) if row_cut is None else row_cut.rows
    columns = None if column_cut is None else column_cut.rows
    low_rank = None if added is None else added.kept(None if row_cut is None else rows, columns)
    narrow = _column_taker(column_cut, width, NUMPY_OF[info.dtype])
    change = None
    if low_rank is not None or info.dtype != dtype:
        change = _changer(info.dtype, dtype, width if columns is None else len(columns), low_rank)
    part_bytes = _PART_BYTES if change is None else _CHANGED_BYTES
    at = 0
    for block in _row_blocks(tensors, info, rows, width, part_bytes):
        values = narrow(block)
        yield values if change is None else change(values, at)
        at += len(values)


def _changer(found: str, wanted: str, width: int, added: LowRank | None) -> Callable[[Array, int], Array]:
    """A function from rows [n, width] and the number of the first to the same with what is added, in another dtype.

    All its memory is reused, so that the steps of one part stay in the processor's cache.
    """
    memory: dict[str, Array] = {}
    product = None if added is None else _Product(added, width)

    def change(block: Array, first: int) -> Array:
        count = len(block)
        if not memory or len(memory["numbers"]) < count:
            memory.update(numbers=np.empty((count, width), np.float32), words=np.empty((count, width), np.uint32))
            memory.update(rounded=np.empty((count, width), NUMPY_OF[wanted]))
        numbers = as_float32(block, found, memory["numbers"][:count])
        if product is not None:
            numbers += product.rows(first, count)
        return from_float32(numbers, wanted, memory["rounded"][:count], memory["words"][:count])

    return change


class _Product:
    """The rows of b @ a in ascending order, multiplied many at a time: a product of few rows is slower a row."""

    def __init__(self, added: LowRank, width: int) -> None:
        self.added, self.begin, self.end = added, 0, 0
        self.memory: Matrix = np.empty((min(_MULTIPLIED_ROWS, len(added.b)), width), np.float32)

    def rows(self, first: int, count: int) -> Matrix:
        """Rows ``first`` to ``first + count`` [count, width]; valid until the next call."""
        if first + count > self.end:
            self.begin, self.end = first, min(first + max(count, _MULTIPLIED_ROWS), len(self.added.b))
            if self.end - self.begin > len(self.memory):
                self.memory = np.empty((self.end - self.begin, self.memory.shape[1]), np.float32)
            np.matmul(self.added.b[self.begin : self.end], self.added.a, out=self.memory[: self.end - self.begin])
        return self.memory[first - self.begin : first - self.begin + count]


def _row_blocks(
    tensors: TensorFolder, info: TensorInfo, rows: NDArray[np.int64], width: int, part_bytes: int = _PART_BYTES
) -> Iterator[Array]:
    """The wanted rows [n, width] in order, some at a time; -1 gives zeros. A block is overwritten by the next."""
    file, kind = tensors.file(info), np.dtype(NUMPY_OF[info.dtype])
    row_bytes = max(width * kind.itemsize, 1)
    at_once = max(part_bytes // row_bytes, 1)
    read = np.empty((min(2 * at_once, info.shape[0] if info.shape else 1), width), kind)
    found = np.empty((min(at_once, len(rows)), width), kind)
    begin = 0
    while begin < len(rows):
        wanted = rows[begin : begin + at_once]
        kept = wanted[wanted >= 0]
        if not len(kept):
            found[: len(wanted)] = 0
            yield found[: len(wanted)]
            begin += len(wanted)
            continue
        low = int(kept[0])
        # Rows ascend within a part of a fused tensor and zeros stand behind them; a step back or a long gap ends the
        # range that one read covers.
        inside = (wanted < 0) | ((wanted >= low) & (wanted < low + len(read)))
        wanted = wanted[: int(np.argmin(inside)) if not inside.all() else len(wanted)]
        high = int(wanted.max()) + 1
        file.read_into(read[: high - low], info.offset + low * row_bytes)
        if len(wanted[wanted >= 0]) == len(wanted) == high - low:
            yield read[: high - low]
        else:
            block = found[: len(wanted)]
            np.take(read, np.maximum(wanted - low, 0), axis=0, out=block, mode="clip")
            block[wanted < 0] = 0
            yield block
        begin += len(wanted)


def _column_taker(cut: Cut | None, width: int, kind: type) -> Callable[[Array], Array]:
    """A function from rows [n, width] to their kept columns [n, m]; whole units are moved at once."""
    if cut is None:
        return lambda block: block
    units, size = np.maximum(cut.units, 0), cut.size
    zeros = cut.units < 0
    pads = bool(zeros.any())
    buffer: Array = np.empty((0, len(units), size), kind)

    def take(block: Array) -> Array:
        nonlocal buffer
        if len(buffer) < len(block):
            buffer = np.empty((len(block), len(units), size), kind)
        found = buffer[: len(block)]
        if size == 1:
            np.take(block, units, axis=1, out=found[:, :, 0], mode="clip")
        else:
            np.take(block.reshape(len(block), width // size, size), units, axis=1, out=found, mode="clip")
        if pads:
            found[:, zeros] = 0
        return found.reshape(len(block), -1)

    return take


def times_vector(tensors: TensorFolder, name: str, vector: NDArray[np.floating], added: LowRank | None) -> Matrix:
    """W @ vector [in] -> [out] in float64 for a matrix with what tuning added, rounded to float32 at the end."""
    info = tensors.info(name)
    wide = vector.astype(np.float64)
    blocks = _row_blocks(tensors, info, np.arange(info.shape[0]), info.shape[1])
    found = np.concatenate([as_float32(block, info.dtype).astype(np.float64) @ wide for block in blocks])
    if added is not None:
        found += added.b.astype(np.float64) @ (added.a.astype(np.float64) @ wide)
    return found.astype(np.float32)
