"""Commands on a device: ``bundle install``, ``rollback`` and ``status``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.options import Seconds, output_options, plain_http_option
from amoeba_deploy.progress import Progress

root_option = click.option(
    "--root", required=True, type=click.Path(path_type=Path), help="The device's folder for bundles."
)
wait_option = click.option("--wait", is_flag=True, help="Wait for another command on this folder to end.")


def health_options(command: Any) -> Any:
    """The options of a health check."""
    for option in (
        click.option(
            "--health-timeout", type=Seconds(), help="How long the engine may take to answer.  [default: 15m]"
        ),
        click.option(
            "--health",
            metavar="COMMAND",
            help="Command that must succeed, too; $AMOEBA_BUNDLE is the bundle. For a shell, write sh -c '...'.",
        ),
        click.option("--no-health-latency", is_flag=True, help="Run the self-test only; measure nothing."),
        click.option(
            "--tolerance",
            type=click.FloatRange(min=0),
            default=0.25,
            show_default=True,
            help="Share by which the measured latency may exceed the bundle's budget.",
        ),
    ):
        command = option(command)
    return command


@click.command("install")
@click.argument("source")
@root_option
@click.option(
    "--trust",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public key, certificate authority or folder of them.  [default: ROOT/trust; repeatable]",
)
@click.option("--unsigned", is_flag=True, help="Ask for no signature.")
@click.option("--device", help="This device's name; kept, and bundles for others are refused from then on.")
@click.option("--allow-older", is_flag=True, help="Accept a lower release number than this device had.")
@click.option("--retry", is_flag=True, help="Try a bundle again that failed here or was rolled back from.")
@click.option("--drop-previous", is_flag=True, help="Give up what is kept for a rollback first, to make room.")
@health_options
@plain_http_option
@wait_option
@output_options
def bundle_install(
    source: str,
    root: Path,
    trust: tuple[Path, ...],
    unsigned: bool,
    device: str | None,
    allow_older: bool,
    retry: bool,
    drop_previous: bool,
    tolerance: float,
    no_health_latency: bool,
    health: str | None,
    health_timeout: float | None,
    plain_http: bool,
    wait: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Install a bundle on this device: SOURCE is a registry's reference, a folder or a .tar.zst.

    It is verified against the keys in ROOT/trust and switched to at once, ROOT/current names it; where it gives other
    tokens than its self-test, or is slower than its budget, what ran before runs again.

    \b
    amoeba bundle install registry.example:5000/team/stories:1 --root /var/lib/amoeba
    """
    from amoeba_deploy.device.install import InstallOptions, install

    options = InstallOptions(
        trust=trust,
        unsigned=unsigned,
        device=device,
        allow_older=allow_older,
        retry=retry,
        drop_previous=drop_previous,
        plain_http=plain_http,
        wait=wait,
        health=_check(tolerance, no_health_latency, health, health_timeout),
    )
    with _interruptible():
        done = install(source, root, options, Progress(quiet))
    emit(done.to_json(), as_json, lambda: click.echo(done.text()))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say what is true of a device whose command is asked to end."""
    try:
        yield
    except KeyboardInterrupt:
        raise AmoebaError("interrupted; what ran before runs on") from None


def _check(tolerance: float, no_latency: bool, command: str | None, timeout: float | None) -> Any:
    from amoeba_deploy.device.health import TIMEOUT, HealthCheck

    return HealthCheck(None if no_latency else tolerance, command, timeout or TIMEOUT)


@click.command("rollback")
@root_option
@health_options
@wait_option
@output_options
def bundle_rollback(
    root: Path,
    tolerance: float,
    no_health_latency: bool,
    health: str | None,
    health_timeout: float | None,
    wait: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Go back to the bundle that ran before, if it is whole and healthy. What is left is kept: again goes forth.

    \b
    amoeba bundle rollback --root /var/lib/amoeba
    """
    from amoeba_deploy.device.rollback import rollback

    with _interruptible():
        done = rollback(root, _check(tolerance, no_health_latency, health, health_timeout), Progress(quiet), wait)
    emit(done.to_json(), as_json, lambda: click.echo(done.text()))


@click.command("status")
@root_option
@click.option("--recover", is_flag=True, help="Undo a switch that was cut off, and mend what can be; for boot.")
@click.option("--check", is_flag=True, help="Hash every file of what runs, and run its self-test.")
@wait_option
@output_options
def bundle_status(root: Path, recover: bool, check: bool, wait: bool, as_json: bool, quiet: bool) -> None:
    """Show what runs on this device and what is kept; exit code 5 where what should run is missing or damaged.

    \b
    amoeba bundle status --root /var/lib/amoeba
    """
    from amoeba_deploy.device import status

    with _interruptible():
        done = status.recover(root, Progress(quiet), wait, check) if recover else status.status(root, check)
    emit(done.to_json(), as_json, lambda: click.echo(done.text()))


def add_to(group: click.Group) -> None:
    """Hang these commands into the group ``bundle``."""
    for command in (bundle_install, bundle_rollback, bundle_status):
        group.add_command(command)
