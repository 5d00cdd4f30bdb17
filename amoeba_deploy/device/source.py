"""Where a bundle is installed from: a folder, an archive, or a registry. Each knows its digest and how to fetch it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from amoeba_deploy.bundle import MANIFEST, RELEASE, read_manifest
from amoeba_deploy.delivery.reference import SCHEMES, Reference, names_host
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.files import sha256_of
from amoeba_deploy.progress import Progress

BUNDLE, PULL = "bundle", "pull"


@dataclass(frozen=True)
class Target:
    """Where a bundle is fetched to."""

    staging: Path
    """The bundle becomes the folder ``bundle`` there."""
    reuse: tuple[Path, ...]
    """Bundles with files that may be the same."""
    progress: Progress

    @property
    def bundle(self) -> Path:
        """The folder of the bundle."""
        return self.staging / BUNDLE


class Source(Protocol):
    """A bundle somewhere else."""

    @property
    def name(self) -> str:
        """As the user wrote it."""
        ...

    def digest(self) -> str:
        """What changes when the bundle does: ``sha256:`` and hex digits. The bundle itself is not fetched for it."""
        ...

    def fetch(self, target: Target) -> None:
        """Bring the bundle into the target's folder."""
        ...


def find_source(text: str, plain_http: bool = False) -> Source:
    """The source that a user named; raises BadInput where it is none."""
    path = Path(text)
    if path.is_dir():
        return FolderSource(text, path)
    if path.is_file():
        return ArchiveSource(text, path)
    if text.startswith(("/", "./", "../", "~")) or text.endswith((".tar.zst", ".tar")):
        raise BadInput(f"{text}: no such bundle; give a folder, a .tar.zst or a registry's reference")
    if not text.startswith(SCHEMES) and not names_host(text):
        raise BadInput(
            f"{text}: there is no such folder or archive, and a registry's reference begins with its host, such as "
            f"registry.example:5000/team/model:1"
        )
    Reference.parse(text)
    return RegistrySource(text, plain_http)


@dataclass(frozen=True)
class FolderSource:
    """A bundle's folder on this machine, a USB stick or a share."""

    name: str
    folder: Path

    def digest(self) -> str:
        """Over the manifest, which has the digests of all files, and the release."""
        read_manifest(self.folder)
        digest = hashlib.sha256()
        for name in (MANIFEST, RELEASE):
            file = self.folder / name
            data = file.read_bytes() if file.is_file() else b""
            digest.update(len(data).to_bytes(8, "big") + data)
        return f"sha256:{digest.hexdigest()}"

    def fetch(self, target: Target) -> None:
        """Copy it; links and whatever else is neither file nor folder are refused."""
        for root, folders, files in os.walk(self.folder):
            place = target.bundle / Path(root).relative_to(self.folder)
            place.mkdir()
            for name in folders:
                if (Path(root) / name).is_symlink():
                    raise VerificationFailed(f"{Path(root) / name}: is a link, which a bundle does not hold")
            for name in files:
                _copy(Path(root) / name, place / name)


def _copy(source: Path, target: Path) -> None:
    """Copy one file's content."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK) if not source.is_symlink() else None
    if descriptor is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor is not None:
            os.close(descriptor)
        raise VerificationFailed(f"{source}: is a link or no file, which a bundle does not hold")
    with os.fdopen(descriptor, "rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)


@dataclass(frozen=True)
class ArchiveSource:
    """A ``.tar.zst`` of 'amoeba bundle pack'."""

    name: str
    file: Path

    def digest(self) -> str:
        """Of the archive."""
        return f"sha256:{sha256_of(self.file)}"

    def fetch(self, target: Target) -> None:
        """Unpack it."""
        from amoeba_deploy.delivery.archive import unpack

        unpack(self.file, target.bundle)


@dataclass(frozen=True)
class RegistrySource:
    """A bundle in an OCI registry; what came of a pull that broke is kept for the next."""

    name: str
    plain_http: bool = False

    @cached_property
    def _digest(self) -> str:
        from amoeba_deploy.delivery.connection import Connection
        from amoeba_deploy.delivery.registry import resolve

        return resolve(Connection(Reference.parse(self.name), plain_http=self.plain_http))[0]

    def digest(self) -> str:
        """Of the artifact that the reference stands for when this is first asked."""
        return self._digest

    def fetch(self, target: Target) -> None:
        """Pull it by the digest that was told, whatever its tag stands for by now."""
        from amoeba_deploy.delivery.registry import pull

        reference = replace(Reference.parse(self.name), digest=self.digest())
        pull(
            reference,
            target.bundle,
            progress=target.progress,
            staging=target.staging / PULL,
            reuse=target.reuse,
            plain_http=self.plain_http,
        )
