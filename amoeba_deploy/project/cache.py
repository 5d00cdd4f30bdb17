"""The build cache: bundles by the digest of everything that decided their bytes.

``$AMOEBA_CACHE/builds/bundles/KEY`` holds ``bundle/`` and ``entry.json`` (what decided it, when, its figures). An entry
appears whole or not at all, under a lock of its own key, so that any number of builds may share a cache. Beside it lie
what each project's targets were last built from (``targets/``), and digests of large files by their size and time
(``digests.json``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import BUNDLE_FORMAT, MANIFEST, bundle_files, verify_files
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.files import (
    cache_folder,
    copy_tree,
    folder_bytes,
    held,
    lock_file,
    read_json,
    sha256_of,
    whole_file,
    whole_folder,
    write_json,
)

ENTRY_FORMAT = "amoeba.build-entry/1"
LAST_FORMAT = "amoeba.build-last/1"
ENTRY, BUNDLE = "entry.json", "bundle"


@dataclass(frozen=True)
class Entry:
    """One bundle of the cache: its key, its folder, and what is known of it."""

    key: str
    folder: Path
    facts: dict[str, Any]

    @property
    def bundle(self) -> Path:
        """The bundle itself, which nothing may change."""
        return self.folder / BUNDLE

    @property
    def content(self) -> str:
        """sha256 of the bundle's manifest."""
        return str(self.facts["content"])

    @property
    def figures(self) -> dict[str, Any]:
        """What was built, for people and gates."""
        found: dict[str, Any] = self.facts["figures"]
        return found

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return int(self.facts["bytes"])

    @property
    def used(self) -> float:
        """When it was last used, in seconds since 1970."""
        return (self.folder / ENTRY).stat().st_mtime


class BuildCache:
    """The cache below a folder; ``$AMOEBA_CACHE/builds`` unless told otherwise."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "builds"

    def _place(self, key: str) -> Path:
        return self.folder / "bundles" / key

    def work_folder(self) -> Path:
        """Where unfinished things lie, on the same disk; raises BadInput where the cache cannot be written."""
        folder = self.folder / "work"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder}: the cache cannot be written ({error.strerror}); set AMOEBA_CACHE") from None
        return folder

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for everything temporary of a build, its processes' too; it goes with the block.

        What killed builds left is removed, too. Raises BadInput where the cache cannot be written.
        """
        work = self.work_folder()
        self._remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=work))
        before = tempfile.tempdir
        try:
            with held(folder):
                tempfile.tempdir = str(folder)
                yield folder
        finally:
            tempfile.tempdir = before
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        for folder in (self.folder / "work").glob("*"):
            with contextlib.suppress(OSError), held(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def find(self, key: str) -> Entry | None:
        """The entry of a key, or None where there is none that is whole."""
        folder = self._place(key)
        try:
            facts = read_json(folder / ENTRY, ENTRY_FORMAT)
            found = Entry(key, folder, facts)
            _ = found.content, found.figures, found.bytes
            whole = sha256_of(found.bundle / MANIFEST) == found.content
        except (BadInput, OSError, KeyError, TypeError, ValueError):
            return None
        return found if whole else None

    def store(self, key: str, bundle: Path, facts: Mapping[str, Any]) -> Entry:
        """Move a finished bundle into the cache, under the key's lock; raises BadInput where the disk refuses."""
        self.drop(key)
        with whole_folder(self._place(key)) as work:
            shutil.move(bundle, work / BUNDLE)
            size = folder_bytes(work)
            content = sha256_of(work / BUNDLE / MANIFEST)
            write_json(work / ENTRY, {"format": ENTRY_FORMAT, **facts, "content": content, "bytes": size})
        found = self.find(key)
        assert found is not None, "it was written just now"
        return found

    def holds(self, entry: Entry, output: Path) -> bool:
        """Whether a folder is an entry's bundle, as far as its manifest and the sizes of its files tell."""
        try:
            if sha256_of(output / MANIFEST) != entry.content:
                return False
            files = read_json(output / MANIFEST, BUNDLE_FORMAT)["files"]
            sizes = {name: (output / name).stat().st_size for name in bundle_files(output)}
        except (OSError, AmoebaError):
            return False
        return sizes == {name: each["bytes"] for name, each in files.items()}

    def hand_out(self, entry: Entry, output: Path) -> None:
        """Copy a bundle of the cache to where it is wanted, every file checked against its manifest.

        Raises:
            VerificationFailed: the cache holds something else than what was built.
            BadInput: the output is taken by something that is no bundle, or the disk refuses.
        """
        with contextlib.suppress(OSError):
            os.utime(entry.folder / ENTRY)
        with whole_folder(output, force=True, inputs=(entry.folder,)) as work:
            copy_tree(entry.bundle, work)
            verify_files(work)

    def drop(self, key: str) -> None:
        """Remove an entry."""
        shutil.rmtree(self._place(key), ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Let nobody else build a key in the meantime; waits for who does."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_file(self._lock_file(key)))
            except OSError as error:
                raise BadInput(
                    f"{self.folder}: the cache cannot be written ({error.strerror}); set AMOEBA_CACHE"
                ) from None
            yield

    def _lock_file(self, key: str) -> Path:
        """Of a key; it is never removed, as who waits for it would then hold another than who comes later."""
        return self.folder / "locks" / key

    def entries(self) -> list[Entry]:
        """All whole entries, the latest used first."""
        keys = [path.name for path in (self.folder / "bundles").glob("*") if not path.name.startswith(".")]
        found = [entry for entry in map(self.find, keys) if entry is not None]
        return sorted(found, key=lambda entry: (-entry.used, entry.key))

    def prune(self, *, older_than: float | None = None, keep_bytes: float | None = None) -> list[Entry]:
        """Remove entries: all, or those not used for some seconds, or the longest unused beyond some bytes.

        Returns those that were removed. An entry that somebody builds or copies just now stays.
        """
        now, kept, removed = time.time(), 0, []
        everything = older_than is None and keep_bytes is None
        for entry in self.entries():
            old = older_than is not None and now - entry.used > older_than
            kept += entry.bytes
            too_much = keep_bytes is not None and kept > keep_bytes
            if (everything or old or too_much) and self._drop_if_free(entry.key):
                removed.append(entry)
                kept -= entry.bytes
        self._remove_broken()
        self._remove_abandoned()
        return removed

    def _drop_if_free(self, key: str) -> bool:
        """Remove an entry unless somebody is at work on it, or its lock cannot be had; whether it was removed."""
        with contextlib.suppress(OSError), lock_file(self._lock_file(key), wait=False):
            self.drop(key)
            return True
        return False

    def _remove_broken(self) -> None:
        """Remove what is no whole entry and nobody is working on."""
        for path in (self.folder / "bundles").glob("*"):
            if not path.name.startswith(".") and self.find(path.name) is None:
                self._drop_if_free(path.name)

    # What a project's targets were last built from

    def _last_file(self, config: Path) -> Path:
        return self.folder / "targets" / f"{hashlib.sha256(str(config.resolve()).encode()).hexdigest()[:16]}.json"

    def last(self, config: Path) -> dict[str, Any]:
        """By target: the key and inputs of its last good build, and its figures; nothing where none is known."""
        try:
            found = read_json(self._last_file(config), LAST_FORMAT)["targets"]
        except (BadInput, KeyError):
            return {}
        return found if isinstance(found, dict) else {}

    def remember(self, config: Path, targets: Mapping[str, Any]) -> None:
        """Add what targets were built from to what is known of a project."""
        file = self._last_file(config)
        with self.lock(file.stem), whole_file(file, force=True) as work:
            known = self.last(config) | dict(targets)
            write_json(work, {"format": LAST_FORMAT, "config": str(config.resolve()), "targets": known})
