"""Paths that an artifact or an archive names: each stays in its folder, and no two are one file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import islice

from amoeba_deploy.errors import BadInput

MAX_FILES = 10_000
"""A bundle has some tens of files."""
MAX_PATH, MAX_NAME = 1024, 255
"""Bytes of a path and of each name in it."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


def check_paths(paths: Iterable[str], where: str) -> None:
    """Check all paths that something names; ``where`` is what it is called in messages.

    Raises:
        BadInput: a path leaves its folder, cannot be a file's, is one that another is or lies in, or they are too many.
    """
    seen: dict[str, str] = {}
    for path in islice(paths, MAX_FILES + 1):
        check_path(path, where)
        if len(seen) == MAX_FILES:
            raise BadInput(f"{where}: names more than {MAX_FILES} files; it is no bundle")
        # What differs by case or by composition alone is one file on some disks.
        key = folded(path)
        if key in seen:
            raise BadInput(f"{where}: names {path!r} and {seen[key]!r}, which are one file; get the bundle again")
        seen[key] = path
    for key, path in seen.items():
        parts = key.split("/")
        above = next((name for end in range(1, len(parts)) if (name := "/".join(parts[:end])) in seen), None)
        if above is not None:
            raise BadInput(f"{where}: names {path!r} in {seen[above]!r}, which is a file; get the bundle again")


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
