"""Tensors in safetensors files: checked headers, memory-mapped reading, deterministic writing.

Nothing here needs torch. A bfloat16 tensor is read as its raw 16-bit words, which is all that slicing needs;
``as_float32`` and ``from_float32`` convert where numbers are wanted. Headers are checked against the file before
anything is read, so a truncated or forged file is refused by name instead of read past its end.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.errors import BadInput

Array = NDArray[Any]

NUMPY_OF = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""How a config spells the dtypes of weights, and how a safetensors header does."""

_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype as safetensors spells it, shape, and absolute byte offset and length."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def _entry(file: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        width = np.dtype(NUMPY_OF[dtype]).itemsize
        whole = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: the header entry of tensor '{name}' is malformed; get the file again") from None
    if not whole or end - begin != math.prod(shape) * width:
        raise BadInput(f"{file}: tensor '{name}' has a size that its shape and dtype contradict; get the file again")
    if start + end > size:
        raise BadInput(
            f"{file}: tensor '{name}' ends at byte {start + end}, the file has {size}; it is truncated, get it again"
        )
    return TensorInfo(file, dtype, shape, start + begin, end - begin)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of one safetensors file and its metadata.

    Raises:
        BadInput: the file is missing, truncated, or its header promises what the file does not hold.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise BadInput(f"{file}: the header should take {length} bytes, the file has {size}; it is damaged")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        items = list(header.items())
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{file}: its header is not the JSON object of a safetensors file; get the file again") from None
    return {name: _entry(file, name, entry, 8 + length, size) for name, entry in items}, metadata


def as_float32(array: Array, dtype: str) -> NDArray[np.float32]:
    """Numbers of any float dtype as float32; exact for bfloat16 and float16."""
    if dtype == "BF16":
        words = array.astype(np.uint32)
        words <<= 16
        return words.view(np.float32)
    return np.asarray(array, dtype=np.float32)


def from_float32(array: NDArray[np.float32], dtype: str) -> Array:
    """float32 rounded once, to nearest even, into ``dtype`` (bfloat16 as raw 16-bit words)."""
    if dtype != "BF16":
        return array.astype(NUMPY_OF[dtype])
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def convert(array: Array, dtype: str, wanted: str) -> Array:
    """An array of one float dtype in another; unchanged, and not copied, where both are the same."""
    return array if dtype == wanted else from_float32(as_float32(array, dtype), wanted)


class TensorFolder:
    """All tensors of a model folder, in one safetensors file or in shards with an index, read through memory maps."""

    def __init__(self, folder: Path) -> None:
        """Read and check all headers.

        Raises:
            BadInput: there are no safetensors, a shard is missing or damaged, or the index contradicts the shards.
        """
        self.folder = folder
        self.files = self._shards()
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, np.memmap[Any, Any]] = {}
        for file in self.files:
            infos, _ = read_header(file)
            twice = sorted(infos.keys() & self.infos.keys())
            if twice:
                raise BadInput(f"{file}: tensor '{twice[0]}' stands in another shard too; get the folder again")
            self.infos |= infos

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if not index.exists():
            if not single.exists():
                raise BadInput(f"{self.folder}: holds neither model.safetensors nor model.safetensors.index.json")
            return [single]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise BadInput(f"{index}: is not a safetensors index; get the folder again") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise BadInput(f"{index}: names a shard outside its own folder; get the folder again")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise BadInput(f"{index}: names the shard {missing[0]}, which is not there; get the folder again")
        return [self.folder / name for name in names]

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; raises BadInput where the folder has none of that name."""
        if name not in self.infos:
            raise BadInput(f"{self.folder}: has no tensor '{name}', which its config calls for")
        return self.infos[name]

    def raw(self, name: str) -> Array:
        """A read-only view of a tensor as it lies in the file (bfloat16 as 16-bit words)."""
        info = self.info(name)
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, mode="r")
        data = self._maps[info.file][info.offset : info.offset + info.length]
        return np.frombuffer(data, dtype=NUMPY_OF[info.dtype]).reshape(info.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32 numbers."""
        return as_float32(self.raw(name), self.info(name).dtype)


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its dtype and shape, known before, and the function that makes its values."""

    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Array]

    @property
    def length(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(NUMPY_OF[self.dtype]).itemsize


def write_tensors(file: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str] | None = None) -> int:
    """Write one safetensors file, making and writing one tensor after the other; returns its size in bytes.

    The order is the mapping's, the header is padded to a multiple of 64 bytes, and nothing depends on time or
    machine: the same tensors give the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, source in tensors.items():
        header[name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.length],
        }
        offset += source.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, source in tensors.items():
            values = np.ascontiguousarray(source.values())
            if values.shape != source.shape or values.nbytes != source.length:
                raise AssertionError(f"{name}: {values.shape} {values.dtype} was made where {source} was promised")
            stream.write(values.data)
    return 8 + len(text) + offset


def array_source(array: Array, dtype: str) -> TensorSource:
    """The source of an array that is already at hand."""
    return TensorSource(dtype, array.shape, lambda: array)
