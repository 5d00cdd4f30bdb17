"""The table of an unfinished dynamic programming, kept in the cache folder so that ``--resume`` can go on from it.

The file is named after everything that decides the table, is replaced after every column, and is removed when the
table is complete. JSON holds floats exactly, so a resumed run ends with the same selection as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import cache_folder, json_text, read_json, whole_file
from amoeba_deploy.stage1.depth import Column

TABLE_FORMAT = "amoeba.depth-table/1"


@dataclass(frozen=True)
class SavedTable:
    """The place of one table: its file, and what it is the table of."""

    file: Path
    identity: dict[str, Any]

    @classmethod
    def of(cls, identity: dict[str, Any]) -> SavedTable:
        """The place of the table that so much decides."""
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        return cls(cache_folder() / "select" / f"{name}.json", identity)

    def read(self, candidates: int, removals: int, beam: int) -> Column | None:
        """The last finished column of a table of such sizes, or None where there is none.

        Raises:
            BadInput: the file is damaged, or holds no column of such a table.
        """
        if not self.file.exists():
            return None
        value = read_json(self.file, TABLE_FORMAT)
        try:
            column = Column.from_json(value["column"])
            if not column.fits(candidates, removals, beam):
                raise ValueError
            return column
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{self.file}: is damaged; remove it, or select without --resume") from None

    def write(self, column: Column) -> None:
        """Replace what is saved."""
        value = {"format": TABLE_FORMAT, **self.identity, "column": column.to_json()}
        with whole_file(self.file, force=True) as file:
            file.write_text(json_text(value), encoding="utf-8")

    def remove(self) -> None:
        """Forget the table."""
        self.file.unlink(missing_ok=True)
