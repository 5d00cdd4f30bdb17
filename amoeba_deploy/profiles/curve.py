"""From a few measured shapes to all of them: how latency and memory of one engine depend on depth and width.

A decoder runs the same step in every block, so its time is additive over blocks:

    time = fixed + sum over blocks of (call + bytes and operations of the block)

with one fixed part (embedding, head), one for calling a block at all, and one in proportion to what the block computes:
its parameters, or its key/value heads and neurons apart (attention and feed-forward reach different shares of the
peak). The coefficients are those of least squared relative error among all that are not negative. It fails where a
small model fits into a cache, or where an engine's kernels suit one size better than another: then what the additive
part leaves over is interpolated between the measured shapes (kriging with the additive trend; Rasmussen and Williams,
Gaussian Processes for Machine Learning, section 2.7), or, if that is no better, times are interpolated linearly.

Which of them holds is found out on the spot: every measured shape is left out once and predicted from the others. The
errors of that choose, are shown, and give the interval: nine predictions in ten should err less than the error that
nine in ten of the shapes left out stay below, as in a jackknife (Barber et al., Predictive inference with the
jackknife+, 2021). Corners that are left out are extrapolated, so the interval is wide rather than narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.interpolation import over_shapes
from amoeba_deploy.profiles.fitting import subset_solutions
from amoeba_deploy.profiles.statistics import percentile

Values = NDArray[np.float64]
Kind = Literal["additive", "corrected", "linear", "proportional"]
Point = tuple[Architecture, float]

COVERED = 0.9
"""The share of predictions that should lie within their interval."""
PREFERRED = 1.1
"""A simpler model is kept while its held-out error is at most this much larger,"""
NEGLIGIBLE = 0.002
"""or larger by this at most."""
FEWEST = 5
"""Points from which held-out errors mean something; from fewer, the additive part is all that is fitted."""
_FAMILIES = ((0, 1, 2), (0, 1, 3, 4))
"""Terms that are fitted together: fixed, block and parameters; or fixed, block, key/value heads and neurons."""
_LENGTHS = (0.25, 0.5, 1.0)
_NUGGETS = (0.03, 0.3)
"""Of the kriging: over what share of the measured range residuals are alike, and how much of them is noise."""


def _block_terms(sizes: Architecture) -> tuple[float, float, float, float]:
    return 1.0, float(sizes.block_parameters), float(sizes.kv_heads), float(sizes.neurons)


def _terms(sizes: Architecture) -> Values:
    """[5]: one, and the sums over blocks of one, parameters, key/value heads and neurons."""
    return np.array([1.0, *(sizes.depth * term for term in _block_terms(sizes))])


def _least_squares(terms: Values, values: Values) -> Values:
    """Coefficients [5] of least squared relative error that are not negative.

    With four terms at most, every choice of those that are not zero is tried: the best is the exact optimum.
    """
    scale = terms.max(axis=0)
    scaled = terms / scale / values[:, None]
    best, least = np.zeros(terms.shape[1]), math.inf
    for family in _FAMILIES:
        for found, error, count in subset_solutions(scaled, np.ones(len(values)), family):
            # A term more must be worth it: more terms always fit the measured points better.
            judged = error * (1 + 2 * count / max(len(values) - count, 1))
            if judged < least:
                best, least = found / scale, judged
    return best


@dataclass(frozen=True)
class Trend:
    """What is fixed and what each block adds, from coefficients [5]."""

    coefficients: Values

    @classmethod
    def of(cls, points: Sequence[Point]) -> Trend:
        values = np.array([value for _, value in points])
        return cls(_least_squares(np.array([_terms(sizes) for sizes, _ in points]), values))

    def __call__(self, sizes: Architecture) -> float:
        return float(self.coefficients @ _terms(sizes))

    @property
    def fixed(self) -> float:
        """The part that no block adds to."""
        return float(self.coefficients[0])

    def block(self, sizes: Architecture) -> float:
        """What one block of these sizes adds."""
        return float(self.coefficients[1:] @ np.array(_block_terms(sizes)))


class _Corrected:
    """The trend, times what is interpolated of the ratios between the measured values and the trend."""

    def __init__(self, points: Sequence[Point], trend: Trend, length: float, nugget: float) -> None:
        self._trend = trend
        self._scale = np.array([max(s.depth for s, _ in points), max(s.block_parameters for s, _ in points)], float)
        self._length = length
        places = np.array([self._place(sizes) for sizes, _ in points])
        ratios = np.array([math.log(value / trend(sizes)) for sizes, value in points])
        alike = self._alike(places, places) + nugget * np.eye(len(points))
        self._places, self._weights = places, np.linalg.solve(alike, ratios)

    def _place(self, sizes: Architecture) -> Values:
        found: Values = np.array([sizes.depth, sizes.block_parameters]) / self._scale
        return found

    def _alike(self, left: Values, right: Values) -> Values:
        distances = np.square(left[:, None] - right[None]).sum(axis=2)
        found: Values = np.exp(-distances / (2 * self._length**2))
        return found

    def __call__(self, sizes: Architecture) -> float:
        alike = self._alike(self._place(sizes)[None], self._places)[0]
        return self._trend(sizes) * math.exp(float(alike @ self._weights))


class _Linear:
    """Linear in the parameters of a block at each measured depth, then linear in depth."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points: dict[int, list[tuple[float, float]]] = {}
        for sizes, value in sorted(points, key=lambda point: point[0].block_parameters):
            self._points.setdefault(sizes.depth, []).append((float(sizes.block_parameters), value))

    def __call__(self, sizes: Architecture) -> float:
        return over_shapes(self._points, sizes.depth, float(sizes.block_parameters))


class _Proportional:
    """In proportion to the parameters of blocks and head: all that can be said from a single shape."""

    def __init__(self, point: Point) -> None:
        self._rate = point[1] / self._read(point[0])

    @staticmethod
    def _read(sizes: Architecture) -> float:
        return sizes.depth * sizes.block_parameters + sizes.embedding_parameters

    def __call__(self, sizes: Architecture) -> float:
        return self._rate * self._read(sizes)


Function = Callable[[Architecture], float]


def _makers() -> list[tuple[Kind, Callable[[Sequence[Point], Trend], Function]]]:
    """Every model in the order of preference."""

    def corrected(length: float, nugget: float) -> Callable[[Sequence[Point], Trend], Function]:
        return lambda points, trend: _Corrected(points, trend, length, nugget)

    found: list[tuple[Kind, Callable[[Sequence[Point], Trend], Function]]] = [
        ("additive", lambda _, trend: trend),
        *(("corrected", corrected(length, nugget)) for length in _LENGTHS for nugget in _NUGGETS),
        ("linear", lambda points, _: _Linear(points)),
    ]
    return found


@dataclass(frozen=True)
class HeldOut:
    """By what share of their values measured shapes were mispredicted from the others."""

    median: float
    p90: float
    worst: float
    shapes: int


class Curve:
    """One figure of one engine over all shapes.

    Args:
        points: sizes of the measured subnets and the values, at least one.
        spread: how far below and above a value measurements of it lie, as logarithms; no interval is narrower, since
            nothing is predicted better than it can be measured.
    """

    def __init__(self, points: Sequence[Point], spread: tuple[float, float] = (0.0, 0.0)) -> None:
        self._points = list(points)
        self._spread = spread
        self.trend = Trend.of(points)
        self.kind: Kind = "additive" if len(points) > 1 else "proportional"
        self._function: Function = self.trend if len(points) > 1 else _Proportional(points[0])
        self._residuals: list[float] = []
        self.additive_held_out: HeldOut | None = None
        if len(points) >= FEWEST:
            self._choose()

    def _choose(self) -> None:
        """Take the simplest model whose held-out error is about the least of all."""
        without = [[p for p in self._points if p is not left] for left in self._points]
        trends = [Trend.of(points) for points in without]
        tried = []
        for kind, make in _makers():
            residuals = [
                math.log(make(points, trend)(left[0]) / left[1])
                for points, trend, left in zip(without, trends, self._points, strict=True)
            ]
            tried.append((float(np.mean(np.abs(residuals))), kind, make, residuals))
        least = min(error for error, *_ in tried)
        _, self.kind, make, self._residuals = next(
            entry for entry in tried if entry[0] <= PREFERRED * least + NEGLIGIBLE
        )
        self._function = make(self._points, self.trend)
        self.additive_held_out = _held_out(tried[0][3])

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The errors of the chosen model, None where too few shapes were measured to leave one out."""
        return _held_out(self._residuals) if self._residuals else None

    @cached_property
    def left_out(self) -> tuple[tuple[Architecture, float, float], ...]:
        """Of every measured subnet its value, and what the others predict of it; none where they are too few."""
        residuals = self._residuals or [0.0] * len(self._points)
        found = tuple((s, v, v * math.exp(r)) for (s, v), r in zip(self._points, residuals, strict=True))
        return found if self._residuals else ()

    @cached_property
    def _half(self) -> float | None:
        """Half the interval's width in the logarithm."""
        if not self._residuals:
            return None
        errors = sorted(abs(residual) for residual in self._residuals)
        rank = min(math.ceil(COVERED * (len(errors) + 1)), len(errors))
        return errors[rank - 1]

    def _beyond(self, sizes: Architecture) -> float:
        """How far outside the measured depths and widths a subnet lies, as a share of what was measured; 0 inside."""
        measures: tuple[Callable[[Architecture], int], ...] = (lambda s: s.depth, lambda s: s.block_parameters)
        found = 0.0
        for measure in measures:
            low, high = min(measure(s) for s, _ in self._points), max(measure(s) for s, _ in self._points)
            found = max(found, (low - measure(sizes)) / low, (measure(sizes) - high) / high)
        return found

    def inside(self, sizes: Architecture) -> bool:
        """Whether a subnet lies between the measured depths and widths."""
        return self._beyond(sizes) <= 0

    def __call__(self, sizes: Architecture) -> float:
        """The predicted value. Outside of what was measured the additive part alone is carried on."""
        if self.kind != "proportional" and not self.inside(sizes):
            return self.trend(sizes)
        return self._function(sizes)

    def interval(self, sizes: Architecture) -> tuple[float, float] | None:
        """Between which values a measurement is expected, nine times in ten; None where too little was measured.

        Outside of what was measured it grows with the distance: by the error that the additive part had on shapes left
        out, and by a tenth of the distance.
        """
        half = self._half
        if half is None:
            return None
        beyond = self._beyond(sizes)
        if beyond > 0:
            assert self.additive_held_out is not None
            half = max(half, self.additive_held_out.worst) * (1 + beyond) + 0.1 * beyond
        value = self(sizes)
        return self.widened(value, (value * math.exp(-half), value * math.exp(half)))

    def widened(self, value: float, interval: tuple[float, float]) -> tuple[float, float]:
        """An interval around a value that is no narrower than measurements lie around theirs."""
        below, above = self._spread
        return min(interval[0], value * math.exp(-below)), max(interval[1], value * math.exp(above))


def _held_out(residuals: Sequence[float]) -> HeldOut:
    errors = [abs(math.expm1(residual)) for residual in residuals]
    return HeldOut(percentile(errors, 0.5), percentile(errors, 0.9), max(errors), len(errors))
