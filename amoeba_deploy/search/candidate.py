"""Candidates: shapes in a flow and precision with everything that they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.quality import Quality, QualityValue
from amoeba_deploy.shape import Shape


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
    def identity(self) -> tuple[tuple[int, int, int], ...]:
        """Blocks, key/value heads and neurons of each part: equal ones are one subnet, whatever its shape is called."""
        return tuple((part.depth, part.kv_heads, part.neurons) for part in self.parts)

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
    identity: tuple[tuple[int, int, int], ...] = ()
    """Of the subnet: blocks, key/value heads and neurons of each of its parts."""

    @property
    def artifact_bytes(self) -> float:
        """Bytes of the engine's files: measured or predicted where the latencies' source tells, else the weights'."""
        known = self.prediction.artifact_bytes
        return self.weight_bytes if known is None else known

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
            "artifact_bytes": round(self.artifact_bytes),
            "quality": quality_to_json(self.quality),
        }


def prediction_to_json(prediction: Prediction) -> dict[str, Any]:
    """Latencies to a microsecond, memory and source; and the latencies' intervals where they are known."""
    intervals = {"tpot_interval_ms": prediction.tpot_interval, "ttft_interval_ms": prediction.ttft_interval}
    return {
        "tpot_ms": round(prediction.tpot_ms, 3),
        "ttft_ms": round(prediction.ttft_ms, 3),
        "memory_bytes": prediction.memory_bytes,
        "source": prediction.source,
        **{name: [round(end, 3) for end in ends] for name, ends in intervals.items() if ends is not None},
    }


def quality_to_json(quality: QualityValue) -> dict[str, Any]:
    """Metric, value and source of a quality."""
    return {"metric": quality.metric, "value": round(quality.value, 6), "source": quality.source}


@dataclass(frozen=True)
class MeasuredQuality:
    """What was predicted of a candidate's quality, and the candidate with what was measured."""

    predicted: QualityValue
    candidate: Candidate
    standard_error: float

    def to_json(self) -> dict[str, Any]:
        """One entry of ``measured_quality`` in the JSON output."""
        candidate = self.candidate
        return {
            **candidate.shape.to_json(),
            "flow": candidate.flow,
            "precision": candidate.precision,
            "predicted": quality_to_json(self.predicted),
            "measured": round(candidate.quality.value, 6),
            "se": round(self.standard_error, 6),
        }


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
        weights = built(shape).weight_bytes(storage)
        found.append(Candidate(shape, flow, precision, predict(shape), value, weights, sizes.identity))
    return found
