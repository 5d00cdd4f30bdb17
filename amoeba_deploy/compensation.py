"""Bias compensation: what removed channels would have added on average, as constant biases of o_proj and down_proj.

b = W[:, removed] @ mean[removed] (FLAP, arXiv 2312.11983, section 3.4), with the means of stage 1's calibration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan
from amoeba_deploy.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bias = NDArray[np.float32]


def removed_mean(weight: NDArray[np.float32], mean: NDArray[np.float32], removed: NDArray[np.bool_]) -> Bias:
    """What the removed input channels [n] add to the outputs of a weight [out, n] when they are at their means [n]."""
    found = weight[:, removed].astype(np.float64) @ mean[removed].astype(np.float64)
    return found.astype(np.float32)


def block_biases(model: ModelFolder, selection: Selection, block: BlockPlan) -> tuple[Bias, Bias]:
    """The compensating biases [hidden] of o_proj and of down_proj in one block of a plan."""
    sizes, scores = model.architecture, selection.blocks[block.index]
    heads, neurons = np.ones(sizes.heads, bool), np.ones(sizes.neurons, bool)
    heads[list(block.heads)] = False
    neurons[list(block.neurons)] = False
    name = f"model.layers.{block.index}"
    output = model.tensors.float32(f"{name}.self_attn.o_proj.weight")
    down = model.tensors.float32(f"{name}.mlp.down_proj.weight")
    attention = removed_mean(output, scores.o_proj_mean, np.repeat(heads, sizes.head_dim))
    feed_forward = removed_mean(down, scores.down_proj_mean, neurons)
    # Extraction drops the model's own bias with a whole sublayer; what that added was constant too.
    if sizes.output_bias and not block.heads:
        attention += model.tensors.float32(f"{name}.self_attn.o_proj.bias")
    if sizes.mlp_bias and not block.neurons:
        feed_forward += model.tensors.float32(f"{name}.mlp.down_proj.bias")
    return attention, feed_forward


def compensate(subnet: PreTrainedModel, model: ModelFolder, selection: Selection, plan: Plan) -> None:
    """Add a plan's compensating biases to its dense subnet as transformers loaded it, in place.

    ``model`` is the full model that the subnet was cut from, ``selection`` its selection.
    """
    import torch

    layers: Any = subnet.model.layers
    for layer, block in zip(layers, plan.blocks, strict=True):
        for linear, bias in zip(
            (layer.self_attn.o_proj, layer.mlp.down_proj), block_biases(model, selection, block), strict=True
        ):
            values = torch.from_numpy(bias).to(linear.weight.dtype)
            own = 0 if linear.bias is None else linear.bias.detach()
            linear.bias = torch.nn.Parameter(values + own, requires_grad=False)
