"""Which latency tables there are of a device, by their headers; nothing heavy is imported to list them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_deploy.files import cache_folder, read_json_object
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.machine import fingerprint

SHIPPED = Path(__file__).parent / "tables"
"""The folder of the tables that ship with the package."""


def local_files() -> list[Path]:
    """The tables of this machine in the cache, of any model, sorted by name."""
    return sorted((cache_folder() / "tables").glob(f"{fingerprint()}-*.json"))


def known_tables(device: str) -> list[dict[str, Any]]:
    """The tables that ship with the package, and those that this machine measured of itself, a few facts of each.

    Raises:
        BadInput: one of them is damaged.
    """
    found = [(file.name, read_json_object(file)) for file in sorted(SHIPPED.glob("*.json"))]
    found = [(name, table) for name, table in found if table.get("device") == device]
    if device == LOCAL:
        found += [(str(file), read_json_object(file)) for file in local_files()]
    return [_entry(name, table) for name, table in found]


def _entry(name: str, table: dict[str, Any]) -> dict[str, Any]:
    sizes, rows = table.get("sizes") or {}, table.get("rows") or []
    model = {key: sizes[key] for key in ("family", "depth", "hidden", "neurons") if key in sizes}
    engines = sorted({f"{row.get('flow')} {row.get('precision')}" for row in rows})
    about = {"architecture": table.get("architecture"), "model": model, "rows": len(rows), "engines": engines}
    return {"file": name, **about, "date": str(table.get("date", ""))}
