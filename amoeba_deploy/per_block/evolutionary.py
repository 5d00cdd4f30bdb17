"""Evolutionary search: NSGA-II over the options of all blocks, for latency and surrogate loss at once.

A genome is the index of each block's option, options sorted by cost, so that neighbours are alike. The first
generation holds the uniform shapes that it is given. Deb, Pratap, Agarwal and Meyarivan, A fast and elitist
multiobjective genetic algorithm: NSGA-II, IEEE Transactions on Evolutionary Computation 6(2), 2002, as pymoo has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amoeba_deploy.errors import ToolchainMissing
from amoeba_deploy.per_block.problem import Choices, Floats, Integers, Problem, Solution

POPULATION, GENERATIONS = 128, 150


def evolve(
    problem: Problem,
    seeds: Sequence[Choices] = (),
    *,
    seed: int = 0,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> list[Solution]:
    """The front of what a run came across, in order of the first cost; the same for the same seed.

    The first budget bounds nothing: it is an objective. The others bind.

    Args:
        problem: whose options are all available, ascending in cost in every block.
        seeds: choices for the first generation, filled up at random.
        seed: of the run.
        population: choices in a generation.
        generations: how many.

    Raises:
        ToolchainMissing: pymoo is not installed.
    """
    genomes = _run(problem, seeds, seed, population, generations)
    found = {tuple(int(gene) for gene in genome) for genome in (*genomes, *map(np.array, seeds))}
    others = problem.constraints[1:]
    solutions = [Solution.of(problem, choices) for choices in sorted(found)]
    legal = [s for s in solutions if all(c.used(s.choices) - c.fixed <= c.allowed for c in others)]
    front: list[Solution] = []
    for one in sorted(legal, key=lambda s: (s.used[0], s.rise, s.choices)):
        if not front or one.rise < front[-1].rise:
            front.append(one)
    return front


def best_within(front: Sequence[Solution], problem: Problem) -> Solution | None:
    """The choice of a front of least rise that is within the problem's budgets; None where none is."""
    within = [one for one in front if problem.fits(one.choices)]
    return min(within, key=lambda s: (s.rise, s.used[0], s.choices), default=None)


def _run(problem: Problem, seeds: Sequence[Choices], seed: int, population: int, generations: int) -> Integers:
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize
    except ImportError:
        raise ToolchainMissing(
            "the evolutionary search needs pymoo, which is not installed; run pip install 'amoeba-deploy[search]', "
            "or take the method exact"
        ) from None
    state = np.random.get_state()
    try:
        algorithm = NSGA2(
            pop_size=population,
            sampling=_first(problem, seeds, seed, population),
            crossover=SBX(prob=0.9, eta=5, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=1 / problem.blocks, eta=5, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        done = minimize(_pymoo_problem(problem), algorithm, ("n_gen", generations), seed=seed, verbose=False)
        return np.asarray(np.rint(done.pop.get("X")), np.int64)
    finally:
        np.random.set_state(state)


def _first(problem: Problem, seeds: Sequence[Choices], seed: int, population: int) -> Integers:
    """The first generation: the seeds, evenly thinned where there are too many, then random choices of all widths."""
    most = population // 2
    if len(seeds) > most:
        seeds = [seeds[round(place * (len(seeds) - 1) / max(most - 1, 1))] for place in range(most)]
    given = list(dict.fromkeys(seeds))
    rng = np.random.default_rng(seed)
    count, last = population - len(given), problem.options - 1
    # A level for each choice, or all of them would be about half as wide as the model.
    levels = rng.uniform(0, last, (count, 1))
    spread = rng.normal(0, max(last / 6, 0.5), (count, problem.blocks))
    drawn = np.clip(np.rint(levels + spread), 0, last).astype(np.int64)
    return np.concatenate([np.array(given, np.int64).reshape(-1, problem.blocks), drawn])


def _pymoo_problem(problem: Problem) -> Any:
    from pymoo.core.problem import Problem as Pymoo

    blocks, others = np.arange(problem.blocks), problem.constraints[1:]

    class Blocks(Pymoo):  # type: ignore[misc]  # pymoo has no types
        def __init__(self) -> None:
            super().__init__(
                n_var=problem.blocks,
                n_obj=2,
                n_ieq_constr=len(others),
                xl=0,
                xu=problem.options - 1,
                vtype=int,
            )

        def _evaluate(self, x: Floats, out: dict[str, Any], *_: Any, **__: Any) -> None:
            chosen = np.rint(x).astype(np.int64)
            first = problem.constraints[0]
            costs, rises = first.costs[blocks, chosen].sum(axis=1), problem.rises[blocks, chosen].sum(axis=1)
            out["F"] = np.stack([costs, rises], axis=1)
            if others:
                used = [c.costs[blocks, chosen].sum(axis=1) - c.allowed for c in others]
                out["G"] = np.stack(used, axis=1)

    return Blocks()
