"""Mean and variance of activations over batches, in one pass and numerically stable.

Within a batch the mean is taken first and squares are summed about it, in float32; batches are merged by the pairwise
update of Chan, Golub and LeVeque (1979) in float64, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Of channels [n] over ``count`` samples: their mean, and the sum of squares about it."""

    count: int
    mean: Vector
    squares: Vector

    @property
    def variance(self) -> Vector:
        """Population variance of each channel."""
        return self.squares / self.count

    @property
    def norm(self) -> Vector:
        """Euclidean norm of each channel over all samples."""
        return np.sqrt(self.squares + self.count * self.mean**2)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of samples together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), squares)


def moments_of(samples: torch.Tensor) -> Moments:
    """The moments of float32 samples [samples, n]."""
    mean = samples.mean(dim=0)
    squares = (samples - mean).square_().sum(dim=0)
    return Moments(len(samples), mean.double().numpy(), squares.double().numpy())


def merge(parts: Iterable[Moments]) -> Moments:
    """All of them together, merged in order."""
    first, *rest = parts
    for part in rest:
        first = first.merged(part)
    return first
