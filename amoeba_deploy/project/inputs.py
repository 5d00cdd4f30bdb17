"""What decides the bytes of a target's bundle, and the key of the cache that follows from it.

Every input has a name, so that a target that is built again can say which one changed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import installed_versions
from amoeba_deploy.checkpoint import EMBEDDED, own_digest
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.profiles.device import LOCAL, load_device
from amoeba_deploy.profiles.machine import fingerprint
from amoeba_deploy.project.asked import device_of
from amoeba_deploy.project.config import Loaded, Target
from amoeba_deploy.project.digests import FileDigests

BASE_PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
"""Packages that take part in every build."""
UNUSED = {"output", "registry", "private_key", "certificate", "chain", "needs"}
"""Entries of a target that say where its bundle goes, not what is in it."""


@dataclass(frozen=True)
class Inputs:
    """By name: digests, versions and options, as text."""

    values: Mapping[str, str]

    @property
    def key(self) -> str:
        """sha256 in hex over all of them."""
        return hashlib.sha256(json.dumps(sorted(self.values.items())).encode()).hexdigest()

    def changes(self, before: Mapping[str, str]) -> list[str]:
        """What differs from the inputs of an earlier build, each as half a sentence."""
        found = []
        for name in sorted({*self.values, *before}):
            old, new = before.get(name), self.values.get(name)
            if old == new:
                continue
            if old is None:
                found.append(f"{name} is new ({_short(new)})")
            elif new is None:
                found.append(f"{name} is gone ({_short(old)})")
            else:
                found.append(f"{name} changed from {_short(old)} to {_short(new)}")
        return found


def _short(value: str | None) -> str:
    text = str(value)
    if text.startswith("sha256:"):
        return text[:19] + "..."
    return text if len(text) <= 60 else text[:57] + "..."


@cache
def source_digest() -> str:
    """sha256 over the package's own files but the embedded checkpoint: a change of code is another tool."""
    root = Path(__file__).parent.parent
    files = sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and root / "demo" not in file.parents
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()


def _packages(flows: Sequence[str]) -> dict[str, str]:
    """Versions of every package that may take part, by flow."""
    found = dict(installed_versions(BASE_PACKAGES)[0])
    for flow in flows:
        try:
            found |= load_backend(flow).toolchain().versions
        except AmoebaError:
            continue  # said where the target is built
    return {f"package {name}": version for name, version in found.items()}


def inputs_of(loaded: Loaded, name: str, digests: FileDigests) -> Inputs:
    """All that decides the bytes of a target.

    Of a target for this machine the machine itself counts, not what its profile measured: that is measured once.

    Raises:
        BadInput: a file that a target names cannot be read, or its device is not known.
    """
    target = loaded.targets[name]
    named = device_of(loaded, target)
    device = load_device(named)
    flows = target.flow or [preference.flow for preference in device.flows]
    values = {
        "amoeba-deploy": f"{__version__} {source_digest()}",
        "checkpoint": _checkpoint(loaded.checkpoint or EMBEDDED, digests),
        "platform": f"{platform.system()} {platform.machine()} Python {platform.python_version()}",
        **{f"option {key}": text for key, text in _options(target).items()},
        **_packages(list(dict.fromkeys(flows))),
    }
    if device.name == LOCAL:
        values["machine"] = fingerprint()
    if named.endswith(".toml"):
        values["device file"] = "sha256:" + digests.of(Path(named), f"device of [targets.{name}]")
    for table in target.table:
        values[f"table {table}"] = "sha256:" + digests.of(loaded.path(table), f"table of [targets.{name}]")
    if target.shape is not None and target.shape.endswith(".json"):
        values["plan"] = "sha256:" + digests.of(loaded.path(target.shape), f"shape of [targets.{name}]")
    if target.verify_text is not None:
        values["verify-text"] = "sha256:" + digests.of(
            loaded.path(target.verify_text), f"verify-text of [targets.{name}]"
        )
    return Inputs(values)


def _options(target: Target) -> dict[str, str]:
    found: dict[str, Any] = target.model_dump(exclude=UNUSED, exclude_defaults=True)
    flat = {key: value for key, value in found.items() if not isinstance(value, dict)}
    for key, value in found.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{part}": each for part, each in value.items()}
    return {key.replace("_", "-"): json.dumps(value) for key, value in sorted(flat.items())}


def _checkpoint(folder: Path, digests: FileDigests) -> str:
    """The digest of a checkpoint's own files, of which amoeba.json names the base model's."""
    if not (folder / "amoeba.json").is_file():
        raise BadInput(f"{folder}: is no one-for-all checkpoint, it has no amoeba.json; give the path of one")
    return own_digest(folder, digests.of)
