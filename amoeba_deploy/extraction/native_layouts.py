"""Engines' own ways to say that blocks differ, as data: what their configs call for, and the sizes to cut blocks to.

Two engines take blocks of different widths from a config. TensorRT-LLM's DeciLM lets key/value heads and neurons vary,
query heads not; llama.cpp's architecture ``deci`` lets all three vary. Where an engine cannot hold a plan's own numbers
they are padded: extraction in the ragged layout with the ``blocks`` given here is exact (cutting.block_cuts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.ragged import BlockSizes, plan_sizes
from amoeba_deploy.plan import Plan

DECI_NEURON_MULTIPLE = 256
"""Readers of ``block_configs`` round a block's neurons up to a multiple of this."""
GGUF_NEURON_MULTIPLE = 256
"""K-quants pack rows of so many; Q8_0 and Q4_0 rows of 32."""


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _divisor(heads: int, least: int) -> int:
    return next(count for count in range(least, heads + 1) if heads % count == 0)


def common_heads(kv_heads: Sequence[int], group: int) -> tuple[int, tuple[int, ...]]:
    """The cheapest number of query heads for all blocks, and of key/value heads for each, that holds every block.

    ``kv_heads`` are the blocks' own, ``group`` the query heads of each. Every block's key/value heads must divide the
    common query heads and own at least ``group`` of them; the cost counted is rows and columns of q, k, v and o.
    """
    most = max(kv_heads)
    best: tuple[int, int, tuple[int, ...]] | None = None
    # With group * most query heads and ``most`` key/value heads everywhere all blocks fit. More than ``most`` heads
    # beyond those cost more than that saves.
    for heads in range(group * most, (group + 1) * most + 1):
        counts = tuple(_divisor(heads, count) for count in kv_heads)
        if any(heads < group * count for count in counts):
            continue
        cost = 2 * (heads * len(counts) + sum(counts))
        if best is None or cost < best[0]:
            best = (cost, heads, counts)
    assert best is not None
    return best[1], best[2]


@dataclass(frozen=True)
class DeciBlocks:
    """Blocks as DeciLM takes them: as many query heads everywhere, key/value heads that divide them."""

    heads: int
    blocks: tuple[BlockSizes, ...]

    def layer_configs(self) -> list[dict[str, Any]]:
        """``layer_configs`` of a TensorRT-LLM checkpoint's config.json."""
        return [
            {
                "attention": {"impl": "attention", "num_key_value_heads": block.kv_heads}
                if block.heads
                else {"impl": "no_op", "num_key_value_heads": None},
                "ffn": {"impl": "mlp", "intermediate_size": block.neurons}
                if block.neurons
                else {"impl": "no_op", "intermediate_size": None},
            }
            for block in self.blocks
        ]

    def block_configs(self, hidden: int) -> list[dict[str, Any]]:
        """``block_configs`` of a Hugging Face config of DeciLM (``nemotron-nas``).

        A reader takes int(2 / 3 * ffn_mult * hidden) neurons, rounded up to a multiple of 256.

        Raises:
            BadInput: some neurons are not in such multiples.
        """
        uneven = [block.neurons for block in self.blocks if block.neurons % DECI_NEURON_MULTIPLE]
        if uneven:
            raise BadInput(
                f"block_configs hold neurons in multiples of {DECI_NEURON_MULTIPLE} only, and a block has {uneven[0]}"
            )
        common = {"replace_with_linear": False}
        return [
            {
                "attention": {
                    "no_op": not block.heads,
                    **common,
                    "n_heads_in_group": block.heads // block.kv_heads if block.heads else None,
                },
                "ffn": {
                    "no_op": not block.neurons,
                    **common,
                    "ffn_mult": round(1.5 * block.neurons / hidden, 6) if block.neurons else None,
                },
            }
            for block in self.blocks
        ]


def deci_blocks(plan: Plan, architecture: Architecture, multiple: int = 1) -> DeciBlocks:
    """A plan's blocks in DeciLM's form, neurons padded to multiples; a sublayer that is not kept costs nothing.

    Raises:
        BadInput: heads would have to be padded under norms that span them all, which changes what they give.
    """
    own = plan_sizes(plan)
    attending = [block.kv_heads for block in own if block.heads]
    heads, counts = common_heads(attending, architecture.group)
    if architecture.head_rule == "all" and (heads, set(counts)) != (architecture.heads, {architecture.kv_heads}):
        raise BadInput(f"the norms of a {architecture.family} span all heads of a block, so none can be padded")
    kv_heads = iter(counts)
    return DeciBlocks(
        heads,
        tuple(
            BlockSizes(heads if b.heads else 0, next(kv_heads) if b.heads else 0, _padded(b.neurons, multiple))
            for b in own
        ),
    )


@dataclass(frozen=True)
class GgufArrays:
    """Blocks as llama.cpp's ``deci`` takes them: values of its per-layer keys, named like those after ``deci.``."""

    blocks: tuple[BlockSizes, ...]

    def arrays(self) -> dict[str, list[int]]:
        """The per-layer arrays."""
        return {
            "attention.head_count": [block.heads for block in self.blocks],
            "attention.head_count_kv": [block.kv_heads for block in self.blocks],
            "feed_forward_length": [block.neurons for block in self.blocks],
        }


def gguf_arrays(plan: Plan, multiple: int = GGUF_NEURON_MULTIPLE) -> GgufArrays:
    """A plan's blocks in ``deci``'s form, neurons padded to multiples, at least one.

    llama.cpp drops the attention too where a layer has no feed-forward, so such a block keeps one multiple of zeros.
    """
    return GgufArrays(
        tuple(BlockSizes(b.heads, b.kv_heads, max(_padded(b.neurons, multiple), multiple)) for b in plan_sizes(plan))
    )
