"""The command ``amoeba``: parse, call, print. What is computed stands in the other modules.

Results go to standard output, remarks and progress to standard error. Every expected failure is one sentence and an
exit code (errors.py); a traceback appears only with ``--debug``.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy import __version__
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.options import (
    Memory,
    Seconds,
    Workers,
    checkpoint_argument,
    comma_list,
    output_options,
    search_options,
    workload_options,
)
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Policy

if TYPE_CHECKING:
    pass


class Commands(click.Group):
    """A group that turns expected failures into a sentence and an exit code, and helps with mistyped names."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AmoebaError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"amoeba: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("amoeba: interrupted; nothing was left under the output's name", err=True)
            ctx.exit(1)
        except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
            raise
        except click.UsageError as error:
            click.echo(f"amoeba: {error.format_message()}", err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            kind = type(error).__name__
            click.echo(f"amoeba: unexpected {kind}: {error}; run 'amoeba --debug ...' to see where", err=True)
            ctx.exit(1)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            click.echo(f"amoeba: {error.format_message()}", err=True)
            raise click.exceptions.Exit(error.exit_code) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise click.UsageError(error.message + hint, ctx) from None


CONTEXT = {"help_option_names": ["-h", "--help"]}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="amoeba")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Derive a subnet of any depth and width from one checkpoint, and build an engine of it for a device.

    \b
    amoeba export --device orin-nx --latency 40ms -o out
    amoeba run out -p "Once upon a time"
    """
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Let a polite request to end (CI, containers) clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def emit(value: dict[str, Any], as_json: bool, text: Callable[[], None]) -> None:
    """Print one JSON object, or the same for people."""
    if as_json:
        click.echo(json.dumps(value))
    else:
        text()


def open_named(path: Path | None) -> Any:
    """The checkpoint of a command: its argument, else ./amoeba.toml's, else the embedded one."""
    from amoeba_deploy.checkpoint import open_checkpoint
    from amoeba_deploy.settings import configured_checkpoint

    return open_checkpoint(path or configured_checkpoint())


@main.command()
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


@main.command()
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


@main.group()
def checkpoint() -> None:
    """Create, import, show and verify one-for-all checkpoints."""


@checkpoint.command("create")
@click.argument("model")
@click.option("--selection", type=click.Path(path_type=Path), required=True, help="What 'amoeba select' wrote.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--quality-text", type=click.Path(path_type=Path), help="Text to measure every shape's loss on.")
@click.option("--quality-tasks", type=click.Path(path_type=Path), help="Questions to measure accuracy on.")
@click.option("--name", help="What derived models call it.  [default: the model's name]")
@click.option("--include-base", is_flag=True, help="Copy the base model into the checkpoint.")
@click.option(
    "--policy",
    type=click.Choice(["uniform", "adaptive"]),
    default="uniform",
    show_default=True,
    help="How widths are spread over blocks: alike, or by one threshold over all.",
)
@click.option(
    "--bias",
    type=click.Choice(["on", "off"]),
    default="off",
    show_default=True,
    help="Whether subnets carry biases that compensate for what is removed.",
)
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


@main.command()
@checkpoint_argument
@click.option("--shape", required=True, help="Such as 24x0.75, or a plan file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--policy",
    type=click.Choice(["uniform", "adaptive"]),
    help="Every block alike, or by one threshold over all blocks.  [default: the checkpoint's]",
)
@click.option("--for", "flow", help="Keep only numbers of heads and neurons that this engine takes, such as gguf.")
@click.option("--precision", help="Of that engine.  [default: its strictest rules]")
@click.option(
    "--bias",
    type=click.Choice(["on", "off"]),
    help="Biases that compensate for what is removed.  [default: the checkpoint's]",
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of the weights.  [default: the base model's]"
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    help="Keep neurons in multiples of this.  [default: the engine's, else the checkpoint's]",
)
@click.option(
    "--layout",
    type=click.Choice(["uniform", "ragged"]),
    default="uniform",
    show_default=True,
    help="Pad blocks of different widths for stock classes, or leave each its own: loads with trust_remote_code=True.",
)
@click.option("--device", help="Also estimate what padding costs there: a name of 'amoeba devices', or your own file.")
@click.option("--shard-size", type=Memory(), default="5GB", show_default=True, help="Most data in one file of weights.")
@click.option(
    "--quality-text", type=click.Path(path_type=Path), help="Text to measure the loss on before and after, in fp32."
)
@click.option("--push-to-hub", metavar="REPO", help="Upload the folder to this Hugging Face repository, org/name.")
@click.option("--plan-only", is_flag=True, help="Print the plan as JSON and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def extract(
    checkpoint: Path | None,
    shape: str,
    output: Path | None,
    device: str | None,
    plan_only: bool,
    bias: str | None,
    shard_size: float,
    quality_text: Path | None,
    push_to_hub: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **wishes: Any,
) -> None:
    """Write the dense subnet of a shape as a folder that stock transformers loads.

    \b
    amoeba extract --shape 8x0.75 -o subnet
    amoeba extract --shape 8x0.75 --for gguf -o subnet
    amoeba extract --shape 8x0.75 --policy adaptive --layout ragged -o subnet --device orin-nx
    """
    from amoeba_deploy import console
    from amoeba_deploy.extraction.layout_cost import layout_cost
    from amoeba_deploy.files import json_text
    from amoeba_deploy.hub import check_name, upload
    from amoeba_deploy.profiles.device import load_device
    from amoeba_deploy.subnet import Subnet, Wishes, derive_folder

    opened, progress = open_named(checkpoint), Progress(quiet)
    asked = Wishes(shape, bias=None if bias is None else bias == "on", shard_bytes=int(shard_size), **wishes)
    if plan_only:
        subnet = Subnet(opened, asked)
        for note in subnet.notes:
            progress.say(f"note: {note}")
        click.echo(json_text(subnet.plan.to_json()), nl=False)
        return
    if output is None:
        raise BadInput("extract needs -o DIR to write to, or --plan-only")
    if push_to_hub:
        check_name(push_to_hub)
    cost = None
    if device:
        cost = layout_cost(Subnet(opened, asked).plan, opened.architecture, load_device(device))
    done = derive_folder(opened, asked, output, force=force, quality_text=quality_text, progress=progress)
    value = {
        "path": str(output),
        "plan": done.plan.to_json(),
        "seconds": round(done.seconds, 4),
        "bytes": done.bytes,
        "layout": wishes["layout"],
        "layout_bytes": done.layout_bytes,
        "predicted": None if cost is None else cost.to_json(),
    }
    if push_to_hub:
        value["url"] = upload(output, push_to_hub, progress)
    emit(value, as_json, lambda: console.print_extraction(done, output, cost))


@main.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--shape", multiple=True, help="Shape of a checkpoint; may be repeated.  [default: the full model]")
@click.option("--text", type=click.Path(path_type=Path), help="Text file: loss and perplexity.")
@click.option("--tasks", help="JSON-lines files of questions, separated by commas: accuracy.")
@click.option("--sequence", type=click.IntRange(2), default=256, show_default=True, help="Tokens a row of text.")
@output_options
def evaluate(
    path: Path | None,
    shape: tuple[str, ...],
    text: Path | None,
    tasks: str | None,
    sequence: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Perplexity on a text and accuracy on questions, of a model folder, a bundle, or shapes of a checkpoint.

    \b
    amoeba evaluate --shape 8x0.75 --text held-out.txt --tasks questions.jsonl
    """
    from amoeba_deploy import console
    from amoeba_deploy.subject import evaluate_subject, subjects

    if text is None and tasks is None:
        raise BadInput("evaluate needs --text FILE or --tasks FILE[,FILE...]")
    questions = [Path(name) for name in comma_list(tasks)]
    results = {
        name: evaluate_subject(subject, text, questions, sequence, Progress(quiet))
        for name, subject in subjects(path, shape, open_named)
    }
    value = next(iter(results.values())) if len(results) == 1 else {"shapes": results}
    emit(value, as_json, lambda: console.print_evaluation(results))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate at most.")
@output_options
def run(path: Path, prompt: str, tokens: int, as_json: bool, quiet: bool) -> None:
    """Stream text from a bundle or a model folder; TTFT and TPOT follow on standard error.

    \b
    amoeba run out -p "Question: Where does Mirel live? Answer:"
    """
    from amoeba_deploy.generation import Timings, stream_text
    from amoeba_deploy.subject import open_subject

    subject = open_subject(path)
    timings, pieces = Timings(), []
    for piece in stream_text(subject.engine, subject.folder, prompt, tokens, subject.context, timings):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    value = {
        "text": "".join(pieces),
        "tokens": len(timings.later) + 1,
        "ttft_ms": timings.ttft_ms,
        "tpot_ms": timings.tpot_ms,
    }
    emit(value, as_json, lambda: click.echo())
    tpot = "" if timings.tpot_ms is None else f", TPOT {timings.tpot_ms:.2f} ms"
    Progress(quiet).say(f"{subject.flow} {subject.precision}: TTFT {timings.ttft_ms:.1f} ms{tpot} (measured)")


@main.command()
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


@main.command()
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


@main.command()
@checkpoint_argument
@search_options
@click.option("--shape", help="Build this shape or plan file instead of searching.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.  [default: named after its target]"
)
@click.option("--no-verify", is_flag=True, help="Do not compare the engine with transformers.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@workload_options
@output_options
def export(
    checkpoint: Path | None,
    shape: str | None,
    output: Path | None,
    no_verify: bool,
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
    done = export_answer(opened, request, output, force=force, verify=not no_verify)
    emit(done.to_json(), as_json, lambda: console.print_export(done))


@main.group()
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
