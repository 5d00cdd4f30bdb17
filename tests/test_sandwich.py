"""Which shapes a step trains, how its learning rate goes, and what settings refuse."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch

from amoeba_deploy.errors import BadInput
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.conflicts import project
from amoeba_deploy.stage2.sandwich import Space, sandwich
from amoeba_deploy.stage2.settings import Settings

SPACE = Space((2, 3, 4), (Fraction(1), Fraction(3, 4), Fraction(1, 2)), "uniform")


def test_a_sandwich_has_the_ends_and_others_without_repeats() -> None:
    for step in range(50):
        shapes = sandwich(SPACE, 2, 0, step)
        assert shapes[:2] == [Shape.parse("4x1"), Shape.parse("2x0.5")]
        assert len(set(shapes)) == 4


def test_the_same_step_takes_the_same_shapes_and_another_seed_others() -> None:
    steps = range(20)
    assert [sandwich(SPACE, 2, 0, step) for step in steps] == [sandwich(SPACE, 2, 0, step) for step in steps]
    assert [sandwich(SPACE, 2, 0, step) for step in steps] != [sandwich(SPACE, 2, 1, step) for step in steps]


def test_random_shapes_come_alike_often() -> None:
    drawn = Counter(shape for step in range(3500) for shape in sandwich(SPACE, 2, 0, step)[2:])
    assert set(drawn) == set(SPACE.between)
    assert all(850 < count < 1150 for count in drawn.values())  # 1000 each, give or take five standard deviations


def test_small_spaces_give_what_there_is() -> None:
    only = Space((3,), (Fraction(1, 2),), "adaptive")
    assert sandwich(only, 2, 0, 0) == [Shape(3, Fraction(1, 2), "adaptive")]
    pair = Space((2, 3), (Fraction(1),), "uniform")
    assert sandwich(pair, 5, 0, 0) == [Shape.parse("3x1"), Shape.parse("2x1")]


def test_the_learning_rate_rises_and_falls() -> None:
    constant = Settings(steps=100, warmup=4, lr=1.0)
    assert [constant.rate(step) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])
    cosine = Settings(steps=104, warmup=4, lr=1.0, schedule="cosine")
    assert [cosine.rate(step) for step in (4, 54, 79)] == pytest.approx([1.0, 0.5, 0.1464466], rel=1e-6)
    assert cosine.rate(103) < 0.001
    assert Settings().learning_rate == 2e-4
    assert Settings(adapter="none").learning_rate == 2e-5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"top_k": 6}, "--top-k 6"),
        ({"adapter": "none", "base_bits": 4}, "--adapter none"),
        ({"widths": (Fraction(1, 2),)}, "must have 1"),
        ({"widths": (Fraction(1), Fraction(1, 2), Fraction(1, 2))}, "twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Settings(**changed)


def test_projection_takes_away_what_points_against_another_gradient() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    first, second = list(project([a, b], random.Random(0)))
    assert torch.allclose(first, torch.tensor([0.5, 0.5]))
    assert torch.allclose(second, torch.tensor([0.0, 1.0]))
    assert float(first @ b) == pytest.approx(0, abs=1e-6)
    assert float(second @ a) == pytest.approx(0, abs=1e-6)


def test_projection_leaves_gradients_that_agree() -> None:
    gradients = [torch.tensor([1.0, 0.2]), torch.tensor([0.5, 1.0]), torch.tensor([0.0, 3.0])]
    for found, gradient in zip(project(gradients, random.Random(0)), gradients, strict=True):
        assert torch.equal(found, gradient)
