"""Attention of a block in the graph: ONNX Runtime's fused operator, or the same function in plain operators.

Both take any ``attention_mask`` [batch, total] of ones and zeros, and differ in where they keep what they have seen:

- The fused operator (``packed``) writes a row's new keys behind its own real ones, so that fillings on the right are
  overwritten by what comes next. The mask counts: a row of c ones has c positions in the cache. Zeros on the left
  are positions like others, which a bias shuts; ONNX Runtime's CUDA kernel takes no bias, so there is none on CUDA.
- The written-out form keeps a column for every column of the mask; a zero shuts its column for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.onnx.nodes import MICROSOFT, TYPES, Graph
from amoeba_deploy.rotary import inverse_frequencies

FUSED_HEAD_MULTIPLE = 16
_SHUT = {"F32": float(np.finfo(np.float32).min), "F16": -1e4, "BF16": -1e18}
"""What a shut score gets added: its share is zero then, and no sum overflows to infinity, whose shares are no numbers.
"""


@dataclass(frozen=True)
class Heads:
    """Query, key and value of a block (one product where key and value are empty), and its numbers of heads."""

    query: str
    key: str
    value: str
    heads: int
    kv_heads: int


def is_fused(sizes: Architecture, dtype: str, on_cuda: bool, windowed: bool) -> bool:
    """Whether the fused operator can be had: heads of a multiple of 16, on CUDA also 16-bit numbers and no window.

    With other heads the operator is built, and fails when it runs. Its CUDA kernels know no float32, and which of them
    keep to a window was not tried.
    """
    return sizes.head_dim % FUSED_HEAD_MULTIPLE == 0 and not (on_cuda and (dtype == "F32" or windowed))


class Attention:
    """Emits the attention of every block into one graph, in numbers of ``dtype`` (as safetensors names it)."""

    def __init__(
        self, graph: Graph, sizes: Architecture, dtype: str, context: int, *, fused: bool, biased: bool, windowed: bool
    ) -> None:
        self.graph, self.sizes, self.dtype, self.context = graph, sizes, dtype, context
        self.fused, self._biased, self._windowed = fused, biased, windowed
        self._scale = sizes.scales.attention or 1 / math.sqrt(sizes.head_dim)

    def shared(self) -> None:
        """What all blocks share: rotary tables, and lengths (fused) or positions and masks (written out)."""
        self._rotary_tables()
        graph = self.graph
        shape = graph.node("Shape", ["attention_mask"], "mask.shape")
        graph.node("Gather", [shape, graph.integer(1)], "length.total")
        graph.node("Shape", ["input_ids"], "length.new", start=1, end=2)
        if self.fused:
            self._lengths()
        else:
            self._masks()

    def _rotary_tables(self) -> None:
        # One row more than the context: where rows of a batch differ in length, a full one is filled up by one.
        graph, sizes = self.graph, self.sizes
        frequencies, factor = inverse_frequencies(sizes.rope, sizes.head_dim, sizes.context, np.float32)
        graph.constant("rotary.frequencies", frequencies[None])
        graph.constant("rotary.positions", np.arange(self.context + 1, dtype=np.float32)[:, None])
        angles = graph.node("Mul", ["rotary.positions", "rotary.frequencies"], "rotary.angles")
        for kind in ("Cos", "Sin"):
            name = f"rotary.{kind.lower()}"
            exact = self.dtype == "F32"
            plain = graph.node(kind, [angles], name if factor == 1 and exact else f"{name}.plain")
            if factor != 1:
                plain = graph.node("Mul", [plain, graph.number(factor, "F32")], name if exact else f"{name}.scaled")
            if not exact:
                graph.node("Cast", [plain], name, to=TYPES[self.dtype])

    def _lengths(self) -> None:
        """Positions that each row has in the cache, less one, and, on the CPU, a bias that shuts zeros on the left."""
        graph = self.graph
        graph.node("Cast", ["length.total"], "length.total32", to=TensorProto.INT32)
        counts = graph.node("ReduceSum", ["attention_mask", graph.integers(1)], "length.counts", keepdims=0)
        if self._biased:
            ones = graph.node("Cast", ["attention_mask"], "mask.int32", to=TensorProto.INT32)
            first = graph.node("ArgMax", [ones], "mask.first", axis=1, keepdims=1)
            flat = graph.node("Squeeze", [first, graph.integers(1)], "mask.first.flat")
            counts = graph.node("Add", [counts, flat], "length.occupied")
            keys = graph.node("Range", [graph.integer(0), "length.total", graph.integer(1)], "positions.keys")
            seen = graph.node("GreaterOrEqual", [keys, first], "mask.seen")
            bias = self._additive(seen, "mask.left")
            row = graph.node("Unsqueeze", [bias, graph.integers(1, 2)], "mask.row")
            target = graph.node("Concat", [graph.integers(1, 1), "length.new", graph.integers(1)], "mask.rows", axis=0)
            graph.node("Expand", [row, target], "mask.bias")
        last = graph.node("Sub", [counts, graph.integers(1)], "length.last")
        graph.node("Cast", [last], "length.last32", to=TensorProto.INT32)

    def _additive(self, seen: str, name: str) -> str:
        graph = self.graph
        return graph.node(
            "Where", [seen, graph.number(0.0, self.dtype), graph.number(_SHUT[self.dtype], self.dtype)], name
        )

    def _masks(self) -> None:
        """Positions of new ids, and which keys each of them attends to: real ones that do not come after it."""
        graph = self.graph
        running = graph.node("CumSum", ["attention_mask", graph.integer(1)], "positions.running")
        less = graph.node("Sub", [running, graph.integer(1)], "positions.less")
        positions = graph.node("Max", [less, graph.integer(0)], "positions.all")
        total = graph.node("Unsqueeze", ["length.total", graph.integers(0)], "length.total1")
        past = graph.node("Sub", [total, "length.new"], "length.past")
        own = graph.node("Slice", [positions, past, total, graph.integers(1)], "positions.rotary")
        keys = graph.node("Range", [graph.integer(0), "length.total", graph.integer(1)], "positions.columns")
        queries = graph.node("Slice", [keys, past, total, graph.integers(0)], "positions.queries")
        column = graph.node("Unsqueeze", [queries, graph.integers(1)], "positions.column")
        causal = graph.node("LessOrEqual", [keys, column], "mask.causal")
        real = graph.node("Cast", ["attention_mask"], "mask.bool", to=TensorProto.BOOL)
        real = graph.node("Unsqueeze", [real, graph.integers(1)], "mask.real")
        seen = graph.node("And", [real, causal], "mask.seen")
        graph.node("Unsqueeze", [self._additive(seen, "mask.full.3d"), graph.integers(1, 2)], "mask.full")
        if self._windowed:
            window = graph.constant("i64_window", np.array(self.sizes.sliding_window, np.int64))
            first = graph.node("Sub", [own, window], "positions.before")
            first = graph.node("Unsqueeze", [first, graph.integers(2)], "positions.before.column")
            each = graph.node("Unsqueeze", [positions, graph.integers(1)], "positions.row")
            near = graph.node("Greater", [each, first], "mask.near")
            seen = graph.node("And", [seen, near], "mask.seen.window")
            graph.node("Unsqueeze", [self._additive(seen, "mask.window.3d"), graph.integers(1, 2)], "mask.window")

    def block(self, layer: int, qkv: Heads, window: int | None, here: str) -> str:
        """Attention of a block over layer ``layer`` of the cache; returns the mixed values [batch, new, heads*size]."""
        return self._fused(layer, qkv, window, here) if self.fused else self._written(layer, qkv, window, here)

    def _fused(self, layer: int, qkv: Heads, window: int | None, here: str) -> str:
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        inputs = [qkv.query, qkv.key, qkv.value, *past, "length.last32", "length.total32", "rotary.cos", "rotary.sin"]
        inputs += ["", "mask.bias"] if self._biased else []
        outputs = [f"{here}.mixed", f"present.{layer}.key", f"present.{layer}.value"]
        self.graph.named(
            "GroupQueryAttention",
            inputs,
            outputs,
            here,
            domain=MICROSOFT,
            num_heads=qkv.heads,
            kv_num_heads=qkv.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=window or -1,
            scale=self._scale,
        )
        return outputs[0]

    def _heads_first(self, value: str, heads: int, result: str) -> str:
        split = self.graph.node(
            "Reshape", [value, self.graph.integers(0, 0, heads, self.sizes.head_dim)], f"{result}.4d"
        )
        return self.graph.node("Transpose", [split], result, perm=[0, 2, 1, 3])

    def _rotated(self, value: str, result: str) -> str:
        inputs = [value, "positions.rotary", "rotary.cos", "rotary.sin"]
        return self.graph.node("RotaryEmbedding", inputs, result, domain=MICROSOFT, interleaved=0)

    def _written(self, layer: int, qkv: Heads, window: int | None, here: str) -> str:
        """Scaled dot-product attention in plain operators; the query heads of a group share its keys by reshaping."""
        graph, size, heads, kv_heads = self.graph, self.sizes.head_dim, qkv.heads, qkv.kv_heads
        query = self._rotated(self._heads_first(qkv.query, heads, f"{here}.q"), f"{here}.q.rotated")
        key = self._rotated(self._heads_first(qkv.key, kv_heads, f"{here}.k"), f"{here}.k.rotated")
        val = self._heads_first(qkv.value, kv_heads, f"{here}.v")
        past = f"past_key_values.{layer}"
        keys = graph.node("Concat", [f"{past}.key", key], f"present.{layer}.key", axis=2)
        values = graph.node("Concat", [f"{past}.value", val], f"present.{layer}.value", axis=2)
        grouped = graph.node("Reshape", [query, graph.integers(0, kv_heads, -1, size)], f"{here}.q.grouped")
        scores = graph.node(
            "FusedMatMul", [grouped, keys], f"{here}.scores", domain=MICROSOFT, transB=1, alpha=self._scale
        )
        apart = graph.node("Reshape", [scores, self._apart(here, kv_heads, heads // kv_heads)], f"{here}.scores.heads")
        mask = "mask.full" if window is None else "mask.window"
        masked = graph.node("Add", [apart, mask], f"{here}.scores.masked")
        shares = graph.node("Softmax", [masked], f"{here}.shares", axis=-1)
        together = graph.node(
            "Reshape", [shares, graph.node("Shape", [scores], f"{here}.scores.shape")], f"{here}.shares.grouped"
        )
        mixed = graph.node("MatMul", [together, values], f"{here}.mixed.grouped")
        split = graph.node("Reshape", [mixed, graph.integers(0, heads, -1, size)], f"{here}.mixed.heads")
        back = graph.node("Transpose", [split], f"{here}.mixed.4d", perm=[0, 2, 1, 3])
        return graph.node("Reshape", [back, graph.integers(0, 0, heads * size)], f"{here}.mixed")

    def _apart(self, here: str, kv_heads: int, group: int) -> str:
        """[batch, kv_heads, group, new, total] as a vector; batch is copied, new and total come from the inputs."""
        graph = self.graph
        fixed = graph.integers(0, kv_heads, group)
        return graph.node("Concat", [fixed, "length.new", "length.total1"], f"{here}.shape", axis=0)
