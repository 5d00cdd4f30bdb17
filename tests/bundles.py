"""Small bundles with real engines for tests of their delivery, and devices that they are installed on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import amoeba
from signers import KeyPair, make_key

from amoeba_deploy.bundle import read_manifest, run_selftest, write_manifest
from amoeba_deploy.delivery.signing import sign
from amoeba_deploy.device import health
from amoeba_deploy.device.slots import current_slot, slot_folder, verify_slot
from amoeba_deploy.device.state import State, read_state

DEVICE = "raspberry-pi-5"


def build(folder: Path, flow: str = "onnx", precision: str = "int8", device: str = DEVICE) -> Path:
    """A bundle of the checkpoint that ships in the package, cut small; about a second."""
    options = ("--device", device, "--flow", flow, "--precision", precision, "--shape", "6x0.5", "--no-verify")
    done = amoeba("export", *options, "-o", folder, "--quiet")
    assert done.exit_code == 0, done.output
    return folder


def change(folder: Path, **facts: Any) -> Path:
    """Write a bundle's manifest anew, over the files that are there now; entries may be changed."""
    old = {key: value for key, value in read_manifest(folder).items() if key not in ("format", "files")}
    write_manifest(folder, old | facts)
    return folder


def step(command: str, does: str = "compile the engine") -> dict[str, str]:
    """A step that runs a line of the shell in the bundle's folder."""
    return {"does": does, "command": f"sh -c '{command}'", "needs": "sh", "where": "device"}


def spoil_weights(folder: Path) -> Path:
    """Let the engine give other tokens, although all digests fit."""
    file = folder / "engine" / "weights.int8.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes((13 * index) % 251 for index in range(len(data) - len(data) // 2))
    file.write_bytes(data)
    return change(folder)


@dataclass(frozen=True)
class Shop:
    """Where bundles come from: one that was built, and the key that signs what is made of it."""

    place: Path
    built: Path
    pair: KeyPair

    @classmethod
    def make(cls, place: Path) -> Shop:
        return cls(place, build(place / "built"), make_key(place / "keys"))

    def release(self, serial: int, name: str | None = None, **facts: Any) -> Path:
        """A signed copy of the bundle; entries of its manifest may be changed."""
        folder = Path(shutil.copytree(self.built, self.place / (name or f"release-{serial}")))
        change(folder, **facts)
        sign(folder, self.pair.private, serial=serial)
        return folder

    def device(self, root: Path) -> Path:
        """The folder of a device that trusts the key."""
        (root / "trust").mkdir(parents=True)
        shutil.copy(self.pair.public, root / "trust")
        return root


def copy_device(root: Path, target: Path) -> Path:
    """A device's folder as it is; files are hard links, so whoever writes into one writes into both."""
    return Path(shutil.copytree(root, target, symlinks=True, copy_function=os.link))


def own_copy(root: Path, target: Path) -> Path:
    """A device's folder as it is."""
    return Path(shutil.copytree(root, target, symlinks=True))


def started(*arguments: object, environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "amoeba_deploy", *map(str, arguments)],
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
        **options,
    )


@contextmanager
def checked_here() -> Iterator[None]:
    """Let health checks open their engines in this process, which takes a third of a second less."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(health, "_checked_apart", lambda folder, wanted: health.probe(folder, wanted.tolerance))
        yield


def install(source: object, root: Path, *options: object) -> dict[str, Any]:
    """Install a bundle, which must succeed; what the command prints."""
    done = amoeba("bundle", "install", source, "--root", root, "--json", "--quiet", *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def try_install(source: object, root: Path, *options: object) -> Result:
    """Try to install a bundle; what came of it."""
    return amoeba("bundle", "install", source, "--root", root, "--quiet", *options)


def check_running(root: Path, engine: bool = True) -> State | None:
    """What must hold at every moment, before any recovery: ``current`` names a whole slot whose engine works.

    The state, or None where nothing is installed. Without ``engine`` digests alone say that it is what once worked.
    """
    name = current_slot(root)
    state = read_state(root)
    if name is None:
        assert state.confirmed is None
        return None
    assert name in (state.confirmed, state.pending)
    slot = state.slots[name]
    assert slot is not None
    verify_slot(root, name, slot)
    folder = slot_folder(root, name)
    assert (root / "current").resolve() == folder.resolve()
    if engine:
        assert run_selftest(root / "current", read_manifest(folder)) > 0
    return state


def check_confirmed(root: Path, engine: bool = True) -> State:
    """The same after a recovery: what runs is confirmed, and nothing is left half done."""
    state = check_running(root, engine)
    assert state is not None
    assert state.pending is None
    assert state.confirmed == current_slot(root)
    for name, slot in state.slots.items():
        assert (slot is not None) == slot_folder(root, name).exists()
    left = {path.name for path in (root / "staging").iterdir()} - {"pull"}
    assert left == set()
    return state
