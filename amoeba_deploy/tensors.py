"""Tensors in safetensors files: checked headers, reading in parts, deterministic writing in parts.

A tensor to be written is a source that gives its bytes part after part, so that tensors of any size pass through a few
megabytes of memory. Every part is written where the header says that it belongs, and the file's space is taken before
the first one: a full disk is met at once. Nothing here needs torch.

A bfloat16 tensor is read as its raw 16-bit words, which is all that slicing needs; ``as_float32`` and ``from_float32``
convert where numbers are wanted. Headers are checked against the file before anything is read, so a truncated or forged
file is refused by name instead of read past its end.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

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
_WRITTEN = NUMPY_OF | {"F8_E4M3": np.uint8}
"""Written as raw bytes too; such a tensor is not read, for its bytes would be taken for whole numbers."""
CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""How a config spells the dtypes of weights, and how a safetensors header does."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    kind = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(kind, str) and kind not in NUMPY_OF:
        raise BadInput(
            f"{file}: tensor '{name}' has the dtype {kind[:20]}, which is not read; convert it to BF16 or F32"
        )
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: of two tensors with one name, readers would take one or the other."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _check_tiling(file: Path, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must follow each other from the header to the file's end, as the format demands."""
    end = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].length)):
        if info.offset != end:
            raise BadInput(f"{file}: tensor '{name}' begins at byte {info.offset} where {end} follows; get it again")
        end += info.length
    if end != size:
        raise BadInput(f"{file}: its tensors end at byte {end}, the file has {size}; get the file again")


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of one safetensors file and its metadata.

    Raises:
        BadInput: the file is missing, truncated, or its header promises what the file does not hold.
    """
    if file.exists() and not file.is_file():
        raise BadInput(f"{file}: is no file; get the folder again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise BadInput(f"{file}: the header should take {length} bytes, the file has {size}; it is damaged")
            header = json.loads(stream.read(length), object_pairs_hook=_once)
        metadata = header.pop("__metadata__", {})
        items = list(header.items())
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{file}: its header is not the JSON object of a safetensors file; get the file again") from None
    infos = {name: _entry(file, name, entry, 8 + length, size) for name, entry in items}
    _check_tiling(file, infos, 8 + length, size)
    return infos, metadata


def as_float32(array: Array, dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Numbers of any float dtype as float32, in ``out`` if given; exact for bfloat16 and float16."""
    if dtype != "BF16":
        if out is None:
            return np.asarray(array, dtype=np.float32)
        out[...] = array
        return out
    found = np.empty(array.shape, np.float32) if out is None else out
    words = found.view(np.uint32)
    words[...] = array
    words <<= 16
    return found


def from_float32(
    array: NDArray[np.float32], dtype: str, out: Array | None = None, scratch: NDArray[np.uint32] | None = None
) -> Array:
    """float32 rounded once, to nearest even, into ``dtype`` (bfloat16 as raw 16-bit words).

    ``out`` takes the result and ``scratch`` what lies between, both contiguous and of the array's shape, if given.
    """
    found = np.empty(array.shape, NUMPY_OF[dtype]) if out is None else out
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            found[...] = array
        if dtype == "F16" and np.isinf(found).any() and np.isfinite(array).all():
            raise BadInput("holds numbers beyond those of float16, 65504; choose bf16 or fp32")
        return found
    numbers = np.ascontiguousarray(array, dtype=np.float32)
    bits = numbers.view(np.uint32)
    words = np.right_shift(bits, 16, out=scratch)
    words &= 1
    words += bits
    words += 0x7FFF
    words >>= 16
    found[...] = words
    flat = numbers.reshape(-1)
    if np.isnan(np.dot(flat, flat)):  # a NaN anywhere, and nothing else, makes a sum of squares one: a single pass
        found[np.isnan(array)] = 0x7FC0
    return found


class OpenFile:
    """A file read at given places, by several threads at once; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("rb", buffering=0)
        self.descriptor = self._stream.fileno()

    def read_into(self, buffer: Array, offset: int) -> None:
        """Fill a contiguous array with the bytes from ``offset`` on; raises BadInput where the file ends before."""
        view, done = buffer.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            count = os.preadv(self.descriptor, [view[done:]], offset + done)
            if count == 0:
                raise BadInput(f"{self.path}: ended at byte {offset + done} while it was read; get the file again")
            done += count


class TensorFolder:
    """All tensors of a model folder, in one safetensors file or in shards with an index, read checked when opened."""

    def __init__(self, folder: Path) -> None:
        """Read and check all headers.

        Raises:
            BadInput: there are no safetensors, a shard is missing or damaged, or the index contradicts the shards.
        """
        self.folder = folder
        self.files = self._shards()
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, np.memmap[Any, Any]] = {}
        self._open: dict[Path, OpenFile] = {}
        for file in self.files:
            infos, _ = read_header(file)
            twice = sorted(infos.keys() & self.infos.keys())
            if twice:
                raise BadInput(f"{file}: tensor '{twice[0]}' stands in another shard too; get the folder again")
            self.infos |= infos

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        single = self.folder / SINGLE
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

    def file(self, info: TensorInfo) -> OpenFile:
        """The open file that a tensor lies in."""
        if info.file not in self._open:
            self._open[info.file] = OpenFile(info.file)
        return self._open[info.file]

    def whole(self, info: TensorInfo) -> Iterable[Part]:
        """A tensor's bytes as they lie there."""
        yield Span(self.file(info), info.offset, info.length)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32 numbers."""
        return as_float32(self.raw(name), self.info(name).dtype)


@dataclass(frozen=True)
class Span:
    """Bytes of an open file that are copied as they lie there."""

    file: OpenFile
    offset: int
    length: int


Part = Union[Array, Span]  # noqa: UP007 - kits import this under Python 3.9
"""Consecutive values of a tensor: an array, which may change once it was written, or bytes of a file."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its dtype and shape, known before, and the function that gives its parts in order."""

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Part]]

    @property
    def length(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(_WRITTEN[self.dtype]).itemsize


def made_source(dtype: str, shape: tuple[int, ...], values: Callable[[], Array]) -> TensorSource:
    """The source of an array that is made as a whole when it is written."""

    def parts() -> Iterator[Part]:
        array = np.ascontiguousarray(values())
        if array.shape != shape:
            raise AssertionError(f"an array {array.shape} was made where {shape} was promised")
        yield array

    return TensorSource(dtype, shape, parts)


def array_source(array: Array, dtype: str) -> TensorSource:
    """The source of an array that is already at hand."""
    return made_source(dtype, array.shape, lambda: array)


def _header(tensors: Mapping[str, TensorSource], metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    """The header with its length in front, and the bytes of all data."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, source in tensors.items():
        end = offset + source.length
        header[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, offset


def _allocate(descriptor: int, size: int) -> None:
    """Take the space of a file, so that a full disk is met before any work; file systems that cannot are left alone."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_array(descriptor: int, array: Array, offset: int) -> int:
    view, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


_COPIED_AT_ONCE = 1 << 20


def _write_span(descriptor: int, span: Span, offset: int) -> int:
    """Copy inside the kernel where the file systems allow it, else through a small buffer."""
    done = 0
    while done < span.length:
        try:
            count = os.copy_file_range(
                span.file.descriptor, descriptor, span.length - done, span.offset + done, offset + done
            )
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                raise
            count = 0
        if count == 0:
            break
        done += count
    while done < span.length:
        buffer = np.empty(min(_COPIED_AT_ONCE, span.length - done), np.uint8)
        span.file.read_into(buffer, span.offset + done)
        done += _write_array(descriptor, buffer, offset + done)
    return done


def _named_parts(name: str, source: TensorSource) -> Iterator[Part]:
    """A source's parts; what is wrong with one is said with the tensor's name."""
    try:
        yield from source.parts()
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def _write_source(descriptor: int, name: str, source: TensorSource, offset: int) -> None:
    done = 0
    for part in _named_parts(name, source):
        if isinstance(part, Span):
            done += _write_span(descriptor, part, offset + done)
        else:
            done += _write_array(descriptor, part, offset + done)
    if done != source.length:
        raise AssertionError(f"{name}: {done} bytes were made where {source} was promised")


@contextmanager
def _created(file: Path, size: int) -> Iterator[int]:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _allocate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _one_multiplier() -> Iterator[None]:
    """Each thread multiplies for itself: a BLAS's own would wait for each other, and change the order of sums."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def write_tensors(
    file: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str] | None = None, threads: int = 1
) -> int:
    """Write one safetensors file; returns its size in bytes.

    The order is the mapping's, the header is padded to a multiple of 64 bytes, and nothing depends on time or
    ``threads``: the same tensors give the same bytes. With several threads so many tensors are made at once.
    """
    header, data = _header(tensors, metadata)
    with _created(file, len(header) + data) as descriptor:
        _write_array(descriptor, np.frombuffer(header, np.uint8), 0)
        offset, places = len(header), []
        for name, source in tensors.items():
            places.append((name, source, offset))
            offset += source.length
        with ThreadPoolExecutor(threads) as pool, _one_multiplier():
            try:
                for done in [pool.submit(_write_source, descriptor, *place) for place in places]:
                    done.result()
            finally:
                pool.shutdown(cancel_futures=True)
    return len(header) + data


def sharded(tensors: Mapping[str, TensorSource], limit: int) -> dict[str, dict[str, TensorSource]]:
    """Tensors by the names of the files they go to, in order, each of at most ``limit`` bytes of data.

    A single tensor that is larger has a file of its own. Names are those of transformers.
    """
    groups: list[dict[str, TensorSource]] = [{}]
    filled = 0
    for name, source in tensors.items():
        if groups[-1] and filled + source.length > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = source
        filled += source.length
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def apart(tensors: Mapping[str, TensorSource]) -> dict[str, dict[str, TensorSource]]:
    """What every subnet of a model has alike in one file, the blocks in another; named as shards."""
    groups: tuple[dict[str, TensorSource], ...] = ({}, {})
    for name, source in tensors.items():
        groups[name.startswith("model.layers.")][name] = source
    return {f"model-{i:05d}-of-00002.safetensors": group for i, group in enumerate(groups, 1)}


def write_model_tensors(
    folder: Path, tensors: Mapping[str, TensorSource], limit: int | None, metadata: Mapping[str, str], threads: int = 1
) -> int:
    """Write a model's tensors as one file or as shards with their index; returns the size of all in bytes.

    ``limit`` is the most data in a file; None stands for one of the blocks and one of the rest.
    """
    files = apart(tensors) if limit is None else sharded(tensors, limit)
    size = sum(write_tensors(folder / file, group, metadata, threads) for file, group in files.items())
    if len(files) > 1:
        total = sum(source.length for source in tensors.values())
        placed = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size
