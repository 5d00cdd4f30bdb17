"""What a device knows of its slots: ``state.json``, one small file that is replaced whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from amoeba_deploy.device.durable import write_file
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import json_text, read_json

STATE = "state.json"
STATE_FORMAT = "amoeba.device-state/1"
REMEMBERED = 16
"""How many refused deliveries are remembered."""
SlotName = Literal["a", "b"]
SLOTS: tuple[SlotName, SlotName] = ("a", "b")
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Serial = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Slot(_Part):
    """The bundle in a slot: where it is from, what it is, and by what it is recognised."""

    source: str
    """As it was given to ``install``."""
    digest: Digest
    """Of what was delivered: a registry's, an archive's, or over a folder's manifest and release."""
    delivered: Hex
    """sha256 of the manifest as it was delivered and signed."""
    manifest: Hex
    """sha256 of the manifest in the slot, which steps may have changed."""
    serial: Serial | None
    """Of its release; None where it has none."""
    signer: str | None
    """Whose signature it is; None where it was installed without."""
    checkpoint: str
    flow: str
    precision: str
    shape: dict[str, Any]
    device: str
    """For which it was built."""
    installed: str
    """UTC, ISO 8601."""
    confirmed: bool
    """Whether it passed its health check here, ever."""


class Refused(_Part):
    """A delivery that is not installed again by itself: it failed here, or was rolled back from."""

    digest: Digest
    reason: str
    at: str


class State(_Part):
    """Which slot is right (confirmed), which a switch was begun to (pending), and what both hold."""

    format: Literal["amoeba.device-state/1"] = "amoeba.device-state/1"
    confirmed: SlotName | None = None
    pending: SlotName | None = None
    highest_serial: Serial | None = None
    """The highest that was ever confirmed; it never falls."""
    refused: list[Refused] = []
    """Deliveries that are not installed again by themselves, the latest first."""
    slots: dict[SlotName, Slot | None] = {"a": None, "b": None}

    @model_validator(mode="after")
    def _whole(self) -> State:
        if set(self.slots) != set(SLOTS):
            raise ValueError("it must have the slots a and b")
        for name in (self.confirmed, self.pending):
            if name is not None and self.slots[name] is None:
                raise ValueError(f"slot {name} is in use and empty")
        if self.pending is not None and self.pending == self.confirmed:
            raise ValueError("a slot is both confirmed and pending")
        return self

    @property
    def running(self) -> Slot | None:
        """The confirmed bundle."""
        return self.slots[self.confirmed] if self.confirmed else None

    @property
    def other(self) -> SlotName:
        """The slot that is not the confirmed one."""
        return "b" if self.confirmed == "a" else "a"

    @property
    def previous(self) -> SlotName | None:
        """The slot that a rollback goes to."""
        kept = self.slots[self.other] is not None and self.pending is None and self.confirmed is not None
        return self.other if kept else None

    def changed(self, **entries: Any) -> State:
        """The same but for some entries."""
        return State(**{**dict(self), **entries})

    def refusing(self, *more: Refused, but: str | None = None) -> State:
        """The same with more deliveries refused, and one (a digest) not any longer; the latest are remembered."""
        gone = {but, *(each.digest for each in more)}
        return self.changed(refused=[*more, *(each for each in self.refused if each.digest not in gone)][:REMEMBERED])

    def refusal(self, digest: str) -> Refused | None:
        """Why a delivery is not installed again by itself; None where it is."""
        return next((each for each in self.refused if each.digest == digest), None)

    def holding(self, name: SlotName, slot: Slot | None) -> State:
        """The same with another bundle, or none, in a slot."""
        return self.changed(slots={**self.slots, name: slot})


def read_state(root: Path) -> State:
    """The state of a device; an empty one where nothing was installed yet.

    Raises:
        BadInput: the file is damaged, or missing although slots are filled.
    """
    file = root / STATE
    how = f"run 'amoeba bundle status --root {root} --recover', which rebuilds it from the slots"
    if not file.is_file():
        if any((root / "slots" / name).exists() for name in SLOTS) or (root / "current").is_symlink():
            raise BadInput(f"{file}: is missing, and slots are filled; {how}")
        return State()
    try:
        return State.model_validate(read_json(file, STATE_FORMAT))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{file}: is damaged ({f'{where}: ' if where else ''}{first['msg']}); {how}") from None
    except BadInput as error:
        raise BadInput(f"{error}; {how}") from None


def write_state(root: Path, state: State) -> None:
    """Replace the state, durably."""
    write_file(root / STATE, json_text(state.model_dump()).encode())
