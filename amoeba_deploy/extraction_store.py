"""Dense subnets that several engines of one build are lowered from, each extracted once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from amoeba_deploy.files import copy_tree, whole_folder


class ExtractionStore:
    """Dense subnets below a folder, by what decides their bytes; safe for several processes at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def subnet(self, what: Mapping[str, Any], extract: Callable[[Path], None]) -> Path:
        """The folder of a subnet, which nothing may change; ``extract`` fills an empty folder where it is not there."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        folder = self.folder / key
        with self._locked(key):
            if not folder.is_dir():
                with whole_folder(folder) as work:
                    extract(work)
        return folder

    def copy(self, what: Mapping[str, Any], extract: Callable[[Path], None], output: Path) -> None:
        """The same, copied into an empty folder."""
        copy_tree(self.subnet(what, extract), output)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
