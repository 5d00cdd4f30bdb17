"""What a model family is: which tensors couple, and how its config is read and rewritten.

All families here share one block: RMS norm, rotary grouped-query attention, RMS norm, gated feed-forward. They differ
in biases, in norms on queries and keys, and in what their configs say. The units that can be removed are whole
blocks, key/value groups (a key/value head with its query heads), and neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amoeba_deploy.architecture import Architecture, Dim, Rope, positive, rope_from_config
from amoeba_deploy.errors import BadInput

Axis = Dim | tuple[Dim, ...]
"""What an axis counts; several dims where matrices are fused, one behind the other."""

Axes = tuple[Axis, ...]

Tensors = dict[str, Axes]
"""Axes of tensors by their names."""

INPUT_NORM: Tensors = {"input_layernorm.weight": ("hidden",)}
ATTENTION: Tensors = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key_value", "hidden"),
    "self_attn.v_proj.weight": ("key_value", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
}
FEED_FORWARD: Tensors = {
    "mlp.gate_proj.weight": ("neuron", "hidden"),
    "mlp.up_proj.weight": ("neuron", "hidden"),
    "mlp.down_proj.weight": ("hidden", "neuron"),
}
MIDDLE_NORM: Tensors = {"post_attention_layernorm.weight": ("hidden",)}
QKV_BIASES: Tensors = {
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("key_value",),
    "self_attn.v_proj.bias": ("key_value",),
}
OUTPUT_BIAS: Tensors = {"self_attn.o_proj.bias": ("hidden",)}
MLP_BIASES: Tensors = {
    "mlp.gate_proj.bias": ("neuron",),
    "mlp.up_proj.bias": ("neuron",),
    "mlp.down_proj.bias": ("hidden",),
}
OUTPUT_BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""What a sublayer adds whatever its units give: of attention, of feed-forward."""
RAGGED = "amoeba_ragged"
"""The ``model_type`` of a subnet whose blocks differ; its family stands in ``base_model_type``."""
QK_NORMS: Tensors = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}


def biases_and_norms(architecture: Architecture) -> Tensors:
    """The biases, and the norms of query and key heads, that the switches of an architecture call for."""
    tensors = dict(QKV_BIASES) if architecture.qkv_bias else {}
    tensors |= OUTPUT_BIAS if architecture.output_bias else {}
    tensors |= MLP_BIASES if architecture.mlp_bias else {}
    return tensors | (QK_NORMS if architecture.qk_norm else {})


def common_tensors(architecture: Architecture) -> Tensors:
    """A block of most families: norm, attention, norm, feed-forward, and what the switches add."""
    return INPUT_NORM | ATTENTION | MIDDLE_NORM | FEED_FORWARD | biases_and_norms(architecture)


PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Config entries with one value a block; they follow the kept blocks."""


@dataclass(frozen=True)
class Family:
    """One family. ``flags`` are the architecture's switches that its config implies (biases, norms, windows)."""

    model_type: str
    flags: Callable[[dict[str, Any]], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers assumes where a config of this family says nothing."""
    rewrite: Callable[[dict[str, Any], Architecture], None] | None = None
    """Changes to an already rewritten config (in place) that only this family needs."""
    tensors: Callable[[Architecture], Tensors] = common_tensors
    """Names (after ``model.layers.{i}.``) and axes of all tensors of a block."""
    fused: dict[str, tuple[str, int]] = field(default_factory=dict)
    """For a matrix of the common block the tensor that holds it and its place there, where several are fused."""
    compensated: str | None = None
    """The family whose stock class holds a subnet of this one with biases on o_proj and down_proj; None: no class."""
    class_name: str = ""
    """The stock causal-language-model class, where subnets of other families are written as one of this."""
    activations: tuple[str, ...] = ("silu",)
    """The feed-forward activations that its configs may name."""

    def architecture(self, config: dict[str, Any]) -> Architecture:
        """The sizes that a config of this family states; raises BadInput where they contradict each other."""
        said = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
        config = self.defaults | said
        hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
        kv_heads = positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise BadInput(f"config.json has {heads} query heads, which {kv_heads} key/value heads do not divide")
        activation = config.get("hidden_activation", config.get("hidden_act", self.activations[0]))
        if activation not in self.activations:
            known = " or ".join(self.activations)
            raise BadInput(
                f"config.json has the activation {activation!r}; {self.model_type} is known with {known} only"
            )
        return Architecture(
            family=self.model_type,
            depth=positive(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=positive(config, "head_dim", hidden // heads),
            neurons=positive(config, "intermediate_size"),
            vocabulary=positive(config, "vocab_size"),
            context=positive(config, "max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope_from_config(config),
            **self.flags(config),
        )

    def block_tensors(self, architecture: Architecture) -> Tensors:
        """Names (after ``model.layers.{i}.``) and axes of all tensors of a block, in the order they are written."""
        return self.tensors(architecture)

    def other_tensors(self, architecture: Architecture) -> list[str]:
        """Names of the tensors outside the blocks."""
        return ["model.embed_tokens.weight", "model.norm.weight"] + ([] if architecture.tied else ["lm_head.weight"])

    def subnet_config(
        self, config: dict[str, Any], kept_blocks: tuple[int, ...], subnet: Architecture, dtype: str
    ) -> dict[str, Any]:
        """The config of a dense subnet that stock transformers, versions 4 and 5, load alike.

        Depth and widths are the subnet's; lists with one entry a block follow ``kept_blocks``; rotary settings and
        dtype stand in both spellings, because readers that pin transformers 4 silently fall back to base 10000.
        """
        changed = dict(config)
        if config.get("model_type") != self.model_type:
            changed |= {"model_type": self.model_type, "architectures": [self.class_name]}
        changed |= {
            "num_hidden_layers": subnet.depth,
            "num_attention_heads": subnet.heads,
            "num_key_value_heads": subnet.kv_heads,
            "head_dim": subnet.head_dim,
            "intermediate_size": subnet.neurons,
            "max_position_embeddings": subnet.context,
            "rms_norm_eps": subnet.norm_epsilon,
            "tie_word_embeddings": subnet.tied,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        for key in PER_LAYER_LISTS:
            if isinstance(config.get(key), list):
                changed[key] = [config[key][index] for index in kept_blocks]
        if isinstance(config.get("max_window_layers"), int):
            changed["max_window_layers"] = sum(index < config["max_window_layers"] for index in kept_blocks)
        _spell_rope_twice(changed, subnet.rope)
        if self.rewrite is not None:
            self.rewrite(changed, subnet)
        return changed


def _spell_rope_twice(config: dict[str, Any], rope: Rope) -> None:
    settings = dict(rope.settings)
    config["rope_parameters"] = {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}
    config["rope_theta"] = rope.theta
    scaled = {"rope_type": rope.kind, "type": rope.kind, **settings}
    config["rope_scaling"] = None if rope.kind == "default" else scaled
