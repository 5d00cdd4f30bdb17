"""Reads a TensorRT-LLM checkpoint back: which part of which Hugging Face tensor each rank's tensors hold.

It knows nothing of the folder that the checkpoint was written from, nor of the writer: everything follows from
``config.json`` and the rank files. So comparing what it finds with the dense folder, bit by bit, proves that no row,
column, head, block or stage is missing or misplaced. Whether the names and the config mean what they should is for
``reference.py`` to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping, Rank, key_value_heads
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import CONFIG_DTYPES, NUMPY_OF, Array, TensorInfo, as_float32, from_float32, read_header

_COMPARED = 1 << 20
"""Numbers that are compared at once."""


@dataclass(frozen=True)
class Piece:
    """Part of a Hugging Face tensor: where it begins in that, and its values (bfloat16 as raw words)."""

    name: str
    row: int
    column: int
    values: Array

    @property
    def place(self) -> tuple[int, ...]:
        """First row, first column, rows and columns; pieces of equal place are copies of each other."""
        return (self.row, self.column, *self.values.shape)


class RankFiles:
    """An open checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint's folder.

        Raises:
            BadInput: a file is missing or damaged, or a tensor is not of the config's dtype.
        """
        self.folder, self.config = folder, read_json_object(folder / "config.json")
        given = self.config.get("mapping") or {}
        self.mapping = Mapping(int(given.get("tp_size", 1)), int(given.get("pp_size", 1)))
        self.dtype = CONFIG_DTYPES[str(self.config["dtype"])]
        self._infos: list[dict[str, TensorInfo]] = []
        for rank in self.mapping.ranks():
            infos, _ = read_header(folder / rank.file)
            wrong = [name for name, info in infos.items() if info.dtype != self.dtype]
            if wrong:
                raise BadInput(
                    f"{folder / rank.file}: tensor '{wrong[0]}' holds {infos[wrong[0]].dtype}, config.json says "
                    f"{self.dtype}; write the checkpoint again"
                )
            self._infos.append(infos)

    def names(self, rank: Rank) -> set[str]:
        """The names of a rank's tensors."""
        return set(self._infos[rank.number])

    def values(self, rank: Rank, name: str) -> Array:
        """A tensor of a rank as it lies in its file; raises BadInput where it has none of that name."""
        info = self._infos[rank.number].get(name)
        if info is None:
            raise BadInput(
                f"{self.folder / rank.file}: has no tensor '{name}', which its config.json calls for; write it again"
            )
        data = np.memmap(info.file, mode="r")[info.offset : info.offset + info.length]
        return np.frombuffer(data, NUMPY_OF[info.dtype]).reshape(info.shape)

    def layer(self, index: int) -> tuple[int, int, str]:
        """Key/value heads and neurons of a block of the whole model, and the name of its feed-forward."""
        layers = self.config.get("layer_configs")
        if layers is None:
            return int(self.config["num_key_value_heads"]), int(self.config["intermediate_size"]), "mlp"
        attention, ffn = layers[index]["attention"], layers[index]["ffn"]
        kv_heads = int(attention["num_key_value_heads"]) if attention["impl"] == "attention" else 0
        return kv_heads, int(ffn["intermediate_size"]) if ffn["impl"] == "mlp" else 0, "ffn"

    def pieces(self) -> Iterator[Piece]:
        """Every part of every Hugging Face tensor, copies on several ranks too.

        Raises:
            BadInput: a rank lacks a tensor, or has one that its config.json does not call for.
        """
        for rank in self.mapping.ranks():
            share = _RankReader(self, rank)
            yield from share.pieces()
            left = sorted(self.names(rank) - share.read)
            if left:
                raise BadInput(f"{self.folder / rank.file}: holds '{left[0]}', which its config.json does not call for")

    def assembled(self) -> dict[str, Array]:
        """All Hugging Face tensors, whole; raises BadInput where copies differ or a part is missing."""
        found: dict[str, dict[tuple[int, ...], Array]] = {}
        for piece in self.pieces():
            other = found.setdefault(piece.name, {}).setdefault(piece.place, piece.values)
            if not np.array_equal(other, piece.values):
                raise BadInput(f"{self.folder}: the ranks' copies of '{piece.name}' differ; write the checkpoint again")
        return {name: self._joined(name, parts) for name, parts in found.items()}

    def _joined(self, name: str, parts: dict[tuple[int, ...], Array]) -> Array:
        flat = next(iter(parts.values())).ndim == 1
        rows = max(place[0] + values.shape[0] for place, values in parts.items())
        columns = 1 if flat else max(place[1] + values.shape[1] for place, values in parts.items())
        if sum(values.size for values in parts.values()) != rows * columns:
            raise BadInput(f"{self.folder}: the ranks do not hold all of '{name}'; write the checkpoint again")
        whole = np.zeros((rows, columns), NUMPY_OF[self.dtype])
        for (row, column, *_), values in parts.items():
            table = values[:, None] if flat else values
            whole[row : row + len(table), column : column + table.shape[1]] = table
        return whole[:, 0] if flat else whole


class _RankReader:
    """The pieces of one rank, and the names of the tensors that were read for them."""

    def __init__(self, files: RankFiles, rank: Rank) -> None:
        self.files, self.rank, self.read = files, rank, set[str]()
        self.tp, self.head_size = files.mapping.tp, int(files.config["head_size"])

    def pieces(self) -> Iterator[Piece]:
        mapping, config = self.files.mapping, self.files.config
        if self.rank.stage == 0:
            yield Piece("model.embed_tokens.weight", 0, 0, self._take("transformer.vocab_embedding.weight"))
        for local, index in enumerate(mapping.layers(int(config["num_hidden_layers"]), self.rank.stage)):
            yield from self._block(f"transformer.layers.{local}.", f"model.layers.{index}.", index)
        if self.rank.stage == mapping.pp - 1:
            yield Piece("model.norm.weight", 0, 0, self._take("transformer.ln_f.weight"))
            yield from self._head(int(config["vocab_size"]))

    def _take(self, name: str) -> Array:
        self.read.add(name)
        return self.files.values(self.rank, name)

    def _head(self, vocabulary: int) -> Iterator[Piece]:
        values = self._take("lm_head.weight")
        begin = self.rank.place * -(-vocabulary // self.tp)
        real = max(min(len(values), vocabulary - begin), 0)
        if values[real:].any():
            raise BadInput(f"{self.files.folder / self.rank.file}: rows of lm_head beyond the vocabulary are not zero")
        if real:
            yield Piece("lm_head.weight", begin, 0, values[:real])

    def _block(self, ours: str, theirs: str, index: int) -> Iterator[Piece]:
        kv_heads, neurons, called = self.files.layer(index)
        names = self.files.names(self.rank)
        if kv_heads:
            yield Piece(theirs + "input_layernorm.weight", 0, 0, self._take(ours + "input_layernorm.weight"))
            yield from self._attention(ours + "attention.", theirs + "self_attn.", kv_heads, names)
        if neurons:
            yield Piece(theirs + "post_attention_layernorm.weight", 0, 0, self._take(ours + "post_layernorm.weight"))
            yield from self._feed_forward(f"{ours}{called}.", theirs + "mlp.", neurons, names)

    def _attention(self, ours: str, theirs: str, kv_heads: int, names: set[str]) -> Iterator[Piece]:
        heads = int(self.files.config["num_attention_heads"]) // self.tp
        keys = key_value_heads(kv_heads, self.tp, self.rank.place)
        width = heads * self.head_size
        first = self.rank.place * width
        for kind in ("weight", "bias"):
            if kind == "bias" and ours + "qkv.bias" not in names:
                continue
            values, done = self._take(f"{ours}qkv.{kind}"), 0
            other = len(keys) * self.head_size
            for part, begin, rows in (
                ("q", first, width),
                ("k", keys[0] * self.head_size, other),
                ("v", keys[0] * self.head_size, other),
            ):
                yield Piece(f"{theirs}{part}_proj.{kind}", begin, 0, values[done : done + rows])
                done += rows
            if done != len(values):
                raise BadInput(f"{self.files.folder}: {ours}qkv.{kind} has {len(values)} rows, its config says {done}")
        for part in ("q", "k"):
            if f"{ours}{part}_layernorm.weight" in names:
                yield Piece(f"{theirs}{part}_norm.weight", 0, 0, self._take(f"{ours}{part}_layernorm.weight"))
        yield Piece(theirs + "o_proj.weight", 0, first, self._take(ours + "dense.weight"))
        if ours + "dense.bias" in names:
            yield Piece(theirs + "o_proj.bias", 0, 0, self._take(ours + "dense.bias"))

    def _feed_forward(self, ours: str, theirs: str, neurons: int, names: set[str]) -> Iterator[Piece]:
        first = self.rank.place * (neurons // self.tp)
        for kind in ("weight", "bias"):
            if f"{ours}fc.{kind}" not in names and kind == "bias":
                continue
            yield Piece(f"{theirs}gate_proj.{kind}", first, 0, self._take(f"{ours}fc.{kind}"))
            yield Piece(f"{theirs}up_proj.{kind}", first, 0, self._take(f"{ours}gate.{kind}"))
            down = self._take(f"{ours}proj.{kind}")
            yield Piece(f"{theirs}down_proj.{kind}", 0, first if kind == "weight" else 0, down)


def require_same(model: ModelFolder, folder: Path) -> int:
    """Compare a checkpoint with the dense folder that it was written from; returns how many tensors were compared.

    Some rows are read at a time, so it takes little memory and about the time of reading both.

    Raises:
        VerificationFailed: a tensor is missing, misplaced, not whole, or differs in a bit.
    """
    files = RankFiles(folder)
    seen: dict[str, dict[tuple[int, ...], int]] = {}
    try:
        for piece in files.pieces():
            seen.setdefault(piece.name, {})[piece.place] = piece.values.size
            _require_equal(model, piece, files.dtype, folder)
    except BadInput as error:
        raise VerificationFailed(str(error)) from None
    tied = {"lm_head.weight"} if model.architecture.tied else set()
    missing = sorted((set(model.tensors.infos) | tied) - set(seen))
    if missing:
        raise VerificationFailed(f"{folder}: the ranks hold nothing of '{missing[0]}'; the checkpoint is wrong")
    for name, parts in seen.items():
        whole = int(np.prod(model.tensors.info(_dense_name(model, name)).shape))
        if sum(parts.values()) != whole:
            raise VerificationFailed(f"{folder}: the ranks do not hold all of '{name}'; the checkpoint is wrong")
    return len(seen)


def _dense_name(model: ModelFolder, name: str) -> str:
    return "model.embed_tokens.weight" if name == "lm_head.weight" and model.architecture.tied else name


def _require_equal(model: ModelFolder, piece: Piece, dtype: str, folder: Path) -> None:
    name = _dense_name(model, piece.name)
    whole: Any = model.tensors.raw(name)
    own = model.tensors.info(name).dtype
    at_once = max(_COMPARED // max(piece.values.shape[-1], 1), 1) if piece.values.ndim > 1 else _COMPARED
    for begin in range(0, len(piece.values), at_once):
        found = piece.values[begin : begin + at_once]
        rows = slice(piece.row + begin, piece.row + begin + len(found))
        wanted = whole[rows] if found.ndim == 1 else whole[rows, piece.column : piece.column + found.shape[1]]
        if own != dtype:
            wanted = from_float32(as_float32(np.ascontiguousarray(wanted), own), dtype)
        if wanted.shape != found.shape or not np.array_equal(wanted.view(np.uint16), found.view(np.uint16)):
            raise VerificationFailed(f"{folder}: '{name}' differs from the dense subnet's; the checkpoint is wrong")
