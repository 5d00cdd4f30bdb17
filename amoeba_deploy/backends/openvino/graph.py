"""Builds the OpenVINO model of a dense subnet, operator by operator: nothing is traced, and every size is a tensor's.

Inputs ``input_ids``, ``attention_mask`` [batch, past + new], ``position_ids`` and ``beam_idx`` [batch], output
``logits`` [batch, new, vocabulary]: what openvino-genai feeds a decoder. The key/value cache is the model's own state,
``past_key_values.{i}.key/value`` [batch, kv_heads, past, head_dim], so nothing is copied from step to step.

Operators are arranged as OpenVINO's fusions expect them (RMSFusion, RoPEFusionGPTNEOX, StatefulSDPAFusion, and
SDPAToPagedAttention for openvino-genai): a norm, a rotation, and attention with its cache and shared key heads each
become one operator of the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.openvino.runtime import load
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.rotary import inverse_frequencies
from amoeba_deploy.tensors import from_float32

Node = Any
"""An ``openvino.Node``."""
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
LOGITS = "logits"


def name_all(model: Any) -> None:
    """Give every operator that OpenVINO named itself a name that does not depend on what was built before.

    Its own end in a number that counts up while the process lives, and would be written into the artefact.
    """
    for index, node in enumerate(model.get_ordered_ops()):
        kind, _, number = node.get_friendly_name().rpartition("_")
        if number.isdigit() and kind == node.get_type_name():
            node.set_friendly_name(f"{kind}.{index}")


class GraphBuilder:
    """Builds one model. ``half``: matrices are stored in bfloat16; norms, biases and constants stay in float32."""

    def __init__(self, model: ModelFolder, half: bool) -> None:
        self.openvino: Any = load("openvino")
        self.op: Any = load("openvino.opset15")
        self.folder, self.sizes, self.half = model, model.architecture, half
        self.attention_scale = self.sizes.scales.attention or 1 / math.sqrt(self.sizes.head_dim)
        self.states: list[Node] = []
        self.shared: dict[str, Node] = {}
        self.held: list[NDArray[Any]] = []
        """Arrays whose memory OpenVINO uses in place; they must live as long as the model."""

    def integers(self, *values: int) -> Node:
        """A constant int64 vector."""
        return self.op.constant(np.array(values, np.int64))

    def number(self, value: float, rank: int = 3) -> Node:
        """A constant float32 number, as a tensor of some rank."""
        return self.op.constant(np.full((1,) * rank, value, np.float32))

    def has(self, tensor: str) -> bool:
        """Whether the model has a tensor: blocks may lack attention or feed-forward."""
        return tensor in self.folder.tensors.infos

    def vector(self, name: str) -> Node:
        """A norm weight or a bias, [1, 1, n]."""
        return self.op.constant(self.folder.tensors.float32(name)[None, None], name=name)

    def matrix(self, name: str) -> Node:
        """A matrix [out, in] as float32 numbers, whatever it is stored in; one operator however often it is used."""
        if name not in self.shared:
            values = self.folder.tensors.float32(name)
            if self.half:
                # numpy knows no bfloat16: the words are handed over as they are.
                words = from_float32(values, "BF16")
                self.held.append(words)
                kind = self.openvino.Type.bf16
                stored = self.openvino.Tensor(words, self.openvino.Shape(list(words.shape)), kind)
                self.shared[name] = self.op.convert(self.op.constant(stored, name=name), "f32")
            else:
                # What lies in a file is read-only, and copied by OpenVINO; what was converted for it is not.
                self.held.append(values)
                self.shared[name] = self.op.constant(values, name=name, shared_memory=values.flags.writeable)
        return self.shared[name]

    def scaled(self, value: Node, factor: float) -> Node:
        """A value times a constant; the value itself where that is one."""
        return value if factor == 1 else self.op.multiply(value, self.op.constant(np.float32(factor)))

    def norm(self, value: Node, weight: str, rank: int = 3) -> Node:
        """RMS norm over the last axis."""
        op = self.op
        gain = op.constant(self.folder.tensors.float32(weight).reshape((1,) * (rank - 1) + (-1,)), name=weight)
        mean = op.reduce_mean(op.power(value, self.number(2, rank)), self.integers(-1), True)
        root = op.sqrt(op.add(mean, self.number(self.sizes.norm_epsilon, rank)))
        return op.multiply(gain, op.multiply(value, op.divide(self.number(1, rank), root)))

    def linear(self, value: Node, name: str) -> Node:
        """The product with the matrix ``name`` [out, in], its bias added."""
        product = self.op.matmul(value, self.matrix(f"{name}.weight"), False, True)
        return self.op.add(product, self.vector(f"{name}.bias")) if self.has(f"{name}.bias") else product

    def length(self, shape: Node, axis: int) -> Node:
        """One dimension of a shape, as a vector of one."""
        return self.op.gather(shape, self.integers(axis), self.op.constant(np.int64(0)))

    def prepare(self, inputs: Mapping[str, Node]) -> None:
        """What all blocks share: batch, rotary tables, and the mask.

        A query at place q of the cache sees the keys at places up to q that hold real tokens. Places are not positions:
        fillings take places, and positions come as an input.
        """
        op, constant = self.op, self.op.constant
        zero, one = constant(np.int64(0)), constant(np.int64(1))
        sizes = self.sizes
        frequencies, factor = inverse_frequencies(sizes.rope, sizes.head_dim, sizes.context, np.float32)
        positions = op.convert(op.unsqueeze(inputs["position_ids"], self.integers(-1)), "f32")
        half = op.multiply(positions, constant(frequencies[None, None]))
        angles = op.unsqueeze(op.concat([half, half], -1), self.integers(1))
        self.shared |= {"cos": self.scaled(op.cos(angles), factor), "sin": self.scaled(op.sin(angles), factor)}
        ids, seen = op.shape_of(inputs["input_ids"]), op.shape_of(inputs["attention_mask"])
        total, new = (op.squeeze(self.length(shape, 1), self.integers(0)) for shape in (seen, ids))
        keys = op.range(zero, total, one, "i64")
        queries = op.range(op.subtract(total, new), total, one, "i64")
        causal = op.less_equal(op.unsqueeze(keys, self.integers(0)), op.unsqueeze(queries, self.integers(1)))
        real = op.unsqueeze(op.convert(inputs["attention_mask"], "boolean"), self.integers(1, 2))
        self.shared["mask"] = op.logical_and(op.unsqueeze(causal, self.integers(0, 1)), real)
        self.shared |= {"batch": self.length(ids, 0), "beams": inputs["beam_idx"]}

    def heads(self, value: Node, count: int) -> Node:
        """[batch, new, heads * size] -> [batch, new, heads, size]."""
        return self.op.reshape(value, self.integers(0, 0, count, self.sizes.head_dim), True)

    def heads_first(self, value: Node) -> Node:
        """[batch, new, heads, size] -> [batch, heads, new, size], and back."""
        return self.op.transpose(value, self.integers(0, 2, 1, 3))

    def rotated(self, value: Node) -> Node:
        """Rotary positions on [batch, heads, new, size]; halves are the pairs."""
        op, half, end = self.op, self.sizes.head_dim // 2, np.iinfo(np.int32).max
        step, axis = self.integers(1), self.integers(3)
        front = op.slice(value, self.integers(0), self.integers(half), step, axis)
        back = op.slice(value, self.integers(half), self.integers(int(end)), step, axis)
        turned = op.concat([op.multiply(back, self.number(-1, 4)), front], -1)
        return op.add(op.multiply(value, self.shared["cos"]), op.multiply(turned, self.shared["sin"]))

    def cached(self, value: Node, heads: int, name: str) -> Node:
        """Past and new keys or values together; they are the past of the next step."""
        op, util, size = self.op, load("openvino.op.util"), self.sizes.head_dim
        facts = util.VariableInfo()
        facts.data_shape = self.openvino.PartialShape([-1, heads, -1, size])
        facts.data_type = self.openvino.Type.f32
        facts.variable_id = name
        variable = util.Variable(facts)
        empty = op.concat([self.shared["batch"], self.integers(heads, 0, size)], 0)
        first = op.broadcast(op.constant(np.float32(0)), empty)
        past = op.gather(op.read_value(first, variable), self.shared["beams"], op.constant(np.int64(0)))
        both = op.concat([past, value], 2)
        self.states.append(op.assign(both, variable))
        return both

    def spread(self, value: Node, kv_heads: int, group: int) -> Node:
        """Every key/value head as often as query heads share it."""
        if group == 1:
            return value
        op, shape, axis = self.op, self.op.shape_of(value), self.op.constant(np.int64(0))
        front, back = (op.gather(shape, self.integers(*axes), axis) for axes in ((0, 1), (2, 3)))
        target = op.concat([front, self.integers(group), back], 0)
        wide = op.broadcast(op.unsqueeze(value, self.integers(2)), target, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self.integers(0, kv_heads * group, -1, self.sizes.head_dim), True)

    def attention(self, index: int, value: Node) -> Node:
        """Attention of one block, from its normed input to the output of o_proj."""
        op, sizes, prefix = self.op, self.sizes, f"model.layers.{index}.self_attn"
        rows = [self.folder.tensors.info(f"{prefix}.{part}_proj.weight").shape[0] for part in "qk"]
        heads, kv_heads = (count // sizes.head_dim for count in rows)
        query = self.heads(self.linear(value, f"{prefix}.q_proj"), heads)
        key = self.heads(self.linear(value, f"{prefix}.k_proj"), kv_heads)
        val = self.heads_first(self.heads(self.linear(value, f"{prefix}.v_proj"), kv_heads))
        if sizes.qk_norm:
            query = self.norm(query, f"{prefix}.q_norm.weight", 4)
            key = self.norm(key, f"{prefix}.k_norm.weight", 4)
        query, key = self.rotated(self.heads_first(query)), self.rotated(self.heads_first(key))
        key = self.cached(key, kv_heads, f"past_key_values.{index}.key")
        val = self.cached(val, kv_heads, f"past_key_values.{index}.value")
        group = heads // kv_heads
        keys, values = self.spread(key, kv_heads, group), self.spread(val, kv_heads, group)
        scale = op.constant(np.float32(self.attention_scale))
        mixed = op.scaled_dot_product_attention(query, keys, values, self.shared["mask"], scale, causal=False)
        flat = op.reshape(self.heads_first(mixed), self.integers(0, 0, heads * sizes.head_dim), True)
        return self.linear(flat, f"{prefix}.o_proj")

    def feed_forward(self, index: int, value: Node) -> Node:
        """The gated feed-forward of one block: down(silu(gate x) * up x)."""
        prefix = f"model.layers.{index}.mlp"
        gate, up = (self.linear(value, f"{prefix}.{part}_proj") for part in ("gate", "up"))
        return self.linear(self.op.multiply(self.op.swish(gate), up), f"{prefix}.down_proj")

    def sublayer(self, state: Node, index: int, front: str, last: str) -> Node:
        """The state behind a sublayer; of one that a ragged subnet lacks, its bias is all that may be left."""
        block, factor = f"model.layers.{index}", self.sizes.scales.residual
        if self.has(f"{block}.{last}.weight"):
            normed = self.norm(state, f"{block}.{front}.weight")
            compute = self.attention if last.startswith("self_attn") else self.feed_forward
            return self.op.add(state, self.scaled(compute(index, normed), factor))
        if self.has(f"{block}.{last}.bias"):
            return self.op.add(state, self.scaled(self.vector(f"{block}.{last}.bias"), factor))
        return state

    def build(self) -> Any:
        """The whole model, as an ``openvino.Model``."""
        op, sizes = self.op, self.sizes
        inputs = {
            name: op.parameter([-1] if name == "beam_idx" else [-1, -1], self._kind(name), name=name) for name in INPUTS
        }
        for name, node in inputs.items():
            node.output(0).get_tensor().set_names({name})
        self.prepare(inputs)
        table = self.matrix("model.embed_tokens.weight")
        state = op.gather(table, op.convert(inputs["input_ids"], "i32"), op.constant(np.int32(0)))
        state = self.scaled(state, sizes.scales.embedding)
        for index in range(sizes.depth):
            state = self.sublayer(state, index, "input_layernorm", "self_attn.o_proj")
            state = self.sublayer(state, index, "post_attention_layernorm", "mlp.down_proj")
        head = table if sizes.tied else self.matrix("lm_head.weight")
        logits = op.matmul(self.norm(state, "model.norm.weight"), head, False, True)
        result = op.result(self.scaled(logits, 1 / sizes.scales.logits), name=LOGITS)
        result.output(0).get_tensor().set_names({LOGITS})
        return self._finish([result], list(inputs.values()))

    def _kind(self, name: str) -> Any:
        return np.int32 if name == "beam_idx" else np.int64

    def _finish(self, results: Sequence[Node], inputs: Sequence[Node]) -> Any:
        model = self.openvino.Model(list(results), self.states, list(inputs), "subnet")
        name_all(model)
        return model
