"""How MLC-LLM names and shapes a model's tensors, and the config that it is given.

Queries, keys and values are one matrix (``qkv_proj``; ``c_attn`` in Qwen), gate and up another (``gate_up_proj``),
rows one behind the other (mlc_llm/loader/standard_loader.py). A quantised matrix NAME.weight is stored as
NAME.q_weight and NAME.q_scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.mlc_llm.formats import Format
from amoeba_deploy.model_folder import ModelFolder


@dataclass(frozen=True)
class Stored:
    """One tensor of MLC: its name, the model's tensors whose rows it holds one behind the other, and its shape."""

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None
    """None for a vector."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] or [rows]."""
        return (sum(self.rows),) if self.columns is None else (sum(self.rows), self.columns)

    def entries(self, form: Format) -> dict[str, tuple[tuple[int, ...], str]]:
        """The names that it has in MLC's files in some format, each with shape and dtype."""
        if self.columns is None or form.group is None:
            return {self.name: (self.shape, form.dtype)}
        stem, groups = self.name.removesuffix("weight"), -(-self.columns // form.group)
        return {
            f"{stem}q_weight": ((sum(self.rows), groups * form.words), "uint32"),
            f"{stem}q_scale": ((sum(self.rows), groups), form.dtype),
        }


def class_of(sizes: Architecture) -> str:
    """MLC's class for a model: a Mistral without a window is a Llama, and MLC's Mistral drops rotary scaling and tied
    embeddings."""
    held_by = families.held_by(sizes)
    return "llama" if held_by == "mistral" else held_by


def stored_tensors(sizes: Architecture) -> list[Stored]:
    """All tensors of a model as MLC stores them."""
    hidden, dim = sizes.hidden, sizes.head_dim
    queries, keys = sizes.heads * dim, sizes.kv_heads * dim
    kind = class_of(sizes)
    fused = "qkv_proj" if kind == "llama" else "c_attn"
    found = [Stored("model.embed_tokens.weight", ("model.embed_tokens.weight",), (sizes.vocabulary,), hidden)]

    def one(name: str, rows: int, columns: int | None) -> Stored:
        return Stored(name, (name,), (rows,), columns)

    for index in range(sizes.depth):
        block = f"model.layers.{index}."
        parts = tuple(f"{block}self_attn.{part}_proj." for part in "qkv")
        heads = (queries, keys, keys)
        found.append(one(f"{block}input_layernorm.weight", hidden, None))
        attention = f"{block}self_attn.{fused}."
        found.append(Stored(f"{attention}weight", tuple(f"{part}weight" for part in parts), heads, hidden))
        if sizes.qkv_bias:
            found.append(Stored(f"{attention}bias", tuple(f"{part}bias" for part in parts), heads, None))
        if sizes.qk_norm:
            found += [one(f"{block}self_attn.{part}_norm.weight", dim, None) for part in "qk"]
        found.append(one(f"{block}self_attn.o_proj.weight", hidden, queries))
        found.append(one(f"{block}post_attention_layernorm.weight", hidden, None))
        wide = (f"{block}mlp.gate_proj.weight", f"{block}mlp.up_proj.weight")
        found.append(Stored(f"{block}mlp.gate_up_proj.weight", wide, (sizes.neurons, sizes.neurons), hidden))
        found.append(one(f"{block}mlp.down_proj.weight", hidden, sizes.neurons))
    found.append(one("model.norm.weight", hidden, None))
    if not sizes.tied:
        found.append(one("lm_head.weight", sizes.vocabulary, hidden))
    return found


def _scaling(sizes: Architecture) -> dict[str, Any] | None:
    rope = sizes.rope
    return None if rope.kind == "default" else {"rope_type": rope.kind, **dict(rope.settings)}


def source_config(model: ModelFolder) -> dict[str, Any]:
    """The ``config.json`` that MLC converts by: every size spelled out, rotary settings in the spelling that it reads.

    From transformers 5's ``rope_parameters`` alone MLC's Llama and Mistral take a base of 10000 and no scaling without
    a word, and its Qwen fails.
    """
    sizes = model.architecture
    kind = class_of(sizes)
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    given: dict[str, Any] = {key: model.config[key] for key in ends if key in model.config}
    return {
        "architectures": [names[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.neurons,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope.theta,
        "rope_scaling": _scaling(sizes),
        "tie_word_embeddings": sizes.tied,
        "attention_bias": sizes.qkv_bias,
        **given,
    }


def wanted_settings(sizes: Architecture, context: int, chunk: int, batch: int) -> dict[str, Any]:
    """What ``model_config`` of ``mlc-chat-config.json`` must say; the library is compiled from it."""
    rope: dict[str, Any] = {"rope_theta": sizes.rope.theta}
    if class_of(sizes) == "llama":
        rope = {"position_embedding_base": sizes.rope.theta, "rope_scaling": _scaling(sizes)}
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.neurons,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": sizes.norm_epsilon,
        "tie_word_embeddings": sizes.tied,
        **rope,
        "context_window_size": context,
        "prefill_chunk_size": chunk,
        "max_batch_size": batch,
    }
