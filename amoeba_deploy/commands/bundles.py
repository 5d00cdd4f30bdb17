"""Commands on bundles: ``bundle verify`` and ``bundle finish``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import (
    output_options,
)
from amoeba_deploy.progress import Progress


@click.group()
def bundle() -> None:
    """Check bundles, and finish them on their device."""


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
