"""Factors: by how much the truth may differ from the terms of an estimate, and the interval that follows.

A time is estimated as ``work x f0 + blocks x f1 + fixed x f2``: work is reading the weights or computing the prompt,
the others are overheads. The factors are one where nothing is known but the device's file. How far they may be off is
a covariance, and what no factor explains is a spread; both are of the logarithm of a time, for factors near one the
same as a share of it.

What is assumed before any measurement, and where it is from:

- work, 0.52: engines differ. The shares of the bandwidth that twelve engines and precisions reached in decoding on one
  machine, with one thread and with two (docs/engines.md), lie around the 0.70 that estimates assume of small models
  with a root mean square of 0.50 in logarithm; devices add ``DEVICES``. Less is known of prefill, so it gets no less.
- overheads, 0.67: those of the files are assumed; nine in ten are taken to lie within a factor of three.
- devices, 0.14: half of the range, in logarithm, of shares of the bandwidth that are reported over devices, from 0.67
  (Raspberry Pi 5) to 0.89 (RTX 4090, Apple's M-series).
- spread, 0.05: errors on held-out shapes of sums over blocks were 4 to 7 % in decoding and 3 to 4 % in prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from amoeba_deploy.profiles.prediction import Interval

NINE_IN_TEN = 1.645
"""Standard deviations on either side that hold nine tenths of a normal distribution."""
ENGINES = 0.50
DEVICES = 0.14
SPREAD = 0.05
OVERHEADS = math.log(3) / NINE_IN_TEN

Three = tuple[float, float, float]
Covariance = tuple[Three, Three, Three]


def diagonal(variances: Three) -> Covariance:
    """The covariance of factors that err on their own."""
    first, second, third = variances
    return (first, 0.0, 0.0), (0.0, second, 0.0), (0.0, 0.0, third)


@dataclass(frozen=True, slots=True)
class Phase:
    """The three factors of decoding or of prefill, their covariance, and the spread that they leave."""

    values: Three
    covariance: Covariance
    spread: float

    def time(self, work: float, blocks: float, fixed: float, floor: float = 0.0) -> tuple[float, Interval]:
        """The time of some terms, all in milliseconds, and the interval that holds nine tenths of the truths.

        Nothing is faster than ``floor``, so the low end is not either.
        """
        (f0, f1, f2), (c0, c1, c2) = self.values, self.covariance
        time = work * f0 + blocks * f1 + fixed * f2
        if time <= 0:
            return 0.0, (0.0, 0.0)
        variance = work * (work * c0[0] + 2 * blocks * c0[1] + 2 * fixed * c0[2])
        variance += blocks * (blocks * c1[1] + 2 * fixed * c1[2]) + fixed * fixed * c2[2]
        share = math.exp(NINE_IN_TEN * math.sqrt(max(variance, 0.0) / (time * time) + self.spread * self.spread))
        return time, (max(time / share, min(floor, time)), time * share)


@dataclass(frozen=True, slots=True)
class Factors:
    """What is known of a flow in a class of precisions on a device."""

    decode: Phase
    prefill: Phase
    short_prefill: Phase
    """Of prompts so short that reading the weights takes longer than computing."""

    @classmethod
    def of(cls, decode: Phase, prefill: Phase) -> Factors:
        """From both phases: a short prompt reads as decoding does, with the overheads of prefill."""
        first = prefill.covariance[1][1], prefill.covariance[1][2]
        second = prefill.covariance[2][1], prefill.covariance[2][2]
        covariance: Covariance = ((decode.covariance[0][0], 0.0, 0.0), (0.0, *first), (0.0, *second))
        values = decode.values[0], *prefill.values[1:]
        return cls(decode, prefill, Phase(values, covariance, max(decode.spread, prefill.spread)))


def _prior() -> Phase:
    work = ENGINES**2 + DEVICES**2
    return Phase((1.0, 1.0, 1.0), diagonal((work, OVERHEADS**2, OVERHEADS**2)), SPREAD)


PRIOR = _prior()
UNCALIBRATED = Factors.of(PRIOR, PRIOR)
