"""Latency tables that ship with the package: ``profiles/tables/*.json``, used where no other table is given."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.sizes import sizes_of_table
from amoeba_deploy.profiles.table import Table, read_table

FOLDER = Path(__file__).parent / "tables"


@cache
def all_shipped() -> tuple[tuple[Path, Table], ...]:
    """Every table that ships with the package, with its file, sorted by name."""
    return tuple((file, read_table(file)) for file in sorted(FOLDER.glob("*.json")))


def known_tables(device: str) -> list[dict[str, Any]]:
    """What tables there are of a device: those that ship with the package, and of this machine what it measured."""
    from amoeba_deploy.profiles.profiler import local_files

    found = [(file, table) for file, table in all_shipped() if table.device == device]
    if device == LOCAL:
        found += [(file, read_table(file)) for file in local_files()]
    return [_entry(file, table) for file, table in found]


def _entry(file: Path, table: Table) -> dict[str, Any]:
    model = sizes_of_table(table)
    return {
        "file": file.name if file.is_relative_to(FOLDER) else str(file),
        "architecture": table.architecture_digest,
        "parameters": None if model is None else model.parameters,
        "rows": len(table.rows),
        "engines": sorted({f"{row.flow} {row.precision}" for row in table.rows}),
        "date": str(table.facts.get("date", "")),
    }


def shipped_tables(device: str, architecture_digest: str) -> tuple[Path, ...]:
    """The files that were measured on a device with a model architecture, sorted by name."""
    return tuple(
        file
        for file, table in all_shipped()
        if (table.device, table.architecture_digest) == (device, architecture_digest)
    )
