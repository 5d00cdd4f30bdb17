"""Paths that an artifact or an archive names: each stays in its folder, and no two are one file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from amoeba_deploy.errors import BadInput

MAX_FILES = 10_000
"""A bundle has some tens of files."""
MAX_PATH, MAX_NAME = 1024, 255
"""Bytes of a path and of each name in it."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class TakenPaths:
    """Paths as they are met, each checked against all before it; ``where`` is what names them, for messages."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._files: dict[str, str] = {}
        self._folders: set[str] = set()
        self._count = 0

    def add_file(self, path: str) -> None:
        """Take a path for a file.

        Raises:
            BadInput: it leaves its folder, cannot be a file's, is one that another is or lies in, or they are too many.
        """
        key = self._add(path)
        # What differs by case or by composition alone is one file on some disks.
        if key in self._files:
            raise BadInput(
                f"{self.where}: names {path!r} and {self._files[key]!r}, which are one file; get the bundle again"
            )
        if key in self._folders:
            raise BadInput(f"{self.where}: names {path!r}, which is a file and a folder; get the bundle again")
        self._files[key] = path

    def add_folder(self, path: str) -> None:
        """Take a path for a folder, which may be met again; raises what ``add_file`` raises."""
        key = self._add(path)
        if key in self._files:
            raise BadInput(f"{self.where}: names {path!r}, which is a file and a folder; get the bundle again")
        self._folders.add(key)

    def _add(self, path: str) -> str:
        """Check a path by itself and for files that it lies in; what is equal for paths that are one."""
        self._count += 1
        if self._count > MAX_FILES:
            raise BadInput(f"{self.where}: names more than {MAX_FILES} files; it is no bundle")
        check_path(path, self.where)
        key = folded(path)
        parts = key.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts))]
        within = next((name for name in above if name in self._files), None)
        if within is not None:
            raise BadInput(
                f"{self.where}: names {path!r} in {self._files[within]!r}, which is a file; get the bundle again"
            )
        self._folders.update(above)
        return key


def check_paths(paths: Iterable[str], where: str) -> None:
    """Check all paths of files that something names; raises what ``TakenPaths.add_file`` raises."""
    taken = TakenPaths(where)
    for path in paths:
        taken.add_file(path)


def folded(path: str) -> str:
    """What is equal for two paths that some disks hold to be one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_path(path: str, where: str) -> None:
    """Raise BadInput where a path is not that of a file below a folder, on any system."""
    reason = _fault(path)
    if reason:
        raise BadInput(f"{where}: names the file {path[:100]!r}, {reason}; it is not to be trusted")


def _fault(path: str) -> str | None:
    """What is wrong with a path, as half a sentence, or None."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "which is not valid text"
    if _UNPRINTABLE.search(path):
        return "which has control characters"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "whose path is absolute"
    if "\\" in path:
        return "which has a backslash"
    parts = path.split("/")
    if ".." in parts:
        return "which leaves its folder"
    if "" in parts or "." in parts:
        return "whose path has empty parts"
    if len(encoded) > MAX_PATH or any(len(part.encode()) > MAX_NAME for part in parts):
        return "whose path is too long"
    return None
