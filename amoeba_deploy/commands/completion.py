"""The command ``completion``, and the values that shells complete: devices, flows, and targets of amoeba.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from amoeba_deploy.commands.common import WithSubcommands
from amoeba_deploy.settings import SETTINGS

VARIABLE = "_AMOEBA_COMPLETE"
"""By which click's script asks the command for completions."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script by which a shell completes commands, options, devices, flows and targets.

    \b
    bash: echo 'eval "$(amoeba completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(amoeba completion zsh)"' >> ~/.zshrc       # after compinit
    fish: amoeba completion fish > ~/.config/fish/completions/amoeba.fish

    Start a new shell then. bash must be 4.4 or newer.
    """
    found = get_completion_class(shell)
    root = click.get_current_context().find_root().command
    assert found is not None, "click has a class for each of the choices"
    # click's script for fish cuts values at their commas, and flows are separated by them.
    click.echo(found(root, {}, "amoeba", VARIABLE).source().replace('string split ","', 'string split -m 1 ","'))


# Values


def device_names(_ctx: click.Context) -> Iterable[str]:
    """The devices of the catalogue."""
    from amoeba_deploy.profiles.device import device_names

    return device_names()


def flow_names(_ctx: click.Context) -> Iterable[str]:
    """The flows of this installation, found without importing any: engines' modules are those that say BACKEND."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec
    from pkgutil import iter_modules

    spec = find_spec("amoeba_deploy.backends")
    places = list(spec.submodule_search_locations or []) if spec else []
    for module in iter_modules(places):
        base = Path(places[0], module.name)
        file = base / "__init__.py" if module.ispkg else base.with_suffix(".py")
        if re.search(r"^BACKEND\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            yield module.name.replace("_", "-")
    yield from sorted(point.name for point in entry_points(group="amoeba_deploy.backends"))


def target_names(ctx: click.Context) -> Iterable[str]:
    """The targets of the project that --config names, ./amoeba.toml's by default; none where it cannot be read."""
    file = Path(ctx.params.get("config") or SETTINGS)
    try:
        targets = tomllib.loads(file.read_text(encoding="utf-8")).get("targets")
    except (OSError, ValueError):
        return ()
    return sorted(targets) if isinstance(targets, dict) else ()


class Named(click.types.StringParamType):
    """A text whose values shells complete; with ``separator`` one of several in it."""

    def __init__(self, names: Callable[[click.Context], Iterable[str]], separator: str = "") -> None:
        self._names, self._separator = names, separator

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, mark, started = incomplete.rpartition(self._separator) if self._separator else ("", "", incomplete)
        used = before.split(self._separator) if mark else []
        names = dict.fromkeys(self._names(ctx))
        return [CompletionItem(before + mark + name) for name in names if name.startswith(started) and name not in used]


class PathOrCommand(click.Path):
    """A path, in whose place one of some commands may stand."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(path_type=Path)
        self._commands = tuple(names)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in self._commands if name.startswith(incomplete)]
        return [*super().shell_complete(ctx, param, incomplete), *names]  # bash forgets what comes before a path


def complete_values(command: click.Command) -> None:
    """Let shells complete the devices, flows and targets of a command and of all below it."""
    kinds = {"--device": Named(device_names), "--flow": Named(flow_names, ","), "--target": Named(target_names)}
    if command.name == "devices":
        kinds["name"] = kinds["--device"]
    for param in command.params:
        found = next((kinds[name] for name in param.opts if name in kinds), None)
        if found is not None and isinstance(param.type, click.types.StringParamType):
            param.type = found
        if isinstance(command, WithSubcommands) and param.name == "checkpoint":
            param.type = PathOrCommand(command.commands)
    below: dict[str, click.Command] = getattr(command, "commands", {})
    for each in below.values():
        complete_values(each)
