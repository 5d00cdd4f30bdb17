"""How important every key/value group and neuron is, from one pass over calibration text.

``flap`` (FLAP, arXiv 2312.11983): for each input channel j of o_proj and down_proj the variance ("fluctuation") of its
activation; the channel scores variance_j * sum_i W_ij^2 (WIFV). For attention that is squared, standardised over the
block's channels and averaged over a group's. A channel that hardly fluctuates could be its mean: it scores
low.

``wanda`` (Wanda, arXiv 2306.11695, in FLAP's structured form Wanda-sp): the channel scores sum_i |W_ij| * norm of its
activation; a group the sum over its channels.

``magnitude``: the Euclidean norm of all weights that go when the unit goes (q, k and v rows and o_proj columns of a
group; gate and up rows and the down column of a neuron).

``taylor`` (LLM-Pruner, arXiv 2305.11627, element-wise first order): over those same weights the sum of |weight x
gradient of the loss|.

Every method's scores are standardised within a block, groups and neurons apart, so that one threshold can be laid over
all blocks (plan.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selection import BlockScores
from amoeba_deploy.stage1.blocks import Blocks, Forward, chunks
from amoeba_deploy.stage1.calibration import Batch
from amoeba_deploy.stage1.lanes import Lanes
from amoeba_deploy.stage1.moments import Moments, Vector, merge, moments_of

if TYPE_CHECKING:
    import torch

WidthMethod = Literal["flap", "wanda", "magnitude", "taylor"]
WIDTH_METHODS: tuple[WidthMethod, ...] = get_args(WidthMethod)
Weight = Callable[[str], NDArray[np.float32]]
"""A block's matrix [out, in] by its name, such as ``mlp.down_proj``."""
GROUP_ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUP_COLUMNS, NEURON_ROWS, NEURON_COLUMNS = "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
MATRICES = (*GROUP_ROWS, GROUP_COLUMNS, *NEURON_ROWS, NEURON_COLUMNS)


@dataclass(frozen=True)
class BlockMoments:
    """Moments of the inputs of o_proj [H*h] and of down_proj [F] in one block."""

    attention: Moments
    feed_forward: Moments


def standardise(values: Vector) -> Vector:
    """Zero mean and unit variance; zeros where all values are alike."""
    spread = float(values.std())
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def flap_channels(moments: Moments, weight: NDArray[np.float32]) -> Vector:
    """WIFV of each input channel [n] from its moments and the weight [out, n] that reads it."""
    squares: Vector = np.einsum("ij,ij->j", weight, weight, dtype=np.float64)  # with no copy of the weight
    return np.asarray(moments.variance * squares)


def wanda_channels(moments: Moments, weight: NDArray[np.float32]) -> Vector:
    """Wanda-sp of each input channel [n] from its moments and the weight [out, n] that reads it."""
    scores: Vector = moments.norm * np.abs(weight).sum(axis=0, dtype=np.float64)
    return scores


def _grouped(channels: Vector, groups: int) -> Vector:
    """Channels [H*h], query heads in group order, as [groups, channels a group]."""
    return channels.reshape(groups, -1)


def activation_scores(
    method: WidthMethod, moments: BlockMoments, weight: Weight, kv_heads: int
) -> tuple[Vector, Vector]:
    """Scores of groups [G] and neurons [F] by ``flap`` or ``wanda``."""
    output, down = weight(GROUP_COLUMNS), weight(NEURON_COLUMNS)
    if method == "flap":
        channels = standardise(flap_channels(moments.attention, output) ** 2)
        return _grouped(channels, kv_heads).mean(axis=1), standardise(flap_channels(moments.feed_forward, down))
    groups = _grouped(wanda_channels(moments.attention, output), kv_heads).sum(axis=1)
    return standardise(groups), standardise(wanda_channels(moments.feed_forward, down))


def unit_sums(values: Weight, kv_heads: int) -> tuple[Vector, Vector]:
    """Sums of what belongs to each group [G] and each neuron [F], over matrices [out, in] of one number a weight."""

    def rows(name: str) -> Vector:
        return np.asarray(values(name).sum(axis=1, dtype=np.float64))

    def columns(name: str) -> Vector:
        return np.asarray(values(name).sum(axis=0, dtype=np.float64))

    heads = sum(_grouped(rows(name), kv_heads).sum(axis=1) for name in GROUP_ROWS)
    heads = heads + _grouped(columns(GROUP_COLUMNS), kv_heads).sum(axis=1)
    neurons = sum(rows(name) for name in NEURON_ROWS) + columns(NEURON_COLUMNS)
    return np.asarray(heads), np.asarray(neurons)


def magnitude_scores(weight: Weight, kv_heads: int) -> tuple[Vector, Vector]:
    """Scores of groups [G] and neurons [F] by the norm of their weights."""
    heads, neurons = unit_sums(lambda name: np.square(weight(name)), kv_heads)
    return standardise(np.sqrt(heads)), standardise(np.sqrt(neurons))


class _Watch:
    """Takes the inputs of o_proj and down_proj of one layer while it runs, each lane its own."""

    def __init__(self, layer: Any) -> None:
        self.layer: Any = layer
        self._taken = threading.local()

    def __enter__(self) -> _Watch:
        watched = {"attention": self.layer.self_attn.o_proj, "feed_forward": self.layer.mlp.down_proj}
        self._hooks = [module.register_forward_pre_hook(self._take(name)) for name, module in watched.items()]
        return self

    def _take(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            setattr(self._taken, name, inputs[0])

        return hook

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.layer = None  # a streamed block must not outlive its turn

    def moments(self, batch: Batch) -> BlockMoments:
        """Of what this lane's last run took."""
        taken = self._taken
        return BlockMoments(moments_of(batch.real(taken.attention)), moments_of(batch.real(taken.feed_forward)))


def activation_moments(
    blocks: Blocks,
    batches: Sequence[Batch],
    memory: int,
    step: Callable[[], None] = lambda: None,
    lanes: Lanes | None = None,
) -> list[list[BlockMoments]]:
    """Of every batch the moments of every block, from one forward pass of the full model; ``step`` after each batch."""
    forward = Forward(blocks, lanes=lanes)
    found: list[list[BlockMoments]] = [[] for _ in batches]
    for chunk in chunks(forward, batches, memory, 2):
        some = [batches[number] for number in chunk]
        states = forward.embed_all(some)
        for index in range(blocks.depth):
            with _Watch(blocks.block(index)) as watch:

                def one(batch: Batch, state: torch.Tensor) -> tuple[torch.Tensor, BlockMoments]:
                    return forward.run(index, state), watch.moments(batch)  # noqa: B023  # called before they change

                made = forward.lanes.map(one, some, states)
            states = [state for state, _ in made]
            for number, (_, moments) in zip(chunk, made, strict=True):
                found[number].append(moments)
        for _ in chunk:
            step()
    return found


def merge_batches(found: Sequence[Sequence[BlockMoments]]) -> list[BlockMoments]:
    """The moments of every block over all batches, merged in the order of the batches."""
    return [
        BlockMoments(merge(part.attention for part in parts), merge(part.feed_forward for part in parts))
        for parts in zip(*found, strict=True)
    ]


def block_scores(
    folder: ModelFolder,
    method: WidthMethod,
    moments: Sequence[BlockMoments],
    saliences: Sequence[tuple[Vector, Vector]] | None = None,
) -> tuple[BlockScores, ...]:
    """Scores and activation means of every block; its matrices are read from the folder, one after the other.

    ``saliences`` are the sums over groups [G] and neurons [F] of each block that ``taylor`` needs (gradients.py).
    """
    sizes: Architecture = folder.architecture
    found = []
    for index, block in enumerate(moments):

        def weight(name: str, index: int = index) -> NDArray[np.float32]:
            return folder.block_matrix(index, name)

        if method == "taylor":
            assert saliences is not None
            heads, neurons = map(standardise, saliences[index])
        elif method == "magnitude":
            heads, neurons = magnitude_scores(weight, sizes.kv_heads)
        else:
            heads, neurons = activation_scores(method, block, weight, sizes.kv_heads)
        arrays = heads, neurons, block.attention.mean, block.feed_forward.mean
        found.append(BlockScores(*(array.astype(np.float32) for array in arrays)))
    return tuple(found)
