"""The command that builds what a page shows, up to the number of its budget."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from amoeba_deploy.options import Latency, Memory
from amoeba_deploy.profiles.workload import Workload


def decimal(value: float) -> str:
    """A number as options take it, without an exponent.

    >>> decimal(1e-05), decimal(40.0), decimal(0.978)
    ('0.00001', '40', '0.978')
    """
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def with_unit(kind: Latency | Memory, value: float) -> str:
    """A value as an option of that kind reads it back: in the largest unit of which it is at least one, if possible."""
    amount = value * kind.scale
    units = sorted(kind.units, key=lambda name: (kind.units[name] > amount, -kind.units[name]))
    texts = [decimal(value / (kind.units[unit] / kind.scale)) + unit for unit in units]
    return next((text for text in texts if kind.convert(text, None, None) == value), texts[0])


def export_command(checkpoint: Path | None, asked: Mapping[str, Any]) -> str:
    """The ``amoeba export`` that makes a search again, quoted as shells need it; a number and ``ms`` must follow."""
    words = ["amoeba", "export", *([] if checkpoint is None else [str(checkpoint)])]
    words += ["--device", str(asked["device"])]
    for name in ("flow", "precision"):
        words += [f"--{name}", str(asked[name])] if asked.get(name) else []
    words += ["--metric", asked["metric"]] if asked["metric"] != "tpot" else []
    kinds: dict[str, Latency | Memory] = {name: Memory() for name in ("memory", "size")}
    for name, kind in (kinds | {name: Latency() for name in ("tpot", "ttft", "e2e")}).items():
        words += [f"--{name}", with_unit(kind, asked[name])] if asked.get(name) is not None else []
    words += ["--max-loss", decimal(asked["max_loss"])] if asked.get("max_loss") is not None else []
    for file in asked["table"]:
        words += ["--table", str(file)]
    words += ["--measured-only"] if asked["measured_only"] else []
    for name, value in asked["settings"]:
        words += ["--set", f"{name}={value}"]
    return f"{shlex.join([*words, *_workload(asked)])} --latency "


def _workload(asked: Mapping[str, Any]) -> list[str]:
    """The options of a workload that are not at their defaults."""
    words, usual = [], Workload()
    for name in ("batch", "prompt", "tokens"):
        words += [f"--{name}", str(asked[name])] if asked[name] != getattr(usual, name) else []
    return words + (["--context", str(asked["context"])] if asked["context"] is not None else [])
