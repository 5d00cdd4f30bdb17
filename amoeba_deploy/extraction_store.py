"""Dense subnets that several engines of one build are lowered from, each extracted once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amoeba_deploy.files import copy_tree, lock_file, whole_folder


class ExtractionStore:
    """Dense subnets below a folder, by what decides their bytes; safe for several processes at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def subnet(self, what: Mapping[str, Any], extract: Callable[[Path], None]) -> Path:
        """The folder of a subnet, which nothing may change; ``extract`` fills an empty folder where it is not there."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        folder = self.folder / key
        with lock_file(self.folder / f"{key}.lock"):
            if not folder.is_dir():
                with whole_folder(folder) as work:
                    extract(work)
        return folder

    def copy(self, what: Mapping[str, Any], extract: Callable[[Path], None], output: Path) -> None:
        """The same, copied into an empty folder."""
        copy_tree(self.subnet(what, extract), output)
