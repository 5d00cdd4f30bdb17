"""``kit.json``: what a kit holds, for which device, and how it is measured. docs/profile_kit.md describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.files import read_json, sha256_of, write_json
from amoeba_deploy.profiles.workload import Workload

KIT_FORMAT = "amoeba.profile-kit/1"
KIT = "kit.json"
RUN = "run.py"
PACKAGE = "package"
"""The folder of the part of this package that the kit carries."""
ARTEFACTS = "artefacts"
_TEXTS = ("device", "model", "weights", "architecture", "tool")
_SIZES = ("depth", "hidden", "heads", "kv_heads", "head_dim", "neurons", "vocabulary", "context")


@dataclass(frozen=True)
class Item:
    """One engine to measure. ``commands`` are of the engine's own tools, where these measure it and not we."""

    id: str
    flow: str
    precision: str
    depth: int
    width: float | str
    bytes: int
    settings: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        width = self.width if isinstance(self.width, str) else f"{self.width:g}"
        return f"{self.flow} {self.precision} {self.depth}x{width}"

    @property
    def artefact(self) -> str:
        """Its folder in the kit."""
        return f"{ARTEFACTS}/{self.id}"

    def to_json(self) -> dict[str, Any]:
        """The entry in kit.json."""
        head = {"id": self.id, "flow": self.flow, "precision": self.precision, "depth": self.depth}
        more = {"width": self.width, "artefact": self.artefact, "bytes": self.bytes, "settings": dict(self.settings)}
        return {**head, **more, "commands": [list(command) for command in self.commands]}


@dataclass(frozen=True)
class Kit:
    """A kit's ``kit.json``."""

    device: str
    model: str
    weights: str
    """``checkpoint`` or ``random``."""
    architecture: str
    """Digest of the full model's architecture."""
    sizes: Mapping[str, int]
    """Of the full model."""
    workload: Workload
    context: int
    budget: float
    """Seconds after which no run begins, counted from each start of the runner."""
    seed: int
    """Of the orders in which the items take turns."""
    items: tuple[Item, ...]
    files: Mapping[str, tuple[int, str]]
    """Bytes and sha256 of every file of the kit but kit.json, by its path with slashes."""
    tool: str

    @property
    def vocabulary(self) -> int:
        """Ids that prompts are drawn from."""
        return self.sizes["vocabulary"]

    def head(self) -> dict[str, Any]:
        """What results repeat of it, so that they say everything themselves."""
        workload = self.workload
        return {
            "device": self.device,
            "model": self.model,
            "weights": self.weights,
            "architecture": self.architecture,
            "sizes": dict(self.sizes),
            "workload": {"batch": workload.batch, "prompt": workload.prompt, "tokens": workload.tokens},
            "context": self.context,
            "items": [item.to_json() for item in self.items],
        }

    def to_json(self) -> dict[str, Any]:
        """All of kit.json."""
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        how = {"budget_seconds": self.budget, "order": {"kind": "shuffled in every round", "seed": self.seed}}
        return {"format": KIT_FORMAT, "tool": self.tool, **self.head(), **how, "files": files}


def write_kit_file(folder: Path, kit: Kit) -> None:
    """Write ``kit.json`` into a kit."""
    write_json(folder / KIT, kit.to_json())


def kit_digest(folder: Path) -> str:
    """What tells a kit from others: the sha256 of its ``kit.json``, which holds those of all other files."""
    return "sha256:" + sha256_of(folder / KIT)


def read_kit(folder: Path) -> Kit:
    """A kit's ``kit.json``.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    value = read_json(folder / KIT, KIT_FORMAT)
    try:
        items, sizes, workload, context = read_head(value)
        files = {name: (_whole(entry["bytes"]), str(entry["sha256"])) for name, entry in value["files"].items()}
        texts: dict[str, Any] = {name: str(value[name]) for name in _TEXTS}
        budget, seed = float(value["budget_seconds"]), _whole(value["order"]["seed"])
        if not budget > 0 or any(not _inside(name) for name in files):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, BadInput):
        raise BadInput(f"{folder / KIT}: lacks an entry or holds one that cannot be; write the kit again") from None
    rest: dict[str, Any] = {"sizes": sizes, "workload": workload, "context": context, "budget": budget, "seed": seed}
    return Kit(**texts, **rest, items=items, files=files)


def read_head(value: Mapping[str, Any]) -> tuple[tuple[Item, ...], dict[str, int], Workload, int]:
    """Items, sizes, workload and context of a kit or of results; raises one of Python's errors, or BadInput."""
    items = tuple(_item(entry) for entry in value["items"])
    if not items or len({item.id for item in items}) != len(items):
        raise ValueError
    sizes = {name: _whole(value["sizes"][name]) for name in _SIZES}
    asked = value["workload"]
    workload = Workload(*(_whole(asked[name]) for name in ("batch", "prompt", "tokens")))
    return items, sizes, workload, _whole(value["context"])


def _item(entry: Mapping[str, Any]) -> Item:
    found = Item(
        str(entry["id"]),
        str(entry["flow"]),
        str(entry["precision"]),
        _whole(entry["depth"]),
        entry["width"],
        _whole(entry["bytes"]),
        {str(name): str(setting) for name, setting in entry["settings"].items()},
        tuple(tuple(str(part) for part in command) for command in entry["commands"]),
    )
    if not _inside(found.artefact) or "/" in found.id or entry["artefact"] != found.artefact:
        raise ValueError
    return found


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def check_files(folder: Path, kit: Kit, names: Sequence[str] | None = None) -> None:
    """Compare files of a kit, all where none are named, with what kit.json says of them.

    Raises:
        VerificationFailed: one is missing, or is not the one that was written.
    """
    for name in kit.files if names is None else names:
        size, digest = kit.files[name]
        file = folder / name
        if not file.is_file():
            raise VerificationFailed(f"{file}: is missing; copy the kit again")
        if file.stat().st_size != size or sha256_of(file) != digest:
            raise VerificationFailed(f"{file}: is not the file that the kit was written with; copy the kit again")


def all_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of every file below a folder, by its path with slashes, in order."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): (file.stat().st_size, sha256_of(file)) for file in found}
