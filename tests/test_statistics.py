"""Medians, their confidence intervals and percentiles, against numpy, SciPy and simulation."""

from __future__ import annotations

import random

import numpy as np
import pytest

from amoeba_deploy.profiles.statistics import mean_and_spread, median_interval, percentile, relative_error


@pytest.mark.parametrize("count", [6, 9, 12, 20, 33, 60])
def test_the_interval_leaves_out_as_many_values_as_a_binomial_allows(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = median_interval([float(value) for value in range(count)])
    # The median lies below all but the k lowest values with probability P(Binomial(n, 1/2) <= k).
    assert high == count - 1 - low
    assert stats.binom.cdf(int(low), count, 0.5) <= 0.025 < stats.binom.cdf(int(low) + 1, count, 0.5)


def test_the_interval_holds_the_true_median_at_least_nineteen_times_in_twenty_whatever_the_distribution() -> None:
    draw, held = random.Random(3), 0
    for _ in range(2000):
        low, high = median_interval([draw.lognormvariate(0, 1.5) for _ in range(15)])
        held += low <= 1 <= high
    # Its exact confidence at 15 values is 96.5 %; four standard deviations of 2000 draws are 1.6 %.
    assert held / 2000 > 0.949


def test_few_values_give_their_whole_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert relative_error([1.0, 2.0, 3.0]) == 0.5
    assert median_interval([5.0]) == (5.0, 5.0)


def test_percentiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=17))
    for share in (0.0, 0.1, 0.5, 0.77, 0.9, 1.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), abs=1e-12)
    assert percentile([4.0], 0.9) == 4.0


def test_a_single_value_has_no_spread() -> None:
    assert mean_and_spread([2.0]) == (2.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
