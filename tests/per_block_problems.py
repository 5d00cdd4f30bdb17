"""Instances of the per-block problem, and the independent solvers that the exact one is held to."""

from __future__ import annotations

import itertools
import math

import numpy as np

from amoeba_deploy.per_block.problem import Constraint, Floats, Problem

KINDS = ("random", "correlated", "blocks", "ties")


def random_options(kind: str, seed: int, blocks: int = 32, options: int = 64) -> tuple[Floats, Floats]:
    """Rises and costs [blocks, options] of one of ``KINDS``.

    ``random`` are unrelated; ``correlated`` have rises that fall with the cost but for noise; ``blocks`` are a grid of
    heads and neurons like those of a model, dropping included; ``ties`` have few distinct values.
    """
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.uniform(-0.01, 0.5, (blocks, options)), rng.uniform(0.1, 1, (blocks, options))
    if kind == "ties":
        return rng.integers(0, 6, (blocks, options)) / 8, rng.integers(1, 6, (blocks, options)) / 4
    if kind == "correlated":
        costs = rng.uniform(0.1, 1, (blocks, options))
        slopes = rng.uniform(0.2, 0.4, (blocks, 1))
        return (1 - costs) * slopes + rng.normal(0, 0.01, (blocks, options)), costs
    side = round(math.sqrt(options))
    heads, neurons = np.repeat(np.arange(1, side + 1), side), np.tile(np.arange(1, side + 1), side)
    costs = np.tile(0.03 + 0.01 * heads + 0.02 * neurons, (blocks, 1))
    scales = rng.uniform(0.005, 0.1, (blocks, 1))
    lost = (1 - heads / side) ** 1.5 + (1 - neurons / side) ** 2 * rng.uniform(0.5, 2, (blocks, 1))
    rises = scales * lost + rng.normal(0, 0.0005, (blocks, side * side))
    costs[:, 0], rises[:, 0] = 0, 3 * scales[:, 0]
    return rises, costs


def budgeted(rises: Floats, costs: Floats, share: float) -> Problem:
    """The problem whose budget lies at a share of the way from the least cost to that of the least rise."""
    low = costs.min(axis=1).sum()
    high = costs[np.arange(len(rises)), rises.argmin(axis=1)].sum()
    return Problem(rises, (Constraint("TPOT", "ms", costs, low + share * (high - low)),))


def highs_optimum(problem: Problem) -> float:
    """The least rise by SciPy's HiGHS, without a gap; infinite where nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    blocks, options = problem.rises.shape
    there = np.isfinite(problem.rises)
    count = blocks * options
    one = coo_matrix((np.ones(count), (np.repeat(np.arange(blocks), options), np.arange(count))))
    limits = [LinearConstraint(one, 1, 1)]
    limits += [LinearConstraint(c.costs.ravel()[None], -np.inf, c.budget - c.fixed) for c in problem.constraints]
    done = milp(
        np.where(there, problem.rises, 0).ravel(),
        integrality=np.ones(count),
        bounds=Bounds(0, there.ravel().astype(float)),
        constraints=limits,
        options={"mip_rel_gap": 0},
    )
    return math.inf if done.x is None else float(done.fun)


def enumerated_optimum(problem: Problem) -> float:
    """The least rise by trying every choice; infinite where nothing fits."""
    choices = itertools.product(range(problem.options), repeat=problem.blocks)
    return min((problem.rise(choice) for choice in choices if problem.fits(choice)), default=math.inf)
