"""sha256 of files that are read once, however often a build asks: ``digests.json`` in the cache of builds."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import sha256_of, whole_file


class FileDigests:
    """sha256 of files, remembered by path, size, time and inode, so that large ones are read once."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "digests.json"
        self._known = self._read()
        self._new: dict[str, list[Any]] = {}

    def _read(self) -> dict[str, Any]:
        try:
            value = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def of(self, file: Path, named: str = "the project") -> str:
        """The digest in hex; raises BadInput, with what names the file, where it cannot be read."""
        try:
            path = file.resolve(strict=True)
            found = path.stat()
            mark = [found.st_size, found.st_mtime_ns, found.st_ino]
            entry = self._known.get(str(path))
            if isinstance(entry, list) and entry[:3] == mark and len(entry) == 4:
                return str(entry[3])
            digest = sha256_of(path)
        except OSError as error:
            raise BadInput(f"{file}: cannot be read ({error.strerror}), and {named} names it") from None
        self._known[str(path)] = [*mark, digest]
        # A file that was written just now may be written again within the same tick of the clock.
        if time.time_ns() - found.st_mtime_ns > 2_000_000_000:
            self._new[str(path)] = self._known[str(path)]
        return digest

    def save(self) -> None:
        """Remember what was read this time."""
        if not self._new:
            return
        with contextlib.suppress(AmoebaError), whole_file(self._file, force=True) as work:
            work.write_text(json.dumps(self._read() | self._new), encoding="utf-8")
