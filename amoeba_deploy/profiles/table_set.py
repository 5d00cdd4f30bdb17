"""Several latency tables as one: those of each device, checked against each other, this machine and its engines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.machine import fingerprint
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.table import Table, read_table

TOLERANCE = 0.03
"""The share by which medians of one shape may differ whatever their spread: two runs of one engine do."""


@dataclass(frozen=True)
class TableSet:
    """Tables of one device as one, with the digest of their files and what is to be said of them."""

    table: Table
    digest: str
    remarks: tuple[str, ...] = ()


def by_device(files: Sequence[Path], devices: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """The files of each device that is searched.

    Raises:
        BadInput: one is damaged, or of another device.
    """
    found: dict[str, list[Path]] = {device: [] for device in devices}
    for file in files:
        device = read_table(file).device
        if device not in found:
            raise BadInput(
                f"{file}: was measured on '{device}', not on {' or '.join(map(repr, devices))}; give that device's "
                f"table"
            )
        found[device].append(file)
    return {device: tuple(own) for device, own in found.items()}


def read_tables(files: Sequence[Path], device: str, architecture_digest: str, flows: Sequence[str]) -> TableSet:
    """The tables of a device as one; where two hold a row of the same measurement, the last named counts.

    Args:
        files: at least one.
        device: its name.
        architecture_digest: of the model that is searched.
        flows: the engines whose rows are wanted.

    Raises:
        BadInput: one is damaged, of another device or architecture, or contradicts another; or, on this machine, was
            measured on another one or with another version of an engine.
    """
    tables = [(file, read_table(file)) for file in files]
    remarks: list[str] = []
    for file, table in tables:
        if table.device != device:
            raise BadInput(f"{file}: was measured on '{table.device}', not on '{device}'; give that device's table")
        if table.architecture_digest != architecture_digest:
            raise BadInput(f"{file}: was measured for another model architecture; profile this one")
        if device == LOCAL:
            _require_this_machine(file, table)
        remarks += _versions(file, table, flows)
    for index, (file, table) in enumerate(tables):
        for other_file, other in tables[:index]:
            _require_agreement(other_file, other, file, table)
    together = reduce(lambda first, second: first.merged(second.rows), (table for _, table in tables))
    return TableSet(together, _digest(files), tuple(remarks))


def _digest(files: Sequence[Path]) -> str:
    """Of one file its own; of several that of their digests, in order."""
    digests = [sha256_of(file) for file in files]
    return "sha256:" + (digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest())


def _require_this_machine(file: Path, table: Table) -> None:
    made_on = _entry(table.facts, "machine").get("fingerprint")
    if made_on is not None and made_on != fingerprint():
        raise BadInput(
            f"{file}: was measured on the machine {made_on}, and this one is {fingerprint()}; profile here, or name "
            f"the device that it was measured on"
        )


def _versions(file: Path, table: Table, flows: Sequence[str]) -> list[str]:
    """Remarks on engines that were measured in another version; raises BadInput where that is this machine's."""
    measured, remarks = _entry(table.facts, "engines"), []
    for flow in dict.fromkeys(flows):
        if not any(row.flow == flow for row in table.rows):
            continue
        for package, version in load_backend(flow).toolchain().versions.items():
            then = measured.get(package)
            if then is None or then == version:
                continue
            if table.device == LOCAL:
                raise BadInput(
                    f"{file}: measured {flow} with {package} {then}, and {version} is installed; profile again"
                )
            remarks.append(f"{file} measured {flow} with {package} {then}; this installation builds with {version}")
    return remarks


def _entry(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, Mapping) else {}


def _require_agreement(first: Path, one: Table, second: Path, other: Table) -> None:
    """Raise BadInput where two tables hold a row of the same measurement with medians that exclude each other."""
    rows = {row.key: row for row in one.rows}
    for row in other.rows:
        known = rows.get(row.key)
        if known is not None and _disagree(known, row):
            workload = f"batch {row.batch}, prompt {row.prompt}, {row.tokens} tokens"
            named = f"{row.flow} {row.precision} {row.shape} ({workload})"
            raise BadInput(
                f"{first} and {second} disagree on {named}: TPOT {_spread(known)} in the one and {_spread(row)} in the "
                f"other; give only one of them, or measure again"
            )


def _disagree(one: Row, other: Row) -> bool:
    """Whether each median of TPOT lies outside the other's spread, and they are further apart than ``TOLERANCE``."""
    apart = abs(one.tpot_ms - other.tpot_ms) > TOLERANCE * min(one.tpot_ms, other.tpot_ms)
    inside = one.p10 <= other.tpot_ms <= one.p90 or other.p10 <= one.tpot_ms <= other.p90
    return apart and not inside


def _spread(row: Row) -> str:
    return f"{row.tpot_ms:g} ms ({row.p10:g} to {row.p90:g})"
