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


def source_named(checkpoint: Path | None, config: str | None) -> Any:
    """What to profile: the checkpoint of ``open_named``, or a config by its path, its folder or a hub id.

    Raises:
        BadInput: both are given, or one cannot be read.
    """
    from amoeba_deploy.errors import BadInput
    from amoeba_deploy.profiles.source import CheckpointSource, ConfigSource

    if config is None:
        return CheckpointSource(open_named(checkpoint))
    if checkpoint is not None:
        raise BadInput("a checkpoint and --config both say what is profiled; give one of them")
    from amoeba_deploy.model_folder import resolve_config

    return ConfigSource.of(resolve_config(config), config)


class WithSubcommands(click.Command):
    """A command beside which others stand under its name: a first argument that names one of them runs that one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands: dict[str, click.Command] = {}

    def command(self, name: str) -> Callable[[Callable[..., Any]], click.Command]:
        """Decorate a function as a command beside this one."""

        def add(function: Callable[..., Any]) -> click.Command:
            self.commands[name] = click.command(name)(function)
            return self.commands[name]

        return add

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            return self.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(100)) for name, command in self.commands.items()])
