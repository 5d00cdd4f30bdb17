"""Tuned adapters: a mixture of low-rank experts whose weights depend on the shape, in ``smol.safetensors``.

Every linear layer of the blocks has E experts, A [r, in] and B [out, r] each. One gate for the whole model sees which
blocks are kept and how wide they are, and gives each expert its share. The factors are mixed, delta W = alpha/r
(sum_k g_k B_k) (sum_k g_k A_k) (AmoebaLLM, arXiv 2411.10606, and its released code), or where the file says so the
products, delta W = alpha/r sum_k g_k B_k A_k. Noise belongs to training alone: here the same shape always gives the
same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction.cutting import LowRank
from amoeba_deploy.families import family_of
from amoeba_deploy.shape import format_width, parse_width
from amoeba_deploy.tensors import (
    NUMPY_OF,
    Array,
    OpenFile,
    TensorInfo,
    TensorSource,
    as_float32,
    from_float32,
    made_source,
    read_header,
    write_tensors,
)

ADAPTERS = "smol.safetensors"
GATE = ("gate.0.weight", "gate.0.bias", "gate.1.weight", "gate.1.bias")
NOISE = ("gate.noise.weight", "gate.noise.bias")
Numbers = NDArray[np.float32]
Mix = Literal["factors", "products"]
"""What the gate's shares multiply: each factor, before the one product; or the products of the experts."""


def width_code(width: Fraction, widths: Sequence[Fraction]) -> NDArray[np.float64]:
    """What the gate sees of a width [W]: one at a tuned width; between two, linear in both; clamped outside.

    ``widths`` are the tuned ones in descending order.
    """
    code = np.zeros(len(widths))
    if width >= widths[0]:
        code[0] = 1
    elif width <= widths[-1]:
        code[-1] = 1
    else:
        below = next(place for place, tuned in enumerate(widths) if tuned <= width)
        share = (width - widths[below]) / (widths[below - 1] - widths[below])
        code[below - 1], code[below] = float(share), float(1 - share)
    return code


def matrices(sizes: Architecture) -> dict[str, tuple[int, int]]:
    """The linear layers of a block, such as ``mlp.up_proj``, and their [out, in]."""
    tensors = family_of({"model_type": sizes.family}).block_tensors(sizes)
    return {
        name.removesuffix(".weight"): (sizes.extent(axes[0]), sizes.extent(axes[1]))
        for name, axes in tensors.items()
        if len(axes) == 2
    }


def tensor_names(block: int, matrix: str) -> tuple[str, str]:
    """How the file names the experts' A and B of a matrix."""
    stem = f"blocks.{block}.{matrix.rpartition('.')[2]}"
    return f"{stem}.lora_a", f"{stem}.lora_b"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint. Experts are read when they are asked for; the gate is in memory."""

    file: OpenFile
    infos: Mapping[str, TensorInfo]
    gate: Mapping[str, Numbers]
    depth: int
    experts: int
    rank: int
    alpha: float
    top_k: int
    widths: tuple[Fraction, ...]
    mix: Mix = "factors"

    def mixture(self, kept_blocks: Sequence[int], width: Fraction) -> Numbers:
        """Every expert's share [E] for a subnet: softmax over the best ``top_k`` logits, zero for the others."""
        if not self.gate:
            return np.ones(1, np.float32)
        kept = np.zeros(self.depth)
        kept[list(kept_blocks)] = 1
        seen = np.concatenate([kept, width_code(width, self.widths)])
        inner = self.gate[GATE[0]].astype(np.float64) @ seen + self.gate[GATE[1]]
        logits = self.gate[GATE[2]].astype(np.float64) @ inner + self.gate[GATE[3]]
        best = np.argsort(-logits, kind="stable")[: self.top_k]
        shares = np.zeros(self.experts)
        shares[best] = np.exp(logits[best] - logits[best].max())
        return np.asarray(shares / shares.sum(), np.float32)

    def low_rank(self, mixture: Numbers, block: int, matrix: str) -> LowRank | None:
        """What a mixture [E] adds to a matrix of a block of the full model; None for what has no adapters."""
        name_a, name_b = tensor_names(block, matrix)
        if name_a not in self.infos:
            return None
        scaled = mixture * np.float32(self.alpha / self.rank)
        if self.mix == "factors":
            return LowRank(self._mixed(name_a, mixture), self._mixed(name_b, scaled))
        # A sum of products is the product of the factors side by side.
        kept = [int(index) for index in np.flatnonzero(mixture)]
        a, b = ([self._expert(name, index) for index in kept] for name in (name_a, name_b))
        shared = [scaled[index] * part for index, part in zip(kept, b, strict=True)]
        return LowRank(np.concatenate(a), np.concatenate(shared, axis=1))

    def tensor(self, name: str) -> Numbers:
        """A tensor of the file, all experts together."""
        return _read(self.file, self.infos[name])

    def _mixed(self, name: str, shares: Numbers) -> Numbers:
        found = np.zeros(self.infos[name].shape[1:], np.float32)
        numbers = np.empty_like(found)
        for index in np.flatnonzero(shares):
            found += np.multiply(self._expert(name, int(index)), shares[index], out=numbers)
        return found

    def _expert(self, name: str, index: int) -> Numbers:
        info = self.infos[name]
        expert: Array = np.empty(info.shape[1:], NUMPY_OF[info.dtype])
        self.file.read_into(expert, info.offset + index * (info.length // self.experts))
        return as_float32(expert, info.dtype)


def read_adapters(folder: Path, sizes: Architecture) -> Adapters:
    """The adapters of a checkpoint folder, checked against the sizes of its base model.

    Raises:
        BadInput: the file is missing or damaged, or belongs to a model of other sizes.
    """
    path = folder / ADAPTERS
    infos, metadata = read_header(path)
    try:
        rank, top_k, alpha = int(metadata["rank"]), int(metadata["top_k"]), float(metadata["alpha"])
        widths = tuple(parse_width(text) for text in metadata["widths"].split(","))
        if rank < 1 or not np.isfinite(alpha) or list(widths) != sorted(set(widths), reverse=True):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise BadInput(f"{path}: its metadata must have rank, alpha, top_k and descending widths; tune again") from None

    mix: Mix = metadata.get("mix", "factors")  # type: ignore[assignment]  # any text, until here
    if mix not in get_args(Mix):
        raise BadInput(f"{path}: mixes {str(mix)[:40]!r} where this version knows factors and products; tune again")

    def check(name: str, shape: tuple[int, ...]) -> None:
        info = infos.get(name)
        if info is None or info.shape != shape or info.dtype not in ("F32", "F16", "BF16"):
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise BadInput(f"{path}: '{name}' should be floats {list(shape)} and is {found}; it is not of this model")

    first = infos.get(tensor_names(0, next(iter(matrices(sizes))))[0])
    experts = first.shape[0] if first is not None and len(first.shape) == 3 else 0
    if not 1 <= top_k <= experts:
        raise BadInput(f"{path}: has {experts} experts where top_k is {top_k}; it is not a file of tuned adapters")
    for block in range(sizes.depth):
        for matrix, (rows, columns) in matrices(sizes).items():
            name_a, name_b = tensor_names(block, matrix)
            check(name_a, (experts, rank, columns))
            check(name_b, (experts, rows, rank))
    gated = experts > 1 or GATE[0] in infos
    if gated:
        inner = infos[GATE[0]].shape[0] if GATE[0] in infos and infos[GATE[0]].shape else 0
        shapes = ((inner, sizes.depth + len(widths)), (inner,), (experts, inner), (experts,))
        for name, shape in zip(GATE, shapes, strict=True):
            check(name, shape)
    file = OpenFile(path)
    gate = {name: _read(file, infos[name]) for name in GATE} if gated else {}
    if not all(np.isfinite(values).all() for values in gate.values()):
        raise BadInput(f"{path}: its gate holds numbers that are not finite; tune again")
    return Adapters(file, infos, gate, sizes.depth, experts, rank, alpha, top_k, widths, mix)


def check_finite(adapters: Adapters) -> int:
    """Read every tensor of the experts and the gate; returns how many there are.

    Raises:
        VerificationFailed: one holds a value that is not finite.
    """
    for name in adapters.infos:
        if not np.isfinite(adapters.tensor(name)).all():
            raise VerificationFailed(f"{adapters.file.path}: tensor '{name}' holds values that are not finite")
    return len(adapters.infos)


def _read(file: OpenFile, info: TensorInfo) -> Numbers:
    values: Array = np.empty(info.shape, NUMPY_OF[info.dtype])
    file.read_into(values, info.offset)
    return as_float32(values, info.dtype)


def write_adapters(
    folder: Path,
    tensors: Mapping[str, Numbers | TensorSource],
    *,
    rank: int,
    alpha: float,
    top_k: int,
    widths: Sequence[Fraction],
    mix: Mix = "factors",
    dtype: Literal["F32", "BF16", "F16"] = "F32",
) -> None:
    """Write ``smol.safetensors``: tensors by the names of this format, and the settings as metadata.

    The experts' arrays are written as ``dtype``, the gate's as float32; sources have their own dtype, and give their
    values when they are written.
    """
    settings = {
        "alpha": repr(float(alpha)),
        "mix": mix,
        "rank": str(rank),
        "top_k": str(top_k),
        "widths": ",".join(format_width(width) for width in sorted(widths, reverse=True)),
    }

    def source(name: str, found: Numbers | TensorSource) -> TensorSource:
        if isinstance(found, TensorSource):
            return found
        kind = "F32" if name.startswith("gate.") else dtype
        return made_source(kind, found.shape, lambda: from_float32(np.asarray(found, np.float32), kind))

    write_tensors(folder / ADAPTERS, {name: source(name, found) for name, found in tensors.items()}, settings)
