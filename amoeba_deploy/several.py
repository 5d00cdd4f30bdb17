"""A search for several devices: one answer each, and the best shape for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.profiles.table_set import by_device
from amoeba_deploy.request import Answer
from amoeba_deploy.search.together import Shared, Single, best_for_all, why_none


def asked_of_each(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of ``search`` and ``export`` for each of their devices, whose are ``device``, ``latency``, ``table``.

    Raises:
        BadInput: a device is named twice or not known, a latency is given twice or for none of the devices, or lacks
            for one of them, or a table is of none of them.
    """
    named: Sequence[str] = asked["devices"]
    names = {load_device(name).name: name for name in named}
    if len(names) < len(named):
        raise BadInput(f"--device names one device twice in {', '.join(named)}; name each once")
    latencies: dict[str, float] = {}
    for device, latency in asked["latencies"]:
        known = names.get(device, device)
        if known and known not in named:
            raise BadInput(f"--latency {device}=... is of none of the devices {', '.join(named)}")
        if known in latencies:
            raise BadInput(f"--latency is given twice{f' for {device}' if device else ''}; give it once")
        latencies[known] = latency
    lacking = [name for name in named if name not in latencies and "" not in latencies]
    if latencies and lacking:
        raise BadInput(f"no --latency is given for {lacking[0]}; add --latency {lacking[0]}=40ms, or one for all")
    files: Sequence[Path] = asked["table"]
    tables = by_device(files, list(names)) if len(names) > 1 else {device: tuple(files) for device in names}
    common = {key: value for key, value in asked.items() if key not in ("devices", "latencies")}
    return [
        common | {"device": name, "latency": latencies.get(name, latencies.get("")), "table": tables[device]}
        for device, name in names.items()
    ]


def one_device(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command that builds for a single device; raises BadInput where several are named."""
    each = asked_of_each(asked)
    if len(each) > 1:
        raise BadInput(f"export builds for one device, and --device names {len(each)}; export for each by itself")
    return each[0]


def of_device(device: str, error: AmoebaError) -> AmoebaError:
    """The same failure with the device's name in front."""
    return type(error)(f"{device}: {error}")


@dataclass(frozen=True)
class SeveralAnswers:
    """The answers of all devices in their order, and the best shape for all where there is one."""

    answers: tuple[Answer, ...]
    shared: Shared | None
    why_none: str | None

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> SeveralAnswers:
        """Find the shape that suits all."""
        singles = [
            Single(one.request.target.device.name, one.result, one.request.budget, one.request.target.workload.tokens)
            for one in answers
        ]
        shared = best_for_all(singles)
        return cls(tuple(answers), shared, None if shared else why_none(singles))

    def to_json(self, top: int = 5) -> dict[str, Any]:
        """The object that ``search --json`` prints for several devices."""
        return {
            "devices": [answer.to_json(top) for answer in self.answers],
            "best_for_all": None if self.shared is None else self.shared.to_json(),
            "why_none_for_all": self.why_none,
        }
