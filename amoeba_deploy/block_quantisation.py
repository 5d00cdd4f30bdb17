"""Weights in 4 or 8 bits with one scale per 32 consecutive inputs, as ONNX Runtime's MatMulNBits stores them.

Rounding is to nearest. In 4 bits the value of largest magnitude in a block maps to -8, so that the whole range
-8..7 is used (llama.cpp's Q4_0 does the same); in 8 bits the scale is the largest magnitude over 127. Stored values
are offset by 8 or 128; two 4-bit values share a byte, the first in its low half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
_AT_ONCE = 1 << 16
"""Weights that are quantised at once: few enough to stay in a processor's cache, which more than doubles the speed."""


def quantise(matrix: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pack a matrix [out, in] into values [out, blocks, 4*bits] and scales [out, blocks], zero-padded at the end."""
    rows, columns = matrix.shape
    count = -(-columns // BLOCK)
    packed, scales = np.empty((rows, count, BLOCK * bits // 8), np.uint8), np.empty((rows, count), np.float32)
    offset, step = 1 << (bits - 1), max(1, _AT_ONCE // max(columns, 1))
    for begin in range(0, rows, step):
        blocks = _across(matrix[begin : begin + step])
        found = _scales(blocks, bits)
        blocks *= np.divide(1, found, out=np.zeros_like(found), where=found != 0)
        np.rint(blocks, out=blocks)
        blocks += offset
        np.clip(blocks, 0, 2 * offset - 1, out=blocks)
        values = blocks.astype(np.uint8)
        if bits == 4:
            values = values[0::2] | np.left_shift(values[1::2], 4)
        scales[begin : begin + step] = found.reshape(-1, count)
        packed[begin : begin + step] = values.T.reshape(-1, count, len(values))
    return packed, scales


def block_scales(matrix: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """The scales [out, blocks] alone."""
    rows, columns = matrix.shape
    step = max(1, _AT_ONCE // max(columns, 1))
    parts = [_scales(_across(matrix[begin : begin + step]), bits) for begin in range(0, rows, step)]
    return np.concatenate(parts).reshape(rows, -(-columns // BLOCK))


def _across(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights as [32, blocks], one block a column: numpy is quick along long rows, not along 32 numbers."""
    height, columns = rows.shape
    count = -(-columns // BLOCK)
    if columns % BLOCK:
        padded = np.zeros((height, count * BLOCK), np.float32)
        padded[:, :columns] = rows
        rows = padded
    return np.ascontiguousarray(rows.reshape(height * count, BLOCK).T)


def _scales(blocks: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    high, low = blocks.max(axis=0), blocks.min(axis=0)
    if bits == 8:
        return np.asarray(np.maximum(high, -low) / np.float32(127), np.float32)
    return np.asarray(np.where(high > -low, high, low) / np.float32(-8), np.float32)


def dequantise(values: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, columns: int) -> NDArray[np.float32]:
    """The matrix [out, columns] that packed values and scales stand for."""
    if bits == 4:
        unpacked = np.empty((*values.shape[:-1], BLOCK), np.uint8)
        unpacked[..., 0::2], unpacked[..., 1::2] = values & 15, values >> 4
        values = unpacked
    matrix = (values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return np.ascontiguousarray(matrix.reshape(len(values), -1)[:, :columns])
