"""GGUF files: written tensor by tensor, read back as numbers, and copied in float32.

The format: magic, version, numbers of tensors and of keys, keys with typed values, then for each tensor its name,
shape (fastest axis first), type and offset, then the data, every tensor at a multiple of 32 bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.gguf.weights import Held
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import from_float32

ALIGNMENT = 32
FLOAT_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Types of matrices by precision; vectors are always in float32, which llama.cpp's operators on them ask for."""
FILE_TYPES = {"fp32": 0, "fp16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""llama.cpp's numbers of what most of a file is in (``llama_ftype``)."""


def file_name(precision: str) -> str:
    """The file in an artefact's folder."""
    return f"model-{precision}.gguf"


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is removed again unless it was written to its end; raises BadInput where the disk refuses."""
    try:
        with path.open("wb") as stream:
            yield stream
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BadInput(f"{path}: cannot be written ({error.strerror}); make room or choose another disk") from None
        raise


def held_type(held: Held, kind: str) -> str:
    """The type of a tensor in a file whose matrices are in ``kind``."""
    return kind if len(held.shape) > 1 else "F32"


def write_file(
    path: Path, arch: str, entries: Mapping[str, Any], model: ModelFolder, tensors: list[Held], kind: str
) -> None:
    """Write a file whose matrices are in a float type, some rows at a time.

    Args:
        path: the file.
        arch: llama.cpp's name of the architecture.
        entries: all keys and values after ``general.architecture``; values keep the types of ``_add``.
        model: where the tensors come from.
        tensors: what to write, in order.
        kind: F32, F16 or BF16.

    Raises:
        BadInput: the disk refuses, or float16 cannot hold a number; nothing is left of the file.
    """
    import gguf

    with _whole(path) as stream:
        writer = gguf.GGUFWriter(None, arch)
        for key, value in entries.items():
            _add(writer, key, value)
        for held in tensors:
            own = held_type(held, kind)
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[own]
            size = math.prod(held.shape) * np.dtype(dtype).itemsize
            writer.add_tensor_info(held.name, held.shape, dtype, size, gguf.GGMLQuantizationType[own])
        writer.fout, writer.state = [stream], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for held in tensors:
            _align(stream)
            own = held_type(held, kind)
            for part in held.parts(model):
                try:
                    stream.write(from_float32(part, own).data)
                except BadInput as error:
                    raise BadInput(f"{held.source}: {error}") from None
        _align(stream)


def _align(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % ALIGNMENT))


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key; whole numbers are unsigned 32-bit, other numbers 32-bit floats. gguf drops empty values unsaid."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: name, shape [out, in], type, and its bytes in rows."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: NDArray[Any]

    def values(self) -> NDArray[np.float32]:
        """Its numbers in float32, dequantised."""
        import gguf

        found = gguf.quants.dequantize(self.data, gguf.GGMLQuantizationType[self.kind])
        return np.ascontiguousarray(found, np.float32).reshape(self.shape)


class GgufFile:
    """A file that is there, its tensors by name."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            BadInput: the file is missing, truncated, or no GGUF file.
        """
        import gguf

        if not path.is_file():
            raise BadInput(f"{path}: is not there; build it again")
        try:
            reader = gguf.GGUFReader(path)
            self._keys_end = int(reader.tensors[0].field.offset) if reader.tensors else 0
            self.tensors = {
                str(tensor.name): Stored(
                    str(tensor.name),
                    tuple(int(size) for size in reversed(tensor.shape)),
                    tensor.tensor_type.name,
                    tensor.data,
                )
                for tensor in reader.tensors
            }
            self.architecture = str(reader.fields["general.architecture"].contents())
        except Exception as error:  # whatever numpy and gguf raise on bytes that are none of theirs
            raise BadInput(f"{path}: is no whole GGUF file ({error!r:.100}); build it again") from None
        self.path = path

    def types(self) -> dict[str, int]:
        """How many matrices have which type; vectors, which always are float32, are not counted."""
        counts = Counter(tensor.kind for tensor in self.tensors.values() if len(tensor.shape) > 1)
        return dict(sorted(counts.items()))

    def bits(self) -> float:
        """Bits that a weight of the matrices takes in the mean."""
        matrices = [tensor for tensor in self.tensors.values() if len(tensor.shape) > 1]
        return 8 * sum(t.data.nbytes for t in matrices) / sum(math.prod(t.shape) for t in matrices)

    def values(self, name: str) -> NDArray[np.float32]:
        """The numbers of a tensor; raises BadInput where the file has none of that name."""
        if name not in self.tensors:
            raise BadInput(f"{self.path}: has no tensor '{name}'; build it again")
        return self.tensors[name].values()

    def write_float32(self, path: Path) -> None:
        """The same keys and tensors in another file, every tensor in float32."""
        with self.path.open("rb") as stream:
            keys = stream.read(self._keys_end)
        with _whole(path) as stream:
            stream.write(keys)
            offset = 0
            for tensor in self.tensors.values():
                name = tensor.name.encode()
                stream.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)))
                stream.write(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
                stream.write(struct.pack("<IQ", 0, offset))
                offset += 4 * math.prod(tensor.shape)
                offset += -offset % ALIGNMENT
            for tensor in self.tensors.values():
                _align(stream)
                stream.write(tensor.values().data)
            _align(stream)
