"""How important every key/value group and neuron is, from one pass over calibration text (FLAP, arXiv 2312.11983).

For each input channel j of o_proj and down_proj: the mean and the variance ("fluctuation") of its activation over all
calibration tokens. A channel scores variance_j * sum_i W_ij^2 (FLAP's WIFV). For attention that score is squared,
standardised over the block's channels and averaged over the channels of a key/value group; for the feed-forward it is
standardised over the block's neurons. A channel that hardly fluctuates can be replaced by its mean, so it scores low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.selection import BlockScores

if TYPE_CHECKING:
    import torch

Vector = NDArray[np.float64]


@dataclass
class RunningMoments:
    """Mean and variance of channels [n] over batches, merged pairwise (Chan, Golub, LeVeque 1979) in float64."""

    count: int = 0
    mean: Vector = field(default_factory=lambda: np.zeros(0))
    squares: Vector = field(default_factory=lambda: np.zeros(0))

    def add(self, values: NDArray[Any]) -> None:
        """Take in a batch of samples [samples, n]."""
        batch = values.astype(np.float64, copy=False)
        mean = batch.mean(axis=0)
        squares = ((batch - mean) ** 2).sum(axis=0)
        if self.count == 0:
            self.count, self.mean, self.squares = len(batch), mean, squares
            return
        total = self.count + len(batch)
        delta = mean - self.mean
        self.squares = self.squares + squares + delta**2 * (self.count * len(batch) / total)
        self.mean = self.mean + delta * (len(batch) / total)
        self.count = total

    @property
    def variance(self) -> Vector:
        """Population variance of each channel."""
        return self.squares / self.count


def standardise(values: Vector) -> Vector:
    """Zero mean and unit variance; zeros where all values are alike."""
    spread = float(values.std())
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def channel_scores(variance: Vector, weight: NDArray[np.float32]) -> Vector:
    """WIFV of each input channel [n] from its variance [n] and the weight [out, n] that reads it."""
    scores: Vector = variance * (weight.astype(np.float64) ** 2).sum(axis=0)
    return scores


def group_scores(channels: Vector, kv_heads: int) -> Vector:
    """One score a key/value group [G] from those of o_proj's channels [H*h], query heads in group order."""
    scores: Vector = standardise(channels**2).reshape(kv_heads, -1).mean(axis=1)
    return scores


def _watch(layer: Any, attention: RunningMoments, feed_forward: RunningMoments) -> list[Any]:
    def record(moments: RunningMoments) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            moments.add(inputs[0].flatten(0, -2).float().numpy())

        return hook

    return [
        layer.self_attn.o_proj.register_forward_pre_hook(record(attention)),
        layer.mlp.down_proj.register_forward_pre_hook(record(feed_forward)),
    ]


def score_blocks(
    model: Any,
    architecture: Architecture,
    rows: torch.Tensor,
    step: Callable[[], None] | None = None,
    rows_at_once: int = 8,
) -> tuple[BlockScores, ...]:
    """Scores and activation means of every block, from one forward pass over rows of token ids [rows, length]."""
    import torch

    layers = model.model.layers
    moments = [(RunningMoments(), RunningMoments()) for _ in layers]
    hooks = [hook for layer, pair in zip(layers, moments, strict=True) for hook in _watch(layer, *pair)]
    try:
        with torch.inference_mode():
            for batch in torch.split(rows, rows_at_once):
                model.model(input_ids=batch, use_cache=False)
                if step is not None:
                    step()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(_block_scores(layer, architecture, *pair) for layer, pair in zip(layers, moments, strict=True))


def _block_scores(
    layer: Any, architecture: Architecture, attention: RunningMoments, feed_forward: RunningMoments
) -> BlockScores:
    output = layer.self_attn.o_proj.weight.detach().float().numpy()
    down = layer.mlp.down_proj.weight.detach().float().numpy()
    heads = group_scores(channel_scores(attention.variance, output), architecture.kv_heads)
    neurons = standardise(channel_scores(feed_forward.variance, down))
    return BlockScores(*(array.astype(np.float32) for array in (heads, neurons, attention.mean, feed_forward.mean)))
