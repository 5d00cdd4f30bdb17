"""Write sections to a file: a page that opens without a network, or an image, by the file's suffix.

A page holds its JavaScript, its data and its styles, and forbids itself to load anything. Its colours follow the
reader's light or dark setting, its charts the width of the window. The same input gives the same bytes.
"""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import check_new_file, whole_file
from amoeba_deploy.pictures.section import PLOT_WIDTH, Section, Spec, load_altair
from amoeba_deploy.pictures.theme import config

SUFFIXES = (".html", ".png")
IMAGE_PLOT_WIDTH = 440
"""Pixels of a plot in an image, before ``IMAGE_SCALE``."""
IMAGE_SCALE = 2
IMAGE_COLUMNS = 2
_APART = {"scale": {"color": "independent", "shape": "independent"}}


def check_page(file: Path, force: bool = False) -> None:
    """Raise BadInput where a picture cannot be written there, ToolchainMissing where none can be made.

    For commands that work long before they write.
    """
    if file.suffix.lower() not in SUFFIXES:
        found = f"ends in '{file.suffix}'" if file.suffix else "has no suffix"
        raise BadInput(f"{file}: {found}, and pictures are written as {' or '.join(SUFFIXES)}; choose one of these")
    check_new_file(file, force)
    load_altair()


def write_page(file: Path, title: str, sections: Sequence[Section], force: bool = False) -> None:
    """Write sections as a page (``.html``) or an image (``.png``), whole or not at all.

    Raises:
        BadInput: the suffix is neither, the file exists and ``force`` is not set, or there is nothing to draw.
        ToolchainMissing: the extra ``plot`` is not installed.
    """
    check_page(file, force)
    drawn = [section for section in sections if section.panels]
    if not drawn:
        raise BadInput(f"{file}: there is nothing to draw; search or profile more than one shape")
    content = page_html(title, drawn).encode() if file.suffix.lower() == ".html" else image_png(title, drawn)
    with whole_file(file, force) as work:
        work.write_bytes(content)


def page_html(title: str, sections: Sequence[Section]) -> str:
    """The page's text."""
    specs: list[Spec] = []
    body = []
    for section in sections:
        panels = []
        for each in section.panels:
            panels.append(_figure(len(specs), each.title))
            specs.append(page_spec(each.spec, f"{section.heading}, {each.title}"))
        heading, caption = html.escape(section.heading), html.escape(section.caption)
        body.append(
            f"<section>\n<h2>{heading}</h2>\n<p>{caption}</p>\n<div class=panels>\n{''.join(panels)}</div>\n</section>"
        )
    return Template(_resource("page.html")).substitute(
        title=html.escape(title),
        body="\n".join(body),
        library=library(),
        drawing=_resource("page.js"),
        specs=script_json(specs),
        wide=script_json(config("var(--ink)", "var(--paper)")),
        narrow=script_json(config("var(--ink)", "var(--paper)", narrow=True)),
    )


def _figure(number: int, title: str) -> str:
    return f'<figure>\n<figcaption>{html.escape(title)}</figcaption>\n<div id="chart{number}"></div>\n</figure>\n'


def page_spec(spec: Any, description: str) -> Spec:
    """A panel's specification as a page draws it: as wide as the page allows, and described to who cannot see it."""
    # The plot's width is the page's to give; ``width`` is Vega's own name for what came of it.
    return {
        **spec,
        "description": description,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": PLOT_WIDTH, "expr": "width"}],
    }


def script_json(value: Any) -> str:
    """JSON that stands in a script element: no text of the data can end it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return (files("amoeba_deploy.pictures") / name).read_text(encoding="utf-8")


def _language_version(known: Sequence[str], schema: str) -> str:
    """The version of Vega-Lite to render with: Altair's own, else the newest known of its major version."""
    major, minor, *_ = (int(part) for part in schema.removeprefix("v").split("."))
    if f"{major}.{minor}" in known:
        return f"{major}.{minor}"
    return max((v for v in known if v.startswith(f"{major}.")), key=lambda v: int(v.split(".")[1]))


@cache
def _version() -> str:
    altair = load_altair()
    import vl_convert

    return _language_version(vl_convert.get_vegalite_versions(), altair.SCHEMA_VERSION)


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that loads nothing."""
    load_altair()
    import vl_convert

    script = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_version()))
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def image_spec(title: str, sections: Sequence[Section]) -> Spec:
    """The image as one Vega-Lite specification: all sections below each other, panels two in a row."""
    return {
        "title": {"text": title, "fontSize": 20, "anchor": "start", "offset": 14},
        "vconcat": [_image_section(section) for section in sections],
        "spacing": 40,
        "align": "none",
        "params": [{"name": PLOT_WIDTH, "value": IMAGE_PLOT_WIDTH}],
        "config": config("#1b1f24", "#ffffff"),
        "resolve": _APART,
    }


def image_png(title: str, sections: Sequence[Section]) -> bytes:
    """The image's bytes."""
    load_altair()
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(image_spec(title, sections), vl_version=_version(), scale=IMAGE_SCALE))


def _image_section(section: Section) -> Spec:
    panels = [
        {**each.spec, "width": IMAGE_PLOT_WIDTH, "title": {"text": each.title, "fontSize": 13}}
        for each in section.panels
    ]
    caption = textwrap.wrap(section.caption, 78 * min(len(panels), IMAGE_COLUMNS))
    return {
        "title": {"text": section.heading, "subtitle": caption, "anchor": "start", "offset": 12},
        "concat": panels,
        "columns": IMAGE_COLUMNS,
        "spacing": 30,
        "resolve": _APART,
    }
