"""Budgets: limits that a shape must stay within, all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.prediction import Metric
from amoeba_deploy.search.candidate import Candidate
from amoeba_deploy.search.quantity import QUANTITIES, Quantity

LATENCY, MEMORY = "latency", "memory"


@dataclass(frozen=True)
class Limit:
    """One bound, in the quantity's own unit: milliseconds, bytes or nats."""

    name: str
    """What is said to bind where it does."""
    quantity: Quantity
    bound: float

    def factor(self, candidate: Candidate, tokens: int) -> float:
        """By what factor a candidate exceeds it; at most 1 where it holds."""
        return self.quantity.value(candidate, tokens) / self.bound

    def broken_by(self, candidate: Candidate, tokens: int) -> str:
        """How a sentence about a candidate says that it exceeds the bound."""
        quantity = self.quantity
        found = quantity.text(quantity.value(candidate, tokens))
        return f"{quantity.told} {found} where {self.allowed} is allowed ({quantity.source(candidate)})"

    @property
    def allowed(self) -> str:
        """The bound with its unit."""
        if self.quantity.name in ("tpot", "ttft", "e2e"):
            return f"{self.bound:g} ms"
        return f"{self.bound:g}" if self.quantity.name == "loss" else self.quantity.text(self.bound)


@dataclass(frozen=True)
class Budget:
    """What a shape must stay within: a latency in milliseconds, bytes of memory, and more; None bounds nothing."""

    metric: Metric
    """The latency that ``ms`` bounds, and by which shapes of equal quality are ranked."""
    ms: float | None
    memory_bytes: int | None
    further: tuple[Limit, ...] = ()

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """Every limit; the budget's latency first, then memory."""
        first = () if self.ms is None else (Limit(LATENCY, QUANTITIES[self.metric], self.ms),)
        second = () if self.memory_bytes is None else (Limit(MEMORY, QUANTITIES["memory"], self.memory_bytes),)
        return (*first, *second, *self.further)

    def exceeded(self, candidate: Candidate, tokens: int) -> list[str]:
        """Every limit that a candidate exceeds, by name."""
        return [limit.name for limit in self.limits if limit.factor(candidate, tokens) > 1]

    def worst(self, candidate: Candidate, tokens: int) -> tuple[float, Limit | None]:
        """By what factor a candidate exceeds the budget at worst (at most 1 where it fits), and which limit that is."""
        factors = [(limit.factor(candidate, tokens), limit) for limit in self.limits]
        return max(factors, key=lambda pair: pair[0], default=(0.0, None))


Bounds = Sequence[tuple[str, float | None]]
"""Names of quantities with what bounds them; None bounds nothing."""


def further_limits(metric: Metric, latency: float | None, asked: Bounds) -> tuple[Limit, ...]:
    """The limits beside ``--latency`` and ``--memory``.

    Raises:
        BadInput: one bounds what ``--latency`` bounds already.
    """
    limits = []
    for name, bound in asked:
        if bound is None:
            continue
        if name == metric and latency is not None:
            raise BadInput(f"--latency and --{name} both bound {name.upper()}; give one of them, or another --metric")
        limits.append(Limit(name, QUANTITIES[name], bound))
    return tuple(limits)
