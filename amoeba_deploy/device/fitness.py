"""Whether a bundle is for the device that it is brought to: its name, chip, memory, and the engine installed there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.bundle import foreign_to, require_runnable
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.manifest import check_manifest
from amoeba_deploy.profiles.machine import memory_bytes, own_chips
from amoeba_deploy.selftest import read_selftest


def check_fitness(folder: Path, manifest: Mapping[str, Any], device: str | None, has_health_command: bool) -> bool:
    """Whether the engine of a bundle can be opened here to be tried; steps that are left may still finish it.

    Args:
        folder: the bundle, whose files are verified.
        manifest: its manifest.
        device: the name of this device, where it has one.
        has_health_command: whether an engine that only its own tools run will be tried by a command of the user's.

    Raises:
        BadInput: the bundle is damaged, or for another device.
        ToolchainMissing: its engine is not installed here, or not in a version that runs it.
    """
    check_manifest(manifest, folder)
    read_selftest(folder)
    _check_device(folder, manifest, device)
    host = next((step for step in manifest["steps"] if step.get("where") == "host"), None)
    if host is not None:
        raise ToolchainMissing(
            f"{folder}: the step to {host.get('does')} is for a host; run 'amoeba bundle finish' on "
            f"{host.get('needs') or 'one'} first, and sign the bundle then"
        )
    backend = load_backend(manifest["flow"])
    foreign = foreign_to(manifest["identity"], backend.toolchain().versions)
    if foreign:
        raise BadInput(f"{folder}: its engine {foreign}; build it for this device, or install it there")
    if not backend.opens:
        if not has_health_command:
            raise ToolchainMissing(
                f"{folder}: only its engine's own tools run a {backend.flow} engine; give a command that tries it "
                f"with --health"
            )
        return False
    require_runnable(folder, {**manifest, "steps": []})
    return True


def _check_device(folder: Path, manifest: Mapping[str, Any], device: str | None) -> None:
    if device is not None and manifest["device"] != device:
        raise BadInput(
            f"{folder}: was built for the device {manifest['device']}, and this one is {device}; build it for this one"
        )
    needed, found = manifest["predicted"]["memory_bytes"], memory_bytes()
    # Where a GPU has memory of its own, how much the machine has says nothing.
    if needed > found and own_chips()[1:] in ((), ("sm_87",)):
        raise BadInput(
            f"{folder}: needs {needed / 1e9:.2f} GB of memory, and this machine has {found / 1e9:.2f} GB; build it "
            f"with a lower --memory"
        )
