"""Commands on checkpoints: ``checkpoint create``, ``import``, ``show`` and ``verify``."""

from __future__ import annotations

from pathlib import Path

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.errors import BadInput
from amoeba_deploy.options import (
    base_options,
    checkpoint_argument,
    cut_options,
    output_options,
    quality_options,
)
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Policy


@click.group()
def checkpoint() -> None:
    """Create, import, show and verify one-for-all checkpoints."""


@checkpoint.command("create")
@click.argument("model")
@click.option("--selection", type=click.Path(path_type=Path), required=True, help="What 'amoeba select' wrote.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@quality_options
@base_options
@cut_options
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def checkpoint_create(
    model: str,
    selection: Path,
    output: Path,
    quality_text: Path | None,
    quality_tasks: Path | None,
    name: str | None,
    include_base: bool,
    policy: Policy,
    bias: str,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Join MODEL and its selection to an untuned one-for-all checkpoint.

    \b
    amoeba checkpoint create models/stories260K --selection selection -o stories --quality-text held-out.txt
    """
    from amoeba_deploy import console
    from amoeba_deploy.checkpoint import create_checkpoint, open_checkpoint
    from amoeba_deploy.files import whole_folder
    from amoeba_deploy.quality import write_quality
    from amoeba_deploy.quality_measurement import measure_quality

    if quality_tasks and not quality_text:
        raise BadInput("--quality-tasks needs --quality-text too: shapes are ranked by their loss on a text")
    with whole_folder(output, force, (Path(model), selection, *filter(None, (quality_text, quality_tasks)))) as folder:
        made = create_checkpoint(
            model, selection, folder, name=name, include_base=include_base, policy=policy, bias=bias == "on"
        )
        if quality_text:
            write_quality(folder, measure_quality(made, quality_text, quality_tasks, progress=Progress(quiet)))
    made = open_checkpoint(output)
    emit(console.checkpoint_json(made), as_json, lambda: console.print_checkpoint(made))


@checkpoint.command("import")
@click.argument("released", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The base model that DIR was made from: a folder or a hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--name", help="What derived models call it.  [default: the name of DIR]")
@click.option("--include-base", is_flag=True, help="Copy the base model into the checkpoint.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def checkpoint_import(
    released: Path,
    base: str,
    output: Path,
    name: str | None,
    include_base: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn what AmoebaLLM's authors released, dp_selection_strategy.npy and adapter_model/, into a checkpoint.

    \b
    amoeba checkpoint import amoeba-llama2 --base models/llama-2-7b -o llama2
    """
    from amoeba_deploy import console
    from amoeba_deploy.checkpoint import open_checkpoint
    from amoeba_deploy.files import whole_folder
    from amoeba_deploy.released.checkpoint import import_released

    with whole_folder(output, force, (released, Path(base))) as folder:
        _, notes = import_released(released, base, folder, name=name, include_base=include_base)
    made = open_checkpoint(output)
    for note in notes:
        Progress(quiet).say(f"note: {note}")
    value = console.checkpoint_json(made) | {"notes": notes}
    emit(value, as_json, lambda: console.print_checkpoint(made))


@checkpoint.command("show")
@checkpoint_argument
@output_options
def checkpoint_show(checkpoint: Path | None, as_json: bool, quiet: bool) -> None:
    """Show what a checkpoint holds: sizes, depths, kept blocks, quality.

    \b
    amoeba checkpoint show
    """
    from amoeba_deploy import console

    opened = open_named(checkpoint)
    emit(console.checkpoint_json(opened), as_json, lambda: console.print_checkpoint(opened))


@checkpoint.command("verify")
@checkpoint_argument
@output_options
def checkpoint_verify(checkpoint: Path | None, as_json: bool, quiet: bool) -> None:
    """Check a checkpoint's digests and read every weight.

    \b
    amoeba checkpoint verify my-checkpoint
    """
    from amoeba_deploy.checkpoint import verify_checkpoint

    opened = open_named(checkpoint)
    count = verify_checkpoint(opened)
    value = {"path": str(opened.path), "digest": opened.digest, "tensors": count}
    emit(value, as_json, lambda: click.echo(f"{opened.path}: intact, {count} tensors, {opened.digest}"))
