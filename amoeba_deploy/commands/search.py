"""The command ``search``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.commands.common import emit, open_named
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.options import Front, checkpoint_argument, output_options, search_options, workload_options
from amoeba_deploy.progress import Progress

if TYPE_CHECKING:
    from amoeba_deploy.per_block.asked import BlockAnswer
    from amoeba_deploy.request import Answer
    from amoeba_deploy.space import Space

SHOWN = 5
"""Shapes that are shown where nothing else is said."""


@click.command()
@checkpoint_argument
@search_options
@click.option("--config", type=click.Path(path_type=Path), help="Search a model's shapes from its config alone.")
@click.option("--top", type=click.IntRange(1), help=f"Shapes to show.  [default: {SHOWN}]")
@click.option("--front", type=Front(), help="What the front weighs, two of tpot, ttft, e2e, memory, size and loss.")
@click.option(
    "--method",
    type=click.Choice(["hierarchical", "exhaustive", "evolutionary"]),
    default="exhaustive",
    show_default=True,
    help="How shapes are searched: a coarse grid and finer ones around the best, all of them, or by mutation.",
)
@click.option("--measure", is_flag=True, help="With --method hierarchical on this machine: measure what it asks for.")
@click.option("--measure-quality", is_flag=True, help="Evaluate the best 3 shapes (or --top) and rank them by that.")
@click.option("--quality-text", type=click.Path(path_type=Path), help="The text that --measure-quality is about.")
@click.option("--any-text", is_flag=True, help="Let --quality-text differ from the checkpoint's own.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan of the best shape, for --shape.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw quality over latency, front and budget, into this .html or .png file.",
)
@click.option("--force", is_flag=True, help="Replace an existing plan or picture.")
@workload_options
@output_options
def search(
    checkpoint: Path | None,
    config: Path | None,
    top: int | None,
    measure_quality: bool,
    quality_text: Path | None,
    any_text: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Find the best shape for a device within a budget, and the Pareto front.

    With several devices one answer for each, and the best shape for all of them.

    \b
    amoeba search --device orin-nx --latency 40ms --config llama-2-7b/config.json --precision int4
    amoeba search --device orin-nx --ttft 200ms --size 4MB --front size,loss
    amoeba search --device local --latency 2ms --method hierarchical --measure
    amoeba search --device orin-nx --latency 1ms --method evolutionary --quality-text held-out.txt -o plan.json
    """
    from amoeba_deploy import answer_text
    from amoeba_deploy.files import check_new_file
    from amoeba_deploy.measured_quality import TOP, QualityCheck, with_measured_quality
    from amoeba_deploy.request import EVOLUTIONARY, Request, require_measurable
    from amoeba_deploy.several import SeveralAnswers, asked_of_each, of_device
    from amoeba_deploy.space import Space

    if plot is not None:
        from amoeba_deploy.pictures.page import check_page

        check_page(plot, force)
    if output is not None:
        check_new_file(output, force)
    each = asked_of_each(asked)
    _check_methods(asked, [one["device"] for one in each])
    space = Space.of_config(config) if config else Space.of_checkpoint(open_named(checkpoint))
    if asked["measure"]:
        require_measurable(space)
    if len(each) > 1 and output is not None:
        raise BadInput("-o writes one plan, and several devices are searched; search each by itself")
    if output is not None and space.checkpoint is None:
        raise BadInput("-o writes which units a plan keeps, and a config has none; give a checkpoint")
    if asked["method"] == EVOLUTIONARY:
        from amoeba_deploy.per_block.report import print_block_answer

        found = _search_blocks(space, each, quality_text, plot, Progress(quiet))
        if output is not None:
            found.result.write_plan(output, force)
        emit(found.to_json(), as_json, lambda: print_block_answer(found, output))
        return
    if quality_text is not None and not measure_quality:
        raise BadInput("--quality-text is the text of --measure-quality; give both")
    check = QualityCheck.of(space.checkpoint, quality_text, any_text) if measure_quality else None
    answers: list[Answer] = []
    for one in each:
        try:
            answer = Request.of(space, one, Progress(quiet)).answer()
            answers.append(answer if check is None else with_measured_quality(answer, check, top or TOP))
        except AmoebaError as error:
            if len(each) == 1:
                raise
            raise of_device(one["device"], error) from None
    if output is not None:
        answers[0].write_plan(output, force)
    if plot is not None:
        _draw(answers, plot, force)
    shown = top or SHOWN
    if len(answers) == 1:
        emit(answers[0].to_json(shown), as_json, lambda: answer_text.print_search(answers[0], shown))
        return
    several = SeveralAnswers.of(answers)
    emit(several.to_json(shown), as_json, lambda: answer_text.print_several(several, shown))


def _search_blocks(
    space: Space, each: Sequence[dict[str, Any]], text: Path | None, plot: Path | None, progress: Progress
) -> BlockAnswer:
    """Search the widths of single blocks, on one device."""
    from amoeba_deploy.per_block.asked import answer_blocks, require_block_search
    from amoeba_deploy.request import Request

    if len(each) > 1:
        raise BadInput("--method evolutionary searches for one device; search each by itself")
    if plot is not None:
        raise BadInput("--plot draws fronts of uniform shapes; leave it out with --method evolutionary")
    text = require_block_search(each[0], text)
    return answer_blocks(Request.of(space, each[0], progress), text)


def _draw(answers: Sequence[Answer], file: Path, force: bool) -> None:
    """Write the fronts of some answers as a picture."""
    from amoeba_deploy.pictures.front import front_of, front_section
    from amoeba_deploy.pictures.page import write_page

    fronts = [
        front_of(
            answer.request.target.device.name,
            answer.result.found,
            answer.best,
            answer.request.budget,
            answer.request.target.workload.tokens,
        )
        for answer in answers
    ]
    write_page(file, f"Latency and quality of {answers[0].request.space.name}", [front_section(fronts)], force)
    answers[0].request.progress.say(f"drawn: {file}")


def _check_methods(asked: dict[str, Any], devices: list[str]) -> None:
    """Raise BadInput where a method cannot be used as asked."""
    if not asked["measure"]:
        return
    if asked["method"] != "hierarchical":
        raise BadInput("--measure measures what a hierarchical search asks for; add --method hierarchical")
    if asked["table"] or devices != ["local"]:
        raise BadInput("--measure measures on this machine; give --device local alone, and no --table")
