"""Commands on bundles where they are built: ``bundle verify``, ``bundle finish`` and ``bundle sign``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from amoeba_deploy.commands import device, registry
from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import (
    output_options,
)
from amoeba_deploy.progress import Progress


@click.group()
def bundle() -> None:
    """Check, finish, sign and deliver bundles."""


@bundle.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--public-key",
    "trust",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Key, certificate authority, or folder of them, one of which must have signed.  [repeatable]",
)
@output_options
def bundle_verify(path: Path, trust: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Check a bundle's files against its manifest and, with a key, its signature; run its self-test where it can run.

    \b
    amoeba bundle verify out
    amoeba bundle verify out --public-key key.pub
    """
    from amoeba_deploy.bundle_check import check_bundle

    done = check_bundle(path, trust, Progress(quiet))
    emit(done.to_json(), as_json, lambda: click.echo(done.text()))


@bundle.command("sign")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    required=True,
    help="Elliptic-curve key (P-256, P-384, P-521) in PEM, or env:NAME of a variable with its path or the PEM.",
)
@click.option("--certificate", type=click.Path(path_type=Path), help="Certificate of that key in PEM.")
@click.option(
    "--chain",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Certificates between it and the authority that devices trust.  [repeatable]",
)
@click.option(
    "--serial",
    type=click.IntRange(0),
    help="Release number: devices refuse lower ones than they have.  [default: seconds since 1970]",
)
@output_options
def bundle_sign(
    path: Path,
    private_key: str,
    certificate: Path | None,
    chain: tuple[Path, ...],
    serial: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sign a bundle, so that a device can tell whom it is from and that it is not older than what it has.

    The password of an encrypted key is read from AMOEBA_KEY_PASSWORD.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub
    amoeba bundle sign out --private-key key.pem
    """
    import os

    from amoeba_deploy.delivery.keys import PASSWORD, key_file
    from amoeba_deploy.delivery.signing import Certificate, check_certificate, sign
    from amoeba_deploy.delivery.trust import require_signing
    from amoeba_deploy.errors import BadInput

    if chain and certificate is None:
        raise BadInput("--chain is of a certificate; give --certificate, too")
    of_key = Certificate(certificate, chain) if certificate else None
    password = os.environ.get(PASSWORD) or None
    require_signing()
    with key_file(private_key, Path()) as file:
        fit = check_certificate(file, of_key, password) if of_key else None
        release = sign(path, file, certificate=of_key, serial=serial, password=password)
    if fit and fit.issuer:
        Progress(quiet).say(f"note: devices must trust the certificate of '{fit.issuer}', which is not in --chain")
    until = fit.until.isoformat() if fit else None
    value = {"path": str(path), "serial": release.serial, "signed": release.signed, "valid_until": until}
    said = f", by a certificate valid until {fit.until:%Y-%m-%d}" if fit else ""
    emit(value, as_json, lambda: click.echo(f"{path}: signed as release {release.serial}{said}"))


@bundle.command("finish")
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def bundle_finish(path: Path, as_json: bool, quiet: bool) -> None:
    """Run the steps that a bundle's engine still needs: those for a host there, the rest on the device that it is for.

    The commands stand in the bundle's manifest and are shown as they run: finish only bundles that you trust.

    \b
    amoeba bundle finish out
    """
    from amoeba_deploy.bundle import finish_bundle, run_step

    progress = Progress(quiet)

    def run(step: Mapping[str, str]) -> None:
        progress.say(f"{step.get('does')}: {step.get('command')}")
        run_step(path, step)

    done = finish_bundle(path, run)
    value = {"path": str(path), "steps": done.ran, "left": done.left}
    said = f"{done.ran} steps run" if done.ran else "nothing left to do"
    if done.left:
        said += f", {done.left} left for the device: copy the bundle there, and run 'amoeba bundle finish' again"
    emit(value, as_json, lambda: click.echo(f"{path}: {said}"))


registry.add_to(bundle)
device.add_to(bundle)
