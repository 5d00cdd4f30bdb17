"""The choice: the best of some candidates within a budget, what kept better ones out, and the front.

Best is the best quality within the budget; then the lower budget metric; then fewer bytes; then greater depth. Equal
in quality are shapes that cannot be told apart: in the order of their losses, those before the first one that is
significantly worse than the first of all (``comparison.py``). As this takes the whole beginning of that order, no other
shape is both better and cheaper than the choice. The front holds the candidates that no other beats in both of two
quantities: the budget metric and quality unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from amoeba_deploy.comparison import Comparison, compare
from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.search.budget import MEMORY, Budget
from amoeba_deploy.search.candidate import Candidate
from amoeba_deploy.search.quantity import QUANTITIES

Axes = tuple[str, str]
"""The names of two quantities."""


@dataclass(frozen=True)
class SearchResult:
    """The best shape, the runners-up in order, the front sorted by its first quantity, and what bound the choice."""

    best: Candidate
    ranked: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    found: tuple[Candidate, ...]
    """All that were considered."""
    binding: str | None
    """The limits that kept a better shape out, such as ``latency and memory``; None where the best of all fits."""
    axes: Axes
    equals: tuple[Candidate, ...] = ()
    """Those within the budget that cannot be told apart from the best in quality, the lowest loss first; the choice is
    not among them."""

    @property
    def considered(self) -> int:
        """How many candidates there were."""
        return len(self.found)


def pareto_front(found: Iterable[Candidate], metric: str, tokens: int, against: str = "loss") -> list[Candidate]:
    """The candidates that no other is at least as good as in two quantities and better in one, sorted by the first."""
    first, second = QUANTITIES[metric].value, QUANTITIES[against].value
    front: list[Candidate] = []
    lowest = float("inf")

    def order(candidate: Candidate) -> tuple[float, float, float, int]:
        return first(candidate, tokens), second(candidate, tokens), candidate.weight_bytes, -candidate.shape.depth

    for candidate in sorted(found, key=order):
        if second(candidate, tokens) < lowest:
            front.append(candidate)
            lowest = second(candidate, tokens)
    return front


def preference(candidate: Candidate, budget: Budget, tokens: int) -> tuple[float, float, float, int]:
    """What candidates within a budget are ranked by; less is better."""
    value = candidate.prediction.value(budget.metric, tokens)
    return candidate.badness, value, candidate.weight_bytes, -candidate.shape.depth


def search(found: Sequence[Candidate], budget: Budget, workload: Workload, axes: Axes | None = None) -> SearchResult:
    """The best candidate within a budget.

    The front keeps every limit but those on its own axes, and the memory always: it shows what more would buy.

    Raises:
        NoShapeFits: none fits; the message names the closest and what bounds it.
    """
    tokens = workload.tokens
    exceeded = [budget.exceeded(candidate, tokens) for candidate in found]
    fitting = [candidate for candidate, over in zip(found, exceeded, strict=True) if not over]
    ranked = sorted(fitting, key=lambda candidate: preference(candidate, budget, tokens))
    if not ranked:
        raise NoShapeFits(_closest(found, budget, tokens))
    chosen, first = axes or (budget.metric, "loss"), ranked[0]
    equals = alike(ranked)
    # Stable: of equals with the same metric the one with the lower loss stays ahead.
    ranked = sorted(equals, key=lambda c: preference(c, budget, tokens)[1]) + ranked[len(equals) :]
    best = ranked[0]
    better = {
        name
        for candidate, over in zip(found, exceeded, strict=True)
        if candidate.badness < first.badness and not _same(candidate, best)
        for name in over
    }
    # A limit on an axis binds nothing there; the device's memory is no choice.
    free = {limit.name for limit in budget.limits if limit.quantity.name in chosen} - {MEMORY}
    standing = [c for c, over in zip(found, exceeded, strict=True) if free.issuperset(over)]
    front = pareto_front(standing, chosen[0], tokens, chosen[1])
    binding = " and ".join(sorted(better)) or None
    others = tuple(candidate for candidate in equals if candidate is not best)
    return SearchResult(best, tuple(ranked), tuple(front), tuple(found), binding, chosen, others)


def alike(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The beginning of an order by quality that cannot be told apart from its first: it alone where nobody measured."""
    first = ranked[0]
    if first.quality.losses is None:
        return [first]
    worse = (_apart(first, candidate) for candidate in ranked[1:])
    count = sum(1 for _ in takewhile(lambda apart: not apart, worse))
    found = list(ranked[: 1 + count])
    # Interpolated shapes count as equal only up to the last one that was measured and is.
    while found[-1].quality.losses is None:
        found.pop()
    return found


def comparison(first: Candidate, second: Candidate) -> Comparison | None:
    """The losses of two candidates in pairs, where both were measured on the same rows."""
    return compare(first.quality.losses, second.quality.losses)


def _apart(first: Candidate, second: Candidate) -> bool:
    """Whether the second is known to be significantly worse; what was measured on other rows counts as told apart."""
    found = comparison(first, second)
    if found is None:
        return second.quality.losses is not None
    return found.significant


def _same(first: Candidate, second: Candidate) -> bool:
    found = comparison(first, second)
    return found is not None and not found.significant


def _closest(found: Sequence[Candidate], budget: Budget, tokens: int) -> str:
    closest = min(found, key=lambda c: (budget.worst(c, tokens)[0], preference(c, budget, tokens)))
    factor, limit = budget.worst(closest, tokens)
    assert limit is not None, "what has no limit fits"
    only = len({candidate.shape for candidate in found}) == 1
    head = "the shape does not fit the budget:" if only else "no shape fits the budget: the closest is"
    return (
        f"{head} {closest.shape} in {closest.flow} {closest.precision}, {limit.broken_by(closest, tokens)}; "
        f"{limit.name} bounds it, {factor:.2f} times over"
    )
