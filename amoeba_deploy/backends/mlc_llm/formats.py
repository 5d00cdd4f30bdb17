"""MLC-LLM's weight formats, and how numbers are read back from them.

``q0f32`` and ``q0f16`` store every tensor as it is. ``q4f16_1`` and the like store matrices in groups along a row: of
each group one scale, and whole numbers packed into 32-bit words, lowest bits first. A number q stands for
(q - (2^(bits-1) - 1)) * scale, computed in the format's own dtype (GroupQuantize._dequantize and
convert_uint_to_float in mlc_llm/quantization/group_quantization.py and utils.py). A last group is filled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32
"""Bits of a packed word."""


@dataclass(frozen=True)
class Format:
    """One format: the dtype of what is not packed and of all arithmetic, and bits and group size of what is."""

    dtype: str
    bits: int = 0
    group: int | None = None

    @property
    def words(self) -> int:
        """Words of a group."""
        return 0 if self.group is None else self.group // (WORD // self.bits)

    @property
    def half(self) -> bool:
        """Whether it computes in float16."""
        return self.dtype == "float16"


FORMATS: dict[str, Format] = {
    "q0f32": Format("float32"),
    "q0f16": Format("float16"),
    "q4f32_1": Format("float32", 4, 32),
    "q4f16_1": Format("float16", 4, 32),
    "q3f16_1": Format("float16", 3, 40),
}
"""Best quality first."""


def dequantise(words: NDArray[np.uint32], scales: NDArray[Any], form: Format, columns: int) -> NDArray[np.float32]:
    """The values [rows, columns] of packed words [rows, groups * words] and scales [rows, groups]."""
    assert form.group is not None
    shifts = np.arange(WORD // form.bits, dtype=np.uint32) * np.uint32(form.bits)
    numbers = (words[:, :, None] >> shifts) & np.uint32(2**form.bits - 1)
    dtype = np.dtype(form.dtype)
    middle = dtype.type(2 ** (form.bits - 1) - 1)
    centred = numbers.reshape(len(words), -1)[:, :columns].astype(dtype) - middle
    spread = np.repeat(scales.astype(dtype), form.group, axis=1)[:, :columns]
    return np.asarray(centred * spread, np.float32)
