"""HTML of a report: everything that comes from data is escaped here, and charts are numbered."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amoeba_deploy.pictures.page import page_spec
from amoeba_deploy.pictures.section import Panel, Section, Spec

LONG = 40
"""Characters from which on a cell's text is broken into lines."""


def escaped(text: object) -> str:
    """Text as an element or a quoted attribute holds it."""
    return html.escape(str(text), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escaped(text)}</p>\n' if kind else f"<p>{escaped(text)}</p>\n"


def remarks_list(remarks: Sequence[str]) -> str:
    """Remarks as a list; nothing where there are none."""
    if not remarks:
        return ""
    return '<ul class="remarks">\n' + "".join(f"<li>{escaped(remark)}</li>\n" for remark in remarks) + "</ul>\n"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table that scrolls by itself where it is too wide; its first column names the rows.

    ``left`` columns hold text, those after them numbers.
    """
    columns = "".join(f'<th scope="col"{_kind(name, at >= left)}>{escaped(name)}</th>' for at, name in enumerate(head))
    body = []
    for first, *others in rows:
        cells = "".join(f"<td{_kind(cell, at >= left)}>{escaped(cell)}</td>" for at, cell in enumerate(others, 1))
        body.append(f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>\n')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}">\n<table>\n'
        f"<caption>{escaped(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n"
        f"</table>\n</div>\n"
    )


def _kind(text: str, number: bool) -> str:
    """The class of a cell: numbers stand at the right, long texts may be broken."""
    return ' class="n"' if number else ' class="long"' if len(text) > LONG else ""


def folded(summary: str, content: str) -> str:
    """Content that opens when its summary is chosen, and in print."""
    return f"<details>\n<summary>{escaped(summary)}</summary>\n{content}</details>\n"


def section(name: str, heading: str, content: str) -> str:
    """A section of the page with a heading of its own; ``name`` is its place in the address."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{escaped(heading)}</h2>\n'
        f"{content}</section>\n"
    )


def _coloured(spec: Any, engines: Sequence[str]) -> Any:
    """A specification whose engines have the colours that they have among ``engines``; its key names its own alone."""
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return [_coloured(part, engines) for part in spec]
    if not isinstance(spec, Mapping):
        return spec
    if spec.get("field") != "engine" or "scale" not in spec:
        return {key: _coloured(part, engines) for key, part in spec.items()}
    own = spec["scale"]["domain"]
    domain = [*engines, *(name for name in own if name not in engines)]
    return {**spec, "scale": {"domain": domain}, "legend": {**spec["legend"], "values": own}}


@dataclass
class Charts:
    """The specifications of all charts of a page, in the order of their numbers.

    ``engines`` are all flows with their precisions: each has one colour on the whole page.
    """

    engines: Sequence[str] = ()
    specs: list[Spec] = field(default_factory=list)

    def plot(self, panel: Panel, description: str) -> str:
        """The element that the page draws a chart into."""
        self.specs.append(page_spec(_coloured(panel.spec, self.engines), description))
        return f'<div class="plot" id="chart{len(self.specs) - 1}"></div>\n'

    def figures(self, drawn: Section, device: str = "") -> str:
        """All charts of a section, side by side where there is room; titles begin with the device's name."""
        found = []
        for panel in drawn.panels:
            title = f"{device}: {panel.title}" if device else panel.title
            plot = self.plot(panel, f"{drawn.heading}, {title}")
            found.append(f"<figure>\n<figcaption>{escaped(title)}</figcaption>\n{plot}</figure>\n")
        return f'<div class="panels">\n{"".join(found)}</div>\n'
