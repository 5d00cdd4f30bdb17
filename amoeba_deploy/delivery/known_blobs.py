"""Where blobs were last seen in a registry, so that it can take them from one repository into another (a mount).

One small file a blob in the cache folder: ``registries/HOST/HEX`` holds a repository's name. Nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from amoeba_deploy.delivery.artifact import Blob
from amoeba_deploy.delivery.reference import MAX_NAME, NAME
from amoeba_deploy.files import cache_folder

MIN_BYTES = 4096
"""A mount costs a request, as sending something small does."""


def _file(host: str, blob: Blob) -> Path:
    return cache_folder() / "registries" / host.replace(":", "_").lower() / blob.hex


def remember(host: str, name: str, blobs: Iterable[Blob]) -> None:
    """Note that a registry has some blobs in a repository, as far as the cache can be written."""
    with suppress(OSError):
        for blob in blobs:
            if blob.size >= MIN_BYTES:
                file = _file(host, blob)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(name, encoding="utf-8")


def repository_of(host: str, blob: Blob) -> str | None:
    """A repository that had a blob, or None."""
    if blob.size < MIN_BYTES:
        return None
    try:
        with _file(host, blob).open(encoding="utf-8") as file:
            name = file.read(MAX_NAME + 1)
    except (OSError, UnicodeDecodeError):
        return None
    return name if NAME.fullmatch(name) and len(name) <= MAX_NAME else None
