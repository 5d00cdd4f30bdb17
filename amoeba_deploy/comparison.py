"""Can two models be told apart? A paired test on what both were asked: the same rows of text, the same questions.

Rows differ far more from each other than two subnets do on one row, so the standard errors of the two losses say little
about their difference; the differences row by row do. Two figures are told apart where their mean difference is more
than ``CRITICAL`` of its standard errors (the normal approximation of the paired t-test, two-sided at 95 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CRITICAL = 1.96
FEWEST_ROWS = 30
"""Fewer pairs say too little for the normal approximation: then nothing is said to be equal."""


@dataclass(frozen=True)
class Comparison:
    """The mean of second minus first over pairs, and its standard error."""

    difference: float
    standard_error: float
    pairs: int

    @property
    def significant(self) -> bool:
        """Whether the two can be told apart."""
        return abs(self.difference) > CRITICAL * self.standard_error

    def to_json(self) -> dict[str, float | int]:
        """The difference, its standard error, and over how many pairs."""
        return {
            "difference": round(self.difference, 6),
            "se": round(self.standard_error, 6),
            "pairs": self.pairs,
        }


def compare(first: NDArray[np.float32] | None, second: NDArray[np.float32] | None) -> Comparison | None:
    """Compare two models by what each made of the same rows or questions [n]; None where that is not known.

    >>> compare(np.zeros(40, np.float32), np.full(40, 0.5, np.float32)).difference
    0.5
    >>> compare(np.zeros(3, np.float32), np.ones(3, np.float32)) is None
    True
    """
    if first is None or second is None or len(first) != len(second) or len(first) < FEWEST_ROWS:
        return None
    return paired(second.astype(np.float64) - first.astype(np.float64))


def paired(differences: Sequence[float] | NDArray[np.float64]) -> Comparison:
    """From differences pair by pair; at least two."""
    found = np.asarray(differences, dtype=np.float64)
    return Comparison(float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found))), len(found))
