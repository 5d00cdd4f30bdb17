"""Weights in 4 or 8 bits with one scale per 32 consecutive inputs, as ONNX Runtime's MatMulNBits stores them.

Rounding is to nearest. In 4 bits the value of largest magnitude in a block maps to -8, so that the whole range
-8..7 is used (llama.cpp's Q4_0 does the same); in 8 bits the scale is the largest magnitude over 127. Stored values
are offset by 8 or 128; two 4-bit values share a byte, the first in its low half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


def quantise(matrix: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pack a matrix [out, in] into values [out, blocks, 4*bits] and scales [out, blocks], zero-padded at the end."""
    rows, columns = matrix.shape
    count = -(-columns // BLOCK)
    blocks = np.zeros((rows, count * BLOCK), np.float32)
    blocks[:, :columns] = matrix
    blocks = blocks.reshape(rows, count, BLOCK)
    high, low = blocks.max(axis=-1), blocks.min(axis=-1)
    if bits == 8:
        scales = np.maximum(high, -low) / np.float32(127)
    else:
        scales = np.where(high > -low, high, low) / np.float32(-8)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    offset = 1 << (bits - 1)
    values = np.clip(np.rint(blocks * inverse[..., None]) + offset, 0, 2 * offset - 1).astype(np.uint8)
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values, scales.astype(np.float32)


def dequantise(values: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, columns: int) -> NDArray[np.float32]:
    """The matrix [out, columns] that packed values and scales stand for."""
    if bits == 4:
        unpacked = np.empty((*values.shape[:-1], BLOCK), np.uint8)
        unpacked[..., 0::2], unpacked[..., 1::2] = values & 15, values >> 4
        values = unpacked
    matrix = (values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return np.ascontiguousarray(matrix.reshape(len(values), -1)[:, :columns])
