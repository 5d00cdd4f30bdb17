"""Measurements from elsewhere: reports of the device test, and files of other benchmarks, merged into a latency table.

A reader knows one form of file; the first that recognises a file reads it. Those of other benchmarks are in
``foreign``. What a file does not say itself (its shape, say) a reader asks of ``Told``.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from amoeba_deploy import __version__
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of
from amoeba_deploy.profiles.foreign import READERS as FOREIGN
from amoeba_deploy.profiles.kit.results import results_file
from amoeba_deploy.profiles.kit_results import KitReader
from amoeba_deploy.profiles.table import TABLE_FORMAT, Table, read_table, write_table
from amoeba_deploy.profiles.told import Told

_KEPT = ("machine", "engines", "context", "test", "device_facts", "items", "kit")


class Reader(Protocol):
    """Reads one form of file."""

    name: str
    """Of the form, as messages call it."""

    def recognises(self, start: str) -> bool:
        """Whether a file is of this form, by its first characters (a million at most)."""
        ...

    def read(self, file: Path, told: Told) -> Table:
        """Its measurements, as a table of some device.

        Raises:
            BadInput: the file is damaged, or lacks what ``told`` lacks too.
        """
        ...


class TableReader:
    """Latency tables and reports of the device test, which say everything themselves."""

    name = "latency table or report of the device test"

    def recognises(self, start: str) -> bool:
        return TABLE_FORMAT.partition("/")[0] in start

    def read(self, file: Path, told: Told) -> Table:
        table = read_table(file)
        if told.architecture is not None and told.architecture.digest != table.architecture_digest:
            raise BadInput(f"{file}: was measured for another model architecture")
        return table


def readers() -> Iterator[Reader]:
    """Every reader, our own form's first."""
    yield TableReader()
    yield KitReader()
    yield from FOREIGN


def read_measurements(file: Path, told: Told) -> tuple[Table, str]:
    """A file's measurements, and the name of its form; raises BadInput where no reader recognises it."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            start = stream.read(2**20)
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    known = list(readers())
    for reader in known:
        if reader.recognises(start):
            return reader.read(file, told), reader.name
    raise BadInput(f"{file}: is of no known form; known are: {', '.join(reader.name for reader in known)}")


def import_measurements(files: Sequence[Path], device: str, told: Told, output: Path) -> Table:
    """Merge files into the table of a device, which is made where it does not exist; returns the whole table.

    A row that is imported replaces the one of the same shape, flow, precision and workload. Nothing is written where
    one of the files is refused.

    Args:
        files: what to read, older ones first; of a kit its folder, that of its results, or their file.
        device: the name that the table has or gets, whatever the files call the machine.
        told: what the files do not say.
        output: the table's file.

    Raises:
        BadInput: a file is of no known form, holds no measurement, or is of another model than the others.
    """
    table = read_table(output) if output.exists() else None
    if table is not None and table.device != device:
        raise BadInput(f"{output}: is the table of '{table.device}', not of '{device}'; choose another output")
    for file in map(results_file, files):
        found, form = read_measurements(file, told)
        measured_on = found.facts.get("kit", {}).get("device", device)
        if measured_on != device:
            raise BadInput(f"{file}: is of a kit for '{measured_on}', not for '{device}'; name that device")
        if not found.rows:
            raise BadInput(f"{file}: holds no measurement, so there is nothing to import; see its items for why")
        twice = [key for key, count in Counter(row.key for row in found.rows).items() if count > 1]
        if twice:
            flow, precision, depth, width, _, batch, prompt, tokens, *_ = twice[0]
            row = f"{flow} {precision} {depth}x{width} (batch {batch}, prompt {prompt}, {tokens} tokens)"
            raise BadInput(
                f"{file}: measures {row} more than once, of other files, threads or rates perhaps; import one of them "
                f"in a file of its own"
            )
        if table is None:
            kept = {name: found.facts[name] for name in _KEPT[:3] if name in found.facts}
            table = Table(device, found.architecture_digest, kept, ())
        if found.architecture_digest != table.architecture_digest:
            raise BadInput(
                f"{file}: was measured for another model architecture than the rest; keep them in two tables"
            )
        source = {"file": file.name, "sha256": sha256_of(file), "form": form, "rows": len(found.rows)}
        source |= {name: found.facts[name] for name in ("date", "tool", *_KEPT) if name in found.facts}
        others = [entry for entry in table.facts.get("imported", []) if entry.get("sha256") != source["sha256"]]
        engines = {**table.facts.get("engines", {}), **found.facts.get("engines", {})}
        facts = table.facts | {"engines": engines, "imported": [*others, source]}
        table = replace(table, facts=facts).merged(found.rows)
    assert table is not None, "the command takes at least one file"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    table = replace(table, facts={"tool": f"amoeba-deploy {__version__}", "date": date} | _without(table.facts))
    write_table(output, table, force=True)
    return table


def _without(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("tool", "date")}
