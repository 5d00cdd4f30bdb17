"""The command ``profile``, and those beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.commands.common import WithSubcommands, emit, open_named, source_named
from amoeba_deploy.errors import BadInput
from amoeba_deploy.options import (
    Memory,
    Seconds,
    checkpoint_argument,
    comma_list,
    measured_shapes_option,
    output_options,
    settings_option,
    workload_options,
)
from amoeba_deploy.progress import Progress

if TYPE_CHECKING:
    from amoeba_deploy.profiles.bench_words import Form


@click.command(cls=WithSubcommands)
@checkpoint_argument
@click.option("--flow", help="Flows, separated by commas, or all.  [default: those that 'local' lists]")
@click.option("--precision", help="Precisions, separated by commas.  [default: all of each flow]")
@click.option(
    "--device", default="local", show_default=True, help="What to call this machine in a table written by -o."
)
@measured_shapes_option
@click.option("--repeats", type=click.IntRange(3), help="Runs of each engine.  [default: until medians are precise]")
@click.option("--budget", type=Seconds(), default="4m", show_default=True, help="Time after which no run begins.")
@settings_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Table to write.  [default: this machine's cache]"
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw curves and heat maps into this .html or .png.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["md", "csv", "json", "jsonl"]),
    help="Print what was measured in llama-bench's words.",
)
@click.option("--config", help="Measure a model's shapes by its config, folder or hub id alone, with random weights.")
@workload_options
@output_options
def profile(
    checkpoint: Path | None,
    flow: str | None,
    precision: str | None,
    device: str,
    shapes: str,
    repeats: int | None,
    budget: float,
    settings: tuple[tuple[str, str], ...],
    output: Path | None,
    plot: Path | None,
    force: bool,
    form: Form | None,
    config: str | None,
    batch: int,
    prompt: int,
    tokens: int,
    context: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure latencies of some shapes on this machine; the table predicts the rest.

    \b
    amoeba profile --flow onnx --precision fp32,int4
    """
    from amoeba_deploy.profiles import report
    from amoeba_deploy.profiles.local import profile_to
    from amoeba_deploy.profiles.workload import Workload

    if as_json and form is not None:
        raise BadInput("--json and --as both say how to print; give one of them")
    if plot is not None:
        from amoeba_deploy.pictures.page import check_page

        check_page(plot, force)
    done = profile_to(
        source_named(checkpoint, config),
        comma_list(flow),
        comma_list(precision),
        shapes,
        Workload(batch, prompt, tokens),
        context,
        repeats=repeats,
        budget=budget,
        settings=dict(settings),
        device=device,
        output=output,
        force=force,
        progress=Progress(quiet),
    )
    if plot is not None:
        report.draw_profiled(done, plot, force)
    if form is not None:
        click.echo(done.bench_text(form), nl=False)
    else:
        emit(report.profiled_json(done), as_json, lambda: report.print_profiled(done))


@profile.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--device", required=True, help="The device that was measured: a name, or the path of its file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Table to write, or to add the rows to."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Whose model was measured.")
@click.option("--config", type=click.Path(path_type=Path), help="Config of the model that was measured.")
@click.option("--shape", help="Of what was measured, such as 24x0.75.")
@click.option("--flow", help="Of what was measured.")
@click.option("--precision", help="Of what was measured.")
@click.option("--batch", type=click.IntRange(1), help="Sequences at once.")
@click.option("--prompt", type=click.IntRange(1), help="Prompt tokens.")
@click.option("--tokens", type=click.IntRange(1), help="Generated tokens.")
@click.option("--peak-memory", type=Memory(), help="Memory that running took, such as 8GB.")
@click.option("--artifact-size", type=Memory(), help="Size of the engine's files.")
@output_options
def profile_import(
    files: tuple[Path, ...],
    device: str,
    output: Path,
    checkpoint: Path | None,
    config: Path | None,
    shape: str | None,
    peak_memory: float | None,
    artifact_size: float | None,
    as_json: bool,
    quiet: bool,
    **told: Any,
) -> None:
    """Add what was measured elsewhere to the latency table of a device.

    A report of the device test and the results of a kit (a folder) say all of it; of other benchmarks' files the
    options from --checkpoint on say what the file does not.

    \b
    amoeba profile import report.json --device orin-nx -o orin-nx.json
    """
    from amoeba_deploy.families import read_architecture
    from amoeba_deploy.model_folder import read_config
    from amoeba_deploy.profiles.device import load_device
    from amoeba_deploy.profiles.imported import import_measurements
    from amoeba_deploy.profiles.kit_results import failed_items
    from amoeba_deploy.profiles.report import print_table
    from amoeba_deploy.profiles.told import Told
    from amoeba_deploy.shape import Shape

    if checkpoint is not None and config is not None:
        raise BadInput("--checkpoint and --config both name the model; give one of them")
    architecture = read_architecture(read_config(config)) if config else None
    known = Told(
        architecture=open_named(checkpoint).architecture if checkpoint else architecture,
        shape=None if shape is None else Shape.parse(shape),
        peak_memory_bytes=None if peak_memory is None else int(peak_memory),
        artifact_bytes=None if artifact_size is None else int(artifact_size),
        **told,
    )
    table = import_measurements(files, load_device(device).name, known, output)
    for source in table.facts["imported"][-len(files) :]:
        for said in failed_items(source):
            Progress(quiet).say(said)
    value = {"path": str(output), "rows": len(table.rows)}
    emit(value, as_json, lambda: print_table(table, output))


@profile.command("kit")
@click.argument("subject", type=click.Path(path_type=Path), required=False, metavar="[CHECKPOINT|KIT]")
@click.option("--config", help="A config.json, a model folder or a hub id: shapes of that model, with random weights.")
@click.option("--device", help="What is to be measured: a name of 'amoeba devices', or the path of your own file.")
@click.option("--flow", help="Flows, separated by commas.")
@click.option("--precision", help="Precisions, separated by commas.  [default: the device's, or a flow's best]")
@measured_shapes_option
@click.option("--budget", type=Seconds(), default="20m", show_default=True, help="Time after which no run begins.")
@settings_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--on", "address", metavar="ssh://[USER@]HOST[:PORT][/DIR]", help="Run the kit there, fetch its results.")
@click.option("--python", default="python3", show_default=True, help="The device's interpreter, with --on.")
@workload_options
@output_options
def profile_kit(
    subject: Path | None,
    config: str | None,
    device: str | None,
    flow: str | None,
    precision: str | None,
    shapes: str,
    budget: float,
    settings: tuple[tuple[str, str], ...],
    output: Path | None,
    force: bool,
    address: str | None,
    python: str,
    batch: int,
    prompt: int,
    tokens: int,
    context: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a folder that measures on a device which cannot hold Amoeba, or run one over ssh.

    \b
    amoeba profile kit --device orin-nx --flow onnx -o kit
    amoeba profile kit kit --on ssh://user@orin
    """
    from amoeba_deploy.files import check_target
    from amoeba_deploy.profiles.device import load_device
    from amoeba_deploy.profiles.kit.form import KIT, read_kit
    from amoeba_deploy.profiles.kit.remote import Remote, measure_there
    from amoeba_deploy.profiles.kit.writer import wanted_items, write_kit
    from amoeba_deploy.profiles.workload import Workload

    remote, progress = Remote.parse(address, python) if address else None, Progress(quiet)
    if subject is not None and (subject / KIT).is_file():
        if remote is None:
            raise BadInput(
                f"{subject}: is a kit; copy it to the device and start run.py there, or give --on ssh://HOST"
            )
        if any(given is not None for given in (config, device, flow, precision, output)):
            raise BadInput(f"{subject}: is a kit, and holds its device and engines; leave the other options out")
        folder, kit = subject, read_kit(subject)
    else:
        if device is None or flow is None or output is None:
            raise BadInput("a kit needs --device, --flow and -o; give the one that is missing")
        check_target(output, force)
        if remote is not None:
            remote.check()
        source, measured, workload = source_named(subject, config), load_device(device), Workload(batch, prompt, tokens)
        positions = workload.context_for(source.architecture.context, context)
        asked = comma_list(flow), comma_list(precision), shapes
        wanted = wanted_items(source, measured, *asked, workload, positions, dict(settings))
        kit = write_kit(
            source, measured, wanted, workload, positions, output, budget=budget, force=force, progress=progress
        )
        folder = output
    value: dict[str, Any] = {"path": str(folder), "device": kit.device, "items": [item.id for item in kit.items]}
    value |= {"bytes": sum(size for size, _ in kit.files.values())}
    if remote is not None:
        value |= {"results": str(measure_there(folder, kit, remote, progress))}
    emit(value, as_json, lambda: _print_kit(value))


def _print_kit(value: dict[str, Any]) -> None:
    """What was written or measured, and what to do next."""
    count, size, path = len(value["items"]), value["bytes"] / 1e6, value["path"]
    click.echo(f"{path}: {count} engines for {value['device']}, {size:.0f} MB")
    results = value.get("results")
    if results is None:
        click.echo(
            f"copy it to the device, and there run: python3 run.py\nor: amoeba profile kit {path} --on ssh://HOST"
        )
    read = results or f"{path}/results"
    click.echo(f"then: amoeba profile import {read} --device {value['device']} -o TABLE")
