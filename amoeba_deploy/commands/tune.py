"""The command of stage 2: ``tune``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import Widths, base_options, cut_options, output_options, quality_options
from amoeba_deploy.progress import Progress


def refuse_idle(context: click.Context, adapter: str, shape: str | None) -> None:
    """Raise a usage error where an option was given that does nothing beside another one."""
    idle = {
        "--adapter none": ("rank", "alpha", "experts", "top_k", "mix", "adapter_dtype", "include_base"),
        "--adapter lora": ("experts", "top_k", "mix"),
        "--shape": ("random_shapes", "distillation", "no_balance", "conflicts"),
    }
    for reason in (f"--adapter {adapter}", "--shape" if shape else ""):
        for name in idle.get(reason, ()):
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} does nothing beside {reason}; leave one of them out")


@click.command()
@click.argument("model")
@click.option("--selection", type=click.Path(path_type=Path), required=True, help="What 'amoeba select' wrote.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--data", required=True, help="JSON, JSON-lines or text file, or a name: alpaca-gpt4, wikitext2, ...")
@click.option("--steps", type=click.IntRange(1), default=10_000, show_default=True, help="Steps to train.")
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Rows a batch, over all processes.")
@click.option("--accumulate", type=click.IntRange(1), default=4, show_default=True, help="Batches a step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: 2e-4; all weights 2e-5]")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine"]),
    default="constant",
    show_default=True,
    help="How the learning rate goes.",
)
@click.option("--warmup", type=click.IntRange(0), default=0, show_default=True, help="Steps over which it rises.")
@click.option(
    "--clip", type=click.FloatRange(0), default=0.3, show_default=True, help="Largest gradient norm; 0: none."
)
@click.option(
    "--adapter",
    type=click.Choice(["smol", "lora", "none"]),
    default="smol",
    show_default=True,
    help="A gated mixture of LoRAs, one LoRA, or all weights themselves.",
)
@click.option("--rank", type=click.IntRange(1), default=64, show_default=True, help="Of each LoRA.")
@click.option("--alpha", type=click.FloatRange(0, min_open=True), default=16.0, show_default=True, help="LoRA's scale.")
@click.option("--experts", type=click.IntRange(1), default=5, show_default=True, help="LoRAs a linear layer.")
@click.option("--top-k", type=click.IntRange(1), default=2, show_default=True, help="Experts that serve a shape.")
@click.option(
    "--mix",
    type=click.Choice(["factors", "products"]),
    default="factors",
    show_default=True,
    help="Mix the experts' factors, as released, or their products.",
)
@click.option(
    "--adapter-dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="In which experts are written.",
)
@click.option("--widths", type=Widths(), default="1,7/8,3/4,5/8", show_default=True, help="Widths to tune.")
@click.option("--random-shapes", type=click.IntRange(0), default=2, show_default=True, help="A step, beside the ends.")
@click.option("--shape", help="Tune this shape alone, such as 24x0.75.")
@click.option(
    "--distillation",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="The largest shape's share in what others learn; the rest is labels.",
)
@click.option(
    "--conflicts",
    type=click.Choice(["sum", "project"]),
    default="sum",
    show_default=True,
    help="Add the shapes' gradients, or first take away what points against another's.",
)
@click.option("--no-balance", is_flag=True, help="Leave the shapes' losses at their own magnitudes.")
@cut_options
@click.option(
    "--template", type=click.Choice(["alpaca", "plain"]), default="alpaca", show_default=True, help="Of prompts."
)
@click.option("--source-tokens", type=click.IntRange(1), default=384, show_default=True, help="Window of prompts.")
@click.option("--target-tokens", type=click.IntRange(1), default=128, show_default=True, help="Window of answers.")
@click.option(
    "--long-answers",
    type=click.Choice(["refuse", "cut", "drop"]),
    help="What becomes of longer ones.  [default: refuse; cut for named data]",
)
@click.option(
    "--grouping",
    type=click.Choice(["none", "length", "pack"]),
    help="Examples as they come, those of like lengths together, or several in a row.  [default: length]",
)
@click.option(
    "--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True, help="Of the products."
)
@click.option("--base-bits", type=click.Choice(["4", "8"]), help="Hold the frozen base in so many bits.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, a third more time.")
@click.option("--cpu", is_flag=True, help="Leave GPUs alone.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option(
    "--save-every", type=click.IntRange(1), default=500, show_default=True, help="Steps between saved states."
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Folder for TensorBoard's events.")
@quality_options
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 0.5),
    default=0.02,
    show_default=True,
    help="Share of the data to measure quality on, where no --quality-text is given.",
)
@base_options
@click.option("--force", is_flag=True, help="Replace an existing output, or begin an interrupted run again.")
@output_options
def tune(
    model: str,
    selection: Path,
    output: Path,
    data: str,
    template: str,
    source_tokens: int,
    target_tokens: int,
    long_answers: str | None,
    grouping: str | None,
    hold_out: float,
    no_balance: bool,
    bias: str,
    base_bits: str | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Tune MODEL once so that every shape is good (stage 2); writes the one-for-all checkpoint.

    Under 'accelerate launch' or 'torchrun' the rows of each batch are spread over the processes.

    \b
    amoeba tune models/stories260K --selection selection -o tuned --data stories.txt --steps 200
    """
    from amoeba_deploy import console
    from amoeba_deploy.stage2.data import DataSettings
    from amoeba_deploy.stage2.pipeline import Run, tune_checkpoint
    from amoeba_deploy.stage2.settings import Settings

    refuse_idle(click.get_current_context(), asked["adapter"], asked["shape"])
    how = {name: asked.pop(name) for name in list(asked) if name in {each.name for each in fields(Settings)}}
    bits: Any = None if base_bits is None else int(base_bits)
    settings = Settings(**how, balance=not no_balance, bias=bias == "on", base_bits=bits)
    windows: Any = (template, source_tokens, target_tokens, long_answers, grouping, hold_out)
    run = Run(model, selection, output, DataSettings(data, *windows), settings, Progress(quiet), **asked)
    made = tune_checkpoint(run)
    if made is not None:  # the other processes of a run have nothing to say
        emit(console.checkpoint_json(made), as_json, lambda: console.print_checkpoint(made))
