"""The command ``amoeba``: its groups of commands, and how failures end.

Every expected failure is one sentence and an exit code (errors.py); a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import signal
import traceback
from types import FrameType
from typing import Any

import click

from amoeba_deploy.commands.build import build, cache, init
from amoeba_deploy.commands.bundles import bundle
from amoeba_deploy.commands.checkpoint import checkpoint
from amoeba_deploy.commands.completion import complete_values, completion
from amoeba_deploy.commands.devices import devices
from amoeba_deploy.commands.doctor import doctor
from amoeba_deploy.commands.export import export
from amoeba_deploy.commands.profile import profile
from amoeba_deploy.commands.report import report
from amoeba_deploy.commands.search import search
from amoeba_deploy.commands.select import select
from amoeba_deploy.commands.subnets import evaluate, extract, run
from amoeba_deploy.commands.tune import tune
from amoeba_deploy.commands.version import version_options
from amoeba_deploy.errors import AmoebaError, ToolchainMissing


class Commands(click.Group):
    """A group that turns expected failures into a sentence and an exit code, and helps with mistyped names."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AmoebaError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"amoeba: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("amoeba: interrupted; nothing was left under the output's name", err=True)
            ctx.exit(1)
        except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
            raise
        except click.UsageError as error:
            click.echo(f"amoeba: {error.format_message()}", err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, ModuleNotFoundError) and error.name:
                from amoeba_deploy.installation import extra_of

                if extra := extra_of(error.name):
                    package, command = error.name.partition(".")[0], f"pip install 'amoeba-deploy[{extra}]'"
                    click.echo(f"amoeba: this needs {package}, which is not installed; run {command}", err=True)
                    ctx.exit(ToolchainMissing.exit_code)
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                from amoeba_deploy.files import system_refusal

                # A file or folder of the user's, which no command should have to foresee.
                click.echo(f"amoeba: {system_refusal(error)}", err=True)
                ctx.exit(2)
            kind = type(error).__name__
            click.echo(f"amoeba: unexpected {kind}: {error}; run 'amoeba --debug ...' to see where", err=True)
            ctx.exit(1)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            click.echo(f"amoeba: {error.format_message()}", err=True)
            raise click.exceptions.Exit(error.exit_code) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(error.message + hint, ctx) from None


CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(cls=Commands, context_settings=CONTEXT)
@version_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Derive a subnet of any depth and width from one checkpoint, and build an engine of it for a device.

    \b
    amoeba export --device orin-nx --latency 40ms -o out
    amoeba run out -p "Once upon a time"
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores the second, and so does what it starts
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Let a polite request to end (CI, containers) clean up as Ctrl-C does."""
    raise KeyboardInterrupt


for command in (
    *(select, tune, checkpoint, extract, evaluate, run, devices, profile, search, export, bundle, init, build, cache),
    *(report, doctor, completion),
):
    main.add_command(command)
complete_values(main)
