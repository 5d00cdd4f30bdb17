"""Nodes and initialisers of an ONNX graph under construction; weights are references into safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from amoeba_deploy.tensors import TensorInfo, from_float32

MICROSOFT = "com.microsoft"
TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "U8": TensorProto.UINT8,
}
"""How a safetensors header and ONNX name the types of numbers."""


@dataclass
class Graph:
    """Nodes and initialisers under construction. Names of values are those of the tensors and blocks they belong to."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initialisers: dict[str, TensorProto] = field(default_factory=dict)
    _cast: set[str] = field(default_factory=set)

    def node(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Add an operator; returns the name of its first output (``name``; further ones are ``name.1`` ...)."""
        names = [name if index == 0 else f"{name}.{index}" for index in range(outputs)]
        self.named(kind, inputs, names, name, **attributes)
        return name

    def named(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: Any) -> None:
        """Add an operator whose outputs have names of their own; an empty one is left out."""
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A small constant inside the graph file."""
        if name not in self.initialisers:
            self.initialisers[name] = numpy_helper.from_array(values, name)
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 vector, named by its values."""
        return self.constant("i64_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """A constant int64 number, named by its value."""
        return self.constant(f"i64_{value}_scalar".replace("-", "m"), np.array(value, np.int64))

    def number(self, value: float, dtype: str) -> str:
        """A constant number of a float type, named by its value."""
        name = f"{dtype.lower()}_{value!r}"
        if name not in self.initialisers:
            raw = from_float32(np.array([value], np.float32), dtype).tobytes()
            self.initialisers[name] = helper.make_tensor(name, TYPES[dtype], (), raw, raw=True)
        return name

    def external(self, name: str, info: TensorInfo, shape: Sequence[int], dtype: str | None = None) -> str:
        """An initialiser that lies in a file beside the graph, as ``dtype`` where that is another than its own.

        ONNX Runtime makes the other type once, when it loads the graph.
        """
        if name not in self.initialisers:
            tensor = TensorProto(name=name, data_type=TYPES[info.dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", info.file.name), ("offset", info.offset), ("length", info.length)):
                tensor.external_data.add(key=key, value=str(value))
            self.initialisers[name] = tensor
        return name if dtype is None else self.cast(name, info.dtype, dtype)

    def cast(self, value: str, found: str, wanted: str) -> str:
        """A value as another type; the value itself where it is of that type."""
        if found == wanted:
            return value
        result = f"{value}.{wanted.lower()}"
        if result not in self._cast:
            self._cast.add(result)
            self.node("Cast", [value], result, to=TYPES[wanted])
        return result


def joined(infos: Sequence[TensorInfo]) -> TensorInfo | None:
    """Several tensors as one, stacked along their first axis, where they lie next to each other in one file."""
    for left, right in pairwise(infos):
        if left.file != right.file or left.dtype != right.dtype or left.offset + left.length != right.offset:
            return None
    first = infos[0]
    shape = (sum(info.shape[0] for info in infos), *first.shape[1:])
    return TensorInfo(first.file, first.dtype, shape, first.offset, sum(info.length for info in infos))
