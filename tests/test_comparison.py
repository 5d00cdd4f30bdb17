"""Two shapes are told apart by what both made of the same rows; where they cannot be, the cheaper one is chosen."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import amoeba
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from amoeba_deploy.checkpoint import EMBEDDED, open_checkpoint
from amoeba_deploy.comparison import CRITICAL, FEWEST_ROWS, compare, paired
from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quality import QualityValue
from amoeba_deploy.quality_pairs import LOSSES, PAIRS, read_pairs, write_pairs
from amoeba_deploy.search import Budget, Candidate, SearchResult, search
from amoeba_deploy.shape import Shape

WORKLOAD = Workload(batch=1, prompt=128, tokens=32)
ROWS = 100
RNG = np.random.default_rng(0)
TEXT: NDArray[np.float64] = RNG.normal(2.0, 0.5, ROWS)
"""How hard every row of a text is, which is common to all shapes."""


def losses(more: float, noise: float, seed: int = 1, rows: int = ROWS) -> NDArray[np.float32]:
    """Losses of a shape on the text: so much more than the text's own on average, with noise of its own a row."""
    own = np.random.default_rng(seed).normal(0.0, 1.0, rows)
    own -= own.mean()
    return (TEXT[:rows] + more + noise * own / own.std(ddof=1)).astype(np.float32)


def candidate(depth: int, tpot: float, found: NDArray[np.float32] | None, loss: float | None = None) -> Candidate:
    """A shape with a latency and the losses that were measured of it, or a loss that was interpolated."""
    if found is None:
        assert loss is not None
        quality = QualityValue("loss", loss, "interpolated")
    else:
        quality = QualityValue("loss", float(found.mean(dtype=np.float64)), "measured", found)
    return Candidate(Shape(depth, Fraction(1)), "onnx", "fp32", Prediction(tpot, 1.0, 10**9, "measured"), quality, 1e6)


def within(found: list[Candidate], ms: float = 100.0) -> SearchResult:
    """Search within a budget of TPOT."""
    return search(found, Budget("tpot", ms, None), WORKLOAD)


# The test


def test_the_standard_error_is_that_of_the_differences() -> None:
    found = compare(losses(0, 0), losses(0.01, 0.02))
    assert found is not None
    assert found.difference == pytest.approx(0.01, abs=1e-6)
    assert found.standard_error == pytest.approx(0.02 / math.sqrt(ROWS), rel=1e-3)
    assert found.pairs == ROWS


def test_what_rows_share_does_not_hide_a_difference() -> None:
    """The text's own spread is fifty times the difference; unpaired, its standard error would hide it."""
    first, second = losses(0, 0), losses(0.01, 0.01)
    found = compare(first, second)
    assert found is not None and found.significant
    unpaired = math.sqrt(first.var(ddof=1) / ROWS + second.var(ddof=1) / ROWS)
    assert CRITICAL * unpaired > 0.01


def test_noise_is_not_significant() -> None:
    found = compare(losses(0, 0), losses(0.001, 0.1))
    assert found is not None and not found.significant


def test_it_is_the_paired_t_test_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = losses(0, 0.05, 3), losses(0.01, 0.05, 4)
    found = compare(first, second)
    assert found is not None
    wanted = stats.ttest_rel(second.astype(np.float64), first.astype(np.float64))
    assert found.difference / found.standard_error == pytest.approx(wanted.statistic, rel=1e-9)


def test_one_in_twenty_equal_shapes_is_told_apart() -> None:
    """The level of the test: of 2000 pairs without a difference about 5 % (four standard errors: 3.1 % to 6.9 %)."""
    rng = np.random.default_rng(5)
    share = np.mean([paired(rng.normal(0, 1, ROWS)).significant for _ in range(2000)])
    assert 0.031 < share < 0.069


@pytest.mark.parametrize("rows", [2, FEWEST_ROWS - 1])
def test_few_rows_say_nothing(rows: int) -> None:
    assert compare(losses(0, 0, rows=rows), losses(1, 0.1, rows=rows)) is None


def test_other_rows_are_not_compared() -> None:
    assert compare(losses(0, 0), losses(0, 0.1, rows=ROWS - 1)) is None
    assert compare(None, losses(0, 0)) is None


# The choice


def test_of_shapes_that_cannot_be_told_apart_the_fastest_is_chosen() -> None:
    slow, fast = candidate(12, 20.0, losses(0, 0)), candidate(11, 10.0, losses(0.001, 0.1))
    found = within([slow, fast])
    assert found.best == fast
    assert found.equals == (slow,)
    assert found.binding is None


def test_a_significantly_better_shape_is_preferred_however_slow() -> None:
    slow, fast = candidate(12, 20.0, losses(0, 0)), candidate(11, 10.0, losses(0.01, 0.01))
    found = within([slow, fast])
    assert found.best == slow
    assert found.equals == ()


def test_where_the_better_one_does_not_fit_and_is_no_different_the_budget_does_not_bind() -> None:
    slow, fast = candidate(12, 20.0, losses(0, 0)), candidate(11, 10.0, losses(0.001, 0.1))
    assert within([slow, fast], 15.0).binding is None
    worse = candidate(10, 5.0, losses(0.02, 0.01))
    assert within([slow, worse], 15.0).binding == "latency"


def test_the_choice_is_never_beaten_in_both_quantities() -> None:
    """A shape that is told apart ends the beginning: one behind it is not chosen, though its own test says nothing."""
    first = candidate(12, 30.0, losses(0, 0))
    apart = candidate(11, 10.0, losses(0.01, 0.01))
    noisy = candidate(10, 20.0, losses(0.02, 0.5))
    found = within([first, apart, noisy])
    assert found.best == first
    assert found.best in found.front


def test_interpolated_shapes_count_as_equal_between_measured_ones() -> None:
    first, last = candidate(12, 30.0, losses(0, 0)), candidate(10, 20.0, losses(0.002, 0.1))
    between = candidate(11, 10.0, None, first.quality.value + 0.001)
    behind = candidate(9, 5.0, None, first.quality.value + 0.003)
    found = within([first, between, last, behind])
    assert found.best == between
    assert set(found.equals) == {first, last}


def test_nothing_counts_as_equal_to_an_interpolated_best() -> None:
    guess, measured = candidate(12, 30.0, None, 1.0), candidate(11, 10.0, losses(0.0, 0.1))
    assert within([guess, measured]).best == guess


def test_without_rows_the_lowest_loss_wins_as_ever() -> None:
    slow, fast = candidate(12, 20.0, None, 2.0), candidate(11, 10.0, None, 2.0001)
    found = within([slow, fast])
    assert found.best == slow and found.equals == ()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_shape_of_any_search_beats_the_choice_in_both(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    found = []
    for index in range(count):
        tpot = data.draw(st.sampled_from([5.0, 10.0, 20.0, 40.0]))
        more = data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.1]))
        noise = data.draw(st.sampled_from([0.0, 0.01, 0.2]))
        measured = data.draw(st.booleans())
        rows = losses(more, noise, index)
        found.append(candidate(index + 1, tpot, rows if measured else None, float(TEXT.mean()) + more))
    result = within(
        found,
        data.draw(st.sampled_from([5.0, 20.0, 100.0]))
        if any(one.prediction.tpot_ms <= 5.0 for one in found)
        else 100.0,
    )
    best = result.best
    for other in result.ranked:
        faster = other.prediction.tpot_ms < best.prediction.tpot_ms and other.badness <= best.badness
        better = other.prediction.tpot_ms <= best.prediction.tpot_ms and other.badness < best.badness
        assert not faster and not better
    assert set(result.ranked) >= {best, *result.equals}
    assert best not in result.equals


# The file


def test_rows_are_written_and_read_back(tmp_path: Path) -> None:
    rows = [losses(0, 0.1, seed) for seed in range(3)]
    right = [np.array([1, 0, 1, 1], np.uint8)] * 3
    write_pairs(tmp_path, rows, right)
    means = [float(row.mean(dtype=np.float64)) for row in rows]
    found, answers = read_pairs(tmp_path, means, [4, 4, 4])
    for own, wanted in zip(found, rows, strict=True):
        np.testing.assert_array_equal(own, wanted)
    np.testing.assert_array_equal(answers[2], right[2])


def test_a_quality_without_rows_has_no_file(tmp_path: Path) -> None:
    write_pairs(tmp_path, [losses(0, 0), None], [None, None])
    assert not (tmp_path / PAIRS).exists()
    assert read_pairs(tmp_path, [1.0, 2.0], [0, 0]) == ([None, None], [None, None])


def test_the_shipped_checkpoint_holds_every_row() -> None:
    quality = open_checkpoint().quality
    assert quality is not None
    for row in quality.rows:
        assert row.losses is not None and row.right is not None
        assert len(row.losses) == quality.text["tokens"] // quality.text["sequence"]
        assert row.losses.std(ddof=1) / math.sqrt(len(row.losses)) == pytest.approx(row.loss_error, abs=2e-6)
        assert row.right.mean() == pytest.approx(row.accuracy, abs=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "other rows", "other means", "other questions", "no tensor", "text"])
def test_rows_of_another_quality_are_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    file = folder / PAIRS
    quality = open_checkpoint(folder).quality
    assert quality is not None
    own = [row.losses for row in quality.rows]
    right = [row.right for row in quality.rows]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "text":
        file.write_text("no tensors")
    elif damage == "other rows":
        write_pairs(folder, own[:-1], right[:-1])
    elif damage == "other means":
        write_pairs(folder, [row + np.float32(0.01) for row in own if row is not None], right)
    elif damage == "other questions":
        write_pairs(folder, own, [row[:-1] for row in right if row is not None])
    else:
        write_pairs(folder, own, right)
        file.write_bytes(file.read_bytes().replace(LOSSES.encode(), b"lasses", 1))
    with pytest.raises(BadInput, match=r"quality\.safetensors"):
        open_checkpoint(folder)


def test_a_checkpoint_without_rows_is_searched_by_its_means(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    with_rows = open_checkpoint(folder)
    before = with_rows.digest
    (folder / PAIRS).unlink()
    without = open_checkpoint(folder)
    assert without.digest != before
    assert without.quality is not None and without.quality.rows == (with_rows.quality and with_rows.quality.rows)
    done = amoeba("search", folder, "--device", "orin-nx", "--latency", "40ms", "--json", "--quiet")
    assert json.loads(done.stdout)["equals"] == []


# What is said


def test_search_names_what_cannot_be_told_apart(tmp_path: Path) -> None:
    """Two shapes' rows are made alike but for noise; the faster one is chosen and the other named."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    quality = open_checkpoint(folder).quality
    assert quality is not None
    full = next(row for row in quality.rows if str(row.shape) == "12x1" and row.precision == "fp32")
    assert full.losses is not None
    noise = np.random.default_rng(0).normal(0, 0.05, len(full.losses))
    noise += 0.0001 - noise.mean()
    rows = []
    for row in quality.rows:
        if str(row.shape) == "11x1" and row.precision == "fp32":
            own = (full.losses + noise).astype(np.float32)
            row = replace(row, loss=float(own.mean(dtype=np.float64)), losses=own)
        rows.append(row)
    from amoeba_deploy.quality import write_quality

    write_quality(folder, replace(quality, rows=tuple(rows)))
    ask = ("search", folder, "--device", "orin-nx", "--flow", "onnx", "--precision", "fp32", "--latency", "40ms")
    found = json.loads(amoeba(*ask, "--json", "--quiet").stdout)
    assert (found["shape"]["depth"], found["shape"]["width"]) == (11, 1.0)
    named = next(one for one in found["equals"] if (one["depth"], one["width"]) == (12, 1.0))
    assert named["difference"] == pytest.approx(-0.0001, abs=1e-5)
    assert named["pairs"] == len(full.losses)
    said = amoeba(*ask).stdout
    assert "its quality cannot be told apart from that of 12x1 onnx fp32 (-0.0001 ±" in said
