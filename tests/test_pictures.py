"""Pictures: what they show, that a page needs no network, that a file is whole, and that a browser draws it."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import browser_page, needs_chromium
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.pictures.curves import curves_of, curves_section
from amoeba_deploy.pictures.equal_size import WAYS, SizePoint, equal_size_panel
from amoeba_deploy.pictures.front import Front, Point, front_of, front_section
from amoeba_deploy.pictures.heatmap import MOST_COLUMNS, heatmap_of, heatmap_section
from amoeba_deploy.pictures.page import check_page, image_spec, page_html, write_page
from amoeba_deploy.pictures.prediction import Pair, prediction_section
from amoeba_deploy.pictures.quality import LossCell, quality_section
from amoeba_deploy.pictures.section import Section, interval_of
from amoeba_deploy.pictures.table import table_sections
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.quality import QualityValue
from amoeba_deploy.search import Budget, Candidate
from amoeba_deploy.shape import Shape

pytest.importorskip("altair", reason="the extra 'plot' is not installed")
pytest.importorskip("vl_convert", reason="the extra 'plot' is not installed")

TOKENS = 32
BUDGET = Budget("tpot", 6.5, None)


def latency(shape: Shape, flow: str = "onnx") -> Prediction:
    """A latency of 1 ms and half a millisecond a block of full width, twice as much in torch; corners are measured."""
    work = (1 + 0.5 * shape.depth * float(shape.width)) * (2 if flow == "torch" else 1)
    measured = shape.depth in (4, 12) and shape.width in (Fraction(1, 2), Fraction(1))
    source = "measured" if measured else "interpolated" if flow == "onnx" else "estimated"
    return Prediction(work, 10 * work, 10**9, source, (0.8 * work, 1.3 * work), (9 * work, 12 * work))


def shapes() -> list[Shape]:
    return [Shape(depth, Fraction(eighths, 8)) for depth in range(4, 13) for eighths in range(4, 9)]


def candidates() -> list[Candidate]:
    """45 shapes in two engines; deeper and wider ones are better."""
    return [
        Candidate(shape, flow, "int4", latency(shape, flow), QualityValue("loss", loss, "measured"), 1e8)
        for flow in ("onnx", "torch")
        for shape in shapes()
        for loss in [3 - 0.04 * shape.depth - float(shape.width)]
    ]


def searched() -> Front:
    found = candidates()
    fitting = [c for c in found if c.prediction.tpot_ms <= (BUDGET.ms or 0)]
    return front_of("orin-nx", found, min(fitting, key=lambda c: c.quality.value), BUDGET, TOKENS)


def sections() -> list[Section]:
    """A front, curves and heatmaps."""
    predictors = {("onnx", "int4"): latency, ("torch", "int4"): lambda shape: latency(shape, "torch")}
    return [front_section([searched()]), *table_sections(predictors, TOKENS, shapes())]


@pytest.fixture(scope="module")
def page() -> str:
    return page_html("A model on orin-nx", sections())


def layers(spec: Mapping[str, Any], mark: str) -> list[tuple[Mapping[str, Any], list[dict[str, Any]]]]:
    """The layers of a kind of mark, each with its rows."""
    found = []
    for layer in spec["layer"]:
        kind = layer["mark"]
        if mark == (kind if isinstance(kind, str) else kind["type"]):
            data = layer.get("data") or spec.get("data")
            found.append((layer, rows_of(spec, data)))
    return found


def rows_of(spec: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return data["values"] if "values" in data else spec["datasets"][data["name"]]


def svg_of(*drawn: Section) -> str:
    """What the renderer of images draws."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(image_spec("Title", drawn)))


def texts(svg: str) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg)


# The front


def test_the_front_shows_every_candidate_the_budget_and_the_choice() -> None:
    front = searched()
    assert len(front.points) == 90
    assert front.chosen is not None
    assert (front.chosen.shape, front.chosen.series) == ("11x1", "onnx int4")
    spec = front_section([front]).panels[0].spec
    every, best, ring = (rows for _, rows in layers(spec, "point"))
    assert len(every) == 90
    assert {row["source"] for row in every} == {"measured", "interpolated", "estimated"}
    assert 2 < len(best) < 90
    assert [row["shape"] for row in ring] == ["11x1"]
    rule, bar = (rows for _, rows in layers(spec, "rule"))
    assert rule == [{"latency": 6.5, "label": "budget 6.5 ms"}]
    assert (bar[0]["low"], bar[0]["high"]) == pytest.approx((0.8 * 6.5, 1.3 * 6.5))


def test_the_picture_names_the_choice_the_budget_the_axes_and_the_sources() -> None:
    shown = texts(svg_of(front_section([searched()])))
    for text in ("budget 6.5 ms", "11x1", "time per output token (ms)", "loss (nats a token, lower is better)"):
        assert text in shown
    for text in ("measured", "interpolated", "estimated", "onnx int4", "torch int4"):
        assert text in shown
    assert "orin-nx: 11x1 in onnx int4, 6.5 ms (interpolated)" in shown


def test_the_budget_rule_stands_at_its_value_on_the_axis() -> None:
    """The rule's place in pixels is that of 6.5 ms between the measured ends of the axis."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(dict(front_section([searched()]).panels[0].spec) | {"width": 500})
    rules = [
        re.search(r"translate\(([\d.]+),", line)[1] for line in re.findall(r"<line[^>]*>", svg) if "dasharray" in line
    ]
    ticks = dict(zip(*_ticks(svg), strict=True))
    place = (6.5 - 4) / (8 - 4) * (ticks[8.0] - ticks[4.0]) + ticks[4.0]
    assert any(float(x) == pytest.approx(place, abs=1.0) for x in rules), (rules, place, ticks)


def _ticks(svg: str) -> tuple[list[float], list[float]]:
    """Values and places of the labels of the horizontal axis, which is linear here."""
    axis = svg[svg.index("X-axis titled") :]
    axis = axis[axis.index("role-axis-label") : axis.index("role-axis-domain")]
    found = re.findall(r'translate\(([\d.]+),[\d.]+\)"[^>]*>([\d.]+)</text>', axis)
    return [float(value) for _, value in found], [float(x) for x, _ in found]


def test_a_wide_range_of_latencies_is_logarithmic_and_a_narrow_one_is_not() -> None:
    front = searched()
    spread = [replace(point, latency_ms=point.latency_ms**3) for point in front.points]
    for points, kind in ((front.points, "linear"), (spread, "log")):
        spec = front_section([replace(front, points=tuple(points), chosen=None)]).panels[0].spec
        assert layers(spec, "point")[0][0]["encoding"]["x"]["scale"]["type"] == kind


def test_without_budget_choice_or_interval_there_is_none_in_the_picture() -> None:
    front = replace(searched(), budget_ms=None, chosen=None)
    section = front_section([front])
    assert section.panels[0].title == "orin-nx"
    assert "nine times in ten" not in section.caption
    assert layers(section.panels[0].spec, "rule") == []
    assert "budget" not in " ".join(texts(svg_of(section)))


def test_each_device_has_a_panel_and_an_engine_the_same_colour_in_all() -> None:
    front = searched()
    other = replace(front, device="other", points=tuple(p for p in front.points if p.flow == "torch"), chosen=None)
    panels = front_section([front, other]).panels
    assert [panel.title.split(":")[0] for panel in panels] == ["orin-nx", "other"]
    domains = [layers(panel.spec, "point")[0][0]["encoding"]["color"]["scale"]["domain"] for panel in panels]
    assert domains == [["onnx int4", "torch int4"]] * 2


def test_parameters_kept_rank_upwards() -> None:
    kept = [
        replace(c, quality=QualityValue("parameters_kept", float(c.shape.depth * c.shape.width) / 12, "counted"))
        for c in candidates()
    ]
    front = front_of("orin-nx", kept, None, BUDGET, TOKENS)
    best = front.best_points("onnx int4")
    assert best[-1].shape == "12x1"
    assert "block parameters kept (share)" in texts(svg_of(front_section([front])))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.booleans())
def test_the_line_of_an_engine_is_what_nothing_dominates(found: list[tuple[int, int]], lower: bool) -> None:
    points = tuple(
        Point(f"{i}x1", "onnx", "int4", ms, ms, ms, 1, 1, quality, "measured", "measured")
        for i, (ms, quality) in enumerate(found, 1)
    )
    front = Front("d", "tpot", None, "loss" if lower else "accuracy", points)

    def dominated(ms: float, quality: float) -> bool:
        return any(
            (a <= ms and (b <= quality if lower else b >= quality)) and (a, b) != (ms, quality) for a, b in found
        )

    expected = sorted({pair for pair in found if not dominated(*pair)})
    assert [(point.latency_ms, point.quality) for point in front.best_points("onnx int4")] == expected


def test_end_to_end_intervals_add_up() -> None:
    prediction = Prediction(2.0, 20.0, 1, "estimated", (1.0, 3.0), (15.0, 30.0))
    assert interval_of(prediction, "e2e", 11) == (25.0, 60.0)
    assert interval_of(prediction, "tpot", 11) == (1.0, 3.0)
    assert interval_of(replace(prediction, ttft_interval=None), "e2e", 11) is None


# Heatmaps and curves


def test_a_heatmap_has_a_cell_a_shape_and_a_dot_where_it_was_measured() -> None:
    section = heatmap_section("tpot", [heatmap_of("onnx", "int4", "tpot", TOKENS, shapes(), latency)])
    spec = section.panels[0].spec
    ((_, cells),) = layers(spec, "rect")
    assert len(cells) == 45
    assert {row["shape"] for row in cells if row["source"] == "measured"} == {"4x0.5", "4x1", "12x0.5", "12x1"}
    svg = svg_of(section)
    shown = texts(svg)
    assert shown.count("7.00") == 1  # 12x1 alone
    assert {"0.5", "0.625", "0.75", "0.875", "1", "4", "12", "depth (blocks)", "width kept (share)"} <= set(shown)
    dots = svg[svg.rindex("mark-symbol") :]
    assert dots[: dots.index("</g>")].count("<path") == 4


def test_what_was_estimated_has_a_cross_on_a_heatmap() -> None:
    section = heatmap_section(
        "tpot", [heatmap_of("torch", "int4", "tpot", TOKENS, shapes(), partial(latency, flow="torch"))]
    )
    marks = [layer for layer, _ in layers(section.panels[0].spec, "point")]
    assert [mark["transform"][0]["filter"] for mark in marks] == [
        "datum.source === 'measured'",
        "datum.source === 'estimated'",
    ]
    svg = svg_of(section)
    crosses = svg[svg.rindex("mark-symbol") :]
    assert crosses[: crosses.index("</g>")].count("<path") == 41


def test_at_equal_size_a_picture_has_two_lines_an_engine() -> None:
    points = [
        SizePoint("onnx int4", way, f"{n}x1", n / 4, 0.2 + 0.2 * n, 1.0 * n, "measured")
        for way in WAYS
        for n in (2, 3, 4)
    ]
    spec = equal_size_panel("orin-nx", "time per output token", points).spec
    (_, rows), *_ = [found for found in layers(spec, "line") if "strokeDash" in found[0]["encoding"]]
    assert {(row["way"], row["kept"]) for row in rows} == {(way, n / 4) for way in WAYS for n in (2, 3, 4)}


def test_losses_are_drawn_with_their_errors_where_they_were_measured() -> None:
    cells = [
        LossCell(Shape(4, Fraction(1)), 0.5, "measured", 0.01),
        LossCell(Shape(2, Fraction(1)), 0.7, "interpolated", None),
    ]
    section = quality_section({"fp32": cells, "int4": []})
    assert [panel.title for panel in section.panels] == ["fp32"]
    ((_, rows),) = layers(section.panels[0].spec, "rect")
    assert [(row["label"], row["error"], row["dark"]) for row in rows] == [
        ("0.500", "0.0100", False),
        ("0.700", "not known", True),
    ]


def test_what_is_predicted_exactly_lies_on_the_diagonal() -> None:
    pairs = [Pair("4x1", "onnx int4", 1.0, 1.0), Pair("2x1", "onnx int4", 0.6, 0.5)]
    section = prediction_section([("orin-nx: TPOT", pairs), ("empty", [])], "caption")
    assert [panel.title for panel in section.panels] == ["orin-nx: TPOT"]
    ((_, ends),) = layers(section.panels[0].spec, "line")
    ((_, rows),) = layers(section.panels[0].spec, "point")
    assert ends == [{"measured": 0.5, "predicted": 0.5}, {"measured": 1.0, "predicted": 1.0}]
    assert [row["off"] for row in rows] == [0.0, 0.2]


def test_a_heatmap_of_many_widths_keeps_the_measured_ones() -> None:
    def predict(shape: Shape) -> Prediction:
        return replace(latency(shape), source="measured" if shape.width == Fraction(333, 344) else "interpolated")

    many = [Shape(depth, Fraction(n, 344)) for depth in (4, 8) for n in range(172, 345)]
    heatmap = heatmap_of("onnx", "int4", "ttft", TOKENS, many, predict)
    widths = {cell.shape.width for cell in heatmap.cells}
    assert MOST_COLUMNS <= len(widths) <= MOST_COLUMNS + 1
    assert {Fraction(1, 2), Fraction(333, 344), Fraction(1)} <= widths
    assert {cell.ms for cell in heatmap.cells} == {latency(cell.shape).ttft_ms for cell in heatmap.cells}


def test_curves_are_relative_to_the_whole_model() -> None:
    depth, width = curves_of("onnx", "int4", "tpot", TOKENS, shapes(), latency)
    assert (depth.axis, width.axis) == ("depth", "width")
    assert [point.shape for point in depth.points] == [f"{d}x1" for d in range(4, 13)]
    assert [point.shape for point in width.points] == ["12x0.5", "12x0.625", "12x0.75", "12x0.875", "12x1"]
    assert (depth.points[-1].share, depth.points[-1].relative) == (1.0, 1.0)
    assert depth.points[0].share == pytest.approx(4 / 12)
    assert depth.points[0].relative == pytest.approx((1 + 2) / (1 + 6))
    assert [point.source for point in depth.points] == ["measured", *["interpolated"] * 7, "measured"]
    ideal = layers(curves_section("tpot", [depth]).panels[0].spec, "line")[0]
    assert ideal[0]["mark"]["strokeDash"]
    assert all(row["share"] == row["relative"] for row in ideal[1])


def test_a_single_shape_has_no_curve() -> None:
    assert curves_of("onnx", "int4", "tpot", TOKENS, [Shape(12, Fraction(1))], latency) == []
    assert curves_of("onnx", "int4", "tpot", TOKENS, [], latency) == []


# Pages and images


class Loads(HTMLParser):
    """Collects whatever makes a browser load something, and counts scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        loading = {"src", "href", "data", "action", "srcset", "poster", "background"}
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in loading]
        if tag in ("link", "iframe", "object", "embed", "base", "img"):
            self.found.append(tag)


def test_a_page_loads_nothing(page: str) -> None:
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert loads.scripts == 2
    assert "default-src 'none'" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    # Names of formats and of the editor that the library would link to if it were asked: none delivers code.
    hosts = set(re.findall(r"https?://([\w.-]+)", page))
    assert hosts <= {"www.w3.org", "vega.github.io", "github.com"}


def test_nothing_in_a_name_can_end_a_script_or_a_tag() -> None:
    front = replace(searched(), device="</script><script>alert(1)</script><b>&")
    hostile = page_html("<img src=x onerror=alert(1)>", [front_section([front])])
    loads = Loads()
    loads.feed(hostile)
    assert (loads.scripts, loads.found) == (2, [])
    assert "&lt;img src=x onerror=alert(1)&gt;" in hostile


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_pictures as t; from pathlib import Path;"
        "[t.write_page(Path(name), 'A model', [t.front_section([t.searched()])]) for name in sys.argv[1:]]"
    )
    names = [str(tmp_path / name) for name in ("again.html", "again.png")]
    subprocess.run([sys.executable, "-c", code, *names], check=True, cwd=Path(__file__).parent.parent)
    for suffix in (".html", ".png"):
        write_page(tmp_path / f"here{suffix}", "A model", [front_section([searched()])])
        assert (tmp_path / f"here{suffix}").read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


def test_an_image_is_a_png_as_wide_as_its_panels(tmp_path: Path) -> None:
    front = searched()
    sizes = {}
    for count in (1, 3):
        file = tmp_path / "deep" / f"{count}.png"
        write_page(file, "Devices", [front_section([replace(front, device=str(i)) for i in range(count)])])
        content = file.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert content[12:16] == b"IHDR"
        sizes[count] = struct.unpack(">II", content[16:24])
    (one, low), (three, high) = sizes[1], sizes[3]
    assert 1900 < three < 2400
    assert one < 0.6 * three
    assert high > 1.6 * low


@pytest.mark.parametrize(("name", "said"), [("front.svg", "ends in '.svg'"), ("front", "has no suffix")])
def test_other_suffixes_are_refused(tmp_path: Path, name: str, said: str) -> None:
    for write in (lambda: check_page(tmp_path / name), lambda: write_page(tmp_path / name, "x", sections())):
        with pytest.raises(BadInput, match=rf"{name}: {said}, and pictures are written as .html or .png; choose one"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_stays_without_force(tmp_path: Path) -> None:
    file = tmp_path / "front.html"
    file.write_text("mine")
    with pytest.raises(BadInput, match=r"exists already; .*--force"):
        write_page(file, "x", sections())
    assert file.read_text() == "mine"
    write_page(file, "x", sections(), force=True)
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is nothing to draw"):
        write_page(tmp_path / "front.html", "x", [Section("empty", "", ())])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_a_missing_library_is_named_with_how_to_get_it(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ToolchainMissing, match=rf"{library} is not installed.*pip install 'amoeba-deploy\[plot\]'"):
        check_page(tmp_path / "front.html")


def test_pictures_cost_nothing_until_they_are_drawn() -> None:
    code = "import sys, amoeba_deploy.pictures.page, amoeba_deploy.pictures.table; print('altair' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


# A browser


@needs_chromium
@pytest.mark.parametrize("width", [390, 1300])
def test_a_browser_draws_every_chart_without_a_complaint(tmp_path: Path, page: str, width: int) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    with browser_page(tmp_path / "profile") as opened:
        opened.size(width, 900)
        opened.open(file)
        opened.until("[...document.querySelectorAll('figure > div')].every((chart) => chart.querySelector('svg'))")
        charts = opened.evaluate("[...document.querySelectorAll('figure')].map((figure) => figure.textContent)")
        assert opened.complaints == []
        assert opened.requests == [file.as_uri()]
    assert len(charts) == sum(len(section.panels) for section in sections()) == 9
    assert "budget 6.5 ms" in charts[0]
