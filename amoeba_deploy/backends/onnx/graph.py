"""Emits the ONNX graph of a dense subnet: no tracing, and no weight is copied.

Initialisers are references into safetensors files (file, byte offset, length), so the graph takes some kilobytes.
Matrices keep their [out, in] layout; queries, keys and values lie next to each other in an extracted folder and are
read as one matrix, as are gate and up. Every block may have its own width: sizes are read from the tensors.

Inputs and outputs have the names of onnxruntime-genai: ``input_ids``, ``attention_mask`` (ones and zeros, past and
new), ``past_key_values.{i}.key/value`` [batch, kv_heads, past, head_dim] -> ``logits`` in float32,
``present.{i}.key/value``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.onnx.attention import Attention, Heads, is_fused
from amoeba_deploy.backends.onnx.nodes import MICROSOFT, TYPES, Graph, joined
from amoeba_deploy.backends.onnx.precisions import PACKED
from amoeba_deploy.backends.onnx.windows import Windows
from amoeba_deploy.block_quantisation import BLOCK
from amoeba_deploy.tensors import TensorInfo

OPSET = 21
IR_VERSION = 10


@dataclass(frozen=True)
class Arithmetic:
    """What a graph computes in: the type of activations and cache, and how its weights are stored."""

    dtype: str
    """As safetensors names it: F32, F16 or BF16."""
    bits: int | None = None
    """Width of block-quantised weights; None where weights are numbers of the type of their tensors."""
    accuracy: int = 0
    """The accuracy level of products with quantised weights."""
    cuda: bool = False


class Emitter:
    """Emits one model: its tensors, what it computes in, the positions it is for, and the window of each block."""

    def __init__(
        self,
        sizes: Architecture,
        tensors: Mapping[str, TensorInfo],
        arithmetic: Arithmetic,
        context: int,
        windows: Windows,
    ) -> None:
        self.sizes, self.tensors, self.windows = sizes, tensors, windows
        self.dtype, self.bits, self.accuracy = arithmetic.dtype, arithmetic.bits, arithmetic.accuracy
        self.graph = Graph()
        windowed = any(windows)
        fused = is_fused(sizes, self.dtype, arithmetic.cuda, windowed)
        self.attention = Attention(
            self.graph, sizes, self.dtype, context, fused=fused, biased=fused and not arithmetic.cuda, windowed=windowed
        )
        self.kv_heads: list[int] = []

    def vector(self, name: str) -> str:
        """A norm weight or a bias."""
        info = self.tensors[name]
        return self.graph.external(name, info, info.shape, self.dtype)

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

    def _stacked(self, names: Sequence[str]) -> str:
        info = joined([self.tensors[name] for name in names])
        assert info is not None, f"{names} do not lie next to each other"
        return self.graph.external("+".join(names), info, info.shape, None if info.dtype == "U8" else self.dtype)

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

    def scaled(self, value: str, factor: float, result: str, dtype: str | None = None) -> str:
        """A value times a constant; the value itself where that is one."""
        if factor == 1:
            return value
        return self.graph.node("Mul", [value, self.graph.number(factor, dtype or self.dtype)], result)

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
        self.graph.named(
            "SkipSimplifiedLayerNormalization",
            [skip, value, self.vector(weight)],
            outputs,
            result,
            domain=MICROSOFT,
            epsilon=self.sizes.norm_epsilon,
        )
        return result, outputs[3]

    def head_norm(self, value: str, heads: int, weight: str, result: str) -> str:
        """RMS norm of every head apart (Qwen3's query and key norms)."""
        size = self.sizes.head_dim
        split = self.graph.node("Reshape", [value, self.graph.integers(0, 0, heads, size)], f"{result}.heads")
        normed = self.norm(split, weight, f"{result}.normed")
        return self.graph.node("Reshape", [normed, self.graph.integers(0, 0, heads * size)], result)

    def has(self, matrix: str) -> bool:
        """Whether the model has a matrix: blocks may lack attention or feed-forward."""
        return f"{matrix}.weight{self._packed}" in self.tensors

    def attend(self, index: int, value: str) -> str:
        """Attention of one block, from its normed input to the output of o_proj."""
        sizes, prefix, here = self.sizes, f"model.layers.{index}.self_attn", f"block.{index}.attention"
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        products, rows = self.linear(names, value, f"{here}.qkv", sizes.hidden)
        heads, kv_heads = rows[0] // sizes.head_dim, rows[1] // sizes.head_dim
        layer = len(self.kv_heads)
        self.kv_heads.append(kv_heads)
        if len(products) == 1 and self.attention.fused and not sizes.qk_norm:
            query, key, val = products[0], "", ""
        else:
            query, key, val = self.split(products, rows, f"{here}.split")
        if sizes.qk_norm:
            query = self.head_norm(query, heads, f"{prefix}.q_norm.weight", f"{here}.q_norm")
            key = self.head_norm(key, kv_heads, f"{prefix}.k_norm.weight", f"{here}.k_norm")
        qkv = Heads(query, key, val, heads, kv_heads)
        mixed = self.attention.block(layer, qkv, self.windows[index], here)
        return self.linear([f"{prefix}.o_proj"], mixed, f"{here}.output", heads * sizes.head_dim)[0][0]

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
            output = self.attend(index, normed) if kind == "attention" else self.feed_forward(index, normed)
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
        self.attention.shared()
        scales = sizes.scales
        state, added = self.scaled(self.embedding(), scales.embedding, "embedded.scaled"), ""
        for index in range(sizes.depth):
            state, added = self.sublayer(state, added, index, "attention")
            state, added = self.sublayer(state, added, index, "mlp")
        normed, _ = self.entered(state, added, "model.norm.weight", "final")
        table = "model.embed_tokens" if sizes.tied else "lm_head"
        exact = self.dtype == "F32"
        self.linear([table], normed, "logits" if exact and scales.logits == 1 else "logits.raw", sizes.hidden)
        raw = "logits.raw"
        if not exact:
            raw = self.graph.node("Cast", [raw], "logits" if scales.logits == 1 else "logits.f32", to=TYPES["F32"])
        if scales.logits != 1:
            self.scaled(raw, 1 / scales.logits, "logits", "F32")
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
                inputs.append(info(f"past_key_values.{index}.{part}", TYPES[self.dtype], past))
                outputs.append(info(f"present.{index}.{part}", TYPES[self.dtype], total))
        graph = helper.make_graph(
            self.graph.nodes, "subnet", inputs, outputs, initializer=list(self.graph.initialisers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="amoeba-deploy")
        helper.set_model_props(model, {PACKED: str(int(self.attention.fused))})
        return model
