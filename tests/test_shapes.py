"""Shapes and plans: the rounding rule, names of widths, nesting, and plan files."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.plan import best_units, plan_from_json, read_plan, subnet_widths
from amoeba_deploy.shape import Shape, distinct_widths, format_width, kept_units, parse_width

LLAMA2_7B = Architecture(
    family="llama", depth=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, neurons=11008, vocabulary=32000,
    context=4096, tied=False,
)  # fmt: skip
WIDTHS = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)


@pytest.mark.parametrize(
    ("units", "ratio", "multiple", "kept"),
    [
        (32, "0.75", 1, 24),
        (11008, "0.75", 32, 8256),
        (172, "0.75", 32, 128),  # 172 * 0.75 / 32 = 4.03
        (172, "1", 32, 172),  # all of them, though 32 does not divide 172
        (172, "0.999", 32, 160),
        (20, "0.5", 32, 20),  # fewer than one multiple: all
        (4, "0.625", 1, 3),  # 2.5 is rounded up
        (4, "0.01", 1, 1),  # never below one multiple
        (512, "0.01", 32, 32),
        (100, "0.99", 32, 96),
        (8, "13/16", 1, 7),  # 6.5 exactly, which binary floating point could take for less
    ],
)
def test_the_rounding_rule(units: int, ratio: str, multiple: int, kept: int) -> None:
    assert kept_units(units, Fraction(ratio), multiple) == kept


@given(st.integers(1, 4096), WIDTHS, WIDTHS, st.sampled_from([1, 32, 256]))
def test_wider_never_keeps_fewer(units: int, one: Fraction, two: Fraction, multiple: int) -> None:
    low, high = sorted((one, two))
    assert kept_units(units, low, multiple) <= kept_units(units, high, multiple) <= units


@given(st.integers(1, 64), WIDTHS)
def test_a_shape_is_read_back_from_its_name(depth: int, width: Fraction) -> None:
    shape = Shape(depth, width)
    assert Shape.parse(str(shape)) == shape
    assert parse_width(str(shape.to_json()["width"])) == width


def test_names_of_shapes() -> None:
    assert str(Shape.parse("24x0.750")) == "24x0.75"
    assert str(Shape.parse("24x3/4")) == "24x0.75"
    assert str(Shape.parse("24x2/3")) == "24x2/3"
    assert str(Shape.parse("24x1.0")) == "24x1"
    assert Shape.parse("24x0.75") == Shape(24, Fraction(3, 4))


@pytest.mark.parametrize(
    "text", ["24", "x0.75", "24x", "24x-1", "24x0", "24x1.01", "0x1", "24x1/0", "24X0.5", "24x0.5 6"]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Shape.parse(text)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([1, 8, 32])), min_size=1, max_size=3),
    st.sampled_from([Fraction(1, 2), Fraction(1, 4), Fraction(1, 10)]),
)
def test_distinct_widths_are_all_and_only_the_different_subnets(units: list[tuple[int, int]], low: Fraction) -> None:
    def kept(width: Fraction) -> tuple[int, ...]:
        return tuple(kept_units(count, width, multiple) for count, multiple in units)

    found = distinct_widths(units, low)
    assert len({kept(width) for width in found}) == len(found)
    assert {kept(width) for width in found} == {kept(low + (1 - low) * Fraction(i, 4000)) for i in range(4001)} | {
        kept(width) for width in found
    }
    assert found[0] == 1
    assert min(found) >= low


def test_each_width_has_its_shortest_name() -> None:
    names = [format_width(width) for width in distinct_widths([(4, 1), (512, 32)], Fraction(1, 2))]
    assert names == ["1", "0.94", "0.9", "0.87", "0.8", "0.75", "0.7", "0.63", "0.6", "0.56", "0.5"]
    assert len(subnet_widths(LLAMA2_7B, Fraction(1, 2))) == 189


def test_parameters_of_llama_2_7b() -> None:
    assert LLAMA2_7B.parameters == 6_738_415_616


def test_equal_scores_keep_the_lower_index() -> None:
    import numpy as np

    assert best_units(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]
    assert best_units(np.zeros(5), 3).tolist() == [0, 1, 2]


def test_plans_are_nested_in_width_and_keep_whole_groups(checkpoint: Checkpoint) -> None:
    widths = subnet_widths(checkpoint.architecture, Fraction(1, 10))
    plans = [checkpoint.plan(Shape(3, width)) for width in widths]
    for wide, narrow in pairwise(plans):
        for outer, inner in zip(wide.blocks, narrow.blocks, strict=True):
            assert set(inner.kv_heads) <= set(outer.kv_heads)
            assert set(inner.neurons) <= set(outer.neurons)
    for plan in plans:
        for block in plan.blocks:
            assert block.heads == tuple(2 * g + member for g in block.kv_heads for member in (0, 1))


def test_plans_are_values(checkpoint: Checkpoint) -> None:
    plan = checkpoint.plan(Shape.parse("3x0.5"))
    assert plan == checkpoint.plan(Shape.parse("3x1/2"))
    assert hash(plan) == hash(checkpoint.plan(Shape.parse("3x0.5")))
    with pytest.raises(AttributeError):
        plan.shape = Shape.parse("2x1")  # type: ignore[misc]


def test_a_plan_file_gives_the_plan_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = checkpoint.plan(Shape.parse("2x0.67"))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    assert read_plan(file, checkpoint.architecture) == plan
    assert checkpoint.plan_of(str(file)) == plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format="amoeba.plan/2"), "amoeba.plan/1"),
        (lambda v: v.update(blocks=[]), "at least one block"),
        (lambda v: v["blocks"][0].update(index=9), "ascend"),
        (lambda v: v["blocks"][0].update(neurons=[3, 2]), "ascend"),
        (lambda v: v["blocks"][0].update(neurons=[160]), "0..159"),
        (lambda v: v["blocks"][0].update(neurons=[]), "at least one"),
        (lambda v: v["blocks"][0].update(heads=[0]), "query heads of the kept"),
        (lambda v: v["shape"].update(depth=4), "the plan has 2"),
        (lambda v: v["shape"].update(width=2), "not in (0, 1]"),
    ],
)
def test_a_wrong_plan_is_refused(change: object, says: str, checkpoint: Checkpoint) -> None:
    value = checkpoint.plan(Shape.parse("2x0.67")).to_json()
    change(value)  # type: ignore[operator]
    with pytest.raises(BadInput) as caught:
        plan_from_json(value, checkpoint.architecture, "plan.json")
    assert says in str(caught.value)
