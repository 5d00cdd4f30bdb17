"""The page: a report as one HTML file that loads nothing, the same bytes for the same input."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import check_new_file, whole_file
from amoeba_deploy.pictures.page import library, script_json
from amoeba_deploy.pictures.section import load_altair
from amoeba_deploy.pictures.theme import config
from amoeba_deploy.report.board_markup import board_json, board_markup, engines
from amoeba_deploy.report.document import Report
from amoeba_deploy.report.kept_markup import kept_markup
from amoeba_deploy.report.markup import Charts, escaped, paragraph, remarks_list, section
from amoeba_deploy.report.sections import (
    bundles_markup,
    curves_sections,
    latency_section,
    prediction_markup,
    quality_markup,
)

SUFFIX = ".html"


def check_page(file: Path, force: bool) -> None:
    """Raise BadInput where a report cannot be written there, ToolchainMissing where none can be made."""
    if file.suffix.lower() != SUFFIX:
        raise BadInput(f"{file}: a report is one page, and its name must end in {SUFFIX}; choose such a name")
    check_new_file(file, force)
    load_altair()


def write_page(file: Path, report: Report, force: bool) -> int:
    """Write a report whole or not at all; returns its bytes."""
    content = page_html(report).encode()
    with whole_file(file, force) as work:
        work.write_bytes(content)
    return len(content)


def page_html(report: Report) -> str:
    """The page's text."""
    charts = Charts(list(dict.fromkeys(engines(case) for case in report.singles)))
    boards, body = _boards(report, charts)
    body += latency_section(report, charts) + curves_sections(report, charts) + kept_markup(report)
    body += quality_markup(report, charts) + prediction_markup(report, charts) + bundles_markup(report)
    data = {
        "boards": boards,
        "kept": [kept.to_json() for kept in report.kept],
        "specs": charts.specs,
        "wide": config("var(--ink)", "var(--paper)"),
        "narrow": config("var(--ink)", "var(--paper)", narrow=True),
    }
    return Template(_resource("page.html")).substitute(
        title=escaped(report.title),
        about=_about(report),
        style=_resource("page.css"),
        body=body,
        library=library(),
        data=script_json(data),
        script=_resource("page.js"),
    )


def _boards(report: Report, charts: Charts) -> tuple[list[dict[str, Any]], str]:
    """What scripts read of all boards, and the section that holds them."""
    keep = {name: number for number, kept in enumerate(report.kept) for name in kept.engines}
    said = (
        "Drag a line, or type a budget: what the search chooses within it is named beside the picture, with the "
        "command that builds it. Filled circles were measured, hollow ones interpolated between measurements, crosses "
        "estimated from a data sheet; the stepped line is the best quality within a latency. Where a paired test "
        "cannot tell the losses of shapes apart, the fastest of them is chosen."
    )
    found: list[dict[str, Any]] = []
    markup = paragraph(said)
    for device in report.devices:
        for board in device.boards:
            number, chart = len(found), len(charts.specs)
            markup += board_markup(report, board, number, charts)
            found.append(board_json(report, board, chart, keep))
        markup += remarks_list(device.remarks)
    return found, section("budget", "Quality within a budget", markup)


def _about(report: Report) -> str:
    """What the report is of."""
    workload, full = report.request.target.workload, report.checkpoint.architecture
    batch = "one sequence" if workload.batch == 1 else f"{workload.batch} sequences at once"
    said = (
        f"{report.checkpoint.name}: {full.depth} blocks of {full.heads} heads and {full.neurons} neurons. Latencies "
        f"are of {batch}, a prompt of {workload.prompt} tokens and {workload.tokens} generated tokens. TPOT is the "
        f"time per output token, TTFT the time to the first token."
    )
    return paragraph(said) + paragraph(f"checkpoint {report.checkpoint.digest}", "digest")


def _resource(name: str) -> str:
    return (files("amoeba_deploy.report") / name).read_text(encoding="utf-8")
