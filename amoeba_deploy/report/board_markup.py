"""Boards as HTML: the picture with its line, the choice beside it, and both as tables; and what their script reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amoeba_deploy.console import amount
from amoeba_deploy.pictures.front import front_of, front_section
from amoeba_deploy.pictures.section import METRIC_TITLES, significant
from amoeba_deploy.report.board import Board
from amoeba_deploy.report.case import Case
from amoeba_deploy.report.command import decimal
from amoeba_deploy.report.document import Report
from amoeba_deploy.report.markup import Charts, escaped, folded, paragraph, table
from amoeba_deploy.report.wording import (
    facts,
    metric_title,
    milliseconds,
    nothing_fits,
    quality_name,
    quality_text,
    reason,
)

Keep = Mapping[str, int]
"""For a flow with its precision the number of what its shapes keep."""
_NAME = "Budget: {metric} at most"


def engines(case: Case) -> str:
    """The engines of a case."""
    return " or ".join(f"{flow} {precision}" for flow, precision in case.pairs)


def board_markup(report: Report, board: Board, number: int, charts: Charts) -> str:
    """One board."""
    case = board.widest
    budget = replace(case.request.budget, ms=None)
    front = front_of(board.device, case.found, None, budget, case.request.target.workload.tokens)
    panel = front_section([front]).panels[0]
    name = f"board{number}"
    heading = board.device if len(board.cases) > 1 else f"{board.device}, {engines(case)}"
    plot = charts.plot(panel, f"Quality over latency on {board.device}")
    tables = "".join(choices_table(report, one) for one in board.cases) + shapes_table(board)
    return (
        f'<section class="board" id="{name}" data-board="{number}" aria-labelledby="{name}-title">\n'
        f'<h3 id="{name}-title">{escaped(heading)}</h3>\n{_controls(board, name)}'
        f'<div class="sides">\n<figure>\n<figcaption>{escaped(_caption(case))}</figcaption>\n'
        f'<div class="stage">\n{plot}{_line(board)}</div>\n</figure>\n{_choice(name)}</div>\n{tables}</section>\n'
    )


def _caption(case: Case) -> str:
    quality = quality_name(case.found[0])
    return (
        f"{quality[0].upper()}{quality[1:]} over {metric_title(case.request.budget.metric)}; {len(case.found)} shapes"
    )


def _controls(board: Board, name: str) -> str:
    metric = board.widest.request.budget.metric.upper()
    label = _NAME.format(metric=metric)
    choose = ""
    if len(board.cases) > 1:
        options = "".join(f'<option value="{i}">{escaped(engines(c))}</option>' for i, c in enumerate(board.cases))
        choose = f'<label>Engine <select class="engine">{options}</select></label>\n'
    return (
        f'<div class="controls">\n{choose}<label for="{name}-budget">{escaped(label)}</label>\n'
        f'<span class="amount"><input class="budget" id="{name}-budget" type="number" min="0" step="any" '
        f'inputmode="decimal" autocomplete="off" aria-describedby="{name}-wrong"> ms</span>\n'
        f'<span class="wrong" id="{name}-wrong" role="alert"></span>\n</div>\n'
    )


def _line(board: Board) -> str:
    label = f"Latency budget on {board.device}"
    return (
        f'<div class="ring" hidden></div>\n<div class="line" role="slider" tabindex="0" aria-label="{escaped(label)}" '
        f'aria-orientation="horizontal" hidden><span class="flag"></span></div>\n'
    )


def _choice(name: str) -> str:
    return (
        f'<div class="choice">\n<p class="said" aria-live="polite"></p>\n<dl></dl>\n<p class="why"></p>\n'
        f'<div class="build"><label for="{name}-command">The command that builds it</label>\n'
        f'<pre id="{name}-command" class="command" tabindex="0"></pre>\n'
        f'<button type="button" class="copy">Copy</button>\n'
        f'<button type="button" class="show-kept">What it keeps</button>\n'
        f'<span class="copied" role="status"></span></div>\n</div>\n'
    )


def choices_table(report: Report, case: Case) -> str:
    """What is chosen at every budget, with the start of the command that builds it."""
    metric, first = case.request.budget.metric.upper(), case.found[0]
    head = [f"{metric} from ms", "shape", "engine", "TPOT ms", "TTFT ms", "latency", "memory", "size"]
    rows = []
    for step in case.choices:
        best, prediction = step.best, step.best.prediction
        figures = [f"{prediction.tpot_ms:.3f}", f"{prediction.ttft_ms:.2f}", prediction.source]
        sizes = [amount(prediction.memory_bytes), amount(best.artifact_bytes)]
        quality = [quality_text(best), best.quality.source]
        rows.append([step.budget, str(best.shape), f"{best.flow} {best.precision}", *figures, *sizes, *quality])
    caption = f"The choice at every budget in {engines(case)}"
    command = f"{report.command(case)}{case.steps[0].budget}ms"
    said = paragraph(f"Below {case.steps[0].budget} ms no shape fits. Each is built as the first one is:")
    content = f'{said}<pre class="command" tabindex="0">{escaped(command)}</pre>\n'
    head = [*head, quality_name(first), "quality"]
    return folded(f"{caption}, as a table", content + table(caption, head, rows, 3))


def shapes_table(board: Board) -> str:
    """Every shape in every engine."""
    rows = []
    for case in board.singles:
        whole = max(case.found, key=lambda c: (c.shape.depth, c.shape.width))
        for candidate in case.found:
            prediction = candidate.prediction
            share = case.latency(candidate) / case.latency(whole)
            rows.append(
                [
                    str(candidate.shape),
                    f"{candidate.flow} {candidate.precision}",
                    milliseconds(prediction.tpot_ms, prediction.tpot_interval),
                    milliseconds(prediction.ttft_ms, prediction.ttft_interval),
                    prediction.source,
                    f"{share:.1%}",
                    amount(prediction.memory_bytes),
                    amount(candidate.artifact_bytes),
                    quality_text(candidate),
                    candidate.quality.source,
                ]
            )
    caption = f"All shapes on {board.device} in {engines(board.widest)}"
    metric = board.widest.request.budget.metric.upper()
    head = ["shape", "engine", "TPOT", "TTFT", "latency", f"{metric} of the whole model's", "memory", "size"]
    head += [quality_name(board.widest.found[0]), "quality"]
    return folded(f"{caption}, as a table", table(caption, head, rows, 2))


def board_json(report: Report, board: Board, chart: int, keep: Keep) -> dict[str, Any]:
    """What the script of a board looks up: every choice, and where it stands in the picture."""
    return {
        "chart": chart,
        "metric": board.widest.request.budget.metric.upper(),
        "title": METRIC_TITLES[board.widest.request.budget.metric],
        "start": None if board.start is None else decimal(board.start),
        "cases": [_case_json(report, case, keep) for case in board.cases],
    }


def _case_json(report: Report, case: Case, keep: Keep) -> dict[str, Any]:
    steps = [
        {
            "ms": step.ms,
            "budget": step.budget,
            "shape": str(step.best.shape),
            "engine": f"{step.best.flow} {step.best.precision}",
            "facts": facts(case, step.best),
            "why": reason(case, step),
            "x": significant(case.latency(step.best)),
            "y": significant(step.best.quality.value, 6),
            "kept": keep[f"{step.best.flow} {step.best.precision}"],
        }
        for step in case.steps
    ]
    return {"command": report.command(case), "nothing": nothing_fits(case), "steps": steps}
