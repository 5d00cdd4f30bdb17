"""What runs on a device and what is kept; and the way back from a switch that was cut off, or a damaged state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import MANIFEST, verify_files
from amoeba_deploy.delivery.release import read_release
from amoeba_deploy.device.health import HealthCheck, check_health
from amoeba_deploy.device.install import check_device, now, title, within
from amoeba_deploy.device.lock import locked
from amoeba_deploy.device.slots import (
    CURRENT,
    current_slot,
    empty_slot,
    point_current,
    read_record,
    slot_folder,
    verify_slot,
)
from amoeba_deploy.device.state import SLOTS, STATE, Slot, SlotName, State, read_state, sha256_hex, write_state
from amoeba_deploy.device.switch import recovered
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.progress import Progress


@dataclass(frozen=True)
class Status:
    """What was found, and what recovery did."""

    root: Path
    device: str | None
    state: State
    current: SlotName | None
    recovered: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``bundle status --json`` prints."""
        previous, state = self.state.previous, self.state.model_dump()
        return {
            "root": str(self.root),
            "device": self.device,
            "current": self.current,
            "confirmed": state["confirmed"],
            "pending": state["pending"],
            "previous": previous,
            "highest_serial": state["highest_serial"],
            "refused": state["refused"],
            "slots": state["slots"],
            "recovered": list(self.recovered),
        }

    def text(self) -> str:
        """The same for people."""
        state, lines = self.state, [f"recovered: {done}" for done in self.recovered]
        running = state.running
        runs = f"runs {title(running)}, in slot {state.confirmed}" if running else "nothing is installed"
        lines.append(f"{self.root}: {runs}")
        previous = state.slots[state.previous] if state.previous else None
        if previous:
            lines.append(f"kept for a rollback: {title(previous)}, in slot {state.previous}")
        if state.pending:
            lines.append(
                f"a switch to slot {state.pending} is not confirmed: an install is at work, or was cut off and 'amoeba "
                f"bundle status --root {self.root} --recover' undoes it"
            )
        if state.refused:
            lines.append(f"not installed again by itself: {state.refused.digest} ({state.refused.reason})")
        return "\n".join(lines)


def status(root: Path) -> Status:
    """What runs on a device; writes nothing.

    Raises:
        BadInput: the folder or its state cannot be read.
        VerificationFailed: ``current`` names what it should not.
    """
    root = root.absolute()
    if not root.is_dir():
        raise BadInput(f"{root}: is no folder; install a bundle there with 'amoeba bundle install'")
    state, current = read_state(root), current_slot(root)
    while state != (after := read_state(root)):  # a command is at work
        state, current = after, current_slot(root)
    if current not in (state.confirmed, state.pending):
        raise VerificationFailed(
            f"{root / CURRENT}: names slot {current}, and {state.confirmed or 'none'} is confirmed; run 'amoeba bundle "
            f"status --root {root} --recover'"
        )
    return Status(root, check_device(root, None), state, current)


def recover(root: Path, progress: Progress, wait: bool = False) -> Status:
    """Undo a switch that was cut off, set ``current`` right, and rebuild a damaged state from the slots.

    Raises:
        BadInput: the folder cannot be written.
        VerificationFailed: no slot holds a bundle that is whole and works.
    """
    root = root.absolute()
    if not root.is_dir():
        raise BadInput(f"{root}: is no folder; install a bundle there with 'amoeba bundle install'")
    with locked(root, wait), within(root):
        rebuilt = []
        try:
            read_state(root)
        except BadInput:
            rebuilt = _rebuild(root, progress)
        _, done = recovered(root)
        found = status(root)
        return Status(root, found.device, found.state, found.current, (*rebuilt, *done))


def _rebuild(root: Path, progress: Progress) -> list[str]:
    """Write the state anew: what runs is what ``current`` names if it works, else the other slot if that does."""
    progress.say(f"{root / STATE}: is damaged, looking into the slots")
    whole = {name: slot for name in SLOTS if (slot := _known(root, name)) is not None}
    try:
        first = current_slot(root)
    except VerificationFailed:
        first = None
    order = sorted(whole, key=lambda name: name != first)
    for name in order:
        try:
            check_health(root, slot_folder(root, name), HealthCheck(tolerance=None))
        except AmoebaError as error:
            progress.say(f"slot {name}: {error}")
            continue
        return _write_rebuilt(root, name, whole)
    if any(slot_folder(root, name).exists() for name in SLOTS):
        raise VerificationFailed(
            f"{root}: neither slot holds a bundle that is whole and works; remove {STATE}, {CURRENT} and slots there, "
            f"and install a bundle"
        )
    point_current(root, None)
    write_state(root, State())
    return [f"{STATE} is rebuilt: nothing is installed"]


def _known(root: Path, name: SlotName) -> Slot | None:
    """What a slot holds, if it is whole: by its record, or else by its own manifest."""
    folder, slot = slot_folder(root, name), read_record(root, name)
    try:
        if slot is not None:
            verify_slot(root, name, slot)
            return slot
        if folder.is_symlink() or not folder.is_dir():
            return None
        manifest, release = verify_files(folder), read_release(folder)
        sha = sha256_hex((folder / MANIFEST).read_bytes())
        return Slot(
            source=str(folder),
            digest=f"sha256:{sha}",
            delivered=sha,
            manifest=sha,
            serial=release.serial if release else None,
            signer=None,
            **{key: manifest[key] for key in ("checkpoint", "flow", "precision", "shape", "device")},
            installed=now(),
            confirmed=False,
        )
    except (AmoebaError, KeyError, ValueError):
        return None


def _write_rebuilt(root: Path, name: SlotName, whole: dict[SlotName, Slot]) -> list[str]:
    confirmed = {each: slot.model_copy(update={"confirmed": True}) for each, slot in whole.items()}
    serials = [slot.serial for slot in whole.values() if slot.serial is not None]
    slots: dict[SlotName, Slot | None] = {each: confirmed.get(each) for each in SLOTS}
    point_current(root, name)
    write_state(root, State(confirmed=name, highest_serial=max(serials, default=None), slots=slots))
    for each in SLOTS:
        if slots[each] is None:
            empty_slot(root, each)
    return [
        f"{STATE} is rebuilt: slot {name} works and is confirmed; the highest release known is that of the slots",
    ]
