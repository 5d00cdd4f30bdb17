"""Commands on subnets and models: ``extract``, ``evaluate`` and ``run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.errors import BadInput
from amoeba_deploy.options import (
    Memory,
    checkpoint_argument,
    comma_list,
    output_options,
)
from amoeba_deploy.progress import Progress


@click.command()
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
    from amoeba_deploy.subnet import Subnet, Wishes, write_folder

    opened, progress = open_named(checkpoint), Progress(quiet)
    asked = Wishes(shape, bias=None if bias is None else bias == "on", shard_bytes=int(shard_size), **wishes)
    subnet = Subnet(opened, asked)
    if plan_only:
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
        cost = layout_cost(subnet.plan, opened.architecture, load_device(device))
    done = write_folder(subnet, output, force=force, quality_text=quality_text, progress=progress)
    value = {
        "path": str(output),
        "plan": done.plan.to_json(),
        "seconds": round(done.seconds, 4),
        "bytes": done.bytes,
        "layout": wishes["layout"],
        "layout_bytes": done.layout_bytes,
        "quality": done.quality,
        "predicted": None if cost is None else cost.to_json(),
    }
    if push_to_hub:
        value["url"] = upload(output, push_to_hub, progress)
    emit(value, as_json, lambda: console.print_extraction(done, output, cost))


@click.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--shape", multiple=True, help="Shape of a checkpoint; may be repeated.  [default: the full model]")
@click.option("--text", type=click.Path(path_type=Path), help="Text file: loss and perplexity.")
@click.option(
    "--tasks",
    help="Tasks of lm-evaluation-harness by name (mmlu, boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, "
    "openbookqa, wikitext, ...) and JSON-lines files of questions, separated by commas.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder with a folder of files a task, asked instead of the hub.  [default: $AMOEBA_DATA]",
)
@click.option("--shots", type=click.IntRange(0), help="Worked examples before a question.  [default: the paper's]")
@click.option("--limit", type=click.IntRange(1), help="Ask only the first so many questions of each task.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--sequence", type=click.IntRange(2), default=256, show_default=True, help="Tokens a row of text.")
@output_options
def evaluate(
    path: Path | None,
    shape: tuple[str, ...],
    text: Path | None,
    tasks: str | None,
    data: Path | None,
    shots: int | None,
    limit: int | None,
    fresh: bool,
    sequence: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Perplexity on a text, accuracy on questions and tasks, of a model folder, a bundle, or shapes of a checkpoint.

    \b
    amoeba evaluate --shape 8x0.75 --text held-out.txt --tasks questions.jsonl
    amoeba evaluate out --tasks piqa,arc_easy --data my-data
    """
    from amoeba_deploy import console
    from amoeba_deploy.evaluated import Wanted, evaluate_one, evaluated_subjects
    from amoeba_deploy.tasks.harness import TaskRequest

    if text is None and not comma_list(tasks):
        raise BadInput("evaluate needs --text FILE or --tasks TASK[,TASK...]")
    progress = Progress(quiet)
    wanted = Wanted.of(text, comma_list(tasks), sequence, TaskRequest(shots, limit, data), fresh)
    results = {
        name: evaluate_one(subject, wanted, progress) for name, subject in evaluated_subjects(path, shape, open_named)
    }
    if any(result["remembered"] for result in results.values()):
        progress.say("measured before; --fresh measures again")
    value = next(iter(results.values())) if len(results) == 1 else {"shapes": results}
    emit(value, as_json, lambda: console.print_evaluation(results))


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Text to continue, or with --chat a question to answer.")
@click.option(
    "--tokens", type=click.IntRange(1), help="Tokens to generate at most.  [default: 64, or what the context leaves]"
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's own chat template.")
@click.option("--system", help="Instructions that go before the question; with --chat.")
@click.option("--sample", is_flag=True, help="Draw tokens as generation_config.json says.  [default: the likeliest]")
@click.option("--seed", type=click.IntRange(0), help="Another draw; with --sample.  [default: 0]")
@output_options
def run(
    path: Path,
    prompt: str,
    tokens: int | None,
    chat: bool,
    system: str | None,
    sample: bool,
    seed: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Stream text from a bundle or a model folder; TTFT and TPOT follow on standard error.

    \b
    amoeba run out -p "Question: Where does Mirel live? Answer:"
    amoeba run out --chat --system "Answer in one sentence." -p "Where does Mirel live?"
    """
    from amoeba_deploy.chat import render_chat
    from amoeba_deploy.generation import Choose, Timings, prompt_of, stream_text
    from amoeba_deploy.sampling import Sampler, greedy, read_sampling
    from amoeba_deploy.subject import find_subject

    if system is not None and not chat:
        raise BadInput("--system goes into a chat template; add --chat")
    if seed is not None and not sample:
        raise BadInput("--seed is of random draws; add --sample")
    found = find_subject(path)
    asked = render_chat(found.folder, prompt, system) if chat else None
    ids = asked.ids if asked else prompt_of(found.folder, prompt)
    choose: Choose = Sampler(read_sampling(found.folder), seed or 0) if sample else greedy
    stops = asked.stops if asked else frozenset()
    subject = found.open()
    timings, pieces = Timings(), []
    most = tokens or max(1, min(64, subject.context - len(ids)))
    for piece in stream_text(
        subject.engine, subject.folder, ids, most, subject.context, timings, choose=choose, stops=stops
    ):
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
