"""How an ``onnx`` artefact stores weights: in place in the dense folder, or quantised in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.backends.onnx.precisions import BITS, DTYPES, shared_file, weights_file
from amoeba_deploy.block_quantisation import BLOCK, block_scales, dequantise, quantise
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import copy_model, copy_other_files
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import (
    CONFIG_DTYPES,
    Array,
    TensorFolder,
    TensorInfo,
    TensorSource,
    as_float32,
    made_source,
    read_header,
    write_tensors,
)

_AT_ONCE = 1 << 18
"""Weights that are read and quantised at once, so that a matrix of any size takes a few megabytes a thread."""


def stored_weights(model: ModelFolder, output: Path, precision: str) -> dict[str, TensorInfo]:
    """Where the graph's weights lie in ``output``; writes them there unless they can be used in place."""
    if precision in BITS:
        copy_other_files(model, output)
        for file, sources in (
            (shared_file(precision), _quantised_others(model, BITS[precision])),
            (weights_file(precision), _quantised_blocks(model, BITS[precision])),
        ):
            write_tensors(output / file, sources, threads=len(os.sched_getaffinity(0)))
        return quantised_infos(output, precision)
    dtype = DTYPES[precision]
    if output != model.path:
        copy_model(model, output, dtype)
        return TensorFolder(output).infos
    if any(info.dtype != CONFIG_DTYPES[dtype] for info in model.tensors.infos.values()):
        raise BadInput(f"{output}: its weights are not {dtype}, which {precision} engines use in place; extract in it")
    return model.tensors.infos


def quantised_infos(artefact: Path, precision: str) -> dict[str, TensorInfo]:
    """Where the tensors of a quantised artefact lie; raises BadInput where a file is missing or damaged."""
    shared, blocks = (read_header(artefact / name(precision))[0] for name in (shared_file, weights_file))
    return shared | blocks


def _quantised_others(model: ModelFolder, bits: int) -> dict[str, TensorSource]:
    """The tensors outside the blocks: values and scales of each matrix, norms in float32."""
    sources: dict[str, TensorSource] = {}
    for name in model.family.other_tensors(model.architecture):
        sources |= _matrices(model, [name], bits) if "norm" not in name else {name: _float32(model, name)}
    return sources


def _quantised_blocks(model: ModelFolder, bits: int) -> dict[str, TensorSource]:
    """The tensors of the blocks: values and scales of each matrix, everything else in float32.

    Matrices that the graph multiplies as one stand together: first the values of all, then the scales of all.
    """
    sources: dict[str, TensorSource] = {}
    for index in range(model.architecture.depth):
        prefix = f"model.layers.{index}."
        names = list(model.block_shapes(index))
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            matrices = [prefix + n for n in names if n.endswith(tuple(f".{part}_proj.weight" for part in group))]
            sources |= _matrices(model, matrices, bits)
        sources |= {prefix + n: _float32(model, prefix + n) for n in names if not n.endswith("_proj.weight")}
    return sources


def _float32(model: ModelFolder, name: str) -> TensorSource:
    return made_source("F32", model.tensors.info(name).shape, lambda: model.tensors.float32(name))


def _matrices(model: ModelFolder, names: list[str], bits: int) -> dict[str, TensorSource]:
    def parts(name: str, made: Callable[[Array], Array]) -> Callable[[], Iterator[Array]]:
        def rows() -> Iterator[Array]:
            raw, info = model.tensors.raw(name), model.tensors.info(name)
            step = max(1, _AT_ONCE // info.shape[1])
            for begin in range(0, info.shape[0], step):
                yield made(as_float32(raw[begin : begin + step], info.dtype))

        return rows

    packed, scales = {}, {}
    for name in names:
        rows, columns = model.tensors.info(name).shape
        count = -(-columns // BLOCK)
        values = parts(name, lambda matrix: quantise(matrix, bits)[0])
        packed[f"{name}.packed"] = TensorSource("U8", (rows, count, BLOCK * bits // 8), values)
        # Found once more rather than kept: those of a large embedding take more memory than everything else here.
        scales[f"{name}.scales"] = TensorSource("F32", (rows, count), parts(name, lambda m: block_scales(m, bits)))
    return packed | scales


def write_dequantised(model: ModelFolder, artefact: Path, precision: str, output: Path) -> None:
    """Write the model with the values that a quantised artefact's weights stand for."""
    infos, bits = quantised_infos(artefact, precision), BITS[precision]
    data = {info.file: np.memmap(info.file, mode="r") for info in infos.values()}

    def array(name: str, dtype: Any) -> Array:
        info = infos[name]
        return np.frombuffer(data[info.file][info.offset : info.offset + info.length], dtype).reshape(info.shape)

    def values(name: str, info: TensorInfo) -> Array:
        if f"{name}.packed" not in infos:
            return as_float32(array(name, np.float32), "F32")
        packed, scales = array(f"{name}.packed", np.uint8), array(f"{name}.scales", np.float32)
        return dequantise(packed, scales, bits, info.shape[1])

    copy_model(model, output, "float32", values)
