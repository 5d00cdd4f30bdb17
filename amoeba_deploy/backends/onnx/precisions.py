"""The precisions of the ``onnx`` flow, and what follows from each. Nothing heavy is imported here."""

from __future__ import annotations

from amoeba_deploy.block_quantisation import BLOCK
from amoeba_deploy.precision import StorageFormat

GRAPH = "model.onnx"
PACKED = "amoeba.packed_cache"
"""The graph's metadata: whether the cache holds each row's real tokens alone (attention.py)."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions whose weights are the dense folder's own, in this dtype."""
BITS = {"int8": 8, "int4": 4}
PRECISIONS = (*DTYPES, *BITS)
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def weights_file(precision: str) -> str:
    """The file that holds the block-quantised weights of an artefact's blocks."""
    return f"weights.{precision}.safetensors"


def shared_file(precision: str) -> str:
    """The file that holds what is the same in every subnet of a model: embedding, head and last norm."""
    return f"shared.{precision}.safetensors"


def stored(precision: str) -> StorageFormat:
    """Bits of weights, and bytes of cached and activated numbers."""
    if precision in DTYPES:
        size = _BYTES[precision]
        return StorageFormat(8 * size, 8 * size, 8 * size, size, size)
    bits = BITS[precision] + 32 / BLOCK
    return StorageFormat(bits, bits, 32, 4, 4)
