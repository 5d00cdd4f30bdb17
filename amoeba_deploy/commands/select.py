"""Commands of stage 1: ``select``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import (
    Memory,
    Workers,
    output_options,
)
from amoeba_deploy.progress import Progress


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--calibration",
    required=True,
    help="Text file, JSON-lines file of questions, or a name: wikitext2, bookcorpus, mmlu, ...",
)
@click.option("--width-calibration", help="Other data for heads and neurons.  [default: the same]")
@click.option(
    "--depth-method",
    type=click.Choice(["dp", "shortened-ppl", "shortened-taylor", "angular", "first"]),
    default="dp",
    show_default=True,
    help="How blocks are chosen.",
)
@click.option(
    "--width-method",
    type=click.Choice(["flap", "wanda", "magnitude", "taylor"]),
    default="flap",
    show_default=True,
    help="How heads and neurons are scored.",
)
@click.option(
    "--metric",
    type=click.Choice(["loss", "accuracy", "choice-loss"]),
    help="What blocks are chosen by.  [default: loss of a text, accuracy on questions]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    help="Rows of text, or questions.  [default: 64 rows; all questions of a file, 40 of a name]",
)
@click.option("--sequence", type=click.IntRange(2), default=256, show_default=True, help="Tokens a row.")
@click.option("--min-depth", type=int, help="Smallest depth to select for.  [default: half of the blocks]")
@click.option("--keep-last", type=click.IntRange(0), default=1, show_default=True, help="Last blocks never removed.")
@click.option(
    "--units",
    type=click.Choice(["block", "sublayer"]),
    default="block",
    show_default=True,
    help="Remove blocks, or attention and feed-forward apart.",
)
@click.option("--beam", type=click.IntRange(1), default=1, show_default=True, help="Sets of blocks kept a cell.")
@click.option("--offload", is_flag=True, help="Read blocks from disk one at a time: for models beyond this memory.")
@click.option(
    "--state-memory", type=Memory(), default="4GB", show_default=True, help="For hidden states; less costs time only."
)
@click.option("--workers", type=Workers(), help="ray, or ray:N: spread the work over a Ray cluster.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def select(
    model: str,
    output: Path,
    calibration: str,
    width_calibration: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    state_memory: float,
    min_depth: int | None,
    **asked: Any,
) -> None:
    """Choose blocks, heads and neurons of MODEL on calibration data (stage 1).

    \b
    amoeba select models/stories260K -o selection --calibration stories.txt
    """
    from amoeba_deploy import console
    from amoeba_deploy.files import whole_folder
    from amoeba_deploy.model_folder import ModelFolder, resolve_model
    from amoeba_deploy.selection import write_selection
    from amoeba_deploy.stage1.pipeline import Settings
    from amoeba_deploy.stage1.pipeline import select as run_selection

    settings = Settings(minimum_depth=min_depth, state_memory=int(state_memory), **asked)
    inputs = [Path(name) for name in (model, calibration, width_calibration) if name and Path(name).exists()]
    with whole_folder(output, force, inputs) as folder:
        opened = ModelFolder(resolve_model(model))
        opened.check_shapes()
        selection = run_selection(
            opened, calibration, settings, width_calibration=width_calibration, progress=Progress(quiet)
        )
        write_selection(folder, selection)
    table = {str(d): c.to_json() for d, c in sorted(selection.depths.items(), reverse=True)}
    emit(
        {"path": str(output), **selection.facts, "depth": table},
        as_json,
        lambda: console.print_selection(selection, output),
    )
