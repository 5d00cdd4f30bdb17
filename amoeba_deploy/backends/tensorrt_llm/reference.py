"""The forward pass of a TensorRT-LLM checkpoint, rank by rank, in float32 with numpy.

It reads ``config.json`` and the rank files and nothing else, takes TensorRT-LLM's own default for every key that is
missing, refuses the keys that TensorRT-LLM refuses, and computes as its layers do (``layers/attention.py``,
``layers/mlp.py``, ``layers/linear.py``): each rank multiplies its own rows, ``RowLinear`` sums the ranks' products and
then adds its bias, the head's columns are gathered. So a checkpoint that is wrong in any way that matters gives other
logits than transformers here, without a GPU. It is for proofs, not for speed: nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Counts, Ids, refuse_lengths
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping, Rank
from amoeba_deploy.backends.tensorrt_llm.reader import RankFiles
from amoeba_deploy.errors import BadInput
from amoeba_deploy.tensors import as_float32

Numbers = NDArray[np.float32]

_MAPPING_KEYS = {"world_size", "gpus_per_node", "cp_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size"}
_QUANTIZATION_KEYS = {
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
}
_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "DeciLMForCausalLM": "deci",
}


def _silu(x: Numbers) -> Numbers:
    return np.asarray(x / (1 + np.exp(-x)), np.float32)


def _gelu(x: Numbers) -> Numbers:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)


_ACTIVATIONS: dict[str, Callable[[Numbers], Numbers]] = {"silu": _silu, "gelu": _gelu}


class _Config:
    """The config as TensorRT-LLM reads it: its own defaults where a key is missing."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        for part, known in (("mapping", _MAPPING_KEYS), ("quantization", _QUANTIZATION_KEYS)):
            unknown = sorted(set(config.get(part) or {}) - known)
            if unknown:
                raise BadInput(f"{folder}: {part} has the key '{unknown[0]}', at which TensorRT-LLM raises")
        mapping = Mapping(config["mapping"]["tp_size"], config["mapping"]["pp_size"])
        if config["mapping"]["world_size"] != mapping.world_size:
            raise BadInput(f"{folder}: world_size is not tp_size times pp_size, at which TensorRT-LLM raises")
        self.kind = _CLASSES[config["architecture"]]
        self.depth, self.hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_size = int(config.get("head_size") or self.hidden // self.heads)
        self.neurons = int(config.get("intermediate_size") or 4 * self.hidden)
        self.vocabulary = int(config["vocab_size"])
        self.activation = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        learned = self.kind != "deci" and "position_embedding_type" not in config
        self.rotates = not learned and config.get("position_embedding_type", "rope_gpt_neox") == "rope_gpt_neox"
        self.epsilon = float(config.get("norm_epsilon", 1e-5))
        self.base = float(config.get("rotary_base", 10000.0))
        self.scaling: dict[str, Any] | None = config.get("rotary_scaling")
        self.attn_bias = bool(config.get("attn_bias", self.kind == "qwen")) and self.kind != "deci"
        self.dense_bias = self.attn_bias and self.kind == "llama"
        self.mlp_bias = bool(config.get("mlp_bias", False)) and self.kind != "deci"
        self.qk_norm = bool(config.get("qk_layernorm", False))
        self.layers = config.get("layer_configs")

    def layer(self, index: int) -> tuple[int, int]:
        """Key/value heads and neurons of a block, 0 where it has no such sublayer."""
        if self.layers is None:
            return self.kv_heads, self.neurons
        attention, ffn = self.layers[index]["attention"], self.layers[index]["ffn"]
        kv_heads = attention["num_key_value_heads"] or self.kv_heads
        neurons = ffn["intermediate_size"] or self.neurons
        return kv_heads if attention["impl"] == "attention" else 0, neurons if ffn["impl"] == "mlp" else 0

    def angles(self, length: int) -> Numbers:
        """Rotary angles [length, head_size / 2]."""
        steps = np.arange(0, self.head_size, 2, dtype=np.float64)
        frequencies = 1.0 / self.base ** (steps / self.head_size)
        positions = np.arange(length, dtype=np.float64)
        # Releases read the kind by either name; both must stand.
        kinds = {self.scaling.get("type"), self.scaling.get("rope_type")} if self.scaling else {None}
        (kind,) = kinds
        if kind == "linear":
            positions = positions / float(self.scaling["factor"]) if self.scaling else positions
        elif kind == "llama3":
            frequencies = _llama3(frequencies, self.scaling or {})
        return np.asarray(positions[:, None] * frequencies, np.float32)


def _llama3(frequencies: NDArray[np.float64], scaling: dict[str, Any]) -> NDArray[np.float64]:
    """Frequencies scaled as Llama 3.1's: low ones by the factor, high ones not, those between by a blend of both."""
    factor, low = float(scaling["factor"]), float(scaling["low_freq_factor"])
    high, context = float(scaling["high_freq_factor"]), float(scaling["original_max_position_embeddings"])
    turns = context * frequencies / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - blend) * frequencies / factor + blend * frequencies)


class RankEngine:
    """An engine in the sense of the interface, computed from a checkpoint's files alone."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint.

        Raises:
            BadInput: a file is damaged, or TensorRT-LLM would refuse the config or a tensor.
        """
        self.files = RankFiles(folder)
        self.config = _Config(folder, self.files.config)
        self._ids: Ids | None = None

    def reset(self) -> None:
        self._ids = None

    def feed(self, ids: Ids, lengths: Counts | None = None) -> Numbers:
        refuse_lengths(lengths, ids, "tensorrt-llm")
        self._ids = ids if self._ids is None else np.concatenate([self._ids, ids], axis=1)
        return self.logits(self._ids)[:, -ids.shape[1] :]

    def logits(self, ids: Ids) -> Numbers:
        """Logits [batch, n, vocabulary] of ids [batch, n]."""
        mapping = self.files.mapping
        stages = [[rank for rank in mapping.ranks() if rank.stage == stage] for stage in range(mapping.pp)]
        states = [self._take(rank, "transformer.vocab_embedding.weight", None)[ids] for rank in stages[0]]
        for ranks in stages:
            for local, index in enumerate(mapping.layers(self.config.depth, ranks[0].stage)):
                states = self._block(ranks, f"transformer.layers.{local}.", index, states)
        parts = []
        for rank, state in zip(stages[-1], states, strict=True):
            final = self._norm(rank, "transformer.ln_f.weight", state)
            parts.append(final @ self._take(rank, "lm_head.weight", (None, self.config.hidden)).T)
        return np.concatenate(parts, axis=-1)[..., : self.config.vocabulary]

    def _take(self, rank: Rank, name: str, shape: tuple[int | None, ...] | None) -> Numbers:
        """A tensor in float32; TensorRT-LLM refuses one of another shape than its layer's."""
        values = as_float32(self.files.values(rank, name), self.files.dtype)
        if shape is not None and any(n is not None and n != m for n, m in zip(shape, values.shape, strict=True)):
            raise BadInput(f"{self.files.folder}: '{name}' is {list(values.shape)}, its layer takes {list(shape)}")
        return values

    def _norm(self, rank: Rank, name: str, x: Numbers) -> Numbers:
        weight = self._take(rank, name, (x.shape[-1],))
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.epsilon) * weight, np.float32)

    def _linear(self, rank: Rank, name: str, x: Numbers, rows: int, bias: bool) -> Numbers:
        product = x @ self._take(rank, f"{name}.weight", (rows, x.shape[-1])).T
        return product + self._take(rank, f"{name}.bias", (rows,)) if bias else product

    def _row_linear(self, ranks: list[Rank], name: str, parts: list[Numbers], bias: bool) -> list[Numbers]:
        """The ranks' products summed, and then each rank's own copy of the bias added."""
        total = sum(
            self._linear(rank, name, part, self.config.hidden, False) for rank, part in zip(ranks, parts, strict=True)
        )
        found = np.asarray(total, np.float32)
        return [found + self._take(r, f"{name}.bias", (self.config.hidden,)) if bias else found for r in ranks]

    def _block(self, ranks: list[Rank], name: str, index: int, states: list[Numbers]) -> list[Numbers]:
        config = self.config
        kv_heads, neurons = config.layer(index)
        if kv_heads:
            parts = [
                self._heads(r, name, kv_heads, self._norm(r, name + "input_layernorm.weight", x))
                for r, x in zip(ranks, states, strict=True)
            ]
            added = self._row_linear(ranks, name + "attention.dense", parts, config.dense_bias)
            states = [x + y for x, y in zip(states, added, strict=True)]
        if neurons:
            called, own = name + ("mlp" if config.kind != "deci" else "ffn"), neurons // len(ranks)
            parts = []
            for rank, x in zip(ranks, states, strict=True):
                normed = self._norm(rank, name + "post_layernorm.weight", x)
                fc = self._linear(rank, called + ".fc", normed, own, config.mlp_bias)
                parts.append(config.activation(fc) * self._linear(rank, called + ".gate", normed, own, config.mlp_bias))
            added = self._row_linear(ranks, called + ".proj", parts, config.mlp_bias)
            states = [x + y for x, y in zip(states, added, strict=True)]
        return states

    def _heads(self, rank: Rank, name: str, kv_heads: int, x: Numbers) -> Numbers:
        """What a rank's own heads give [batch, n, heads * head_size], before the output product."""
        config, tp = self.config, self.files.mapping.tp
        heads, own, size = config.heads // tp, -(-kv_heads // tp), config.head_size
        batch, length, _ = x.shape
        fused = self._linear(rank, name + "attention.qkv", x, (heads + 2 * own) * size, config.attn_bias)
        split = fused.reshape(batch, length, heads + 2 * own, size).transpose(0, 2, 1, 3)
        q, k, v = split[:, :heads], split[:, heads : heads + own], split[:, heads + own :]
        if config.qk_norm and config.kind != "deci":
            q = self._norm(rank, name + "attention.q_layernorm.weight", q)
            k = self._norm(rank, name + "attention.k_layernorm.weight", k)
        if config.rotates:
            angles = config.angles(length)
            q, k = _rotated(q, angles), _rotated(k, angles)
        k, v = np.repeat(k, heads // own, axis=1), np.repeat(v, heads // own, axis=1)
        scores = (q @ k.transpose(0, 1, 3, 2)) / np.sqrt(np.float32(size))
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        given = (weights @ v).transpose(0, 2, 1, 3)
        return np.asarray(given.reshape(batch, length, heads * size), np.float32)


def _rotated(x: Numbers, angles: Numbers) -> Numbers:
    """Heads [..., n, head_size] rotated by their positions' angles, halves of a head as pairs (GPT-NeoX)."""
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
