"""The switch from one slot to another, and what undoes one that was cut off.

The state says ``pending`` before ``current`` changes and until the new engine has passed its health check. Whoever
finds it so later knows that the switch was cut off, and goes back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from amoeba_deploy.device.durable import make_folder
from amoeba_deploy.device.health import Health
from amoeba_deploy.device.slots import (
    CURRENT,
    SLOT_FOLDER,
    STAGING,
    current_slot,
    empty_slot,
    point_current,
    verify_slot,
)
from amoeba_deploy.device.source import PULL
from amoeba_deploy.device.state import Refused, SlotName, State, read_state, write_state
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed


def make_folders(root: Path) -> None:
    """Make the folders of a device that are not there; raises BadInput where a link is in their place."""
    for name in (SLOT_FOLDER, STAGING):
        if (root / name).is_symlink():
            raise BadInput(f"{root / name}: is a link, and a folder belongs there; remove it")
        make_folder(root / name)


def clear_staging(root: Path) -> None:
    """Remove what was on its way, but for a pull that can go on; it is on no path to what runs."""
    for path in (root / STAGING).iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != PULL:
            shutil.rmtree(path, ignore_errors=True)


def switch(
    root: Path,
    state: State,
    name: SlotName,
    check: Callable[[Path], Health],
    when_failed: Callable[[str], Refused],
    leaves: Refused | None = None,
) -> tuple[State, Health]:
    """Let ``current`` name a slot whose bundle is complete and synced, and confirm it when it is healthy.

    Args:
        root: the device's folder.
        state: in which that slot is filled and not confirmed.
        name: the slot.
        check: the health check of the bundle at a path.
        when_failed: what is noted of a bundle that fails, from the reason.
        leaves: what is noted of the bundle that ran, where it shall not come back by itself.

    Raises:
        VerificationFailed: it is not healthy; what ran before runs again.
    """
    slot = state.slots[name]
    assert slot is not None
    pending = state.changed(pending=name)
    write_state(root, pending)
    try:
        point_current(root, name)
        health = check(root / CURRENT)
        serials = [serial for serial in (state.highest_serial, slot.serial) if serial is not None]
        confirmed = pending.holding(name, slot.model_copy(update={"confirmed": True})).changed(
            confirmed=name, pending=None, highest_serial=max(serials, default=None)
        )
        confirmed = confirmed.refusing(*([leaves] if leaves else []), but=slot.digest)
        write_state(root, confirmed)
    except AmoebaError as error:
        undo(root, pending.refusing(when_failed(str(error))))
        now = "what ran before runs again" if state.confirmed else "nothing runs, as before"
        raise VerificationFailed(f"{slot.source}: is not healthy here: {error}; {now}") from None
    except BaseException:
        undo(root, pending)
        raise
    return confirmed, health


def undo(root: Path, state: State) -> State:
    """Go back from a pending switch; a bundle that never was healthy here is given up."""
    name = state.pending
    assert name is not None
    slot = state.slots[name]
    point_current(root, state.confirmed)
    kept = slot if slot is not None and slot.confirmed else None
    after = state.changed(pending=None, slots={**state.slots, name: kept})
    write_state(root, after)
    if kept is None:
        empty_slot(root, name)
    return after


def recovered(root: Path, to_replace: bool = False) -> tuple[State, list[str]]:
    """The state, after what was cut off was undone; and what was done for that, a sentence each.

    ``to_replace``: another bundle is about to be installed, so none need be whole where ``current`` was changed.

    Raises:
        BadInput: the state is damaged.
        VerificationFailed: ``current`` is not what it should be, and no slot that was confirmed is whole.
    """
    state, done = read_state(root), []
    if state.pending is not None:
        done.append(f"the switch to slot {state.pending} was not confirmed and is undone")
        state = undo(root, state)
    for name, slot in state.slots.items():
        if slot is None:
            empty_slot(root, name)
    try:
        right = current_slot(root) == state.confirmed
    except VerificationFailed:
        if not (root / CURRENT).is_symlink():
            raise
        right = False
    if not right:
        running = state.running
        try:
            if state.confirmed and running:
                verify_slot(root, state.confirmed, running)
        except VerificationFailed as error:
            return _without_running(root, state, done, error, to_replace)
        point_current(root, state.confirmed)
        done.append(f"{root / CURRENT} was changed and is set right")
    return state, done


def _without_running(
    root: Path, state: State, done: list[str], error: VerificationFailed, to_replace: bool
) -> tuple[State, list[str]]:
    """The state where ``current`` was changed and the confirmed slot is damaged."""
    try:
        state, said = fall_back(root, state, str(error))
        return state, [*done, said]
    except VerificationFailed:
        if not to_replace:
            raise
    point_current(root, None)
    state = state.changed(confirmed=None)
    write_state(root, state)
    return state, [*done, f"nothing runs: {error}"]


def fall_back(root: Path, state: State, reason: str) -> tuple[State, str]:
    """Let the other slot run where the confirmed one is damaged, and empty that; what was done, in a sentence.

    Raises:
        VerificationFailed: the other slot is empty, was never confirmed, or is damaged, too.
    """
    damaged, name = state.confirmed, state.previous
    slot = state.slots[name] if name else None
    if damaged is None or name is None or slot is None or not slot.confirmed:
        raise VerificationFailed(f"{reason}; no other bundle is kept, so install one with 'amoeba bundle install'")
    try:
        verify_slot(root, name, slot)
    except VerificationFailed as error:
        raise VerificationFailed(f"{reason}; the other slot is damaged, too ({error}): install a bundle") from None
    pending = state.changed(pending=name)
    write_state(root, pending)
    point_current(root, name)
    after = pending.changed(confirmed=name, pending=None).holding(damaged, None)
    write_state(root, after)
    empty_slot(root, damaged)
    return after, f"{reason}; slot {name}, which ran before, runs again"
