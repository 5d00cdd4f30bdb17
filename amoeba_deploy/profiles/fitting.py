"""Factors of a roofline's terms from measured times, by non-negative least squares of their relative errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amoeba_deploy.profiles.factors import Covariance, Phase, Three

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRIOR_ROWS = 4
"""How many measurements' worth of evidence the assumed spread is."""
ROUNDS = 4


@dataclass(frozen=True)
class Sample:
    """The terms of one measurement and the time that was measured, in milliseconds.

    ``known`` is a part of the time that no factor belongs to.
    """

    work: float
    blocks: float
    fixed: float
    time: float
    known: float = 0.0


def fitted(samples: Sequence[Sample], prior: Phase) -> Phase:
    """The factors that explain the times best, how uncertain they are, and the spread that they leave.

    Relative errors weigh against what is assumed in ``prior`` as their variances do, which for normal errors gives the
    most probable factors and, by Laplace's approximation, their covariance (Bishop, Pattern Recognition and Machine
    Learning, 3.3). The spread is estimated from the errors, the assumed one counting as ``PRIOR_ROWS`` rows; a few
    rounds settle it, since it decides how much the rows weigh.
    """
    import numpy as np

    terms = np.array([[s.work, s.blocks, s.fixed] for s in samples], dtype=float).reshape(-1, 3)
    times = np.array([s.time for s in samples], dtype=float)
    rows = terms / times[:, None]
    wanted = 1.0 - np.array([s.known for s in samples], dtype=float) / times
    own = np.linalg.inv(np.linalg.cholesky(np.array(prior.covariance, dtype=float)))
    assumed = own @ np.array(prior.values)
    spread = prior.spread
    for _ in range(ROUNDS):
        matrix, target = np.vstack([rows / spread, own]), np.concatenate([wanted / spread, assumed])
        values = non_negative(matrix, target)
        errors = rows @ values - wanted
        spread = math.sqrt((PRIOR_ROWS * prior.spread**2 + float(errors @ errors)) / (PRIOR_ROWS + len(samples)))
    matrix = np.vstack([rows / spread, own])
    covariance = np.linalg.inv(matrix.T @ matrix)
    return Phase(_three(values), _rows(covariance), spread)


def non_negative(matrix: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """The x >= 0 [n] that minimises |matrix [m, n] x - target [m]|, for a few columns of full rank.

    The minimum is the plain least squares over the columns where it is not zero, so of all subsets of columns whose
    solution has no negative entry the best is exact. Three columns have eight subsets.
    """
    import numpy as np

    count = matrix.shape[1]
    best, least = np.zeros(count), float(target @ target)
    for solution, error, _ in subset_solutions(matrix, target, range(count)):
        if error < least:
            best, least = solution, error
    return best


def subset_solutions(
    matrix: NDArray[Any], target: NDArray[Any], columns: Sequence[int]
) -> Iterator[tuple[NDArray[Any], float, int]]:
    """The least squares over every subset of some columns that has no negative entry: x [n], |error|^2, its size."""
    import numpy as np

    for size in range(1, len(columns) + 1):
        for subset in itertools.combinations(columns, size):
            chosen = list(subset)
            solution = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            if (solution < 0).any():
                continue
            errors = matrix[:, chosen] @ solution - target
            whole = np.zeros(matrix.shape[1])
            whole[chosen] = solution
            yield whole, float(errors @ errors), size


def _three(values: NDArray[Any]) -> Three:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _rows(covariance: NDArray[Any]) -> Covariance:
    first, second, third = (_three(row) for row in covariance)
    return first, second, third
