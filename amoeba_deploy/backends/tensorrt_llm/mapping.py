"""How a TensorRT-LLM checkpoint is spread over GPUs: tensor parallel within a stage, stages one after the other.

Rank r is the r-th GPU: its stage is r // tp, its place in the stage r % tp (``tensorrt_llm.mapping.Mapping``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """One GPU: its number, its pipeline stage, and its place among the GPUs of the stage."""

    number: int
    stage: int
    place: int

    @property
    def file(self) -> str:
        """The file that holds its weights."""
        return f"rank{self.number}.safetensors"


@dataclass(frozen=True)
class Mapping:
    """``tp`` GPUs in each of ``pp`` stages."""

    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        """All GPUs."""
        return self.tp * self.pp

    def ranks(self) -> Iterator[Rank]:
        """All ranks in order."""
        for number in range(self.world_size):
            yield Rank(number, number // self.tp, number % self.tp)

    def layers(self, depth: int, stage: int) -> range:
        """The blocks of a stage; of depth % pp stages at the front each has one more (``torch.tensor_split``)."""
        least, more = divmod(depth, self.pp)
        begin = stage * least + min(stage, more)
        return range(begin, begin + least + (stage < more))

    def to_json(self) -> dict[str, int]:
        """``mapping`` of a checkpoint's config.json; TensorRT-LLM raises at any other key."""
        return {"world_size": self.world_size, "tp_size": self.tp, "pp_size": self.pp}


def key_value_heads(kv_heads: int, tp: int, place: int) -> range:
    """The key/value heads of one of ``tp`` GPUs; where there are fewer heads than GPUs, each has several copies."""
    if kv_heads >= tp:
        share = kv_heads // tp
        return range(place * share, (place + 1) * share)
    head = place // (tp // kv_heads)
    return range(head, head + 1)
