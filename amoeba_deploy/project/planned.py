"""Targets before anything is done: what decides each, whether the cache has it, and why it would be built."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.profiles.device import LOCAL, load_device
from amoeba_deploy.project.asked import device_of
from amoeba_deploy.project.cache import BuildCache, Entry
from amoeba_deploy.project.config import Loaded
from amoeba_deploy.project.digests import FileDigests
from amoeba_deploy.project.inputs import Inputs, inputs_of
from amoeba_deploy.project.result import Result, State


@dataclass(frozen=True)
class Planned:
    """A target with its inputs, its entry in the cache if there is one, and its last build of this project."""

    name: str
    device: str
    output: Path
    needs: tuple[str, ...]
    inputs: Inputs | None
    entry: Entry | None
    last: Mapping[str, Any] | None
    """Key, inputs and figures of the last good build."""
    forced: bool
    failure: AmoebaError | None = None
    """Why its inputs cannot even be read."""

    @property
    def is_here(self) -> bool:
        """Whether the target is for this machine, and so measured on it."""
        return self.failure is None and load_device(self.device).name == LOCAL

    def why(self) -> str:
        """Why it is built, as half a sentence."""
        if self.forced:
            return "asked for with --force"
        if self.last is None or self.inputs is None:
            return "was never built for this project"
        changes = self.inputs.changes(self.last["inputs"])
        return "; ".join(changes) if changes else "its bundle is not in the cache any more"

    def result(self, state: State, reason: str, entry: Entry | None = None) -> Result:
        """What became of it."""
        figures = entry.figures if entry else None
        remarks = tuple(entry.facts.get("remarks", ())) if entry else ()
        before = self.last.get("figures") if self.last else None
        return Result(self.name, self.device, state, self.output, reason, 0.0, figures, before, remarks)


def plan(loaded: Loaded, names: Sequence[str], cache: BuildCache, force: bool = False) -> list[Planned]:
    """Some targets before anything is done, in the order of their names; ``force`` takes none from the cache."""
    digests, last = FileDigests(cache.folder), cache.last(loaded.file)
    found = [_planned(loaded, name, digests, cache, last.get(name), force) for name in names]
    digests.save()
    return found


def _planned(loaded: Loaded, name: str, digests: FileDigests, cache: BuildCache, last: Any, force: bool) -> Planned:
    target = loaded.targets[name]
    inputs, entry, known, failure = None, None, None, None
    output, device = loaded.output(name), device_of(loaded, target)
    try:
        inputs = inputs_of(loaded, name, digests)
        known = last if isinstance(last, dict) and isinstance(last.get("inputs"), dict) else None
        entry = None if force else cache.find(inputs.key) or _kept(known, inputs.key, output, cache)
    except AmoebaError as error:
        failure = error
    return Planned(name, device, output, tuple(target.needs), inputs, entry, known, force, failure)


def _kept(last: Mapping[str, Any] | None, key: str, output: Path, cache: BuildCache) -> Entry | None:
    """An output that is what was built last, though the cache has lost it."""
    if last is None or last.get("key") != key or not isinstance(last.get("figures"), dict):
        return None
    figures = last["figures"]
    kept = Entry(key, output, {"content": str(figures.get("content")), "figures": figures})
    return kept if cache.holds(kept, output) else None


def ordered(loaded: Loaded, names: Sequence[str]) -> list[str]:
    """Some targets and all that they need, each after what it needs, else in the order of the file.

    Raises:
        BadInput: there is no such target, or targets need each other in a circle.
    """
    if not loaded.targets:
        raise BadInput(f"{loaded.file}: has no targets; add such as [targets.kiosk]")
    for name in names:
        if name not in loaded.targets:
            raise BadInput(f"'{name}' is not a target of {loaded.file}; it has {', '.join(loaded.targets) or 'none'}")
    wanted, rest = set[str](), list(names or loaded.targets)
    while rest:
        name = rest.pop()
        if name not in wanted:
            wanted.add(name)
            rest += loaded.targets[name].needs
    graph = {name: loaded.targets[name].needs for name in loaded.targets if name in wanted}
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise BadInput(f"{loaded.file}: targets need each other in a circle: {' -> '.join(error.args[1])}") from None
