"""Test an engine on the device that this runs on, and write a report.

    make test-device FLOW=onnx OUT=report.json
    python tools/test_device.py --flow onnx -o report.json    # in any environment with the package and the engine

It builds the checkpoint that ships in the package (or MODEL, a checkpoint's or model's folder) whole and at half of
its depth and width in each precision of the engine, runs the steps that are left to the device, verifies, runs the
self-test and measures. What fails is written down, and the rest goes on. The report is a latency table:

    amoeba profile import report.json --device orin-nx -o orin-nx.json

An engine that only tools of its own run, such as TensorRT-LLM's, is refused: its bundle's manifest lists commands that
measure it, whose report 'amoeba profile import' reads, too.

Exit codes: 0 all that the engine takes passed, 5 an engine computes something else than its model, 6 it cannot run
here, 2 wrong usage or every shape refused, 1 other failures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from amoeba_deploy.console import print_device_test
from amoeba_deploy.device_test import (
    ITEM_SECONDS,
    REPEATS,
    Settings,
    checkpoint_of,
    examine_device,
    failure,
    require_testable,
)
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.files import check_new_file
from amoeba_deploy.options import Seconds, Setting, comma_list, workload_options
from amoeba_deploy.profiles.table import write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--flow", required=True, help="The engine, such as onnx.")
@click.option("--precision", help="Precisions, separated by commas.  [default: all of the engine]")
@click.option(
    "--model", type=click.Path(path_type=Path), help="Checkpoint or model folder.  [default: the embedded one]"
)
@click.option("--device", default="local", show_default=True, help="What to call this machine in the report.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="report.json", show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing report.")
@click.option("--repeats", type=click.IntRange(3), default=REPEATS, show_default=True, help="Runs of each engine.")
@click.option("--limit", type=Seconds(), default=ITEM_SECONDS, help="After which an item is ended.  [default: 1h]")
@click.option(
    "--set", "engine", type=Setting(), multiple=True, metavar="NAME=VALUE", help="A setting of the engine's own."
)
@workload_options
def main(
    flow: str,
    precision: str | None,
    model: Path | None,
    device: str,
    output: Path,
    force: bool,
    repeats: int,
    limit: float,
    engine: tuple[tuple[str, str], ...],
    batch: int,
    prompt: int,
    tokens: int,
    context: int | None,
) -> None:
    """Test an engine on this device and write a report that 'amoeba profile import' reads.

    \b
    python tools/test_device.py --flow onnx -o report.json
    """
    try:
        check_new_file(output, force)
        require_testable(flow)
        workload = Workload(batch, prompt, tokens)
        settings = Settings(flow, tuple(comma_list(precision)), device, workload, context, repeats, dict(engine))
        with tempfile.TemporaryDirectory(prefix="amoeba-model-") as work:
            checkpoint = checkpoint_of(model, Path(work))
            table = examine_device(checkpoint, checkpoint.path if model else None, settings, limit, Progress())
        write_table(output, table, force)
        print_device_test(table, output)
        error = failure(table.facts["items"])
    except AmoebaError as raised:
        error = raised
    if error is not None:
        click.echo(f"test_device: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
