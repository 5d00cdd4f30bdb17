"""The command ``search``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.options import checkpoint_argument, output_options, search_options, workload_options
from amoeba_deploy.progress import Progress


@click.command()
@checkpoint_argument
@search_options
@click.option("--config", type=click.Path(path_type=Path), help="Search a model's shapes from its config alone.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Shapes to show.")
@workload_options
@output_options
def search(checkpoint: Path | None, config: Path | None, top: int, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Find the best shape for a device within a budget, and the Pareto front.

    \b
    amoeba search --device orin-nx --latency 40ms --config llama-2-7b/config.json --precision int4
    """
    from amoeba_deploy import console
    from amoeba_deploy.request import Request, Space

    space = Space.of_config(config) if config else Space.of_checkpoint(open_named(checkpoint))
    answer = Request.of(space, asked, Progress(quiet)).answer()
    emit(answer.to_json(), as_json, lambda: console.print_search(answer, top))
