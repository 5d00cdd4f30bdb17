"""One shape for several devices: the best that fits the budget of each, in the flow that is best there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.backends import takes_of
from amoeba_deploy.search.budget import Budget
from amoeba_deploy.search.candidate import Candidate, quality_to_json
from amoeba_deploy.search.choice import SearchResult


@dataclass(frozen=True)
class Single:
    """The search of one device, and what it stayed within."""

    device: str
    result: SearchResult
    budget: Budget
    tokens: int


@dataclass(frozen=True)
class Shared:
    """One subnet on every device, in the order of the devices."""

    candidates: tuple[Candidate, ...]
    devices: tuple[str, ...]

    @property
    def worst(self) -> Candidate:
        """The one of the least quality: precisions of one name may differ a little between engines."""
        return max(self.candidates, key=lambda candidate: candidate.badness)

    def to_json(self) -> dict[str, Any]:
        """``best_for_all`` in the JSON output."""
        return {
            "shape": self.candidates[0].shape.to_json(),
            "precision": common_precision(self.candidates[0]),
            "quality": quality_to_json(self.worst.quality),
            "devices": [
                {"device": device} | candidate.to_json()
                for device, candidate in zip(self.devices, self.candidates, strict=True)
            ],
        }


def common_precision(candidate: Candidate) -> str:
    """The name that engines share for a precision, such as int4 for GGUF's q4_k_m; its own where it has no other."""
    names = [name for name, own in takes_of(candidate.flow).aliases.items() if own == candidate.precision]
    return names[0] if names else candidate.precision


def best_for_all(singles: Sequence[Single]) -> Shared | None:
    """The subnet of the least loss that fits the budget of every device in one precision; None where there is none.

    Of equal loss the one whose tightest budget is used least is taken, then the one of fewer bytes, then the deeper.
    Shapes of equal sizes are one, whatever engines with other steps call them.
    """
    fitting = [_by_subnet(single) for single in singles]
    common = [key for key in fitting[0] if all(key in found for found in fitting[1:])]
    devices = tuple(single.device for single in singles)
    shared = [Shared(tuple(found[key] for found in fitting), devices) for key in common]

    def order(one: Shared) -> tuple[float, float, float, int]:
        used = max(
            single.budget.worst(candidate, single.tokens)[0]
            for single, candidate in zip(singles, one.candidates, strict=True)
        )
        weights = sum(candidate.weight_bytes for candidate in one.candidates)
        return one.worst.badness, used, weights, -one.candidates[0].shape.depth

    return min(shared, key=order, default=None)


def _by_subnet(single: Single) -> dict[tuple[Any, ...], Candidate]:
    """The best of a device's fitting candidates for every subnet and precision."""
    found: dict[tuple[Any, ...], Candidate] = {}
    for candidate in single.result.ranked:
        key = candidate.shape.policy, candidate.identity, common_precision(candidate)
        found.setdefault(key, candidate)
    return found


def why_none(singles: Sequence[Single]) -> str:
    """Why no shape suits all devices, as a sentence."""
    precisions = [sorted({common_precision(c) for c in single.result.found}) for single in singles]
    listed = "; ".join(f"{s.device}: {', '.join(own)}" for s, own in zip(singles, precisions, strict=True))
    if not set.intersection(*map(set, precisions)):
        return f"no shape suits all devices: they have no precision in common ({listed}); name one with --precision"
    counts = ", ".join(f"{len(single.result.ranked)} on {single.device}" for single in singles)
    return f"no shape fits the budgets of all devices: {counts} fit, none of them on all"
