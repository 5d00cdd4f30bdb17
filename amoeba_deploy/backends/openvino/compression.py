"""Weights in 8 or 4 bits by NNCF's data-free weight compression, and the numbers that stored weights stand for.

Compression runs on the OpenVINO model: on an ONNX graph NNCF's int8 is slower than float32. Matrices become integers
with a float16 scale (and in 8 bits a zero point) per row, or in 4 bits per group of inputs; NNCF keeps the names of
constants, so ``NAME``, ``NAME/scale`` and ``NAME/zero_point`` are read back from the artefact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.openvino.graph import name_all
from amoeba_deploy.backends.openvino.runtime import core, load, silenced
from amoeba_deploy.errors import BadInput
from amoeba_deploy.tensors import Array, TensorInfo, as_float32

SMALLEST_GROUP = 32
"""Inputs a group has at least; rows that do not divide into such groups stay in 8 bits."""


def compress(model: Any, precision: str, group: int) -> Any:
    """The model with its matrices in 8 bits a row, or in 4 bits a group of ``group`` inputs (or a divisor of it).

    In 4 bits the embedding and the head keep 8, NNCF's default, and so do rows that 32 does not divide.
    """
    nncf: Any = load("nncf")
    advanced: Any = load("nncf.quantization.advanced_parameters")
    with silenced():
        if precision == "int8":
            found = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            found = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_SYM,
                ratio=1.0,
                group_size=group,
                advanced_parameters=nncf.AdvancedCompressionParameters(
                    group_size_fallback_mode=advanced.GroupSizeFallbackMode.ADJUST,
                    min_adjusted_group_size=SMALLEST_GROUP,
                ),
            )
    name_all(found)
    return found


class StoredWeights:
    """The weights of an artefact by their names in a Hugging Face folder."""

    def __init__(self, file: Path) -> None:
        """Read an IR; raises BadInput where it cannot be read."""
        self._model = read_model(file)
        self._constants = {
            node.get_friendly_name(): node
            for node in self._model.get_ordered_ops()
            if node.get_type_name() == "Constant"
        }

    def kind(self, name: str) -> str:
        """How a tensor is stored, as OpenVINO spells element types: ``f32``, ``bf16``, ``u8``, ``i4`` ..."""
        return str(self._constant(name).get_element_type().get_type_name())

    def _constant(self, name: str) -> Any:
        if name not in self._constants:
            raise BadInput(f"the OpenVINO model holds no weights named '{name}'; lower the subnet again")
        return self._constants[name]

    def _numbers(self, name: str) -> NDArray[np.float32]:
        """A constant as it stands, integers as float32 numbers."""
        node, kind = self._constant(name), self.kind(name)
        data = np.asarray(node.data)
        shape = tuple(int(size) for size in node.get_output_shape(0))
        if kind == "bf16":
            return as_float32(data.view(np.uint16).reshape(shape), "BF16")
        if kind in ("u4", "i4"):
            packed = data.reshape(-1).view(np.uint8)
            values = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
            values = values.astype(np.int8)
            data = np.where(values > 7, values - 16, values) if kind == "i4" else values
        return np.asarray(data, np.float32).reshape(shape)

    def float32(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A tensor as the artefact computes with it: (integer - zero point) * scale, in float32."""
        values = self._numbers(name)
        if f"{name}/zero_point" in self._constants:
            values = values - self._numbers(f"{name}/zero_point")
        if f"{name}/scale" in self._constants:
            values = values * self._numbers(f"{name}/scale")
        return np.ascontiguousarray(values.reshape(shape))

    def values(self) -> Callable[[str, TensorInfo], Array]:
        """For ``copy_model``: a tensor's values by name."""
        return lambda name, info: self.float32(name, info.shape)

    def matrices(self) -> dict[str, str]:
        """How each matrix is stored, by name."""
        names = [name for name in self._constants if name.endswith(".weight") and "norm" not in name]
        return {name: self.kind(name) for name in sorted(names)}


def read_model(file: Path) -> Any:
    """An IR (xml and bin); raises BadInput where either is missing or damaged."""
    for part in (file, file.with_suffix(".bin")):
        if not part.is_file():
            raise BadInput(f"{file.parent}: has no {part.name}; it is no artefact of the flow 'openvino'")
    try:
        return core().read_model(str(file))
    except Exception as error:  # OpenVINO raises bare RuntimeError
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise BadInput(f"{file}: is not an OpenVINO model, or a damaged one ({reason:.120}); lower it again") from None
