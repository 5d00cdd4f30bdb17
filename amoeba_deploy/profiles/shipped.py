"""Latency tables that ship with the package: ``profiles/tables/*.json``, used where no other table is given."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from amoeba_deploy.profiles.known_tables import SHIPPED
from amoeba_deploy.profiles.table import Table, read_table


@cache
def all_shipped() -> tuple[tuple[Path, Table], ...]:
    """Every table that ships with the package, with its file, sorted by name."""
    return tuple((file, read_table(file)) for file in sorted(SHIPPED.glob("*.json")))


def shipped_tables(device: str, architecture_digest: str) -> tuple[Path, ...]:
    """The files that were measured on a device with a model architecture, sorted by name."""
    return tuple(
        file
        for file, table in all_shipped()
        if (table.device, table.architecture_digest) == (device, architecture_digest)
    )
