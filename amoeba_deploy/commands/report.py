"""The command ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.options import (
    DeviceLatency,
    checkpoint_argument,
    limit_options,
    output_options,
    settings_option,
    workload_options,
)
from amoeba_deploy.progress import Progress

if TYPE_CHECKING:
    from amoeba_deploy.report.document import Report


@click.command()
@checkpoint_argument
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="A name of 'amoeba devices', or the path of your own device file.  [default: those of the tables]",
)
@click.option(
    "--latency",
    "latencies",
    type=DeviceLatency(),
    multiple=True,
    help="Where the line stands first, such as 40ms; of one of several devices NAME=40ms.",
)
@limit_options
@click.option(
    "--table",
    "--tables",
    "table",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Latency table to use; several are merged.",
)
@click.option(
    "--bundle", "--bundles", "bundles", type=click.Path(path_type=Path), multiple=True, help="Bundle to show, too."
)
@click.option("--measured-only", is_flag=True, help="Refuse estimates.")
@settings_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Page to write, an .html file.")
@click.option("--force", is_flag=True, help="Replace an existing page.")
@workload_options
@output_options
def report(
    checkpoint: Path | None,
    bundles: tuple[Path, ...],
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Write one page for those who decide what ships: what every budget buys, on which device, and how that is known.

    The page needs no network. Nothing is measured: latencies are of tables, or estimated.

    \b
    amoeba report -o report.html
    amoeba report checkpoint --device orin-nx --device my-board.toml --table my-board.json --bundle out -o report.html
    """
    from amoeba_deploy.report.document import make_report
    from amoeba_deploy.report.page import check_page, write_page

    check_page(output, force)
    progress = Progress(quiet)
    done = make_report(open_named(checkpoint), checkpoint, asked, bundles, progress)
    for device in done.devices:
        for remark in device.remarks:
            progress.say(f"note: {device.boards[0].device}: {remark}")
    size = write_page(output, done, force)
    emit({"path": str(output), "bytes": size} | done.to_json(), as_json, lambda: _print(done, output, size))


def _print(done: Report, output: Path, size: int) -> None:
    """What the page shows, and where it is."""
    from amoeba_deploy.console import amount

    for device in done.devices:
        for board in device.boards:
            case = board.widest
            engines = ", ".join(f"{flow} {precision}" for flow, precision in case.pairs)
            least, most = case.choices[0], case.choices[-1]
            click.echo(
                f"{board.device}, {engines}: {len(case.found)} shapes, from {least.best.shape} at {least.budget} ms to "
                f"{most.best.shape} at {most.budget} ms"
            )
    click.echo(f"{output}: {amount(size)}")
