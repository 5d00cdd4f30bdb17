"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.options import checkpoint_argument, comma_list, output_options, search_options, workload_options
from amoeba_deploy.progress import Progress


@click.command()
@checkpoint_argument
@search_options
@click.option("--shape", help="Build this shape or plan file instead of searching.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.  [default: named after its target]"
)
@click.option("--no-verify", is_flag=True, help="Do not compare the engine with transformers.")
@click.option(
    "--verify-text",
    type=click.Path(path_type=Path),
    help="Text to compare perplexities on.  [default: what the subnet itself writes]",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@workload_options
@output_options
def export(
    checkpoint: Path | None,
    shape: str | None,
    output: Path | None,
    no_verify: bool,
    verify_text: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Search, extract, lower, verify and bundle: from a checkpoint to an engine for a device.

    With --flow all a bundle of every engine that can be built here, each with its own best shape, in one folder.

    \b
    amoeba export --device orin-nx --latency 40ms -o out
    amoeba export --device orin-nx --latency 40ms --flow all -o engines
    """
    from amoeba_deploy import answer_text
    from amoeba_deploy.backends import ALL
    from amoeba_deploy.export_all import export_all
    from amoeba_deploy.exported import export_answer
    from amoeba_deploy.files import check_target
    from amoeba_deploy.request import Request
    from amoeba_deploy.several import one_device
    from amoeba_deploy.space import Space

    asked = one_device(asked)
    opened = open_named(checkpoint)
    if comma_list(asked["flow"]) == [ALL]:
        built = export_all(
            opened,
            asked,
            output,
            shape=shape,
            force=force,
            verify=not no_verify,
            text=verify_text,
            progress=Progress(quiet),
        )
        failure = built.failure()
        emit(built.to_json(), as_json, lambda: answer_text.print_all_exports(built))
        if failure is not None:
            raise failure
        return
    if shape is not None:
        opened.plan_of(shape)  # a wrong shape is said before an output that is taken
    if output is not None:
        check_target(output, force, (opened.path, opened.model.path))
    request = Request.of(Space.of_checkpoint(opened), asked, Progress(quiet), shape)
    done = export_answer(opened, request, output, force=force, verify=not no_verify, text=verify_text)
    emit(done.to_json(), as_json, lambda: answer_text.print_export(done))
