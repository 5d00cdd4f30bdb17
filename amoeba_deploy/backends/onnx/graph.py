"""Emits the ONNX graph of a dense subnet: no tracing, and no weight is copied.

Initialisers are references into safetensors files (file, byte offset, length), so the graph takes some kilobytes.
Matrices keep their [out, in] layout; queries, keys and values lie next to each other in an extracted folder and are
read as one matrix, as are gate and up. Every block may have its own width: sizes are read from the tensors.

Inputs and outputs have the names of onnxruntime-genai: ``input_ids``, ``attention_mask`` (ones, past and new),
``past_key_values.{i}.key/value`` [batch, kv_heads, past, head_dim] -> ``logits``, ``present.{i}.key/value``.

Attention is the fused GroupQueryAttention of ONNX Runtime, which wants head sizes that are multiples of 16; other
head sizes get the same function written out in plain operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from amoeba_deploy.architecture import Architecture, Rope
from amoeba_deploy.block_quantisation import BLOCK
from amoeba_deploy.errors import BadInput
from amoeba_deploy.tensors import TensorInfo

MICROSOFT = "com.microsoft"
OPSET = 21
IR_VERSION = 10
FUSED_HEAD_MULTIPLE = 16
ROPE_KINDS = ("default", "linear", "llama3")
_TYPES = {"F32": TensorProto.FLOAT, "U8": TensorProto.UINT8}


def inverse_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Rotary frequencies [head_dim/2], scaled as the config says.

    theta^(-2i/d); ``linear`` divides all by the factor; ``llama3`` divides the low ones and blends between
    (transformers, modeling_rope_utils.py, _compute_llama3_parameters).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(rope.setting("factor"))
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind != "default":
        raise BadInput(f"rotary scaling '{rope.kind}' is not emitted; known are {', '.join(ROPE_KINDS)}")
    return np.asarray(frequencies, np.float32)


def _llama3(rope: Rope, frequencies: NDArray[np.float32]) -> NDArray[np.float32]:
    factor, original = float(rope.setting("factor")), float(rope.setting("original_max_position_embeddings"))
    low, high = float(rope.setting("low_freq_factor")), float(rope.setting("high_freq_factor"))
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies, np.float32)


@dataclass
class Graph:
    """Nodes and initialisers under construction. Names of values are those of the tensors and blocks they belong to."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initialisers: dict[str, TensorProto] = field(default_factory=dict)

    def node(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Add an operator; returns the name of its first output (``name``; further ones are ``name.1`` ...)."""
        domain = attributes.pop("domain", "")
        names = [name if index == 0 else f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A small constant inside the graph file."""
        if name not in self.initialisers:
            self.initialisers[name] = numpy_helper.from_array(values, name)
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 vector, named by its values."""
        return self.constant("i64_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def external(self, name: str, info: TensorInfo, shape: Sequence[int]) -> str:
        """An initialiser that lies in a file beside the graph."""
        if name not in self.initialisers:
            tensor = TensorProto(name=name, data_type=_TYPES[info.dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", info.file.name), ("offset", info.offset), ("length", info.length)):
                tensor.external_data.add(key=key, value=str(value))
            self.initialisers[name] = tensor
        return name


def joined(infos: Sequence[TensorInfo]) -> TensorInfo | None:
    """Several tensors as one, stacked along their first axis, where they lie next to each other in one file."""
    for left, right in pairwise(infos):
        if left.file != right.file or left.dtype != right.dtype or left.offset + left.length != right.offset:
            return None
    first = infos[0]
    shape = (sum(info.shape[0] for info in infos), *first.shape[1:])
    return TensorInfo(first.file, first.dtype, shape, first.offset, sum(info.length for info in infos))


class Emitter:
    """Emits one model. ``bits`` is None for float32 weights, else the width of block-quantised ones."""

    def __init__(
        self, sizes: Architecture, tensors: Mapping[str, TensorInfo], bits: int | None, context: int, accuracy: int
    ) -> None:
        self.sizes, self.tensors, self.bits, self.context = sizes, tensors, bits, context
        self.accuracy = accuracy
        self.graph = Graph()
        self.fused = sizes.head_dim % FUSED_HEAD_MULTIPLE == 0
        self.attention_scale = sizes.scales.attention or 1 / math.sqrt(sizes.head_dim)
        self.kv_heads: list[int] = []

    def vector(self, name: str) -> str:
        """A norm weight or a bias."""
        info = self.tensors[name]
        return self.graph.external(name, info, info.shape)

    def linear(self, names: Sequence[str], value: str, result: str, columns: int) -> tuple[list[str], list[int]]:
        """Products with the matrices ``names`` [out, columns], biases added; and the rows of each matrix.

        Matrices that lie next to each other are multiplied as one, and there is a single result to split.
        """
        rows = [self.tensors[f"{name}.weight{self._packed}"].shape[0] for name in names]
        if not self._adjacent(names) and len(names) > 1:
            parts = [self.linear([n], value, f"{result}.{i}", columns)[0][0] for i, n in enumerate(names)]
            return parts, rows
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self.tensors]
        weights = [f"{name}.weight" for name in names]
        product = self._product(weights, value, f"{result}.product" if biases else result, sum(rows), columns)
        if biases:
            product = self.graph.node("Add", [product, self._stacked(biases)], result)
        return [product], rows

    def _adjacent(self, names: Sequence[str]) -> bool:
        kinds = [".weight.packed", ".weight.scales"] if self.bits else [".weight"]
        kinds += [".bias"] if f"{names[0]}.bias" in self.tensors else []
        return all(joined([self.tensors[name + kind] for name in names]) is not None for kind in kinds)

    @property
    def _packed(self) -> str:
        return ".packed" if self.bits else ""

    def _stacked(self, names: Sequence[str], shape: Sequence[int] | None = None) -> str:
        info = joined([self.tensors[name] for name in names])
        assert info is not None, f"{names} do not lie next to each other"
        return self.graph.external("+".join(names), info, shape or info.shape)

    def _product(self, names: Sequence[str], value: str, result: str, rows: int, columns: int) -> str:
        if self.bits is None:
            inputs = [value, self._stacked(names)]
            return self.graph.node("FusedMatMul", inputs, result, domain=MICROSOFT, transB=1)
        packed = self._stacked([f"{name}.packed" for name in names])
        scales = self._stacked([f"{name}.scales" for name in names])
        return self.graph.node(
            "MatMulNBits",
            [value, packed, scales],
            result,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=self.bits,
            block_size=BLOCK,
            accuracy_level=self.accuracy,
        )

    def split(self, products: Sequence[str], rows: Sequence[int], result: str) -> list[str]:
        """The product with each matrix: as they are, or cut from the last axis of a single one."""
        if len(products) > 1:
            return list(products)
        self.graph.node("Split", [products[0], self.graph.integers(*rows)], result, outputs=len(rows), axis=-1)
        return [result if index == 0 else f"{result}.{index}" for index in range(len(rows))]

    def embedding(self) -> str:
        """Token ids to hidden states."""
        name = "model.embed_tokens.weight"
        if self.bits is None:
            return self.graph.node("Gather", [self.vector(name), "input_ids"], "embedded")
        packed, scales = self.tensors[f"{name}.packed"], f"{name}.scales"
        flat = self.graph.external(f"{name}.rows", packed, (packed.shape[0], math.prod(packed.shape[1:])))
        return self.graph.node(
            "GatherBlockQuantized",
            [flat, "input_ids", self.vector(scales)],
            "embedded",
            domain=MICROSOFT,
            bits=self.bits,
            block_size=BLOCK,
            quantize_axis=1,
            gather_axis=0,
        )

    def scaled(self, value: str, factor: float, result: str) -> str:
        """A value times a constant; the value itself where that is one."""
        if factor == 1:
            return value
        constant = self.graph.constant(f"f32_{factor!r}", np.array(factor, np.float32))
        return self.graph.node("Mul", [value, constant], result)

    def norm(self, value: str, weight: str, result: str) -> str:
        """RMS norm over the last axis."""
        return self.graph.node(
            "SimplifiedLayerNormalization",
            [value, self.vector(weight)],
            result,
            axis=-1,
            epsilon=self.sizes.norm_epsilon,
            stash_type=1,
        )

    def add_norm(self, skip: str, value: str, weight: str, result: str) -> tuple[str, str]:
        """RMS norm of a sum, and the sum itself."""
        outputs = [result, "", "", f"{result}.sum"]
        self.graph.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [skip, value, self.vector(weight)],
                outputs,
                name=result,
                domain=MICROSOFT,
                epsilon=self.sizes.norm_epsilon,
            )
        )
        return result, outputs[3]

    def head_norm(self, value: str, heads: int, weight: str, result: str) -> str:
        """RMS norm of every head apart (Qwen3's query and key norms)."""
        size = self.sizes.head_dim
        split = self.graph.node("Reshape", [value, self.graph.integers(0, 0, heads, size)], f"{result}.heads")
        normed = self.norm(split, weight, f"{result}.normed")
        return self.graph.node("Reshape", [normed, self.graph.integers(0, 0, heads * size)], result)

    def positions(self) -> None:
        """What all blocks share: rotary tables and lengths (fused), or positions and the causal mask (written out)."""
        graph = self.graph
        frequencies = inverse_frequencies(self.sizes.rope, self.sizes.head_dim)
        graph.constant("rotary.frequencies", frequencies[None])
        graph.constant("rotary.positions", np.arange(self.context, dtype=np.float32)[:, None])
        angles = graph.node("Mul", ["rotary.positions", "rotary.frequencies"], "rotary.angles")
        graph.node("Cos", [angles], "rotary.cos")
        graph.node("Sin", [angles], "rotary.sin")
        shape = graph.node("Shape", ["attention_mask"], "mask.shape")
        total = graph.node("Gather", [shape, graph.constant("i64_one", np.array(1, np.int64))], "length.total")
        if self.fused:
            graph.node("Cast", [total], "length.total32", to=TensorProto.INT32)
            counts = graph.node("ReduceSum", ["attention_mask", graph.integers(1)], "length.counts", keepdims=0)
            last = graph.node("Sub", [counts, graph.integers(1)], "length.last")
            graph.node("Cast", [last], "length.last32", to=TensorProto.INT32)
            return
        zero = graph.constant("i64_zero", np.array(0, np.int64))
        one = graph.constant("i64_one", np.array(1, np.int64))
        keys = graph.node("Range", [zero, total, one], "positions.keys")
        new = graph.node("Shape", ["input_ids"], "length.new", start=1, end=2)
        count = graph.node("Squeeze", [new], "length.new0")
        past = graph.node("Sub", [total, count], "length.past")
        queries = graph.node("Range", [past, total, one], "positions.queries")
        row = graph.node("Unsqueeze", [queries, graph.integers(0)], "positions.row")
        graph.node("Expand", [row, graph.node("Shape", ["input_ids"], "ids.shape")], "positions.rotary")
        column = graph.node("Unsqueeze", [queries, graph.integers(1)], "positions.column")
        seen = graph.node("LessOrEqual", [keys, column], "mask.seen")
        open_, shut = np.array(0, np.float32), np.array(np.finfo(np.float32).min, np.float32)
        graph.node(
            "Where", [seen, graph.constant("f32_zero", open_), graph.constant("f32_lowest", shut)], "mask.causal"
        )

    def has(self, matrix: str) -> bool:
        """Whether the model has a matrix: blocks may lack attention or feed-forward."""
        return f"{matrix}.weight{self._packed}" in self.tensors

    def attention(self, index: int, value: str) -> str:
        """Attention of one block, from its normed input to the output of o_proj."""
        sizes, prefix, here = self.sizes, f"model.layers.{index}.self_attn", f"block.{index}.attention"
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        products, rows = self.linear(names, value, f"{here}.qkv", sizes.hidden)
        heads, kv_heads = rows[0] // sizes.head_dim, rows[1] // sizes.head_dim
        layer = len(self.kv_heads)
        self.kv_heads.append(kv_heads)
        if len(products) == 1 and self.fused and not sizes.qk_norm:
            query, key, val = products[0], "", ""
        else:
            query, key, val = self.split(products, rows, f"{here}.split")
        if sizes.qk_norm:
            query = self.head_norm(query, heads, f"{prefix}.q_norm.weight", f"{here}.q_norm")
            key = self.head_norm(key, kv_heads, f"{prefix}.k_norm.weight", f"{here}.k_norm")
        attend = self._fused_attention if self.fused else self._written_attention
        mixed = attend(layer, (query, key, val), heads, kv_heads, here)
        return self.linear([f"{prefix}.o_proj"], mixed, f"{here}.output", heads * sizes.head_dim)[0][0]

    def _fused_attention(self, layer: int, qkv: tuple[str, str, str], heads: int, kv_heads: int, here: str) -> str:
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        inputs = [*qkv, *past, "length.last32", "length.total32", "rotary.cos", "rotary.sin"]
        outputs = [f"{here}.mixed", f"present.{layer}.key", f"present.{layer}.value"]
        self.graph.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                outputs,
                name=here,
                domain=MICROSOFT,
                num_heads=heads,
                kv_num_heads=kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
                local_window_size=-1,
                scale=self.attention_scale,
            )
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

    def _written_attention(self, layer: int, qkv: tuple[str, str, str], heads: int, kv_heads: int, here: str) -> str:
        """Scaled dot-product attention in plain operators; the query heads of a group share its keys by reshaping."""
        graph, size, group = self.graph, self.sizes.head_dim, heads // kv_heads
        query = self._rotated(self._heads_first(qkv[0], heads, f"{here}.q"), f"{here}.q.rotated")
        key = self._rotated(self._heads_first(qkv[1], kv_heads, f"{here}.k"), f"{here}.k.rotated")
        val = self._heads_first(qkv[2], kv_heads, f"{here}.v")
        past = f"past_key_values.{layer}"
        keys = graph.node("Concat", [f"{past}.key", key], f"present.{layer}.key", axis=2)
        values = graph.node("Concat", [f"{past}.value", val], f"present.{layer}.value", axis=2)
        grouped = graph.node("Reshape", [query, graph.integers(0, kv_heads, -1, size)], f"{here}.q.grouped")
        scores = graph.node(
            "FusedMatMul", [grouped, keys], f"{here}.scores", domain=MICROSOFT, transB=1, alpha=self.attention_scale
        )
        target = self._dynamic_shape(here, kv_heads, group)
        apart = graph.node("Reshape", [scores, target], f"{here}.scores.heads")
        masked = graph.node("Add", [apart, "mask.causal"], f"{here}.scores.masked")
        shares = graph.node("Softmax", [masked], f"{here}.shares", axis=-1)
        together = graph.node(
            "Reshape", [shares, graph.node("Shape", [scores], f"{here}.scores.shape")], f"{here}.shares.grouped"
        )
        mixed = graph.node("MatMul", [together, values], f"{here}.mixed.grouped")
        split = graph.node("Reshape", [mixed, graph.integers(0, heads, -1, size)], f"{here}.mixed.heads")
        back = graph.node("Transpose", [split], f"{here}.mixed.4d", perm=[0, 2, 1, 3])
        return graph.node("Reshape", [back, graph.integers(0, 0, heads * size)], f"{here}.mixed")

    def _dynamic_shape(self, here: str, kv_heads: int, group: int) -> str:
        """[batch, kv_heads, group, new, total] as a vector; batch is copied, new and total come from the inputs."""
        graph = self.graph
        total = graph.node("Unsqueeze", ["length.total", graph.integers(0)], f"{here}.total")
        return graph.node("Concat", [graph.integers(0, kv_heads, group), "length.new", total], f"{here}.shape", axis=0)

    def feed_forward(self, index: int, value: str) -> str:
        """The gated feed-forward of one block: down(silu(gate x) * up x)."""
        graph, prefix, here = self.graph, f"model.layers.{index}.mlp", f"block.{index}.mlp"
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        products, rows = self.linear(names, value, f"{here}.gate_up", self.sizes.hidden)
        gate, up = self.split(products, rows, f"{here}.gate")
        share = graph.node("Sigmoid", [gate], f"{here}.sigmoid")
        active = graph.node("Mul", [gate, share], f"{here}.silu")
        gated = graph.node("Mul", [active, up], f"{here}.gated")
        return self.linear([f"{prefix}.down_proj"], gated, f"{here}.output", rows[0])[0][0]

    def entered(self, state: str, added: str, weight: str, result: str) -> tuple[str, str]:
        """The norm of a state to which ``added`` (if anything) is still to be added, and the state itself."""
        if not added:
            return self.norm(state, weight, result), state
        return self.add_norm(state, added, weight, result)

    def sublayer(self, state: str, added: str, index: int, kind: str) -> tuple[str, str]:
        """The state in front of a sublayer that is there, and what it adds; its bias is all that is left of others."""
        block, here, factor = f"model.layers.{index}", f"block.{index}.{kind}", self.sizes.scales.residual
        front, last, entrance = "input_layernorm", "self_attn.o_proj", f"block.{index}.input"
        if kind == "mlp":
            front, last, entrance = "post_attention_layernorm", "mlp.down_proj", f"block.{index}.middle"
        if self.has(f"{block}.{last}"):
            normed, state = self.entered(state, added, f"{block}.{front}.weight", entrance)
            output = self.attention(index, normed) if kind == "attention" else self.feed_forward(index, normed)
            return state, self.scaled(output, factor, f"{here}.scaled")
        if f"{block}.{last}.bias" not in self.tensors:
            return state, added
        if added:
            state = self.graph.node("Add", [state, added], f"{here}.state")
        constant = self.scaled(self.vector(f"{block}.{last}.bias"), factor, f"{here}.scaled")
        return self.graph.node("Add", [state, constant], f"{here}.constant"), ""

    def model(self) -> onnx.ModelProto:
        """The whole graph."""
        sizes = self.sizes
        self.positions()
        scales = sizes.scales
        state, added = self.scaled(self.embedding(), scales.embedding, "embedded.scaled"), ""
        for index in range(sizes.depth):
            state, added = self.sublayer(state, added, index, "attention")
            state, added = self.sublayer(state, added, index, "mlp")
        normed, _ = self.entered(state, added, "model.norm.weight", "final")
        table = "model.embed_tokens" if sizes.tied else "lm_head"
        raw = "logits" if scales.logits == 1 else "logits.raw"
        self.linear([table], normed, raw, sizes.hidden)
        self.scaled(raw, 1 / scales.logits, "logits")
        return self._finish()

    def _finish(self) -> onnx.ModelProto:
        sizes, info = self.sizes, helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "new"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [info("logits", TensorProto.FLOAT, ["batch", "new", sizes.vocabulary])]
        for index, kv_heads in enumerate(self.kv_heads):
            for part in ("key", "value"):
                past, total = (["batch", kv_heads, axis, sizes.head_dim] for axis in ("past", "total"))
                inputs.append(info(f"past_key_values.{index}.{part}", TensorProto.FLOAT, past))
                outputs.append(info(f"present.{index}.{part}", TensorProto.FLOAT, total))
        graph = helper.make_graph(
            self.graph.nodes, "subnet", inputs, outputs, initializer=list(self.graph.initialisers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="amoeba-deploy")
