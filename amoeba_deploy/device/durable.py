"""Changes to files that are on the disk, whole, when the function returns, and not half there at any moment before.

A name is changed by a rename alone, after what it will name was written and synced; then its folder is synced.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_PART = ".part"


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below a folder, and its own name, to the disk; raises OSError at a link."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
    sync_folder(folder.parent)


def write_file(file: Path, data: bytes) -> None:
    """Write a file; one of that name is replaced."""
    part = file.with_name(f".{file.name}{_PART}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, file)  # noqa: PTH105
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def point(link: Path, target: str) -> None:
    """Make a symbolic link name ``target``; one of that name is replaced, and nothing else."""
    part = link.with_name(f".{link.name}{_PART}")
    with suppress(FileNotFoundError):
        os.unlink(part)  # noqa: PTH108
    os.symlink(target, part)  # noqa: PTH211
    os.replace(part, link)  # noqa: PTH105
    sync_folder(link.parent)


def remove(file: Path) -> None:
    """Remove a file or a link, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(file)  # noqa: PTH108
    sync_folder(file.parent)


def move(source: Path, target: Path) -> None:
    """Rename a folder within one file system; ``target`` must not be there, or be an empty folder."""
    os.rename(source, target)  # noqa: PTH104
    sync_folder(target.parent)
    sync_folder(source.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there."""
    if not folder.is_dir():
        os.mkdir(folder)  # noqa: PTH102
        sync_folder(folder.parent)
