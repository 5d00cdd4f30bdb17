"""The release of a signed bundle: a number that only grows, so that a device can refuse what is older than what it has.

``release.json`` is written when a bundle is signed and is covered by the signature. The manifest cannot hold the
number: the same inputs give the same manifest, whenever they are built.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy.bundle import RELEASE
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json, write_json

RELEASE_FORMAT = "amoeba.release/1"


@dataclass(frozen=True)
class Release:
    """A serial number, and when it was signed (UTC, ISO 8601), which is for people only."""

    serial: int
    signed: str


def new_release(serial: int | None = None) -> Release:
    """A release of now; its serial is the time in seconds since 1970 where none is given."""
    now = datetime.datetime.now(datetime.UTC)
    return Release(int(now.timestamp()) if serial is None else serial, now.isoformat(timespec="seconds"))


def write_release(folder: Path, release: Release) -> None:
    """Write ``release.json`` of a bundle."""
    write_json(folder / RELEASE, {"format": RELEASE_FORMAT, "serial": release.serial, "signed": release.signed})


def read_release(folder: Path) -> Release | None:
    """The release of a bundle, or None where it has none; raises BadInput where the file is damaged."""
    if not (folder / RELEASE).is_file():
        return None
    value = read_json(folder / RELEASE, RELEASE_FORMAT)
    serial, signed = value.get("serial"), value.get("signed")
    if not isinstance(serial, int) or isinstance(serial, bool) or serial < 0 or not isinstance(signed, str):
        raise BadInput(f"{folder / RELEASE}: lacks serial or signed; get the bundle again")
    return Release(serial, signed)
