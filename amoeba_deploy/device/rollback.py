"""Going back to the bundle that ran before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.device.health import Health, HealthCheck, check_command, check_health
from amoeba_deploy.device.install import now, title, within
from amoeba_deploy.device.lock import locked
from amoeba_deploy.device.slots import verify_slot
from amoeba_deploy.device.state import Refused, Slot, SlotName
from amoeba_deploy.device.switch import recovered, switch
from amoeba_deploy.errors import BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.progress import Progress


@dataclass(frozen=True)
class RolledBack:
    """What runs after a rollback, and what ran before it and is kept."""

    root: Path
    name: SlotName
    slot: Slot
    left: Slot | None
    health: Health

    def to_json(self) -> dict[str, Any]:
        """The object that ``bundle rollback --json`` prints."""
        return {
            "root": str(self.root),
            "slot": self.name,
            "bundle": self.slot.model_dump(),
            "left": self.left.model_dump() if self.left else None,
            "health": vars(self.health),
        }

    def text(self) -> str:
        """The same for people."""
        return f"{self.root}: runs {title(self.slot)} again, in slot {self.name}; {self.health.text()}"


def rollback(root: Path, check: HealthCheck, progress: Progress, wait: bool = False) -> RolledBack:
    """Switch to the bundle that ran before, if it is whole and healthy; another rollback goes forth again.

    What was left is not installed again by itself: a timer that polls a tag stays at what was chosen.

    Raises:
        BadInput: nothing is kept.
        VerificationFailed: what is kept was changed, or is not healthy any more; what runs goes on.
        ToolchainMissing: only its engine's own tools run it, and no command tries it.
    """
    root = root.absolute()
    check_command(root, check.command)
    with locked(root, wait), within(root):
        state, done_before = recovered(root)
        for each in done_before:
            progress.say(f"recovered: {each}")
        name = state.previous
        slot, left = (state.slots[name] if name else None), state.running
        if name is None or slot is None:
            raise BadInput(f"{root}: keeps no bundle to go back to; install one with 'amoeba bundle install'")
        try:
            verify_slot(root, name, slot)
        except VerificationFailed as error:
            raise VerificationFailed(f"{error}; what runs goes on, and installing another replaces it") from None
        opens = load_backend(slot.flow).opens
        if not opens and not check.command:
            raise ToolchainMissing(
                f"{root}: only its engine's own tools run what is kept; give a command that tries it with --health"
            )
        progress.say("switching, and checking the engine's health")
        wanted = HealthCheck(check.tolerance, check.command, check.timeout, selftest=opens)
        done, health = switch(
            root,
            state,
            name,
            lambda path: check_health(root, path, wanted),
            lambda reason: Refused(digest=slot.digest, reason=reason, at=now()),
            leaves=Refused(digest=left.digest, reason="it was rolled back from", at=now()) if left else None,
        )
        now_there = done.slots[name]
        assert now_there is not None
        return RolledBack(root, name, now_there, left, health)
