"""The options ``--version`` and ``--version --json`` of the command itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from typing import Any

import click

from amoeba_deploy import __version__

AS_JSON = "amoeba_deploy.version_as_json"


def version_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add both; their order on the command line does not matter, as ``--json`` is read first."""
    as_json = click.option(
        "--json", is_flag=True, is_eager=True, expose_value=False, callback=_note, help="With --version: as JSON."
    )
    version = click.option(
        "--version", is_flag=True, expose_value=False, callback=_show, help="Show the version and exit."
    )
    return version(as_json(function))


def _note(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta[AS_JSON] = value


def _show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if ctx.resilient_parsing:
        return
    if not value:
        if ctx.meta.get(AS_JSON):
            raise click.UsageError(
                "--json goes with --version here, or behind a command, as in 'amoeba devices --json'", ctx
            )
        return
    click.echo(json.dumps(version_json()) if ctx.meta.get(AS_JSON) else f"amoeba, version {__version__}")
    ctx.exit()


def version_json() -> dict[str, Any]:
    """The versions of this package, of Python, of every engine, and of all that they need; nothing is imported."""
    from amoeba_deploy.installation import engine_versions, package_versions

    return {
        "amoeba-deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "engines": engine_versions(),
        "packages": package_versions(),
    }
