"""Model families: one file each, found by the ``model_type`` that a config names.

To add one, write a file that builds a ``Family`` and name it in ``_FAMILIES``; docs/families.md is the recipe.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families.family import Family

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def families() -> tuple[str, ...]:
    """The names of all known families, as configs spell them."""
    return _FAMILIES


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config belongs to.

    Raises:
        BadInput: the config names no family, or one that is not known.
    """
    name = config.get("model_type")
    if name not in _FAMILIES:
        raise BadInput(f"config.json has model_type {name!r}; the families known are {', '.join(_FAMILIES)}")
    found = import_module(f"{__name__}.{name}").FAMILY
    assert isinstance(found, Family)
    return found


def refusal(subnet: Architecture) -> str | None:
    """Why no stock class can hold a subnet of these sizes, as half a sentence, or None."""
    return family_of({"model_type": subnet.family}).refusal(subnet)


def read_architecture(config: dict[str, Any]) -> Architecture:
    """The sizes that a config states, by its family's rules."""
    return family_of(config).architecture(config)
