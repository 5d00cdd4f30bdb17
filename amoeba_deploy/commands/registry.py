"""Commands that bring bundles elsewhere: ``bundle push`` and ``pull``, ``bundle pack`` and ``unpack``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import output_options, plain_http_option
from amoeba_deploy.progress import Progress

if TYPE_CHECKING:
    from amoeba_deploy.delivery.registry import Pulled, Pushed

force_option = click.option("--force", is_flag=True, help="Replace an existing output.")


@click.command("push")
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("reference", metavar="REF")
@plain_http_option
@output_options
def bundle_push(path: Path, reference: str, plain_http: bool, as_json: bool, quiet: bool) -> None:
    """Push a bundle to a registry, as REF: host[:port]/name[:tag]. What the registry has is not sent again.

    \b
    amoeba bundle push out registry.example:5000/team/stories:1
    """
    from amoeba_deploy.delivery.registry import push

    done = push(path, reference, progress=Progress(quiet), plain_http=plain_http)
    emit(asdict(done), as_json, lambda: _print_pushed(path, done))


def _print_pushed(path: Path, done: Pushed) -> None:
    parts = [f"{done.layers_sent} files sent ({_megabytes(done.bytes_sent)})"]
    if done.layers_mounted:
        parts.append(f"{done.layers_mounted} taken from another repository there ({_megabytes(done.bytes_mounted)})")
    if done.layers_present:
        parts.append(f"{done.layers_present} there already ({_megabytes(done.bytes_present)})")
    click.echo(f"{path}: pushed to {done.reference}, {', '.join(parts)}\n{done.digest}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@click.command("pull")
@click.argument("reference", metavar="REF")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@force_option
@plain_http_option
@output_options
def bundle_pull(reference: str, output: Path, force: bool, plain_http: bool, as_json: bool, quiet: bool) -> None:
    """Pull a bundle from a registry: host[:port]/name[:tag|@sha256:...]. A pull that broke goes on where it broke.

    Every digest is checked; who made the bundle is not: see 'amoeba bundle install'.

    \b
    amoeba bundle pull registry.example:5000/team/stories:1 -o out
    """
    from amoeba_deploy.delivery.registry import pull

    done = pull(reference, output, progress=Progress(quiet), force=force, plain_http=plain_http)
    value = asdict(done) | {"path": str(output)}
    emit(value, as_json, lambda: _print_pulled(output, done))


def _print_pulled(output: Path, done: Pulled) -> None:
    if done.unchanged:
        click.echo(f"{output}: is {done.reference} already, nothing was done\n{done.digest}")
        return
    kept = f", {_megabytes(done.bytes_kept)} were here" if done.bytes_kept else ""
    click.echo(f"{output}: {done.files} files from {done.reference}, {_megabytes(done.bytes_fetched)} fetched{kept}")
    click.echo(done.digest)


@click.command("pack")
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write, .tar.zst.")
@force_option
@output_options
def bundle_pack(path: Path, output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Pack a bundle into one file, a tar archive compressed with zstd. The same bundle gives the same bytes.

    \b
    amoeba bundle pack out -o stories.tar.zst
    """
    from amoeba_deploy.delivery.archive import pack

    done = pack(path, output, force=force)
    value = asdict(done) | {"path": str(output)}
    said = f"{output}: {done.files} files, {_megabytes(done.bytes)} packed into {_megabytes(done.packed_bytes)}"
    emit(value, as_json, lambda: click.echo(f"{said}\n{done.digest}"))


@click.command("unpack")
@click.argument("archive", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@force_option
@output_options
def bundle_unpack(archive: Path, output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Unpack a bundle that 'amoeba bundle pack' wrote, and check its files.

    \b
    amoeba bundle unpack stories.tar.zst -o out
    """
    from amoeba_deploy.delivery.archive import unpack

    done = unpack(archive, output, force=force)
    value = asdict(done) | {"path": str(output)}
    emit(value, as_json, lambda: click.echo(f"{output}: {done.files} files, {_megabytes(done.bytes)}"))


def add_to(group: click.Group) -> None:
    """Hang these commands into the group ``bundle``."""
    for command in (bundle_push, bundle_pull, bundle_pack, bundle_unpack):
        group.add_command(command)
