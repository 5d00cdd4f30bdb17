"""Losses never get better where something is removed: levelled rows, what they change, and how well they predict."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, amoeba, sentence
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from amoeba_deploy.interpolation import over_shapes
from amoeba_deploy.monotone import covers, held_out, levelled, rows_of
from amoeba_deploy.quality_pairs import PAIRS
from amoeba_deploy.request import Request
from amoeba_deploy.shape import Shape
from amoeba_deploy.space import Space

DEPTHS, WIDTHS = (6, 9, 12), (0.5, 0.75, 1.0)
FULL = st.lists(st.floats(0, 10), min_size=9, max_size=9).map(
    lambda v: dict(zip(product(DEPTHS, WIDTHS), v, strict=True))
)
ANY = st.dictionaries(st.tuples(st.sampled_from(DEPTHS), st.sampled_from(WIDTHS)), st.floats(0, 10), min_size=1)


@given(ANY)
def test_levelled_values_never_fall_where_something_is_removed(values: dict[tuple[int, float], float]) -> None:
    found = levelled(values)
    assert set(found) == set(values)
    for (depth, width), (other, narrow) in product(found, found):
        if depth >= other and width >= narrow:
            assert found[depth, width] <= found[other, narrow]


@given(ANY)
def test_no_monotone_values_need_a_smaller_largest_change(values: dict[tuple[int, float], float]) -> None:
    """The least change that any monotone values need is half of the worst contradiction between two rows."""
    contradictions = [
        values[large] - values[small]
        for large, small in product(values, values)
        if large[0] >= small[0] and large[1] >= small[1]
    ]
    changed = max(abs(levelled(values)[shape] - value) for shape, value in values.items())
    assert changed == pytest.approx(max(contradictions) / 2, abs=1e-12)


def test_rows_that_contradict_nothing_stay_exactly_as_they_are() -> None:
    values = {(d, w): 1 / d + 0.1 / w for d, w in product(DEPTHS, WIDTHS)}
    assert levelled(values) == values
    values[9, 0.75] = 2.0
    found = levelled(values)
    assert found[12, 1.0] == values[12, 1.0]
    # The best of those that keep less is 6x0.75, which contradicts it most.
    assert found[9, 0.75] == (2.0 + values[6, 0.75]) / 2 == found[6, 0.75]


@given(FULL)
def test_interpolation_from_levelled_rows_never_gets_better_where_something_is_removed(
    values: dict[tuple[int, float], float],
) -> None:
    rows = rows_of(levelled(values))
    found = np.array([[over_shapes(rows, d, w) for w in np.linspace(0.4, 1, 13)] for d in range(5, 14)])
    assert (np.diff(found, axis=0) <= 1e-12).all()
    assert (np.diff(found, axis=1) <= 1e-12).all()


def test_each_row_is_held_out_in_turn() -> None:
    values = {(d, w): 1 / d + 0.1 * (1 - w) for d, w in product(DEPTHS, WIDTHS)}
    values[9, 0.75] += 0.01
    found = held_out(values)
    assert found is not None
    # Along the width all others lie on lines; nothing contradicts, so only the raised row is off.
    assert (found.rows, found.worst) == (3, pytest.approx(0.01))
    assert found.median == pytest.approx(0, abs=1e-12)
    assert held_out({(6, 0.5): 2.0, (6, 1.0): 1.0}) is None


def test_what_lies_outside_the_rows_is_told() -> None:
    rows = {6: [(0.5, 2.0), (1.0, 1.0)], 12: [(0.5, 1.0)]}
    assert covers(rows, 9, 0.5)
    assert not any((covers(rows, 5, 0.5), covers(rows, 13, 0.5), covers(rows, 9, 0.4)))


# The embedded checkpoint


def test_interpolated_losses_of_the_checkpoint_are_monotone_and_measured_ones_as_measured(demo: Checkpoint) -> None:
    quality = demo.quality
    assert quality is not None
    for row in quality.rows:
        assert quality.loss(row.shape, row.precision).value == row.loss
    interpolated = {
        (shape.depth, shape.width): quality.loss(shape, "int4").value
        for shape in demo.shapes()
        if quality.loss(shape, "int4").source == "interpolated"
    }
    assert len(interpolated) > 10
    for (d, w), (e, v) in product(interpolated, interpolated):
        if d >= e and w >= v:
            assert interpolated[d, w] <= interpolated[e, v]


def test_search_says_how_far_interpolated_losses_are_off(demo: Checkpoint) -> None:
    assert demo.quality is not None
    losses = {(r.shape.depth, float(r.shape.width)): r.loss for r in demo.quality.rows if r.precision == "int4"}
    wanted = held_out(losses)
    asked = ("search", "--device", "orin-nx", "--latency", "40ms", "--flow", "onnx", "--precision", "int4", "--quiet")
    assert wanted is not None
    assert json.loads(amoeba(*asked, "--json").stdout)["quality"]["held_out"] == wanted.to_json()
    said = next(line for line in amoeba(*asked).stdout.splitlines() if "interpolated losses" in line)
    assert f"{wanted.median:.4f}" in said
    assert f"{wanted.worst:.4f}" in said
    assert 0 < wanted.median < wanted.worst < 0.01


@pytest.fixture
def half_measured(tmp_path: Path) -> Checkpoint:
    """The embedded checkpoint with the quality of depths from 8 and widths from 0.625 alone."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "checkpoint"))
    value = json.loads((folder / "quality.json").read_text())
    value["rows"] = [row for row in value["rows"] if row["depth"] >= 8 and row["width"] >= 0.625]
    (folder / "quality.json").write_text(json.dumps(value))
    (folder / PAIRS).unlink()
    return open_checkpoint(folder)


ORIN = ("--device", "orin-nx", "--flow", "onnx", "--precision", "int4")


def test_a_search_never_chooses_a_shape_outside_the_measured_ones(half_measured: Checkpoint) -> None:
    found = json.loads(amoeba("search", half_measured.path, *ORIN, "--memory", "8GB", "--json").stdout)
    assert min(shape["depth"] for shape in found["pareto"]) == 8
    assert found["considered"] < len(half_measured.shapes())
    said = sentence(amoeba("search", half_measured.path, *ORIN, "--latency", "1.2ms", "--quiet"), 3)
    assert "closest is 8x0.63" in said


def test_a_named_shape_outside_the_measured_ones_has_the_loss_of_the_nearest_and_a_remark(
    half_measured: Checkpoint,
) -> None:
    asked = {"device": "orin-nx", "latency": None, "metric": "tpot", "memory": None, "flow": "onnx", "table": ()}
    asked |= {"precision": "int4", "measured_only": False, "batch": 1, "prompt": 128, "tokens": 32, "context": None}
    space = Space.of_checkpoint(half_measured)
    answer = Request.of(space, asked, QUIET, "6x1").answer()
    quality = half_measured.quality
    assert quality is not None
    assert answer.best.quality.value == quality.loss(Shape.parse("8x1"), "int4").value
    assert answer.best.quality.source == "interpolated"
    assert any("6x1 lies outside" in remark and "likely too low" in remark for remark in answer.remarks)
    assert not any("outside" in remark for remark in Request.of(space, asked, QUIET, "8x1").answer().remarks)
