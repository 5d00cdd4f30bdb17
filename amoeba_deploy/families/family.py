"""What a model family is: which tensors couple, and how its config is read and rewritten.

All families here share one block: rotary grouped-query attention, then a gated feed-forward, each added to what went
in. They differ in where norms stand, in biases, in whether matrices are fused, and in what their configs say. The units
that can be removed are whole blocks, key/value groups (a key/value head with its query heads), and neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Union

from amoeba_deploy.architecture import Architecture, Dim, positive, rope_from_config
from amoeba_deploy.errors import BadInput

Axis = Union[Dim, tuple[Dim, ...]]  # noqa: UP007 - kits import this under Python 3.9
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
_NULL_MEANS_NONE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
"""Config entries in which null switches something off; elsewhere null is as good as left out."""


def _spell_rope_twice(config: dict[str, Any], subnet: Architecture) -> None:
    rope = subnet.rope
    settings = dict(rope.settings)
    config["rope_parameters"] = {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}
    config["rope_theta"] = rope.theta
    scaled = {"rope_type": rope.kind, "type": rope.kind, **settings}
    config["rope_scaling"] = None if rope.kind == "default" else scaled


def _no_lists(_config: dict[str, Any]) -> dict[str, list[Any]]:
    return {}


def window_in_use(config: dict[str, Any]) -> int | None:
    """The sliding window in positions, where ``layer_types`` gives any block one that is shorter than the context."""
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    used = "sliding_attention" in config["layer_types"][: config["num_hidden_layers"]]
    return int(window) if used and window is not None and window < context else None


@dataclass(frozen=True)
class Family:
    """One family, known by the ``model_type`` of its configs."""

    model_type: str
    flags: Callable[[dict[str, Any]], dict[str, Any]]
    """Entries of ``Architecture`` that a completed config implies beyond its sizes: biases, norms, windows, traits."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers assumes where a config of this family says nothing."""
    rewrite: Callable[[dict[str, Any], Architecture], None] | None = None
    """Changes to an already rewritten config (in place) that only this family needs."""
    tensors: Callable[[Architecture], Tensors] = common_tensors
    """Names (after ``model.layers.{i}.``) and axes of all tensors of a block."""
    fused: dict[str, tuple[str, int]] = field(default_factory=dict)
    """For a matrix of the common block the tensor that holds it and its place there, where several are fused."""
    held_by: Callable[[Architecture], str] | None = None
    """The model type whose stock class holds a subnet of some sizes; None: always this family's own."""
    compensated: str | None = None
    """The family whose stock class holds a subnet of this one with biases on o_proj and down_proj; None: no class."""
    class_name: str = ""
    """The stock causal-language-model class, where subnets of other families are written as one of this."""
    activations: tuple[str, ...] = ("silu",)
    """The feed-forward activations that its configs may name."""
    layer_lists: Callable[[dict[str, Any]], dict[str, list[Any]]] = _no_lists
    """The lists with one entry a block that its class makes for a full config, defaults filled in, that has none."""
    spell_rope: Callable[[dict[str, Any], Architecture], None] = _spell_rope_twice
    """Writes a subnet's rotary settings, for transformers 4 and 5, over the full model's in a config (in place)."""

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config with what its class assumes where it says nothing: defaults, and lists with one entry a block."""
        said = {key: value for key, value in config.items() if value is not None or key in _NULL_MEANS_NONE}
        if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
            said["num_key_value_heads"] = config.get("num_attention_heads")
        found = self.defaults | said
        depth = positive(found, "num_hidden_layers")
        found = self.layer_lists(found) | found
        for key in PER_LAYER_LISTS:
            if isinstance(found.get(key), list) and len(found[key]) < depth:
                raise BadInput(f"config.json has {len(found[key])} entries in {key} for {depth} blocks")
        return found

    def architecture(self, config: dict[str, Any]) -> Architecture:
        """The sizes that a config of this family states; raises BadInput where they contradict each other."""
        config = self.completed(config)
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
        common: dict[str, Any] = {
            "family": self.model_type,
            "depth": positive(config, "num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": positive(config, "head_dim", hidden // heads),
            "neurons": positive(config, "intermediate_size"),
            "vocabulary": positive(config, "vocab_size"),
            "context": positive(config, "max_position_embeddings", 2048),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
            "rope": rope_from_config(config),
        }
        return Architecture(**(common | self.flags(config)))

    def block_tensors(self, architecture: Architecture) -> Tensors:
        """Names (after ``model.layers.{i}.``) and axes of all tensors of a block, in the order they are written."""
        return self.tensors(architecture)

    def matrix_rows(self, architecture: Architecture, name: str) -> tuple[str, slice]:
        """Where a matrix of the common block, such as ``mlp.gate_proj``, lies: its tensor, and its rows there."""
        if name not in self.fused:
            return f"{name}.weight", slice(None)
        tensor, place = self.fused[name]
        axis = self.block_tensors(architecture)[f"{tensor}.weight"][0]
        assert isinstance(axis, tuple)
        begin = architecture.extent(axis[:place])
        return f"{tensor}.weight", slice(begin, begin + architecture.extent(axis[place]))

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
        full = self.completed(config)
        for key in PER_LAYER_LISTS:
            if isinstance(full.get(key), list):
                changed[key] = [full[key][index] for index in kept_blocks]
        if isinstance(full.get("max_window_layers"), int):
            changed["max_window_layers"] = sum(index < full["max_window_layers"] for index in kept_blocks)
        self.spell_rope(changed, subnet)
        if self.rewrite is not None:
            self.rewrite(changed, subnet)
        return changed
