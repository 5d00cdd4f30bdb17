"""What runs on a device and what is kept; and the way back from a switch that was cut off, or a damaged state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.bundle import MANIFEST, verify_files
from amoeba_deploy.delivery.release import read_release
from amoeba_deploy.device.health import Health, HealthCheck, check_health
from amoeba_deploy.device.install import check_device, now, title, within
from amoeba_deploy.device.lock import locked
from amoeba_deploy.device.slots import (
    CURRENT,
    current_slot,
    damage,
    empty_slot,
    point_current,
    read_record,
    slot_folder,
    verify_slot,
)
from amoeba_deploy.device.state import SLOTS, STATE, Slot, SlotName, State, read_state, write_state
from amoeba_deploy.device.switch import fall_back, recovered
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.files import sha256_of
from amoeba_deploy.progress import Progress


@dataclass(frozen=True)
class Status:
    """What was found, and what recovery did."""

    root: Path
    device: str | None
    state: State
    current: SlotName | None
    damaged: tuple[str, ...] = ()
    """What a quick look found wrong with the slot that does not run."""
    recovered: tuple[str, ...] = ()
    checked: Health | None = None
    """What was found of the engine that runs, where it was to be checked."""

    @property
    def previous(self) -> SlotName | None:
        """The slot that a rollback goes to, which is not damaged."""
        return None if self.damaged else self.state.previous

    def to_json(self) -> dict[str, Any]:
        """The object that ``bundle status --json`` prints."""
        state = self.state.model_dump()
        return {
            "root": str(self.root),
            "device": self.device,
            "current": self.current,
            "confirmed": state["confirmed"],
            "pending": state["pending"],
            "previous": self.previous,
            "damaged": list(self.damaged),
            "highest_serial": state["highest_serial"],
            "refused": state["refused"],
            "slots": state["slots"],
            "recovered": list(self.recovered),
            "checked": vars(self.checked) if self.checked else None,
        }

    def text(self) -> str:
        """The same for people."""
        state, lines = self.state, [f"recovered: {done}" for done in self.recovered]
        running = state.running
        runs = f"runs {title(running)}, in slot {state.confirmed}" if running else "nothing is installed"
        found = f"; every file as it was installed{self._tokens()}" if self.checked else ""
        lines.append(f"{self.root}: {runs}{found}")
        previous = state.slots[self.previous] if self.previous else None
        if previous:
            lines.append(f"kept for a rollback: {title(previous)}, in slot {self.previous}")
        lines += [f"damaged, so there is no rollback: {each}" for each in self.damaged]
        if state.pending:
            lines.append(
                f"a switch to slot {state.pending} is not confirmed: an install is at work, or was cut off and 'amoeba "
                f"bundle status --root {self.root} --recover' undoes it"
            )
        lines += [f"not installed again by itself: {each.digest} ({each.reason})" for each in state.refused]
        return "\n".join(lines)

    def _tokens(self) -> str:
        tokens = self.checked.selftest_tokens if self.checked else None
        return f", {tokens} self-test tokens equal" if tokens is not None else ", its engine only its own tools run"


def status(root: Path, check: bool = False) -> Status:
    """What runs on a device; writes nothing.

    What runs is looked at quickly: its manifest's digest, and that every listed file is there in its size. With
    ``check`` every file is hashed, and the engine must pass its self-test.

    Raises:
        BadInput: the folder or its state cannot be read.
        VerificationFailed: ``current`` is missing or names what it should not, or what it names is damaged.
    """
    root = root.absolute()
    if not root.is_dir():
        raise BadInput(f"{root}: is no folder; install a bundle there with 'amoeba bundle install'")
    seen = _look(root)
    while seen[0] != read_state(root):  # a command is at work
        seen = _look(root)
    state, current, damages = seen
    how = f"run 'amoeba bundle status --root {root} --recover', or install a bundle"
    if current not in (state.confirmed, state.pending) or (current is None and state.confirmed):
        names = f"names slot {current}" if current else "is missing, so nothing runs"
        raise VerificationFailed(
            f"{root / CURRENT}: {names}, and {_slot_named(state.confirmed)} is confirmed; run 'amoeba bundle status "
            f"--root {root} --recover'"
        )
    for name in (current, state.confirmed):
        if name in damages:
            raise VerificationFailed(f"{damages[name]}, so what runs is damaged; {how}")
    checked = _checked(root, state) if check else None
    return Status(root, check_device(root, None), state, current, tuple(damages.values()), checked=checked)


def _look(root: Path) -> tuple[State, SlotName | None, dict[SlotName, str]]:
    """The state, what ``current`` names, and what is wrong with the slots."""
    state, current = read_state(root), current_slot(root)
    found = {name: damage(root, name, slot) for name, slot in state.slots.items() if slot is not None}
    return state, current, {name: said for name, said in found.items() if said is not None}


def _slot_named(name: SlotName | None) -> str:
    return f"slot {name}" if name else "none"


def _checked(root: Path, state: State) -> Health | None:
    """Hash what runs, and run its self-test; None where nothing runs."""
    name, slot = state.confirmed, state.running
    if name is None or slot is None:
        return None
    how = f"run 'amoeba bundle status --root {root} --recover --check', or install a bundle"
    try:
        verify_slot(root, name, slot)
    except VerificationFailed as error:
        raise VerificationFailed(f"{error}, so what runs is damaged; {how}") from None
    try:
        opens = load_backend(slot.flow).opens
        return check_health(root, slot_folder(root, name), HealthCheck(None, selftest=opens))
    except VerificationFailed as error:
        raise VerificationFailed(
            f"{slot_folder(root, name)}: is whole and not healthy: {error}; mend that, install another bundle, or go "
            f"back with 'amoeba bundle rollback --root {root}'"
        ) from None


def recover(root: Path, progress: Progress, wait: bool = False, check: bool = False) -> Status:
    """Undo a switch that was cut off, set ``current`` right, and rebuild a damaged state from the slots.

    Where what runs is damaged, the other slot runs if it is whole and was confirmed. ``check`` is that of ``status``.

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
        state, done = recovered(root)
        done += _replaced(root, state, check)
        found = status(root, check)
        return replace(found, recovered=(*rebuilt, *done))


def _replaced(root: Path, state: State, check: bool) -> list[str]:
    """Let the other slot run where what runs is damaged; what was done for that.

    One that is whole and fails its self-test stays: what it needs on this machine may be what is wrong.
    """
    name, slot = state.confirmed, state.running
    if name is None or slot is None:
        return []
    said = damage(root, name, slot)
    if said is None and check:
        try:
            verify_slot(root, name, slot)
        except VerificationFailed as error:
            said = str(error)
    return [fall_back(root, state, said)[1]] if said else []


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
        sha = sha256_of(folder / MANIFEST)
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
