"""``benchmarks.paper``: methods at equal parameters, by figures that come out alike, beside the paper's own."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Steps
from amoeba_deploy.selection import DepthChoice, Selection
from amoeba_deploy.stage2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.paper import reference
from benchmarks.paper.data import KINDS, file_data, kind_of
from benchmarks.paper.methods import METHODS, TOLERANCE, kept_share, reachable, shapes_at
from benchmarks.paper.runs import Cell, Runs
from benchmarks.paper.table1 import AMOEBA, against_amoeba, print_table, table_1

RATIOS = (0.8, 0.65, 0.5)
DEMO = EMBEDDED.parent


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_method_reaches_every_ratio_within_a_per_cent(method: object, ratio: float, demo: Checkpoint) -> None:
    sizes, steps = demo.architecture, Steps.of(demo.architecture)
    selection = demo.selection
    if method.depth is None:  # type: ignore[attr-defined]
        whole = {sizes.depth: DepthChoice(tuple(range(sizes.depth)), 0.0)}
        selection = Selection(selection.base_digest, whole, selection.blocks, {})
    target = reachable(ratio, sizes.depth)
    found = shapes_at(selection, sizes, method, target, steps)  # type: ignore[arg-type]
    assert found
    for shape in found:
        assert abs(kept_share(selection, sizes, shape, steps) / target - 1) <= TOLERANCE


def test_whole_blocks_say_which_ratio_is_compared() -> None:
    assert [reachable(ratio, 32) for ratio in RATIOS] == [26 / 32, 21 / 32, 0.5]
    assert reachable(0.01, 12) == 1 / 12


def cell(share: float, losses: list[float], right: list[int]) -> Cell:
    tasks = {"questions": {"right": right, "chance": 0.25}}
    return {"shape": "6x1", "share": share, "loss": float(np.mean(losses)), "losses": losses, "tasks": tasks}


def cells(more: float) -> list[Cell]:
    """Two seeds of a method whose losses are so much above 1, with a row that is hard for all."""
    return [cell(0.5, [1.0 + more + seed / 100 + (row == 3) for row in range(40)], [1, 1, 0, 1]) for seed in (0, 1)]


def test_differences_are_taken_row_by_row() -> None:
    found = against_amoeba(cells(0.0), cells(0.01))
    assert found.difference == pytest.approx(0.01)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)
    assert found.significant


def test_the_table_marks_what_is_significant(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {0.5: {method.name: cells(0.0 if method.name == AMOEBA else 0.02) for method in METHODS}}
    print_table(groups, 12)
    said = capsys.readouterr().out
    assert "| 50% (50.0%) | FLAP | 6x1 | 50.0% | 1.0500 ± 0.0071 | +0.0200 ± 0.0000 * | 75.0 ± 0.0 |" in said
    assert "over 40 rows" in said


def test_a_group_of_unequal_sizes_is_not_printed() -> None:
    groups = {0.5: {method.name: cells(0.0) for method in METHODS}}
    groups[0.5]["FLAP"][0]["share"] = 0.51
    with pytest.raises(AssertionError, match=r"FLAP keeps 51\.00% where 50\.00% is compared"):
        print_table(groups, 12)


def test_the_papers_figures_are_marked_as_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    reference.print_table_1()
    said = capsys.readouterr().out
    assert "The paper's own Table 1 (LLaMA2-7B" in said and "not measured here" in said
    assert "| 65% | Amoeba | 36.00 | 56.96 |" in said
    assert {method.name for method in METHODS} == set(reference.TABLE_1[80])


def test_questions_are_told_apart_by_what_they_ask() -> None:
    from amoeba_deploy.evaluation import read_questions

    kinds = [kind_of(question) for question in read_questions(DEMO / "questions.jsonl")]
    assert {kind: kinds.count(kind) for kind in KINDS} == {
        "food": 60,
        "colour": 50,
        "pet": 50,
        "job": 50,
        "home": 50,
        "other": 66,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """The table of the embedded model on a few rows, one step a tuning."""
    text = (DEMO / "validation.txt").read_text(encoding="utf-8")
    for name, begin, count in (("calibration", 0, 4000), ("tuning", 4000, 12000), ("held-out", 20000, 8000)):
        (tmp_path / f"{name}.txt").write_text(text[begin : begin + count], encoding="utf-8")
    rows = (DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "own.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = file_data(
        tmp_path / "calibration.txt",
        str(tmp_path / "tuning.txt"),
        tmp_path / "held-out.txt",
        [tmp_path / "own.jsonl"],
        [],
        None,
        None,
    )
    widths = tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4))
    settings = Settings(steps=1, batch=1, accumulate=1, lr=1e-3, rank=2, experts=2, widths=widths)
    return Runs(ModelFolder(EMBEDDED / "base"), data, settings, 2, 128, tmp_path / "work", lambda _: None)


def test_the_table_is_made_from_nothing_and_comes_out_alike(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = table_1(runs, [0], (0.5,))
    assert list(found[0.5]) == [method.name for method in METHODS]
    print_table(found, 12)
    assert capsys.readouterr().out.count("| 50% (50.0%) |") == 5
    amoeba, alone = (found[0.5][name][0] for name in (AMOEBA, "Amoeba tuned alone"))
    assert alone["shape"] == amoeba["shape"]
    assert min(amoeba["considered"], key=amoeba["considered"].get) == amoeba["shape"]
    assert len(amoeba["considered"]) > 2
    files = sorted((tmp_path / "work").glob("*.json"))
    assert len(files) == len(METHODS)
    before = {file: json.loads(file.read_text(encoding="utf-8"))["result"] for file in files}
    files[0].unlink()
    table_1(runs, [0], (0.5,))
    after = {file: json.loads(file.read_text(encoding="utf-8"))["result"] for file in files}
    assert after == before
