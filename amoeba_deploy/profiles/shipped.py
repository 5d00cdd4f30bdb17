"""Latency tables that ship with the package: ``profiles/tables/*.json``, used where no other table is given."""

from __future__ import annotations

from pathlib import Path

from amoeba_deploy.profiles.table import read_table

FOLDER = Path(__file__).parent / "tables"


def shipped_tables(device: str, architecture_digest: str) -> tuple[Path, ...]:
    """The files that were measured on a device with a model architecture, sorted by name."""
    files = sorted(FOLDER.glob("*.json"))
    tables = {file: read_table(file) for file in files}
    return tuple(
        file
        for file, table in tables.items()
        if (table.device, table.architecture_digest) == (device, architecture_digest)
    )
