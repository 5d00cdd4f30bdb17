"""What all commands share: printing results, and finding the checkpoint that they work on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def emit(value: dict[str, Any], as_json: bool, text: Callable[[], None]) -> None:
    """Print one JSON object, or the same for people."""
    if as_json:
        click.echo(json.dumps(value))
    else:
        text()


def open_named(path: Path | None) -> Any:
    """The checkpoint of a command: its argument, else ./amoeba.toml's, else the embedded one."""
    from amoeba_deploy.checkpoint import open_checkpoint
    from amoeba_deploy.settings import configured_checkpoint

    return open_checkpoint(path or configured_checkpoint())
