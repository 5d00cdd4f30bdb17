"""How a precision stores a model: bits a weight takes, scales included, and bytes a cached or activated number takes.

Each backend states this for each of its precisions; estimates of bytes, latency and memory need nothing else of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_deploy.architecture import Architecture


@dataclass(frozen=True)
class StorageFormat:
    """Bits a weight takes in matrices, in the embedding, and elsewhere; bytes a cached or an activated number takes."""

    matrix_bits: float
    embedding_bits: float
    other_bits: float
    cache_bytes: int
    activation_bytes: int
    head_bits: float | None = None
    """Of the output head, where that is not stored like the other matrices."""

    def block_bytes(self, architecture: Architecture) -> float:
        """Bytes of one block's weights."""
        matrices = architecture.block_matrix_parameters * self.matrix_bits
        return (matrices + architecture.block_other_parameters * self.other_bits) / 8

    def head_bytes(self, architecture: Architecture) -> float:
        """Bytes of the output head, which decoding reads whole for every token, and of the final norm."""
        bits = self.matrix_bits if self.head_bits is None else self.head_bits
        return (architecture.embedding_parameters * bits + architecture.hidden * self.other_bits) / 8

    def embedding_bytes(self, architecture: Architecture) -> float:
        """Bytes of an embedding table stored beside the head: none where the two are tied."""
        return 0.0 if architecture.tied else architecture.embedding_parameters * self.embedding_bits / 8

    def read_bytes(self, architecture: Architecture) -> float:
        """Bytes of all weights that one decoding step reads: every block and the head."""
        return architecture.depth * self.block_bytes(architecture) + self.head_bytes(architecture)

    def weight_bytes(self, architecture: Architecture) -> float:
        """Bytes of all weights."""
        return self.read_bytes(architecture) + self.embedding_bytes(architecture)

    def cache_bytes_at(self, architecture: Architecture, positions: float, batch: int) -> float:
        """Bytes of the key/value cache when ``batch`` sequences hold ``positions`` tokens each."""
        return architecture.kv_values_per_token * positions * batch * self.cache_bytes
