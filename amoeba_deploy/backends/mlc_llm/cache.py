"""MLC-LLM's files of weights: ``tensor-cache.json`` lists the tensors that lie in ``params_shard_N.bin``.

The layout is TVM's tensor cache (tvm/contrib/tvmjs.py, ``dump_tensor_cache``). MLC writes float32 tensors as
bfloat16 there (``"format": "f32-to-bf16"``), also those of ``q0f32``; so ``write_float32`` writes them again as they
are (``"raw"``), which the same loaders read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.mlc_llm.formats import Format, dequantise
from amoeba_deploy.backends.mlc_llm.layout import Stored
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object, write_json
from amoeba_deploy.model_folder import ModelFolder

INDEX = "tensor-cache.json"
SHARD_BYTES = 32 * 2**20
"""The most data in one shard, MLC's own limit; a larger tensor gets a shard of its own."""
_AS_BF16 = "f32-to-bf16"


@dataclass(frozen=True)
class Record:
    """Where one tensor lies, and how its numbers are written."""

    file: str
    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    form: str

    @property
    def halved(self) -> bool:
        """Whether float32 numbers are written as bfloat16."""
        return self.form == _AS_BF16 and self.dtype == "float32"


class TensorCache:
    """The tensors of a folder; values are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises BadInput where it is missing or damaged, or a shard is not as long as it says."""
        self.folder = folder
        value = read_json_object(folder / INDEX)
        try:
            self.records = dict(_records(value))
            sizes = {str(shard["dataPath"]): int(shard["nbytes"]) for shard in value["records"]}
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{folder / INDEX}: is no index of tensors as MLC-LLM writes it; build it again") from None
        for name, size in sizes.items():
            found = (folder / name).stat().st_size if Path(name).name == name and (folder / name).is_file() else None
            if found != size:
                raise BadInput(f"{folder / name}: is {found or 'no'} bytes long where its index has {size}")
        for name, record in self.records.items():
            width = 2 if record.halved else np.dtype(record.dtype).itemsize
            whole = record.bytes == math.prod(record.shape) * width
            if not whole or not 0 <= record.offset <= sizes[record.file] - record.bytes:
                raise BadInput(f"{folder / INDEX}: tensor '{name}' does not lie in its shard as its shape calls for")

    def array(self, name: str) -> NDArray[Any]:
        """A tensor's numbers in its own dtype, those written as bfloat16 in float32."""
        record = self.records[name]
        data = np.memmap(self.folder / record.file, np.uint8, "r")[record.offset : record.offset + record.bytes]
        if record.halved:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(record.shape)
        return data.view(np.dtype(record.dtype)).reshape(record.shape)

    def values(self, stored: Stored, form: Format) -> NDArray[np.float32]:
        """What one of MLC's tensors stands for, in float32, dequantised where it is packed."""
        if stored.columns is None or form.group is None:
            return self.array(stored.name).astype(np.float32)
        stem = stored.name.removesuffix("weight")
        return dequantise(self.array(f"{stem}q_weight"), self.array(f"{stem}q_scale"), form, stored.columns)


def _records(value: dict[str, Any]) -> Iterator[tuple[str, Record]]:
    for shard in value["records"]:
        for entry in shard["records"]:
            shape = tuple(int(size) for size in entry["shape"])
            np.dtype(entry["dtype"])
            record = Record(
                str(shard["dataPath"]),
                int(entry["byteOffset"]),
                int(entry["nbytes"]),
                shape,
                str(entry["dtype"]),
                str(entry["format"]),
            )
            yield str(entry["name"]), record


def source_values(model: ModelFolder, stored: Stored) -> NDArray[np.float32]:
    """The model's own numbers of one of MLC's tensors."""
    parts = [model.tensors.float32(name) for name in stored.sources]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def write_float32(folder: Path, model: ModelFolder, tensors: Iterable[Stored]) -> None:
    """Write all tensors of a model again, in float32 as they are, in place of a folder's shards."""
    for old in (*folder.glob("params_shard_*.bin"), *folder.glob("tensor-cache*.json")):
        old.unlink()
    shards: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    data = bytearray()
    total = 0

    def finish() -> None:
        nonlocal records, data
        name = f"params_shard_{len(shards)}.bin"
        (folder / name).write_bytes(data)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        shard = {"dataPath": name, "format": "raw-shard", "nbytes": len(data), "records": records}
        shards.append(shard | {"md5sum": digest})
        records, data = [], bytearray()

    for stored in tensors:
        raw = np.ascontiguousarray(source_values(model, stored), np.float32).tobytes()
        if data and len(data) + len(raw) > SHARD_BYTES:
            finish()
        entry = {"name": stored.name, "shape": list(stored.shape), "dtype": "float32", "format": "raw"}
        records.append(entry | {"nbytes": len(raw), "byteOffset": len(data)})
        data += raw
        total += len(raw)
    finish()
    count = sum(len(shard["records"]) for shard in shards)
    facts = {"ParamSize": count, "ParamBytes": float(total), "BitsPerParam": 32.0}
    write_json(folder / INDEX, {"metadata": facts, "records": shards})


def source_places(tensors: Iterable[Stored]) -> dict[str, tuple[Stored, slice]]:
    """For each of the model's own tensors the tensor of MLC that holds it, and its rows there."""
    places = {}
    for stored in tensors:
        first = 0
        for name, rows in zip(stored.sources, stored.rows, strict=True):
            places[name] = (stored, slice(first, first + rows))
            first += rows
    return places
