"""The report in a browser: its line moves by mouse, finger, keys and typing, and shows what the search chooses."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser_page, needs_chromium
from conftest import amoeba

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.shape import Shape

pytest.importorskip("altair", reason="the extra 'plot' is not installed")
pytest.importorskip("vl_convert", reason="the extra 'plot' is not installed")
pytest.importorskip("websocket", reason="the extra 'test' is not installed")

pytestmark = needs_chromium
OPTIONS = ("--device", "epyc-zen4-2", "--device", "orin-nx", "--flow", "onnx", "--precision", "int8,int4")
FIRST = "#board0 "
"""Where the first device's board is."""
LINE, BUDGET, SAID, COMMAND = (f"{FIRST}{name}" for name in (".line", ".budget", ".said", ".command"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    done = amoeba("report", *OPTIONS, "-o", file, "--quiet")
    assert done.exit_code == 0, done.output
    return file


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def page(opened: Page, file: Path) -> Page:
    """The report as it opens on a desk, in light colours."""
    opened.complaints.clear()
    opened.requests.clear()
    opened.size(1280, 900)
    opened.media()
    opened.open(file)
    opened.until("document.documentElement.dataset.drawn === 'yes'")
    return opened


def searched(page: Page) -> dict[str, Any]:
    """What a search finds with the options of the command that the page shows."""
    words = shlex.split(page.text(COMMAND))
    assert words[:2] == ["amoeba", "export"]
    assert float(words[-1].removesuffix("ms")) == budget(page)
    return dict(json.loads(amoeba("search", *words[2:], "--json", "--quiet").stdout))


def require_the_searchs_choice(page: Page) -> str:
    """The page shows what the search chooses at its budget; returns the shape."""
    found = searched(page)
    shape = Shape(found["shape"]["depth"], Fraction(str(found["shape"]["width"])))
    assert page.text(SAID) == f"{shape} in {found['flow']} {found['precision']}"
    assert f"{found['quality']['value']:.4f}" in page.text(f"{FIRST}dl")
    return str(shape)


def budget(page: Page) -> float:
    return float(page.evaluate(f"document.querySelector('{BUDGET}').value"))


# The line


def test_it_opens_with_every_picture_without_a_complaint_or_a_request(page: Page, file: Path) -> None:
    assert page.evaluate("document.querySelectorAll('.plot').length") == page.evaluate(
        "document.querySelectorAll('.plot svg').length"
    )
    assert page.complaints == []
    assert page.requests == [file.as_uri()]


def test_the_line_stands_at_its_budget_and_the_ring_on_the_choice(page: Page) -> None:
    places = page.evaluate(
        "[...document.querySelectorAll('.board')].map((board) => { const middle = (e) => { const r ="
        " e.getBoundingClientRect(); return r.left + r.width / 2; }; return [middle(board.querySelector('.line')),"
        " middle(board.querySelector('.ring')), board.querySelector('.background').getBoundingClientRect().left]; })"
    )
    for line, ring, left in places:
        assert left <= ring <= line + 1


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_the_line_is_dragged(page: Page, touch: bool) -> None:
    page.size(1280, 900, touch=touch)
    before = budget(page)
    page.drag(LINE, 120, touch=touch)
    right = budget(page)
    first = require_the_searchs_choice(page)
    page.drag(LINE, -220, touch=touch)
    left = budget(page)
    assert left < before < right
    assert require_the_searchs_choice(page) != first
    assert page.complaints == []


def test_a_line_dragged_beyond_the_picture_stays_at_its_edge(page: Page) -> None:
    page.drag(LINE, 5000)
    assert budget(page) == pytest.approx(
        float(page.evaluate(f"document.querySelector('{LINE}').ariaValueMax")), rel=1e-3
    )
    assert require_the_searchs_choice(page) == "12x1"


def test_keys_go_from_choice_to_choice(page: Page) -> None:
    page.evaluate(f"document.querySelector('{LINE}').focus()")
    page.press("Home")
    shown = [require_the_searchs_choice(page)]
    for _ in range(3):
        page.press("ArrowRight")
        shown.append(require_the_searchs_choice(page))
        value = page.evaluate(f"document.querySelector('{LINE}').ariaValueText")
        assert value == f"TPOT at most {budget(page):g} ms: {page.text(SAID)}"
    assert all(one != other for one, other in itertools.pairwise(shown))
    page.press("ArrowLeft")
    assert page.text(SAID).startswith(f"{shown[2]} in")
    page.press("End")
    assert require_the_searchs_choice(page) == "12x1"
    page.press("ArrowRight")
    assert page.text(SAID).startswith("12x1")


def test_the_line_is_reached_by_keys_alone(page: Page) -> None:
    for _ in range(40):
        page.press("Tab")
        if page.evaluate(f"document.activeElement === document.querySelector('{LINE}')"):
            break
    else:
        pytest.fail("forty tabs do not reach the line")
    assert page.evaluate(f"document.querySelector('{LINE}').getAttribute('role')") == "slider"


@pytest.mark.parametrize("typed", ["0.45", "0.67", "0.9929", "1.1637", "7"])
def test_a_typed_budget_is_looked_up(page: Page, typed: str) -> None:
    page.type(BUDGET, typed)
    assert page.text(COMMAND).endswith(f"--latency {typed}ms")
    require_the_searchs_choice(page)


def test_a_budget_that_nothing_fits_says_what_is_closest(page: Page) -> None:
    page.type(BUDGET, "0.2")
    assert page.text(SAID).startswith("No shape fits this budget. The closest is 6x0.56 in onnx int8:")
    assert page.text(COMMAND) == ""
    assert page.evaluate(f"document.querySelector('{FIRST}.ring').hidden")
    page.evaluate(f"document.querySelector('{LINE}').focus()")
    page.press("ArrowRight")
    assert require_the_searchs_choice(page) == "6x0.56"


@pytest.mark.parametrize("typed", ["0", "-3"])
def test_what_is_no_budget_is_said_and_changes_nothing(page: Page, typed: str) -> None:
    before = page.text(SAID)
    page.type(BUDGET, typed)
    assert page.text(f"{FIRST}.wrong") == "Write a number of milliseconds above zero."
    assert page.text(SAID) == before


def test_one_engine_is_chosen_from(page: Page) -> None:
    page.evaluate(
        f"(() => {{ const e = document.querySelector('{FIRST}.engine'); e.value = '2';"
        " e.dispatchEvent(new Event('change')); })()"
    )
    page.type(BUDGET, "0.8")
    assert "--precision int4 " in page.text(COMMAND)
    assert page.text(SAID).endswith("onnx int4")
    require_the_searchs_choice(page)


def test_the_command_is_copied(page: Page) -> None:
    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(f"{FIRST}.copy")
    page.until(f"document.querySelector('{FIRST}.copied').textContent !== ''")
    assert page.text(f"{FIRST}.copied") == "copied"
    assert page.evaluate("navigator.clipboard.readText()") == page.text(COMMAND)


def test_what_a_choice_keeps_is_drawn(page: Page, demo: Checkpoint) -> None:
    page.type(BUDGET, "0.705")
    shape = require_the_searchs_choice(page)
    page.click(f"{FIRST}.show-kept")
    assert page.evaluate("document.getElementById('kept-shape').value") == shape
    plan = demo.plan(Shape.parse(shape))
    squares = page.evaluate("document.querySelectorAll('#kept-picture .kept').length")
    assert squares == sum(len(block.heads) for block in plan.blocks)
    assert page.text("#kept-said").startswith(f"{shape} keeps {len(plan.blocks)} of 12 blocks")


# How it looks


def colours(page: Page) -> tuple[str, str]:
    """Of the paper, and of what is written in a picture."""
    found = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.plot svg text')).fill]"
    )
    return found[0], found[1]


def choose_theme(page: Page, name: str) -> None:
    page.click(f"input[name=theme][value={name}]")


def test_colours_follow_the_reader_who_may_choose_others(page: Page) -> None:
    light, dark = ("rgb(255, 255, 255)", "rgb(27, 31, 36)"), ("rgb(20, 23, 27)", "rgb(230, 233, 237)")
    assert colours(page) == light
    page.media(scheme="dark")
    assert colours(page) == dark
    choose_theme(page, "light")
    assert colours(page) == light
    choose_theme(page, "auto")
    assert colours(page) == dark
    page.media()
    choose_theme(page, "dark")
    assert colours(page) == dark
    assert page.complaints == []


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page, file: Path) -> None:
    page.size(390, 844, touch=True)
    page.open(file)
    page.until("document.documentElement.dataset.drawn === 'yes'")
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .skip, svg, script') &&"
        " (e.getBoundingClientRect().right > 390.5 || e.getBoundingClientRect().left < -0.5)).map((e) =>"
        " e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.evaluate("[...document.querySelectorAll('.plot svg')].every((e) => e.clientWidth <= 390)")
    page.drag(LINE, 60, touch=True)
    require_the_searchs_choice(page)
    assert page.complaints == []


def test_print_shows_everything_on_white(page: Page) -> None:
    choose_theme(page, "dark")
    page.media(scheme="dark", kind="print")
    page.until("[...document.querySelectorAll('details')].every((each) => each.open)")
    assert colours(page) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert page.evaluate("[...document.querySelectorAll('table, .plot svg, .line')].every((e) => e.clientHeight > 0)")
    assert page.evaluate("[...document.querySelectorAll('button, nav, select')].every((e) => e.clientHeight === 0)")
    page.media()
    page.until("[...document.querySelectorAll('details')].every((each) => !each.open)")
