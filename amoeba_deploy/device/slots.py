"""The folders of a device: ``ROOT/slots/a`` and ``b``, and the link ``ROOT/current`` that names the one that runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pydantic import ValidationError

from amoeba_deploy.bundle import MANIFEST, read_manifest, verify_files
from amoeba_deploy.device.durable import move, point, remove, write_file
from amoeba_deploy.device.state import SLOTS, Slot, SlotName
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.files import json_text, read_json_object, sha256_of

CURRENT, STAGING, TRUST, DEVICE, SLOT_FOLDER = "current", "staging", "trust", "device", "slots"


def slot_folder(root: Path, name: SlotName) -> Path:
    """Where a slot's bundle lies."""
    return root / SLOT_FOLDER / name


def current_slot(root: Path) -> SlotName | None:
    """The slot that ``current`` names; None where there is no such link.

    Raises:
        VerificationFailed: it names anything else, or is no link.
    """
    link = root / CURRENT
    if not link.is_symlink():
        if link.exists():
            raise VerificationFailed(f"{link}: is no link, as 'amoeba bundle install' makes it; move it away")
        return None
    target = os.readlink(link)  # noqa: PTH115
    for name in SLOTS:
        if target == f"{SLOT_FOLDER}/{name}":
            return name
    raise VerificationFailed(
        f"{link}: names {target}, which is no slot; run 'amoeba bundle status --root {root} --recover'"
    )


def point_current(root: Path, name: SlotName | None) -> None:
    """Let ``current`` name a slot, or remove it, durably and at once."""
    if name is None:
        remove(root / CURRENT)
    else:
        point(root / CURRENT, f"{SLOT_FOLDER}/{name}")


def empty_slot(root: Path, name: SlotName) -> None:
    """Empty a slot that the state says is empty. What still runs in it from before is left with its old folder."""
    folder, record = slot_folder(root, name), record_file(root, name)
    if record.exists():
        remove(record)
    if folder.is_symlink():
        remove(folder)
    elif folder.exists():
        old = Path(tempfile.mkdtemp(prefix="old-", dir=root / STAGING))
        move(folder, old / name)
        shutil.rmtree(old, ignore_errors=True)


def record_file(root: Path, name: SlotName) -> Path:
    """A copy of what the state says of a slot, for the day on which the state is damaged."""
    return root / SLOT_FOLDER / f"{name}.json"


def write_record(root: Path, name: SlotName, slot: Slot) -> None:
    """Write the record of a slot, durably."""
    write_file(record_file(root, name), json_text(slot.model_dump()).encode())


def read_record(root: Path, name: SlotName) -> Slot | None:
    """The record of a slot; None where there is none, or a damaged one."""
    try:
        return Slot.model_validate(read_json_object(record_file(root, name)))
    except (AmoebaError, ValidationError):
        return None


def verify_slot(root: Path, name: SlotName, slot: Slot) -> None:
    """Check that a slot holds the bundle that the state says, byte for byte.

    Raises:
        VerificationFailed: it does not.
    """
    folder = slot_folder(root, name)
    if folder.is_symlink() or folder.parent.is_symlink() or not (folder / MANIFEST).is_file():
        raise VerificationFailed(f"{folder}: does not hold the bundle that was installed")
    if sha256_of(folder / MANIFEST) != slot.manifest:
        raise VerificationFailed(f"{folder / MANIFEST}: was changed after it was installed")
    try:
        verify_files(folder)
    except (BadInput, VerificationFailed) as error:
        raise VerificationFailed(str(error).rpartition("; ")[0] or str(error)) from None


def damage(root: Path, name: SlotName, slot: Slot) -> str | None:
    """What a quick look finds wrong with a slot, where and what; None where nothing is.

    Its manifest must be the one installed, and the files listed there must have their sizes; nothing else is read.
    """
    folder = slot_folder(root, name)
    if folder.is_symlink() or folder.parent.is_symlink() or not folder.is_dir():
        return f"{folder}: is no folder with the bundle that was installed"
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():
            return f"{manifest}: is missing"
        if sha256_of(manifest) != slot.manifest:
            return f"{manifest}: was changed after it was installed"
        for name_there, entry in read_manifest(folder)["files"].items():
            file = folder / name_there
            if file.is_symlink() or not file.is_file():
                return f"{file}: is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{file}: has {file.stat().st_size} bytes, and {entry['bytes']} were installed"
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror})"
    except AmoebaError as error:
        return str(error)
    return None
