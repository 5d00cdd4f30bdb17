"""Bias compensation: what removed channels would have added on average, as constant biases of o_proj and down_proj.

b = W[:, removed] @ mean[removed] (FLAP, arXiv 2312.11983, section 3.4), with the means of stage 1's calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.extraction.cutting import LowRank, times_vector
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan
from amoeba_deploy.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bias = NDArray[np.float32]
LowRanks = Callable[[int, str], LowRank | None]
"""For a block of the full model and a matrix of it what tuning added."""
Biases = Callable[[BlockPlan], tuple[Bias, Bias]]
"""For a block of a plan the compensating biases [hidden] of o_proj and down_proj."""


def removed_mean(mean: NDArray[np.float32], kept: tuple[int, ...], size: int) -> NDArray[np.float32]:
    """The means [units * size] of input channels with those of the kept units, each of ``size`` channels, at zero."""
    found = mean.reshape(-1, size).copy()
    found[list(kept)] = 0
    return found.reshape(-1)


def block_biases(
    model: ModelFolder, selection: Selection, block: BlockPlan, low_rank: LowRanks = lambda _block, _matrix: None
) -> tuple[Bias, Bias]:
    """The compensating biases [hidden] of o_proj and of down_proj in one block of a plan.

    ``low_rank`` gives what tuning added to a matrix of a block: the bias is of the tuned weights.
    """
    sizes, scores = model.architecture, selection.blocks[block.index]
    name = f"model.layers.{block.index}"

    def added(matrix: str, mean: NDArray[np.float32], kept: tuple[int, ...], size: int) -> Bias:
        removed = removed_mean(mean, kept, size)
        return times_vector(model.tensors, f"{name}.{matrix}.weight", removed, low_rank(block.index, matrix))

    attention = added("self_attn.o_proj", scores.o_proj_mean, block.heads, sizes.head_dim)
    feed_forward = added("mlp.down_proj", scores.down_proj_mean, block.neurons, 1)
    return with_own_biases(model, block, attention, feed_forward)


def with_own_biases(model: ModelFolder, block: BlockPlan, attention: Bias, feed_forward: Bias) -> tuple[Bias, Bias]:
    """Compensating biases of a block, and the model's own where a whole sublayer is gone.

    Extraction drops the model's own bias with it; what that added was constant too.
    """
    sizes, name = model.architecture, f"model.layers.{block.index}"
    if sizes.output_bias and not block.heads:
        attention = attention + model.tensors.float32(f"{name}.self_attn.o_proj.bias")
    if sizes.mlp_bias and not block.neurons:
        feed_forward = feed_forward + model.tensors.float32(f"{name}.mlp.down_proj.bias")
    return attention, feed_forward


def compensate(subnet: PreTrainedModel, plan: Plan, biases: Biases, factor: float = 1.0) -> None:
    """Add a plan's compensating biases to its dense subnet as transformers loaded it, in place.

    ``factor`` is 1 to add them and -1 to take them away again.
    """
    import torch

    layers: Any = subnet.model.layers
    for layer, block in zip(layers, plan.blocks, strict=True):
        for linear, bias in zip((layer.self_attn.o_proj, layer.mlp.down_proj), biases(block), strict=True):
            values = torch.from_numpy(factor * bias).to(subnet.dtype)
            own = 0 if linear.bias is None else linear.bias.detach()
            linear.bias = torch.nn.Parameter(values + own, requires_grad=False)
