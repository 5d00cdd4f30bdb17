"""A causal language model whose blocks differ in width, written by amoeba-deploy.

It runs the stock transformers classes of the model that it was cut from, named by ``base_model_type`` in config.json.
Only the numbers of heads and neurons are each block's own (``block_sizes``), and a sublayer without any is left out.
With ``output_bias`` every o_proj and down_proj carries a bias; of a sublayer that is left out it is all that remains.

Load it with ``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``; transformers 5.20 or newer.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, DynamicCache, GenerationMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

OWN_ENTRIES = ("model_type", "base_model_type", "block_sizes", "output_bias", "architectures", "auto_map")


class AmoebaRaggedConfig(PreTrainedConfig):
    """The entries of the config of the model that this one was cut from, its numbers of heads and neurons too.

    ``block_sizes`` has num_attention_heads, num_key_value_heads and intermediate_size of each block; 0 for none.
    """

    model_type = "amoeba_ragged"

    def __init__(
        self,
        base_model_type: str = "llama",
        block_sizes: list[dict[str, int]] | None = None,
        output_bias: bool = False,
        **entries: Any,
    ) -> None:
        self.base_model_type = base_model_type
        self.block_sizes = block_sizes or []
        self.output_bias = output_bias
        super().__init__(**entries)

    def base(self) -> PreTrainedConfig:
        """The stock config that all blocks share, but for their own sizes."""
        entries = {key: value for key, value in self.to_dict().items() if key not in OWN_ENTRIES}
        return AutoConfig.for_model(self.base_model_type, **entries)

    def attention_blocks(self) -> list[int]:
        """The blocks that have attention, in order: their places here are their layers in a key/value cache."""
        return [index for index, sizes in enumerate(self.block_sizes) if sizes["num_attention_heads"]]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config; to those who ask for the decoder, such as caches, the layers that a cache has."""
        if not decoder or encoder or not self.block_sizes:
            return self
        kept = self.attention_blocks()
        config = self.base()
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[index] for index in kept]
        config.num_hidden_layers = len(kept)
        return config


class Constant(nn.Module):
    """What a matrix without inputs adds: its bias [hidden], or zero."""

    def __init__(self, hidden: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(()) if self.bias is None else self.bias


class NoAttention(nn.Module):
    """Stands where a block has no attention."""

    def __init__(self, hidden: int, bias: bool) -> None:
        super().__init__()
        self.o_proj = Constant(hidden, bias)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where a block has no feed-forward."""

    def __init__(self, hidden: int, bias: bool) -> None:
        super().__init__()
        self.down_proj = Constant(hidden, bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(hidden_states)
        return output


def norms_around(layer: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """The norms in front of a stock layer's attention and feed-forward, and those on what they give.

    Where a class names norms of its feed-forward, ``post_attention_layernorm`` is of what the attention gives; in the
    others it is in front of the feed-forward.
    """
    names = [name for name, _ in layer.named_children() if name.endswith("layernorm")]
    behind = [name for name in names if name.startswith("post_") and any("feedforward" in n for n in names)]
    front = [name for name in names if name not in behind]
    return {
        "self_attn": ([n for n in front if n == "input_layernorm"], [n for n in behind if "attention" in n]),
        "mlp": ([n for n in front if n != "input_layernorm"], [n for n in behind if "feedforward" in n]),
    }


def sized_layer(stock: Any, base: PreTrainedConfig, index: int, sizes: dict[str, int], output_bias: bool) -> Any:
    """A layer of the class of ``stock`` with its own numbers of heads and neurons."""
    config = copy.copy(base)
    for name, number in sizes.items():
        setattr(config, name, max(number, 1))
    layer = type(stock)(config, index)
    missing: list[tuple[str, nn.Module]] = []
    if not sizes["num_attention_heads"]:
        missing.append(("self_attn", NoAttention(config.hidden_size, output_bias)))
    if not sizes["intermediate_size"]:
        missing.append(("mlp", NoFeedForward(config.hidden_size, output_bias)))
    for name, stand_in in missing:
        setattr(layer, name, stand_in)
        front, behind = norms_around(stock)[name]
        for norm in front + ([] if output_bias else behind):
            setattr(layer, norm, nn.Identity())
    if output_bias:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(config.hidden_size))
    return layer


class AmoebaRaggedForCausalLM(PreTrainedModel, GenerationMixin):
    """The base model's stock class with every layer in its own size."""

    config_class = AmoebaRaggedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: AmoebaRaggedConfig) -> None:
        base = config.base()
        base._attn_implementation = config._attn_implementation
        # The stock layers are replaced; until then they need no more than this.
        base.num_key_value_heads = base.intermediate_size = 1
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(base)](base)
        # What was asked for, or else what the stock class prefers.
        config._attn_implementation = stock.config._attn_implementation
        super().__init__(config)
        layers = [
            sized_layer(layer, stock.config, index, config.block_sizes[index], config.output_bias)
            for index, layer in enumerate(stock.model.layers)
        ]
        for place, index in enumerate(config.attention_blocks()):
            layers[index].self_attn.layer_idx = place
        stock.model.layers = nn.ModuleList(layers)
        self.model, self.lm_head = stock.model, stock.lm_head
        # The stock model is no part of this one, or every tensor would have two names; its forward pass runs on the
        # two parts above.
        self._stock = (stock,)
        self._no_split_modules = [type(layers[0]).__name__]
        self.post_init()

    @property
    def stock(self) -> Any:
        """The stock model, whose parts are this model's."""
        (stock,) = self._stock
        if stock.lm_head is not self.lm_head or stock.model is not self.model:
            stock.lm_head, stock.model = self.lm_head, self.model
        return stock

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> None:
        super().set_attn_implementation(attn_implementation, **options)
        for layer in self.model.layers:
            config = getattr(layer.self_attn, "config", None)
            if config is not None:
                config._attn_implementation = self.model.config._attn_implementation

    def _get_static_cache_init_shape(self) -> None:
        """Key/value heads differ between layers; a static cache takes them from its first update."""
        return

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared: dict[str, Any] = self.stock.prepare_inputs_for_generation(*args, **kwargs)
        return prepared

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        stock = self.stock
        if use_cache is None:
            use_cache = stock.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return stock(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
