"""The exact optimum per block: equal to HiGHS and to enumeration, under one budget and several; NSGA-II beside it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from per_block_problems import KINDS, budgeted, enumerated_optimum, highs_optimum, random_options

from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.per_block.evolutionary import best_within, evolve
from amoeba_deploy.per_block.exact import least, solve, supported_front
from amoeba_deploy.per_block.hulls import Relaxation, lower_hull
from amoeba_deploy.per_block.problem import Constraint, Problem, dropped_at_most

SUMS = 1e-9
"""Two solvers add the same few dozen numbers in different orders, and HiGHS lets a budget be exceeded by some 1e-9."""


# One budget


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_that_of_highs(kind: str, seed: int) -> None:
    problem = budgeted(*random_options(kind, seed, 12, 25), share=(0, 0.05, 0.3, 0.6, 0.95)[seed])
    found = solve(problem)
    assert problem.fits(found.choices)
    assert found.rise == pytest.approx(highs_optimum(problem), abs=SUMS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_of_a_large_model_is_that_of_highs(kind: str) -> None:
    problem = budgeted(*random_options(kind, 7), share=0.5)
    assert solve(problem).rise == pytest.approx(highs_optimum(problem), abs=SUMS)


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_that_of_trying_every_choice(seed: int) -> None:
    kind = KINDS[seed % len(KINDS)]
    problem = budgeted(*random_options(kind, seed, 5, 4), share=(0, 0.2, 0.5, 1)[seed % 4])
    assert solve(problem).rise == pytest.approx(enumerated_optimum(problem), abs=1e-12)


def test_a_budget_that_is_the_least_cost_exactly_is_kept() -> None:
    rises, costs = random_options("random", 3)
    low = costs.min(axis=1).sum()
    found = solve(Problem(rises, (Constraint("TPOT", "ms", costs, low),)))
    assert found.choices == tuple(costs.argmin(axis=1).tolist())


def test_a_budget_that_binds_nothing_gives_the_least_rise_of_every_block() -> None:
    rises, costs = random_options("random", 3)
    found = solve(Problem(rises, (Constraint("TPOT", "ms", costs, 1e9),)))
    assert found.choices == tuple(rises.argmin(axis=1).tolist())


def test_of_equal_rises_the_cheaper_option_is_taken() -> None:
    rises, costs = np.zeros((3, 4)), np.tile([4.0, 2.0, 1.0, 3.0], (3, 1))
    assert solve(Problem(rises, (Constraint("TPOT", "ms", costs, 100.0),))).choices == (2, 2, 2)


def test_an_option_that_lowers_the_loss_is_taken_though_it_is_not_the_whole_block() -> None:
    rises, costs = np.array([[0.0, -0.5], [0.0, 0.3]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    found = solve(Problem(rises, (Constraint("TPOT", "ms", costs, 3.5),)))
    assert (found.choices, found.rise) == ((1, 0), -0.5)


def test_an_option_that_a_block_does_not_have_is_not_taken() -> None:
    rises, costs = np.array([[math.inf, 1.0], [0.0, 1.0]]), np.ones((2, 2))
    assert solve(Problem(rises, (Constraint("TPOT", "ms", costs, 5.0),))).choices == (1, 0)


def test_an_impossible_budget_names_the_least_possible() -> None:
    costs = np.array([[0.0, 2.0], [0.0, 3.0]])
    constraints = Constraint("TPOT", "ms", costs, 2.5, 1.0), dropped_at_most(np.array([True, False]), 2, 1)
    with pytest.raises(NoShapeFits, match=r"least possible TPOT is 3 ms where 2\.5 ms is allowed"):
        solve(Problem(np.array([[1.0, 0.0], [1.0, 0.0]]), constraints))


# Several budgets


@pytest.mark.parametrize("seed", range(60))
def test_under_several_budgets_the_optimum_is_that_of_trying_every_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rises, _ = random_options(KINDS[seed % len(KINDS)], seed, 5, 4)
    constraints = []
    for name in ("TPOT", "memory", "third")[: 2 + seed % 2]:
        costs = rng.integers(0, 5, rises.shape) / 4 if seed % 3 else rng.uniform(0, 1, rises.shape)
        low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
        constraints.append(Constraint(name, "", costs, low + (high - low) * rng.choice([0.1, 0.3, 0.5]) + 2, 2))
    problem = Problem(rises, tuple(constraints))
    wanted = enumerated_optimum(problem)
    if math.isinf(wanted):
        with pytest.raises(NoShapeFits, match=r"least possible|together"):
            solve(problem)
        return
    found = solve(problem)
    assert problem.fits(found.choices)
    assert found.rise == pytest.approx(wanted, abs=1e-12)


def test_latency_memory_and_depth_together_give_the_optimum_of_highs() -> None:
    rises, costs = random_options("blocks", 1, 16, 36)
    sizes = np.tile(0.02 * np.repeat(np.arange(1, 7), 6) + 0.02 * np.tile(np.arange(1, 7), 6), (16, 1))
    sizes[:, 0] = 0
    dropped = np.arange(36) == 0
    high = costs.max(axis=1).sum()
    problem = Problem(
        rises,
        (
            Constraint("TPOT", "ms", costs, 0.5 * high),
            Constraint("memory", "bytes", sizes, 0.45 * sizes.max(axis=1).sum()),
            dropped_at_most(dropped, 16, 14),
        ),
    )
    found = solve(problem)
    assert sum(choice == 0 for choice in found.choices) <= 2
    assert found.rise == pytest.approx(highs_optimum(problem), abs=SUMS)


def test_at_least_one_block_is_kept_however_cheap_dropping_is() -> None:
    rises, costs = np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    problem = Problem(rises, (Constraint("TPOT", "ms", costs, 5.0), dropped_at_most(np.array([True, False]), 2, 1)))
    assert solve(problem).choices == (1, 0)
    assert least(problem) == 1.0


# The front, and its hulls


def test_every_point_of_the_convex_front_is_the_optimum_for_its_cost() -> None:
    problem = budgeted(*random_options("blocks", 2, 8, 16), share=0.5)
    front = supported_front(problem)
    assert len(front) > 10
    assert [one.used for one in front] == sorted(one.used for one in front)
    for one in front:
        first = problem.constraints[0]
        at_cost = problem.of_constraints([Constraint(first.name, first.unit, first.costs, one.used[0])])
        assert solve(at_cost).rise == pytest.approx(one.rise, abs=1e-12)


def test_the_relaxation_is_never_above_the_optimum_and_meets_it_at_its_corners() -> None:
    problem = budgeted(*random_options("correlated", 4, 6, 5), share=0.4)
    first = problem.constraints[0]
    envelope = Relaxation.of(first.costs, problem.rises).envelopes[0]
    for budget in np.linspace(envelope.costs[0], envelope.costs[-1], 15):
        exact = solve(problem.of_constraints([Constraint("TPOT", "ms", first.costs, float(budget))])).rise
        assert float(envelope.bound(np.array([budget]))[0]) <= exact + 1e-12


def test_the_hull_of_points_on_a_line_is_its_ends() -> None:
    costs = np.array([3.0, 1.0, 2.0, 2.0])
    assert lower_hull(costs, 4 - costs).tolist() == [1, 0]


# NSGA-II


def small_problem() -> Problem:
    """Ten blocks of sixteen options in order of cost, as the evolutionary search wants them."""
    rises, costs = random_options("blocks", 5, 10, 16)
    order = np.argsort(costs, axis=1, kind="stable")
    return budgeted(np.take_along_axis(rises, order, 1), np.take_along_axis(costs, order, 1), 0.4)


def test_the_evolutionary_front_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    problem = small_problem()
    state = np.random.get_state()[1].copy()
    one, same, other = (evolve(problem, seed=s, population=24, generations=12) for s in (3, 3, 4))
    assert one == same
    assert one != other
    assert (np.random.get_state()[1] == state).all()


def test_the_evolutionary_front_ascends_in_cost_falls_in_rise_and_is_never_below_the_optimum() -> None:
    problem = small_problem()
    front = evolve(problem, population=32, generations=25)
    assert all(a.used < b.used and a.rise > b.rise for a, b in pairwise(front))
    found, optimum = best_within(front, problem), solve(problem)
    assert found is not None
    assert problem.fits(found.choices)
    assert found.rise >= optimum.rise - 1e-12


def test_the_evolutionary_search_is_at_least_as_good_as_the_shapes_that_it_begins_with() -> None:
    problem = small_problem()
    seeds = [(place,) * 10 for place in range(16)]
    found = best_within(evolve(problem, seeds, population=40, generations=4), problem)
    assert found is not None
    assert found.rise <= min(problem.rise(seed) for seed in seeds if problem.fits(seed))


def test_the_evolutionary_search_keeps_the_other_budgets() -> None:
    problem = small_problem()
    dropped = dropped_at_most(np.arange(16) == 0, 10, 9)
    front = evolve(problem.of_constraints([*problem.constraints, dropped]), population=32, generations=15)
    assert front
    assert all(sum(choice == 0 for choice in one.choices) <= 1 for one in front)
