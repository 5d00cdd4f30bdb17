"""Commands on devices: ``devices``, ``profile``, ``search`` and ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.options import (
    Seconds,
    checkpoint_argument,
    comma_list,
    output_options,
    search_options,
    workload_options,
)
from amoeba_deploy.progress import Progress


@click.command()
@click.argument("name", required=False)
@output_options
def devices(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the device catalogue, or what is known of one device and from where.

    \b
    amoeba devices orin-nx
    """
    from amoeba_deploy import console
    from amoeba_deploy.profiles.device import device_names, load_device

    if name is None:
        known = [load_device(each) for each in device_names()]
        emit({"devices": [console.device_summary(d) for d in known]}, as_json, lambda: console.print_devices(known))
    else:
        device = load_device(name)
        emit(console.device_json(device), as_json, lambda: console.print_device(device))


@click.command()
@checkpoint_argument
@click.option("--flow", help="Flows, separated by commas.  [default: every one installed]")
@click.option("--precision", help="Precisions, separated by commas.  [default: all of each flow]")
@click.option(
    "--device", default="local", show_default=True, help="What to call this machine in a table written by -o."
)
@click.option("--shapes", default="grid", show_default=True, help="corners, grid, or shapes separated by commas.")
@click.option("--repeats", type=click.IntRange(3), default=9, show_default=True, help="Runs of each engine.")
@click.option("--budget", type=Seconds(), default="5m", show_default=True, help="Time after which no repeat begins.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Table to write.  [default: this machine's cache]"
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@workload_options
@output_options
def profile(
    checkpoint: Path | None,
    flow: str | None,
    precision: str | None,
    device: str,
    shapes: str,
    repeats: int,
    budget: float,
    output: Path | None,
    force: bool,
    batch: int,
    prompt: int,
    tokens: int,
    context: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure latencies of some shapes on this machine; search interpolates the rest.

    \b
    amoeba profile --flow onnx --precision fp32,int4
    """
    from amoeba_deploy import console
    from amoeba_deploy.profiles.local import profile_to
    from amoeba_deploy.profiles.workload import Workload

    opened = open_named(checkpoint)
    table, file = profile_to(
        opened,
        comma_list(flow),
        comma_list(precision),
        shapes,
        Workload(batch, prompt, tokens),
        context,
        repeats=repeats,
        budget=budget,
        device=device,
        output=output,
        force=force,
        progress=Progress(quiet),
    )
    value = {"path": str(file), "rows": len(table.rows)}
    emit(value, as_json, lambda: console.print_table(table, file))


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

    \b
    amoeba export --device orin-nx --latency 40ms -o out
    """
    from amoeba_deploy import console
    from amoeba_deploy.files import check_target
    from amoeba_deploy.request import Request, Space, export_answer

    opened = open_named(checkpoint)
    if output is not None:
        check_target(output, force, (opened.path, opened.model.path))
    request = Request.of(Space.of_checkpoint(opened), asked, Progress(quiet), shape)
    done = export_answer(opened, request, output, force=force, verify=not no_verify, text=verify_text)
    emit(done.to_json(), as_json, lambda: console.print_export(done))
