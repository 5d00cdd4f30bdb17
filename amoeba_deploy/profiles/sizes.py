"""The sizes of a model in the header of its latency table, without which a table is of use for that model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from amoeba_deploy.architecture import Architecture, Rope, Scales
from amoeba_deploy.profiles.table import Table

SIZES = "sizes"
"""The entry of the header."""


def sizes_to_json(architecture: Architecture) -> dict[str, Any]:
    """All sizes of a model, as the header holds them."""
    return asdict(architecture)


def sizes_of_table(table: Table, known: Architecture | None = None) -> Architecture | None:
    """The full model that a table was measured of: ``known`` where it is that one, else by the header.

    None where the header does not say, or says other sizes than its own digest.
    """
    if known is not None and known.digest == table.architecture_digest:
        return known
    found = table.facts.get(SIZES)
    if not isinstance(found, Mapping):
        return None
    try:
        read = _architecture(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return read if read.digest == table.architecture_digest else None


def _architecture(value: Mapping[str, Any]) -> Architecture:
    rope, scales = dict(value["rope"]), dict(value["scales"])
    settings = tuple((name, _frozen(setting)) for name, setting in rope.pop("settings"))
    own = {name: entry for name, entry in value.items() if name not in ("rope", "scales", "traits")}
    traits = tuple(value["traits"])
    return Architecture(**own, rope=Rope(**rope, settings=settings), scales=Scales(**scales), traits=traits)


def _frozen(value: Any) -> Any:
    """Lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
