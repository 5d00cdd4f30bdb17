"""Which shapes a step trains: the largest, the smallest and some random ones (the sandwich rule, arXiv 1903.05134)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from amoeba_deploy.shape import Policy, Shape


@dataclass(frozen=True)
class Space:
    """The shapes that are tuned: some depths at some widths, under one policy."""

    depths: tuple[int, ...]
    widths: tuple[Fraction, ...]
    policy: Policy

    @property
    def largest(self) -> Shape:
        """The deepest and widest shape."""
        return Shape(max(self.depths), max(self.widths), self.policy)

    @property
    def smallest(self) -> Shape:
        """The shallowest and narrowest shape."""
        return Shape(min(self.depths), min(self.widths), self.policy)

    @property
    def between(self) -> list[Shape]:
        """All other shapes, largest first."""
        every = [Shape(d, w, self.policy) for d in sorted(self.depths)[::-1] for w in sorted(self.widths)[::-1]]
        return [shape for shape in every if shape not in (self.largest, self.smallest)]


def sandwich(space: Space, count: int, seed: int, step: int) -> list[Shape]:
    """The shapes of a step, without repeats: the largest first, the smallest, then ``count`` random others.

    They follow from the seed and the step alone, so that all processes, and a run that is resumed, take the same.
    """
    others: Sequence[Shape] = space.between
    rng = random.Random(f"shapes/{seed}/{step}")
    chosen = rng.sample(others, min(count, len(others)))
    ends = [space.largest] if space.smallest == space.largest else [space.largest, space.smallest]
    return ends + chosen
