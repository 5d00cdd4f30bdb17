"""Search: the best shape within a budget, and the Pareto front, over every shape of a model.

The search is exhaustive: a model has some hundreds to thousands of distinct shapes and judging one takes
microseconds. Best is the best quality within the budget; then the lower budget metric; then fewer bytes; then greater
depth. The front holds the shapes that no other beats in both the budget metric and quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quality import Quality, QualityValue
from amoeba_deploy.shape import Shape

Metric = Literal["tpot", "ttft", "e2e"]


@dataclass(frozen=True)
class Budget:
    """What a shape must stay within: a latency in milliseconds, and bytes of memory; None bounds nothing."""

    metric: Metric
    ms: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class SubnetSizes:
    """The sizes of a subnet: every block as wide as the widest, and each block's own."""

    padded: Architecture
    parts: tuple[Architecture, ...]
    kept: int
    """Parameters of the blocks that are kept of the model; padding and compensating biases are not."""

    @classmethod
    def of(cls, padded: Architecture, parts: Sequence[Architecture], compensated: bool) -> SubnetSizes:
        """From the sizes before compensation; one part of the whole depth where all blocks are alike."""
        kept = sum(part.depth * part.block_parameters for part in parts)
        if not compensated:
            return cls(padded, tuple(parts), kept)
        return cls(families.compensated(padded), tuple(map(families.compensated, parts)), kept)

    def built(self, ragged: bool) -> SubnetSizes:
        """What an engine really has: the blocks' own sizes where it takes them, else padded ones."""
        return self if ragged else replace(self, parts=(self.padded,))

    @property
    def mean(self) -> Architecture:
        """Where blocks differ, the nearest subnet whose blocks are all alike: latency follows their parameters."""
        if len(self.parts) == 1:
            return self.padded
        groups = round(sum(part.kv_heads for part in self.parts) / len(self.parts))
        neurons = round(sum(part.neurons for part in self.parts) / len(self.parts))
        return self.padded.subnet(self.padded.depth, max(groups, 1), max(neurons, 1))

    def weight_bytes(self, storage: StorageFormat) -> float:
        """Bytes of all weights."""
        blocks = sum(part.depth * storage.block_bytes(part) for part in self.parts)
        return blocks + storage.head_bytes(self.padded) + storage.embedding_bytes(self.padded)


@dataclass(frozen=True)
class Candidate:
    """One shape in one flow and precision, with everything that it is judged by."""

    shape: Shape
    flow: str
    precision: str
    prediction: Prediction
    quality: QualityValue
    weight_bytes: float

    @property
    def badness(self) -> float:
        """The quality turned so that lower is better."""
        return self.quality.value if self.quality.metric == "loss" else -self.quality.value

    def to_json(self) -> dict[str, Any]:
        """One entry of ``pareto`` in the JSON output."""
        return {
            **self.shape.to_json(),
            "flow": self.flow,
            "precision": self.precision,
            **prediction_to_json(self.prediction),
            "quality": quality_to_json(self.quality),
        }


def prediction_to_json(prediction: Prediction) -> dict[str, Any]:
    """Latencies to a microsecond, memory and source."""
    return {
        "tpot_ms": round(prediction.tpot_ms, 3),
        "ttft_ms": round(prediction.ttft_ms, 3),
        "memory_bytes": prediction.memory_bytes,
        "source": prediction.source,
    }


def quality_to_json(quality: QualityValue) -> dict[str, Any]:
    """Metric, value and source of a quality."""
    return {"metric": quality.metric, "value": round(quality.value, 6), "source": quality.source}


@dataclass(frozen=True)
class SearchResult:
    """The best shape, the runners-up in order, the front sorted by the budget metric, and what bound the choice."""

    best: Candidate
    ranked: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    considered: int
    binding: str | None
    """What kept a better shape out: ``latency``, ``memory`` or both; None where the best of all shapes fits."""


def candidates(
    shapes: Sequence[Shape],
    full: Architecture,
    sized: Callable[[Shape], SubnetSizes],
    flow: str,
    precision: str,
    predict: Callable[[Shape], Prediction],
    quality: Quality | None,
    built: Callable[[Shape], SubnetSizes],
    storage: StorageFormat,
) -> list[Candidate]:
    """Judge every shape in one flow and precision.

    Args:
        shapes: what to consider.
        full: the architecture of the full model.
        sized: gives a shape the sizes that it keeps.
        flow: the engine family.
        precision: one of its precisions.
        predict: gives a shape its latency and memory.
        quality: what was measured; None ranks by the share of block parameters kept.
        built: gives a shape the sizes that the engine will have, padding included.
        storage: how the precision stores weights.
    """
    whole = full.depth * full.block_parameters
    found = []
    for shape in shapes:
        sizes = sized(shape)
        if quality is not None:
            value = quality.loss(shape, precision, sizes.mean)
        else:
            value = QualityValue("parameters_kept", sizes.kept / whole, "counted")
        found.append(Candidate(shape, flow, precision, predict(shape), value, built(shape).weight_bytes(storage)))
    return found


def _factors(candidate: Candidate, budget: Budget, tokens: int) -> dict[str, float]:
    factors = {}
    if budget.ms is not None:
        factors["latency"] = candidate.prediction.value(budget.metric, tokens) / budget.ms
    if budget.memory_bytes is not None:
        factors["memory"] = candidate.prediction.memory_bytes / budget.memory_bytes
    return factors


def exceeded(candidate: Candidate, budget: Budget, tokens: int) -> list[str]:
    """Everything of a budget that a candidate exceeds."""
    return [bound for bound, factor in _factors(candidate, budget, tokens).items() if factor > 1]


def excess(candidate: Candidate, budget: Budget, tokens: int) -> tuple[float, str]:
    """By what factor a candidate exceeds its budget at worst (at most 1 where it fits), and what bounds it."""
    factors = _factors(candidate, budget, tokens)
    return max(((factor, bound) for bound, factor in factors.items()), default=(0.0, "nothing"))


def pareto_front(found: Iterable[Candidate], metric: Metric, tokens: int) -> list[Candidate]:
    """The candidates that no other is at least as good as in metric and quality and better in one, sorted by metric."""
    front: list[Candidate] = []

    def order(candidate: Candidate) -> tuple[float, float, float, int]:
        value = candidate.prediction.value(metric, tokens)
        return value, candidate.badness, candidate.weight_bytes, -candidate.shape.depth

    for candidate in sorted(found, key=order):
        if not front or candidate.badness < front[-1].badness:
            front.append(candidate)
    return front


def search(found: Sequence[Candidate], budget: Budget, workload: Workload) -> SearchResult:
    """The best candidate within a budget.

    Raises:
        NoShapeFits: none fits; the message names the closest and what bounds it.
    """
    tokens = workload.tokens

    def order(candidate: Candidate) -> tuple[float, float, float, int]:
        value = candidate.prediction.value(budget.metric, tokens)
        return candidate.badness, value, candidate.weight_bytes, -candidate.shape.depth

    fitting = sorted((c for c in found if excess(c, budget, tokens)[0] <= 1), key=order)
    if not fitting:
        closest = min(found, key=lambda c: (excess(c, budget, tokens)[0], order(c)))
        raise NoShapeFits(_closest(closest, budget, tokens, only=len({c.shape for c in found}) == 1))
    best = fitting[0]
    better = {bound for c in found if c.badness < best.badness for bound in exceeded(c, budget, tokens)}
    binding = " and ".join(sorted(better)) or None
    storable = [c for c in found if budget.memory_bytes is None or c.prediction.memory_bytes <= budget.memory_bytes]
    return SearchResult(best, tuple(fitting), tuple(pareto_front(storable, budget.metric, tokens)), len(found), binding)


def _closest(closest: Candidate, budget: Budget, tokens: int, only: bool) -> str:
    factor, bound = excess(closest, budget, tokens)
    if bound == "latency":
        found = closest.prediction.value(budget.metric, tokens)
        needs = f"{budget.metric.upper()} {found:.3g} ms where {budget.ms:g} ms is allowed"
    else:
        found = closest.prediction.memory_bytes / 1e9
        needs = f"{found:.3g} GB where {(budget.memory_bytes or 0) / 1e9:.3g} GB is allowed"
    head = "the shape does not fit the budget:" if only else "no shape fits the budget: the closest is"
    return (
        f"{head} {closest.shape} in {closest.flow} {closest.precision}, which needs {needs} "
        f"({closest.prediction.source}); {bound} bounds it, {factor:.2f} times over"
    )
