"""Medians, their confidence intervals, and percentiles of a few repeated measurements.

Only the standard library is used: the same figures are computed on devices that have no room for more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, median, stdev

CONFIDENCE = 0.95
FEWEST = 6
"""Values from which an interval that holds their median with 95 % confidence can be given."""


@cache
def _rank(count: int, confidence: float) -> int:
    """How many values are left out on each side of the interval; 0 keeps all of them."""
    left = 0
    below = 0.5**count
    while 2 * (left + 1) < count and 2 * (below + math.comb(count, left + 1) * 0.5**count) <= 1 - confidence:
        left += 1
        below += math.comb(count, left) * 0.5**count
    return left


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Between which values the true median lies with some confidence, whatever the distribution.

    The k-th smallest and k-th largest of n values hold it with probability 1 - 2 P(Binomial(n, 1/2) < k); the largest
    k that keeps ``confidence`` is taken (Conover, Practical Nonparametric Statistics, section 3.2). Fewer than six
    values cannot reach 95 %: then the interval is their whole range.
    """
    ordered = sorted(values)
    left = _rank(len(ordered), confidence)
    return ordered[left], ordered[-1 - left]


def relative_error(values: Sequence[float]) -> float:
    """Half the width of the median's 95 % confidence interval, as a share of the median."""
    low, high = median_interval(values)
    return (high - low) / 2 / median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, linear between neighbours.

    >>> percentile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    index = min(int(position), len(ordered) - 2) if len(ordered) > 1 else 0
    upper = ordered[min(index + 1, len(ordered) - 1)]
    return ordered[index] + (upper - ordered[index]) * (position - index)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; no spread is known of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
