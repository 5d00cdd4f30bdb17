"""The report: it shows what the search chooses at every budget, says where figures are from, and measures nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from bundles import build, change
from conftest import QUIET, amoeba, sentence
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.options import Latency, Memory
from amoeba_deploy.plan import Steps
from amoeba_deploy.profiles.machine import fingerprint
from amoeba_deploy.profiles.profiler import engine_versions, local_table_file
from amoeba_deploy.profiles.shipped import all_shipped
from amoeba_deploy.profiles.source import CheckpointSource
from amoeba_deploy.report.case import Case, shortest
from amoeba_deploy.report.command import decimal, with_unit
from amoeba_deploy.report.kept import kept_units
from amoeba_deploy.search import search
from amoeba_deploy.shape import Shape
from amoeba_deploy.space import Space

pytest.importorskip("altair", reason="the extra 'plot' is not installed")
pytest.importorskip("vl_convert", reason="the extra 'plot' is not installed")

MEASURED, ESTIMATED = "epyc-zen4-2", "orin-nx"
TWO_ENGINES = ("--device", MEASURED, "--flow", "onnx", "--precision", "int8,int4")
((SHIPPED, _),) = all_shipped()


def write(output: Path, *options: object) -> str:
    """The page that some options give."""
    done = amoeba("report", *options, "-o", output, "--quiet")
    assert done.exit_code == 0, done.output
    return output.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def looked_up(case: dict[str, Any], budget: str) -> dict[str, Any] | None:
    """The choice that the page shows at a budget; None where it says that none fits."""
    return next((step for step in reversed(case["steps"]) if step["ms"] <= float(budget)), None)


def searched(case: dict[str, Any], budget: str) -> Any:
    """What the page's own command would build, by a search with the same options."""
    words = shlex.split(f"{case['command']}{budget}ms")
    assert words[:2] == ["amoeba", "export"]
    return amoeba("search", *words[2:], "--json", "--quiet")


def budgets_of(case: dict[str, Any]) -> list[str]:
    """Budgets at, just below and between some of the latencies where the choice changes, and beyond them all."""
    steps = case["steps"]
    some = [steps[round(part * (len(steps) - 1))] for part in (0, 0.2, 0.5, 0.8, 1)]
    exact = [decimal(step["ms"]) for step in some]
    below = [decimal(step["ms"] * (1 - 1e-12)) for step in some[1:]]
    return [*exact, *below, *(step["budget"] for step in some), decimal(1.5 * steps[-1]["ms"])]


def require_equal(case: dict[str, Any], budget: str) -> None:
    """The page shows at a budget what the search finds within it."""
    shown, found = looked_up(case, budget), json.loads(searched(case, budget).stdout)
    assert shown is not None
    shape = found["shape"]
    assert shown["engine"] == f"{found['flow']} {found['precision']}", budget
    assert Shape.parse(shown["shape"]) == Shape(shape["depth"], Fraction(str(shape["width"]))), budget
    assert shown["why"].count("cannot be told apart") == bool(found["equals"])


# The choice


@pytest.mark.parametrize(
    "options",
    [
        (),
        TWO_ENGINES,
        ("--device", ESTIMATED, "--flow", "onnx,gguf", "--precision", "int8"),
        ("--device", MEASURED, "--metric", "ttft", "--size", "6MB", "--max-loss", "0.611"),
        ("--device", ESTIMATED, "--metric", "e2e", "--memory", "275.5MB", "--prompt", 64, "--tokens", 16),
        ("--table", SHIPPED, "--precision", "int4", "--measured-only"),
    ],
    ids=["defaults", "two engines", "not ranked", "limits", "workload", "table"],
)
def test_what_is_shown_at_a_budget_is_what_the_search_chooses(tmp_path: Path, options: Sequence[object]) -> None:
    boards = data_of(write(tmp_path / "report.html", *options))["boards"]
    assert boards
    for board in boards:
        for case in board["cases"]:
            for budget in budgets_of(case):
                require_equal(case, budget)


@pytest.mark.parametrize("memory", [1.0, 0.6], ids=["all fit", "memory binds, too"])
def test_where_nothing_is_tied_few_searches_say_as_much_as_one_at_every_latency(
    checkpoint: Checkpoint, memory: float
) -> None:
    space = Space.of_checkpoint(checkpoint)
    asked = {"device": ESTIMATED, "flow": "torch", "precision": None, "table": (), "metric": "tpot", "memory": None}
    asked |= {"measured_only": False, "batch": 1, "prompt": 64, "tokens": 32, "context": None}
    found = Case.of(space, asked, QUIET).found
    bound = sorted(candidate.prediction.memory_bytes for candidate in found)[round(memory * len(found)) - 1]
    case = Case.of(space, {**asked, "memory": bound}, QUIET)
    for ms in sorted(map(case.latency, found)):
        budget = replace(case.request.budget, ms=ms)
        own = [step for step in case.steps if step.ms <= ms]
        try:
            result = search(found, budget, case.request.target.workload)
        except NoShapeFits:
            assert own == []
        else:
            assert (own[-1].best, own[-1].binding) == (result.best, result.binding)


def test_below_the_first_budget_the_page_names_the_closest_as_the_search_does(tmp_path: Path) -> None:
    for board in data_of(write(tmp_path / "report.html"))["boards"]:
        (case,) = board["cases"]
        first = case["steps"][0]
        budget = decimal(first["ms"] * (1 - 1e-9))
        assert looked_up(case, budget) is None
        refusal = sentence(searched(case, budget), 3)
        closest = re.search(r"the closest is (\S+) in (\S+ \S+),", refusal)
        assert closest is not None
        assert f"The closest is {closest[1]} in {closest[2]}:" in case["nothing"]


def test_a_command_names_all_that_the_search_was_asked_for(tmp_path: Path) -> None:
    table = tmp_path / "a table's file.json"
    shutil.copyfile(SHIPPED, table)
    limits = ("--memory", "1GiB", "--ttft", "20ms")
    page = write(tmp_path / "report.html", "--table", table, "--precision", "int8", *limits)
    command = data_of(page)["boards"][0]["cases"][0]["command"]
    asked = ["--flow", "onnx", "--precision", "int8", "--memory", "1GiB", "--ttft", "20ms", "--table", str(table)]
    assert shlex.split(command) == ["amoeba", "export", "--device", MEASURED, *asked, "--latency"]


def test_the_command_builds_what_is_shown(tmp_path: Path) -> None:
    (board, _) = data_of(write(tmp_path / "report.html"))["boards"]
    step = board["cases"][0]["steps"][0]
    words = shlex.split(f"{board['cases'][0]['command']}{step['budget']}ms")
    done = amoeba(*words[1:], "--no-verify", "-o", tmp_path / "bundle", "--quiet")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert step["engine"] == f"{manifest['flow']} {manifest['precision']}"
    assert step["shape"] == f"{manifest['shape']['depth']}x{manifest['shape']['width']}"


def test_engines_whose_precision_was_not_measured_are_not_ranked_against_others(tmp_path: Path) -> None:
    options = ("--device", MEASURED, "--flow", "onnx,gguf", "--precision", "int8,int4")
    boards = data_of(write(tmp_path / "report.html", *options))["boards"]
    engines = [[step["engine"] for case in board["cases"] for step in case["steps"]] for board in boards]
    assert [len(board["cases"]) for board in boards] == [3, 1, 1]
    assert [set(own) for own in engines[1:]] == [{"gguf q8_0"}, {"gguf q4_k_m"}]
    assert set(engines[0]) == {"onnx int8", "onnx int4"}


def test_an_engine_that_a_device_does_not_list_is_passed_over_while_others_are_left(tmp_path: Path) -> None:
    options = ("--device", MEASURED, "--device", ESTIMATED, "--flow", "onnx,openvino", "--precision", "int8")
    page = write(tmp_path / "report.html", *options)
    assert "passed over openvino int8: the device &#x27;orin-nx&#x27; lists no flow" in page
    assert "openvino int8" in json.dumps(data_of(page)["boards"][0])


def test_the_line_stands_first_where_it_is_asked_to(tmp_path: Path) -> None:
    boards = data_of(write(tmp_path / "report.html", "--latency", "1.25ms"))["boards"]
    assert [board["start"] for board in boards] == ["1.25", "1.25"]


def test_this_machine_is_shown_as_it_was_measured_and_is_not_measured(tmp_path: Path, demo: Checkpoint) -> None:
    value = json.loads(SHIPPED.read_text())
    value |= {"device": "local", "machine": {"fingerprint": fingerprint()}, "engines": engine_versions()}
    table = local_table_file(CheckpointSource(demo))
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(value))
    before = table.read_bytes()
    (board,) = data_of(write(tmp_path / "report.html", "--device", "local", "--flow", "onnx"))["boards"]
    (case,) = board["cases"]
    require_equal(case, case["steps"][3]["budget"])
    assert table.read_bytes() == before
    assert list(table.parent.iterdir()) == [table]


@given(st.floats(1e-6, 1e6), st.floats(1e-15, 1.0))
def test_the_number_of_a_budget_reaches_its_latency_and_not_the_next(low: float, by: float) -> None:
    high = low * (1 + by)
    text = shortest(low, high)
    assert re.fullmatch(r"\d*\.?\d+", text)
    assert low <= float(text)
    assert float(text) < high or low == high


@given(st.floats(1e-6, 1e9))
def test_a_latency_is_written_as_the_option_reads_it(value: float) -> None:
    assert Latency().convert(with_unit(Latency(), value), None, None) == value
    assert Latency().convert(decimal(value) + "ms", None, None) == value


@pytest.mark.parametrize("text", ["8GB", "1GiB", "275.5MB", "3MiB", "0.5MB"])
def test_an_amount_of_memory_is_written_as_the_option_reads_it(text: str) -> None:
    value = Memory().convert(text, None, None)
    assert Memory().convert(with_unit(Memory(), value), None, None) == value


# The other sections


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
def test_the_kept_units_are_those_of_the_plans(demo: Checkpoint, policy: Any) -> None:
    shapes = [Shape(depth, Fraction(eighths, 8), policy) for depth in (6, 9, 12) for eighths in (4, 5, 6, 8)]
    full, steps = demo.architecture, Steps.of(demo.architecture, 64)
    found = kept_units(demo, steps, shapes, ["onnx int8"])
    for shape in shapes:
        plan = demo.plan(shape, steps)
        blocks = found.shapes[str(shape)]
        assert [index for index, _ in blocks] == list(plan.kept_blocks)
        for (_, number), block in zip(blocks, plan.blocks, strict=True):
            pattern = found.patterns[number]
            assert [head for head in range(full.heads) if pattern.heads[head] == "1"] == list(block.heads)
            assert pattern.count == len(block.neurons)
            part = full.neurons // len(pattern.neurons)
            own = [sum(neuron // part == at for neuron in block.neurons) for at in range(len(pattern.neurons))]
            assert [round(9 * count / part) for count in own] == [int(digit) for digit in pattern.neurons]


def test_every_figure_of_a_picture_stands_in_a_table(tmp_path: Path, demo: Checkpoint) -> None:
    tables = tables_of(write(tmp_path / "report.html", *TWO_ENGINES))
    choices, shapes = (
        tables["The choice at every budget in onnx int8"],
        tables[f"All shapes on {MEASURED} in onnx int8 or onnx int4"],
    )
    assert len(shapes) == 2 * 77
    assert {row[4] for row in shapes} == {"measured", "interpolated"}
    assert choices[0][:3] == ["0.41", "6x0.56", "onnx int8"]
    losses = tables["Losses and accuracies"]
    assert len(losses) == 3 * 77
    row = next(row for row in losses if row[:3] == ["12x1", "int8", "measured"])
    assert demo.quality is not None
    own = next(r for r in demo.quality.rows if str(r.shape) == "12x1" and r.precision == "int8")
    assert row[3:5] == [f"{own.loss:.4f}", f"{own.loss_error:.4f}"]
    assert [row[4] for row in losses if row[2] == "interpolated"] == [""] * (len(losses) - len(demo.quality.rows))
    assert len(tables["What shapes keep, for onnx int8, onnx int4"]) == 77


def test_predictions_are_held_against_what_was_measured(tmp_path: Path) -> None:
    tables = tables_of(write(tmp_path / "report.html", *TWO_ENGINES))
    points = tables["Measured shapes left out"]
    errors = tables["Errors of shapes left out, as shares of what was measured"]
    assert len(points) == 4 * 12
    for engine, _, figure, _count, middle, *_ in errors:
        own = [abs(float(p) / float(m) - 1) for *_, e, f, m, p in points if (e, f) == (engine, figure)]
        assert float(middle.rstrip("%")) == pytest.approx(100 * median(own), abs=0.15)


def test_only_estimates_are_said_to_be_that(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", "--device", ESTIMATED)
    assert "None of these latencies was measured: all are estimated from data sheets." in page


def test_without_a_known_quality_shapes_are_ranked_by_what_they_keep(tmp_path: Path, checkpoint: Checkpoint) -> None:
    options = (checkpoint.path, "--device", ESTIMATED, "--flow", "torch", "--prompt", 64)
    page = write(tmp_path / "report.html", *options)
    assert "No quality is known of this checkpoint: shapes are ranked by the block parameters that they keep." in page
    (case,) = data_of(page)["boards"][0]["cases"]
    assert case["steps"][-1]["facts"][-1] == ["block parameters kept", "100.0%, counted"]
    assert shlex.split(case["command"])[2] == str(checkpoint.path)


# Bundles


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "bundle", device=ESTIMATED)


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def timed(bundle: Path, **timing: object) -> None:
    """Let a bundle say what was measured of it."""
    file = bundle / "measured.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timing": timing}))


def test_a_bundle_is_shown_with_its_speed_as_predicted_and_as_measured(bundle: Path, tmp_path: Path) -> None:
    predicted = json.loads((bundle / "manifest.json").read_text())["predicted"]
    timed(bundle, tpot_ms=2 * predicted["tpot_ms"], ttft_ms=3.0)
    page = write(tmp_path / "report.html", "--device", ESTIMATED, "--bundle", bundle)
    (row,) = tables_of(page)["Bundles"]
    assert row[:7] == [str(bundle), ESTIMATED, "6x0.5", "onnx int8", "this one", "no", "no"]
    assert row[9:] == ["estimated", f"{2 * predicted['tpot_ms']:.3f}", "+100.0%", "1 x (128 + 32 tokens)"]
    assert "Bundles: TPOT" in page


def test_a_bundle_of_another_checkpoint_is_told_apart(bundle: Path, tmp_path: Path) -> None:
    change(bundle, checkpoint_digest="sha256:" + "0" * 64)
    (row,) = tables_of(write(tmp_path / "report.html", "--bundle", bundle))["Bundles"]
    assert row[4] == "another of that name: amoeba-demo-7m"
    assert row[10] == "not measured"


@pytest.mark.parametrize(
    ("code", "said"), [(5, "differs from what its manifest lists"), (2, "is not a bundle"), (2, "measured.json")]
)
def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path, code: int, said: str) -> None:
    if "differs" in said:
        (bundle / "selftest.json").write_text("{}")
    elif "not a bundle" in said:
        (bundle / "manifest.json").unlink()
    else:
        timed(bundle, tpot_ms="fast")
    output = tmp_path / "report.html"
    assert said in sentence(amoeba("report", "--bundle", bundle, "-o", output, "--quiet"), code)
    assert not output.exists()


# The file


class _Addresses(HTMLParser):
    """Everything that a page could load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [str(value) for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    found = _Addresses()
    found.feed(page)
    assert found.found
    assert all(address.startswith("#") for address in found.found)
    assert not {"link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert "default-src 'none'" in page


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, built: Path) -> None:
    pages = [write(tmp_path / f"{name}.html", "--bundle", built) for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_hostile_names_stay_text(tmp_path: Path, checkpoint: Checkpoint, bundle: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>'\"$title"
    head = json.loads((checkpoint.path / "amoeba.json").read_text())
    (checkpoint.path / "amoeba.json").write_text(json.dumps(head | {"name": hostile}))
    change(bundle, device=hostile, checkpoint=hostile)
    renamed = bundle.rename(tmp_path / "<b onclick=alert(1)>&amp;")
    options = ("--device", ESTIMATED, "--flow", "torch", "--prompt", 64, "--bundle", renamed)
    page = write(tmp_path / "report.html", checkpoint.path, *options)
    plain = write(tmp_path / "plain.html", open_checkpoint(checkpoint.path).path, *options[:-2])
    found, expected = _Addresses(), _Addresses()
    found.feed(page)
    expected.feed(plain)
    assert "img" not in found.tags
    assert found.tags.count("script") == expected.tags.count("script") == 3
    assert found.tags.count("b") == 0
    (row,) = tables_of(page)["Bundles"]
    assert row[0] == str(renamed)
    assert row[1] == hostile
    assert f"<title>{hostile}" not in page


def test_json_is_one_object_and_says_what_was_written(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = amoeba("report", *TWO_ENGINES, "-o", output, "--json", "--quiet")
    value = json.loads(done.stdout)
    assert done.stderr == ""
    assert (value["path"], value["bytes"], value["shapes"]) == (str(output), output.stat().st_size, 77)
    (device,) = value["devices"]
    assert [len(case["flows"]) for case in device["cases"]] == [2, 1, 1]
    assert device["cases"][1]["choices"][-1]["command"].endswith("--flow onnx --precision int8 --latency 1.17ms")


# Refusals


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--device", "orin-nxx"), 2, "orin-nxx"),
        (("--table", "missing.json"), 2, "missing.json: cannot be read"),
        (("--table", SHIPPED, "--device", ESTIMATED), 2, "was measured on 'epyc-zen4-2'"),
        (("--device", "local"), 4, "a report measures nothing; run 'amoeba profile' first"),
        (("--flow", "onx"), 2, "onx"),
        (("--memory", "1MB"), 3, "epyc-zen4-2: no shape fits the budget"),
        (("--device", ESTIMATED, "--measured-only"), 4, "only estimates exist for 'orin-nx'"),
        (("--tpot", "3ms"), 2, "--latency and --tpot both bound TPOT"),
        (("--device", ESTIMATED, "--device", ESTIMATED), 2, "names one device twice"),
        (("nowhere",), 2, "nowhere: is not a folder"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[object], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in sentence(amoeba("report", *options, "-o", "report.html", "--quiet"), code)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_another_model_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    output = tmp_path / "report.html"
    done = amoeba("report", checkpoint.path, "--table", SHIPPED, "--prompt", 64, "-o", output, "--quiet")
    assert "was measured for another model architecture" in sentence(done, 2)


def test_an_output_that_exists_stays_without_force(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("mine")
    assert "exists already" in sentence(amoeba("report", "-o", output, "--quiet"), 2)
    assert output.read_text() == "mine"
    assert write(output, "--force").startswith("<!DOCTYPE html>")


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    said = sentence(amoeba("report", "-o", tmp_path / "report.pdf", "--quiet"), 2)
    assert "its name must end in .html" in said


# Tables of a page


class _Tables(HTMLParser):
    """The rows of every table by its caption."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._caption, self._within = "", ""

    def handle_starttag(self, tag: str, _attributes: list[tuple[str, str | None]]) -> None:
        if tag == "caption":
            self._caption = ""
        if tag == "tr" and self._within != "thead":
            self.found[self._caption].append([])
        if tag in ("td", "th") and self._within != "thead":
            self.found[self._caption][-1].append("")
        self._within = tag if tag in ("caption", "thead", "td", "th") and self._within != "thead" else self._within

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.found[self._caption] = []
        if tag in ("caption", "thead") or (tag in ("td", "th") and self._within != "thead"):
            self._within = ""

    def handle_data(self, text: str) -> None:
        if self._within == "caption":
            self._caption += text
        elif self._within in ("td", "th"):
            self.found[self._caption][-1][-1] += text


def tables_of(page: str) -> dict[str, list[list[str]]]:
    found = _Tables()
    found.feed(page)
    return found.found
