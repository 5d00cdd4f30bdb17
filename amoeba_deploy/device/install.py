"""Installing a bundle on a device: fetched, verified, found fit, brought into the slot that is idle, and switched to.

Nothing is written outside the device's folder, and nothing into the slot that ``current`` names.
"""

from __future__ import annotations

import datetime
import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import MANIFEST, finish_bundle, read_manifest, require_runnable, run_step, verify_files
from amoeba_deploy.delivery.release import read_release
from amoeba_deploy.delivery.trust import Trust
from amoeba_deploy.device.durable import move, sync_tree, write_file
from amoeba_deploy.device.fitness import check_fitness
from amoeba_deploy.device.health import Health, HealthCheck, check_command, check_health
from amoeba_deploy.device.lock import locked
from amoeba_deploy.device.slots import (
    DEVICE,
    SLOT_FOLDER,
    STAGING,
    TRUST,
    damage,
    empty_slot,
    slot_folder,
    write_record,
)
from amoeba_deploy.device.source import Source, Target, find_source
from amoeba_deploy.device.state import Refused, Slot, SlotName, State, read_state, write_state
from amoeba_deploy.device.switch import clear_staging, make_folders, recovered, switch
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.files import sha256_of, system_refusal
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import shape_text


@dataclass(frozen=True)
class InstallOptions:
    """How to install."""

    trust: tuple[Path, ...] = ()
    """Keys and authorities; those in ``ROOT/trust`` where none are given."""
    unsigned: bool = False
    """No signature is asked for."""
    device: str | None = None
    """This device's name, kept from the first install on."""
    allow_older: bool = False
    retry: bool = False
    """Try a bundle again that failed here or was rolled back from."""
    drop_previous: bool = False
    """Make room: give up the bundle that a rollback would go back to before anything is fetched."""
    plain_http: bool = False
    wait: bool = False
    health: HealthCheck = field(default_factory=HealthCheck)


@dataclass(frozen=True)
class Installed:
    """What runs after an install, and what was done for it."""

    root: Path
    name: SlotName
    slot: Slot
    unchanged: bool
    steps: int = 0
    health: Health | None = None
    recovered: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``bundle install --json`` prints."""
        return {
            "root": str(self.root),
            "slot": self.name,
            "unchanged": self.unchanged,
            "bundle": self.slot.model_dump(),
            "steps": self.steps,
            "health": vars(self.health) if self.health else None,
            "recovered": list(self.recovered),
        }

    def text(self) -> str:
        """The same for people."""
        if self.unchanged:
            return f"{self.root}: runs {title(self.slot)} already, nothing was done"
        checked = f"; {self.health.text()}" if self.health else ""
        return f"{self.root}: runs {title(self.slot)} now, in slot {self.name}{checked}"


def title(slot: Slot) -> str:
    """What a slot holds, in a few words."""
    release = "no release" if slot.serial is None else f"release {slot.serial}"
    signed = f"signed by {slot.signer}" if slot.signer else "its signature was not checked"
    try:
        shape = shape_text(slot.shape)
    except (KeyError, BadInput):  # of a later version's, or what somebody wrote
        shape = "of an unknown shape"
    return f"{slot.checkpoint} {shape} in {slot.flow} {slot.precision} ({release}, {signed})"


def now() -> str:
    """This moment in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def within(root: Path) -> Iterator[None]:
    """Say what the system refuses in one sentence, and keep temporary files and caches in the device's folder."""
    place = root / STAGING / "tmp"
    inside = {"TMPDIR": str(place), "AMOEBA_CACHE": str(place / "cache")}
    before = {name: os.environ.get(name) for name in inside}
    os.environ.update(inside)
    tempfile.tempdir = None
    try:
        make_folders(root)
        clear_staging(root)
        place.mkdir()
        try:
            yield
        finally:
            with suppress(OSError):
                clear_staging(root)
    except OSError as error:
        raise BadInput(f"{root}: {_refusal(error)}") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None


def _refusal(error: OSError) -> str:
    said = system_refusal(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some there, or install with --drop-previous, which gives up what a rollback would go back to"
        return f"{said.rpartition('; ')[0]}; {advice}"
    return said


def install(text: str, root: Path, options: InstallOptions, progress: Progress) -> Installed:
    """Install a bundle from a folder, an archive or a registry; what ran before runs again where that fails.

    Raises:
        BadInput: it is for another device, older than what it would replace, or cannot be fetched; no key is trusted;
            the disk is full.
        VerificationFailed: its signature or a digest does not hold, or its engine is not healthy here.
        ToolchainMissing: its engine is not installed here, or a step's tool.
    """
    root = root.absolute()
    source = find_source(text, options.plain_http)
    _check_apart(text, root)
    check_command(root, options.health.command)
    named = trusted(root, options) if options.trust else None
    with locked(root, options.wait), within(root):
        state, done = recovered(root, to_replace=True)
        for each in done:
            progress.say(f"recovered: {each}")
        name = check_device(root, options.device)
        digest = source.digest()
        running = state.running
        if running and state.confirmed and running.digest == digest and damage(root, state.confirmed, running) is None:
            return Installed(root, state.confirmed, running, True, recovered=tuple(done))
        refuse_again(source.name, state, digest, options.retry)
        installed = _install(root, state, source, digest, name, named, options, progress)
        if options.device and name is None:
            write_file(root / DEVICE, f"{options.device}\n".encode())
        return Installed(**{**vars(installed), "recovered": tuple(done)})


def _check_apart(text: str, root: Path) -> None:
    """Raise BadInput where a source lies in a part of the device's folder that an install may empty."""
    path = Path(text)
    for name in (STAGING, SLOT_FOLDER):
        if path.exists() and (root / name).resolve() in (path.resolve(), *path.resolve().parents):
            raise BadInput(
                f"{text}: lies in the device's own folder {root / name}, which installs empty; put it elsewhere, or go "
                f"back with 'amoeba bundle rollback --root {root}'"
            )


def check_device(root: Path, asked: str | None) -> str | None:
    """The name that this device has; raises BadInput where it is asked to be another."""
    file = root / DEVICE
    known = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None
    if known and asked and known != asked:
        raise BadInput(f"{file}: says that this device is {known}, and --device says {asked}; give the right one")
    return known or None


def refuse_again(name: str, state: State, digest: str, retry: bool) -> None:
    """Raise VerificationFailed where a delivery is one that failed here, unless it is to be tried again."""
    refused = state.refusal(digest)
    if refused is not None and not retry:
        raise VerificationFailed(
            f"{name}: is not installed again, since {refused.at}: {refused.reason}; install another, or this one with "
            f"--retry"
        )


def _install(
    root: Path,
    state: State,
    source: Source,
    digest: str,
    known_device: str | None,
    named: Trust | None,
    options: InstallOptions,
    progress: Progress,
) -> Installed:
    """Bring a bundle that is not what runs into the other slot, and switch to it.

    ``named`` are the keys of the options, where there are any; else those in ``ROOT/trust`` count.
    """
    other = state.other
    trust = named or trusted(root, options)
    if options.drop_previous and state.slots[other] is not None:
        state = _emptied(root, state, other)
    reuse = [slot_folder(root, name) for name, slot in state.slots.items() if slot is not None]
    progress.say(f"{source.name}: fetching")
    target = Target(root / STAGING, tuple(reuse), progress)
    source.fetch(target)
    staged = target.bundle
    with _named(staged, source.name):
        slot, manifest, openable = _verified(
            staged, source.name, digest, trust, known_device or options.device, options
        )
        check_age(source.name, slot, state, options.allow_older)
    state = _emptied(root, state, other)
    folder = slot_folder(root, other)
    try:
        move(staged, folder)
        with _named(folder, source.name):
            steps = _finish(folder, manifest, openable, progress)
        slot = slot.model_copy(update={"manifest": sha256_of(folder / MANIFEST)})
        sync_tree(folder)
        write_record(root, other, slot)
        progress.say("switching, and checking the engine's health")
        checked = HealthCheck(
            options.health.tolerance, options.health.command, options.health.timeout, selftest=openable
        )
        _, health = switch(
            root,
            state.holding(other, slot),
            other,
            lambda path: check_health(root, path, checked),
            lambda reason: Refused(digest=digest, reason=reason, at=now()),
        )
    except Exception:
        _give_back(root, other)
        raise
    return Installed(root, other, slot.model_copy(update={"confirmed": True}), False, steps, health)


def _emptied(root: Path, state: State, name: SlotName) -> State:
    """Empty a slot, after the state says so."""
    state = state.holding(name, None)
    write_state(root, state)
    empty_slot(root, name)
    return state


def _give_back(root: Path, name: SlotName) -> None:
    """Free what a slot takes that was not switched to; where even that fails, the next command does it."""
    with suppress(OSError, AmoebaError):
        if read_state(root).slots[name] is None:
            empty_slot(root, name)


def trusted(root: Path, options: InstallOptions) -> Trust | None:
    """The keys that a signature is held against; None where none is asked for. Raises BadInput where none is known."""
    if options.unsigned:
        return None
    folder = root / TRUST
    trust = Trust.of(options.trust) if options.trust else Trust.of_folder(folder)
    if not trust:
        where = options.trust[0] if options.trust else folder
        raise BadInput(
            f"{where}: holds no public key and no certificate authority, so no signature can be trusted; copy key.pub "
            f"of whoever signs to {folder}, or install with --unsigned"
        )
    return trust


def _verified(
    staged: Path, source: str, digest: str, trust: Trust | None, device: str | None, options: InstallOptions
) -> tuple[Slot, Mapping[str, Any], bool]:
    """What a fetched bundle is, after its signature, digests and fitness were checked; and if its engine opens here."""
    signer, digests = None, None
    if trust is not None:
        from amoeba_deploy.delivery.signing import verify_signature

        signed = verify_signature(staged, trust)
        signer, digests = signed.signer, signed.digests
    manifest = verify_files(staged, digests)
    openable = check_fitness(staged, manifest, device, options.health.command is not None)
    release = read_release(staged)
    sha = sha256_of(staged / MANIFEST)
    slot = Slot(
        source=source,
        digest=digest,
        delivered=sha,
        manifest=sha,
        serial=release.serial if release else None,
        signer=signer,
        checkpoint=manifest["checkpoint"],
        flow=manifest["flow"],
        precision=manifest["precision"],
        shape=manifest["shape"],
        device=manifest["device"],
        installed=now(),
        confirmed=False,
    )
    return slot, manifest, openable


def check_age(source: str, slot: Slot, state: State, allow_older: bool) -> None:
    """Raise BadInput where a bundle is older than one that was confirmed here."""
    floor = state.highest_serial
    if allow_older or floor is None or (slot.serial is not None and slot.serial >= floor):
        return
    what = "has no release number" if slot.serial is None else f"is release {slot.serial}"
    raise BadInput(
        f"{source}: {what}, and this device had release {floor} already; get a newer one, or add --allow-older"
    )


def _finish(folder: Path, manifest: Mapping[str, Any], openable: bool, progress: Progress) -> int:
    """Run the steps that are left, in the slot; how many."""

    def run(step: Mapping[str, str]) -> None:
        progress.say(f"{step.get('does')}: {step.get('command')}")
        run_step(folder, step)

    if not manifest["steps"]:
        return 0
    ran = finish_bundle(folder, run).ran
    if openable:
        require_runnable(folder, read_manifest(folder))
    return ran


@contextmanager
def _named(folder: Path, source: str) -> Iterator[None]:
    """Let what is wrong with a fetched bundle be said of where it is from."""
    try:
        yield
    except AmoebaError as error:
        raise type(error)(str(error).replace(str(folder), source)) from None
