"""First-order Taylor salience of weights, |weight x gradient of the loss|, one block at a time.

The gradient walks from the head back through the blocks: each block is run again from the states in front of it and
differentiated, so that one block's graph and gradients are in memory at a time, and a model streamed from disk works
like one in memory. The gradients are those of the whole model's mean loss over all calibration batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families import family_of
from amoeba_deploy.stage1.blocks import Blocks, Forward, chunks
from amoeba_deploy.stage1.calibration import Batch
from amoeba_deploy.stage1.importance import MATRICES, unit_sums
from amoeba_deploy.stage1.moments import Vector
from amoeba_deploy.stage1.states import BoundaryStates

if TYPE_CHECKING:
    import torch


def _head_gradients(
    forward: Forward, states: BoundaryStates, batches: Sequence[Batch], limit: int
) -> list[torch.Tensor]:
    """Gradients of the mean loss at the last block's output, one [rows, length, hidden] a batch."""
    import torch

    count = sum(batch.count for batch in batches)
    found: list[torch.Tensor] = []
    for chunk in chunks(forward, batches, limit, 2):
        ends = states.at(forward.count, chunk)
        head = forward.blocks.head()
        for state, number in zip(ends, chunk, strict=True):
            leaf = state.detach().requires_grad_()
            loss = -forward.log_likelihood(head, batches[number], leaf).sum() / count
            torch.autograd.backward(loss)
            assert leaf.grad is not None
            found.append(leaf.grad)
    return found


def _matrices(layer: Any, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    return {name: layer.get_parameter(name) for name in names}


def _block_gradients(
    forward: Forward,
    index: int,
    names: Sequence[str],
    inputs: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor],
    gradients: dict[str, torch.Tensor],
) -> list[torch.Tensor]:
    """Adds one block's weight gradients to ``gradients``; returns those at its input."""
    import torch

    weights = _matrices(forward.blocks.block(index), names)
    for parameter in weights.values():
        parameter.requires_grad_(True)
    found = []
    for state, gradient in zip(inputs, upstream, strict=True):
        leaf = state.detach().requires_grad_()
        torch.autograd.backward(forward.run(index, leaf), gradient)
        assert leaf.grad is not None
        found.append(leaf.grad)
    for name, parameter in weights.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad if name not in gradients else gradients[name].add_(parameter.grad)
        parameter.grad = None
        parameter.requires_grad_(False)
    return found


def taylor_saliences(
    blocks: Blocks,
    batches: Sequence[Batch],
    architecture: Architecture,
    memory: int,
    step: Callable[[], None] = lambda: None,
) -> list[tuple[Vector, Vector]]:
    """Of every block the sums of |weight x gradient| over groups [G] and neurons [F]; ``step`` after each block.

    Their sum over a block is the block's own importance (Shortened LLaMA, arXiv 2402.02834, section 3.2). Held in
    memory are one block with its gradients, the states that ``memory`` bytes allow, and one gradient a state.
    """
    family = family_of({"model_type": architecture.family})
    rows = {name: family.matrix_rows(architecture, name) for name in MATRICES}
    names = sorted({tensor for tensor, _ in rows.values()})  # fewer than matrices where some are fused
    forward = Forward(blocks)
    states = BoundaryStates(forward, batches, memory)
    upstream = _head_gradients(forward, states, batches, memory)
    found: list[tuple[Vector, Vector]] = []
    for index in reversed(range(blocks.depth)):
        gradients: dict[str, torch.Tensor] = {}
        for chunk in chunks(forward, batches, memory, 2):
            inputs = states.at(index, chunk)
            part = upstream[chunk.start : chunk.stop]
            upstream[chunk.start : chunk.stop] = _block_gradients(forward, index, names, inputs, part, gradients)
        weights = _matrices(blocks.block(index), names)
        whole = {name: (weights[name].detach() * gradients[name]).abs().numpy() for name in names}
        salience = {name: whole[tensor][part] for name, (tensor, part) in rows.items()}
        found.append(unit_sums(salience.__getitem__, architecture.kv_heads))
        step()
    return found[::-1]
