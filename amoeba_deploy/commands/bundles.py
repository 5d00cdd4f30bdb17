"""Commands on bundles: ``bundle verify``."""

from __future__ import annotations

from pathlib import Path

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import (
    output_options,
)
from amoeba_deploy.progress import Progress


@click.group()
def bundle() -> None:
    """Check bundles."""


@bundle.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def bundle_verify(path: Path, as_json: bool, quiet: bool) -> None:
    """Check every file of a bundle against its manifest and run its self-test.

    \b
    amoeba bundle verify out
    """
    from amoeba_deploy.bundle import run_selftest, verify_files

    manifest = verify_files(path)
    Progress(quiet).say("files intact, running the self-test")
    count = run_selftest(path, manifest)
    value = {"path": str(path), "files": len(manifest["files"]), "selftest_tokens": count}
    emit(
        value,
        as_json,
        lambda: click.echo(f"{path}: {len(manifest['files'])} files intact, {count} self-test tokens equal"),
    )
