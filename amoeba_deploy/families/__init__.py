"""Model families: one file each, found by the ``model_type`` that a config names.

To add one, write a file that builds a ``Family`` and name it in ``_FAMILIES``; docs/families.md is the recipe.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families.family import RAGGED, Family

_FAMILIES = (
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


def families() -> tuple[str, ...]:
    """The names of all known families, as configs spell them."""
    return _FAMILIES


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config belongs to.

    Raises:
        BadInput: the config names no family, or one that is not known.
    """
    name = config.get("base_model_type" if config.get("model_type") == RAGGED else "model_type")
    if name == "gemma3":
        raise BadInput(
            "config.json has model_type 'gemma3', which is text and vision in one; take its text model, saved by "
            "transformers' Gemma3ForCausalLM as model_type 'gemma3_text'"
        )
    if name not in _FAMILIES:
        raise BadInput(f"config.json has model_type {name!r:.100}; the families known are {', '.join(_FAMILIES)}")
    found = import_module(f"{__name__}.{name}").FAMILY
    assert isinstance(found, Family)
    return found


def refusal(subnet: Architecture) -> str | None:
    """Why no stock class can hold a subnet of these sizes, as half a sentence, or None."""
    if subnet.head_rule == "divides" and subnet.hidden % subnet.heads:
        return (
            f"the stock class of a {subnet.family} takes {subnet.heads} heads only where they divide its hidden size "
            f"{subnet.hidden}; keep another number"
        )
    return None


def held_by(subnet: Architecture) -> str:
    """The model type whose stock class holds a subnet of these sizes."""
    rule = family_of({"model_type": subnet.family}).held_by
    return subnet.family if rule is None else rule(subnet)


def compensated(subnet: Architecture) -> Architecture:
    """The sizes of a subnet with biases on o_proj and down_proj, in the family whose stock class holds them.

    Where that family has its biases on all linears together, the others are zeros.

    Raises:
        BadInput: no stock class computes this family's function with such biases.
    """
    if subnet.output_bias and subnet.mlp_bias:
        return subnet
    held_by = family_of({"model_type": subnet.family}).compensated
    if held_by is None:
        raise BadInput(
            f"no stock class holds a {subnet.family} with biases on o_proj and down_proj; derive it with --bias off, "
            f"or extract it with --layout ragged"
        )
    if subnet.sliding_window is not None and held_by != subnet.family:
        raise BadInput(
            f"no stock class holds a {subnet.family} with both a sliding window and biases on o_proj and down_proj; "
            f"derive it with --bias off"
        )
    return replace(subnet, family=held_by, qkv_bias=True, output_bias=True, mlp_bias=True)


def read_architecture(config: dict[str, Any]) -> Architecture:
    """The sizes that a config states, by its family's rules.

    Raises:
        BadInput: the family is not known, or an entry is missing, contradicts another, or is of a wrong kind.
    """
    family = family_of(config)
    try:
        return family.architecture(config)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise BadInput(
            f"config.json of a {family.model_type} has an entry that is missing or of a wrong kind ({error!r:.200})"
        ) from None
