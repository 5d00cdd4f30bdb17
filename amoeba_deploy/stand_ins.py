"""A stock model's own forward pass, run in part: stand-ins take the place of the modules that are not to run.

What a family does around its layers (scaling embeddings, making masks and rotary angles, dividing or capping logits) is
so never written down twice. Nothing here changes the model: copies share all that they do not replace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def with_parts(module: Any, **parts: torch.nn.Module) -> Any:
    """A module like another in which some of its submodules are others; the rest, and all weights, are shared."""
    found = shallow_copy(module)
    found._modules = {**module._modules, **parts}
    return found


def shallow_copy(module: Any) -> Any:
    """Another module of the same class with the same attributes; no ``__new__`` of a wrapper has a say in it."""
    found = object.__new__(type(module))
    found.__dict__.update(module.__dict__)
    return found


def with_weight(module: Any, weight: torch.Tensor) -> Any:
    """A module like another with another weight."""
    found = shallow_copy(module)
    found._parameters = {**module._parameters, "weight": torch.nn.Parameter(weight, requires_grad=False)}
    return found


class _Recorder(torch.nn.Module):
    """In the place of a layer: gives the states back, and keeps what else it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: dict[str, Any] = {}

    def forward(self, states: torch.Tensor, **keywords: Any) -> torch.Tensor:
        self.keywords = keywords
        return states


class _Nothing(torch.nn.Module):
    """In the place of rotary angles that no layer will read."""

    def forward(self, *_: Any, **__: Any) -> None:
        return None


class _Ends(torch.nn.Module):
    """In the place of the model under the head: takes the last layer's states for its input."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> SimpleNamespace:
        nothing = {"past_key_values": None, "cache": None, "hidden_states": None, "attentions": None}
        return SimpleNamespace(last_hidden_state=self.norm(inputs_embeds), **nothing)


class _Zeros(torch.nn.Module):
    """In the place of a sublayer: adds nothing."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


def sublayer(layer: Any, attention: bool) -> Any:
    """A layer of which the attention alone adds to the states, or the feed-forward alone."""
    silent = "mlp" if attention else "self_attn"
    return with_parts(layer, **{silent: _Zeros(not attention)})


def front(model: Any, embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [rows, length, hidden] in front of a model's first layer, from token ids [rows, length]."""
    silent = {"layers": torch.nn.ModuleList(), "norm": torch.nn.Identity(), "rotary_emb": _Nothing()}
    base = with_parts(model.model, embed_tokens=embedding, **silent)
    found: torch.Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
    return found


def layer_keywords(model: Any, length: int) -> list[dict[str, Any]]:
    """What each layer of a model is called with beside states [rows, length, hidden]: mask, rotary angles, ..."""
    config = model.config
    recorders = [_Recorder() for _ in range(config.num_hidden_layers)]
    base = with_parts(model.model, layers=torch.nn.ModuleList(recorders), norm=torch.nn.Identity())
    base(inputs_embeds=torch.zeros(1, length, config.hidden_size), use_cache=False)
    return [recorder.keywords for recorder in recorders]


def logits_of(model: Any, norm: Any, linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from the last layer's states [n, hidden] to logits [n, vocabulary]."""
    head = with_parts(model, model=_Ends(norm), lm_head=linear)

    def logits(states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = head(inputs_embeds=states[None], use_cache=False).logits[0]
        return found

    return logits


def outline(skeleton: Any) -> Any:
    """A model like one on torch's meta device, without its layers, with real buffers and tables of one row."""
    config = copy.deepcopy(skeleton.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 0, 1, None
    found = type(skeleton)._from_config(config, dtype=torch.float32).eval()
    found.config = found.model.config = skeleton.config
    return found.requires_grad_(False)
