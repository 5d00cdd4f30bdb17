"""What a target asks a search for: the options of ``amoeba search``, with paths relative to the project's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from amoeba_deploy.errors import BadInput
from amoeba_deploy.options import Latency, Memory
from amoeba_deploy.project.config import Loaded, Target


def milliseconds(text: str | None) -> float | None:
    """A latency of the file in milliseconds."""
    return None if text is None else Latency().convert(text, None, None)


def byte_count(text: str | None) -> float | None:
    """An amount of memory of the file in bytes."""
    return None if text is None else Memory().convert(text, None, None)


def search_options(loaded: Loaded, target: Target) -> Mapping[str, Any]:
    """The options of ``search`` that a target stands for, with its first flow and precision left open.

    Raises:
        BadInput: a limit is zero.
    """
    try:
        return {
            "device": device_of(loaded, target),
            "latency": milliseconds(target.latency),
            "metric": target.metric,
            "memory": byte_count(target.memory),
            "tpot": milliseconds(target.tpot),
            "ttft": milliseconds(target.ttft),
            "e2e": milliseconds(target.e2e),
            "size": byte_count(target.size),
            "max_loss": target.max_loss,
            "flow": None,
            "precision": None,
            "table": tuple(loaded.path(file) for file in target.table),
            "measured_only": target.measured_only,
            "settings": tuple(target.settings.items()),
            "batch": target.workload.batch,
            "prompt": target.workload.prompt,
            "tokens": target.workload.tokens,
            "context": target.workload.context,
        }
    except click.UsageError as error:
        raise BadInput(f"{loaded.file}: {error.message}") from None


def device_of(loaded: Loaded, target: Target) -> str:
    """A target's device by its name, or the path of its file, which is relative to the project's."""
    device = str(target.device)
    return str(loaded.path(device)) if device.endswith(".toml") or re.search(r"[/\\]", device) else device


def shape_of(loaded: Loaded, target: Target) -> str | None:
    """The shape that a target names; the path of a plan file is relative to the project's file."""
    if target.shape is not None and target.shape.endswith(".json"):
        return str(loaded.path(target.shape))
    return target.shape
