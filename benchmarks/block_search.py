"""The search per block as a problem: ``python -m benchmarks.block_search``.

Times the exact search on random instances of 32 blocks with 64 options each against SciPy's HiGHS (milp without a
gap), interleaved, and says whether both found the same optimum. Then what NSGA-II reaches on the same instances, and
the exact search under three budgets (latency, memory and depth). Kinds of instances: ``random`` are unrelated rises
and costs; ``correlated`` have rises that fall with the cost but for noise; ``blocks`` are a grid of heads and neurons
like those of a model, dropping included; ``ties`` have few distinct values. Needs scipy and pymoo.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from amoeba_deploy.per_block.evolutionary import best_within, evolve
from amoeba_deploy.per_block.exact import solve
from amoeba_deploy.per_block.problem import Constraint, Floats, Problem, dropped_at_most

BLOCKS, SIDE = 32, 8
KINDS = ("random", "correlated", "blocks", "ties")
SHARES = (0.0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Where budgets lie between the least cost and that of the least rise."""
EQUAL = 1e-7
"""HiGHS lets constraints be broken by up to 1e-6 of their scale, and rises are below 1."""


def instance(kind: str, seed: int) -> tuple[Floats, Floats]:
    """Rises and costs [blocks, options], options ascending in cost."""
    rng, options = np.random.default_rng(seed), SIDE * SIDE
    shape = BLOCKS, options
    if kind == "random":
        rises, costs = rng.uniform(-0.01, 0.5, shape), rng.uniform(0.1, 1, shape)
    elif kind == "ties":
        rises, costs = rng.integers(0, 6, shape) / 8, rng.integers(1, 6, shape) / 4
    elif kind == "correlated":
        costs = rng.uniform(0.1, 1, shape)
        rises = (1 - costs) * rng.uniform(0.2, 0.4, (BLOCKS, 1)) + rng.normal(0, 0.01, shape)
    else:
        heads, neurons = np.repeat(np.arange(1, SIDE + 1), SIDE), np.tile(np.arange(1, SIDE + 1), SIDE)
        costs = np.tile(0.03 + 0.01 * heads + 0.02 * neurons, (BLOCKS, 1))
        scales = rng.uniform(0.005, 0.1, (BLOCKS, 1))
        lost = (1 - heads / SIDE) ** 1.5 + (1 - neurons / SIDE) ** 2 * rng.uniform(0.5, 2, (BLOCKS, 1))
        rises = scales * lost + rng.normal(0, 0.0005, shape)
        costs[:, 0], rises[:, 0] = 0, 3 * scales[:, 0]
    order = np.argsort(costs, axis=1, kind="stable")
    return np.take_along_axis(rises, order, 1), np.take_along_axis(costs, order, 1)


def with_budget(rises: Floats, costs: Floats, share: float) -> Problem:
    """One latency budget."""
    low, high = costs.min(axis=1).sum(), costs[np.arange(BLOCKS), rises.argmin(axis=1)].sum()
    return Problem(rises, (Constraint("TPOT", "ms", costs, float(low + share * (high - low))),))


def highs(problem: Problem) -> float:
    """The optimum by HiGHS."""
    count = problem.rises.size
    one = coo_matrix((np.ones(count), (np.repeat(np.arange(problem.blocks), problem.options), np.arange(count))))
    limits = [LinearConstraint(one, 1, 1)]
    limits += [LinearConstraint(c.costs.ravel()[None], -np.inf, c.budget - c.fixed) for c in problem.constraints]
    done = milp(
        problem.rises.ravel(),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0},
    )
    return float(done.fun)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of wall-clock time, and the result."""
    began = time.perf_counter()
    found = call()
    return 1e3 * (time.perf_counter() - began), found


def exact(kind: str, count: int, repeats: int) -> None:
    """Print one kind's times and whether all optima are equal."""
    ours, theirs, apart = [], [], []
    for seed in range(count):
        problem = with_budget(*instance(kind, seed), SHARES[seed % len(SHARES)])
        times = []
        for _ in range(repeats):
            spent, found = timed(lambda problem=problem: solve(problem))
            times.append(spent)
        ours.append(min(times))
        spent, optimum = timed(lambda problem=problem: highs(problem))
        theirs.append(spent)
        apart.append(abs(found.rise - optimum))
    equal = sum(each <= EQUAL for each in apart)
    print(
        f"  {kind:12} exact {statistics.median(ours):7.1f} ms (most {max(ours):7.1f})   HiGHS "
        f"{statistics.median(theirs):7.1f} ms (most {max(theirs):7.1f})   equal {equal} of {count}, "
        f"apart by at most {max(apart):.1e}"
    )


def several(count: int) -> None:
    """Print the times under latency, memory and depth, memory going with heads and neurons otherwise than latency."""
    ours, theirs, apart = [], [], []
    for seed in range(count):
        rises, costs = instance("blocks", seed)
        sizes = costs * np.random.default_rng(seed).uniform(0.8, 1.25, rises.shape[1])[None]
        one = with_budget(rises, costs, 0.5).constraints[0]
        memory = Constraint("memory", "bytes", sizes, 0.48 * float(sizes.max(axis=1).sum()))
        problem = Problem(rises, (one, memory, dropped_at_most(costs[0] == 0, BLOCKS, BLOCKS - 2)))
        spent, found = timed(lambda problem=problem: solve(problem))
        ours.append(spent)
        spent, optimum = timed(lambda problem=problem: highs(problem))
        theirs.append(spent)
        apart.append(abs(found.rise - optimum))
    print(
        f"  exact {statistics.median(ours):.0f} ms (most {max(ours):.0f}), HiGHS {statistics.median(theirs):.0f} ms "
        f"(most {max(theirs):.0f}), apart by at most {max(apart):.1e}"
    )


def evolutionary(kind: str) -> None:
    """Print what NSGA-II reaches from uniform choices, beside the optimum and the best uniform choice."""
    problem = with_budget(*instance(kind, 0), 0.5)
    uniform = [(place,) * BLOCKS for place in range(problem.options)]
    spent, front = timed(lambda: evolve(problem, uniform))
    found, optimum = best_within(front, problem), solve(problem).rise
    best = min(problem.rise(choice) for choice in uniform if problem.fits(choice))
    reached = "nothing within the budget" if found is None else f"{found.rise:.4f}"
    print(f"  {kind:12} optimum {optimum:.4f}   NSGA-II {reached} in {spent / 1e3:.1f} s   best uniform {best:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact search per block against HiGHS and NSGA-II.")
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="runs of the exact search, the least of which counts")
    parser.add_argument("--skip-evolutionary", action="store_true")
    asked = parser.parse_args()
    print(f"{BLOCKS} blocks of {SIDE * SIDE} options, {asked.instances} instances a kind, one budget")
    for kind in KINDS:
        exact(kind, asked.instances, asked.repeats)
    print("three budgets")
    several(max(2, asked.instances // 4))
    if not asked.skip_evolutionary:
        print("NSGA-II, total rise in nats at a budget half-way")
        for kind in KINDS[:3]:
            evolutionary(kind)


if __name__ == "__main__":
    main()
