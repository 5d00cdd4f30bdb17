"""The loss of a subnet on the answer's tokens, and its derivative, a few positions at a time.

The largest subnet learns from the answer itself (``teacher_loss``), every other one from the largest one's
predictions (``answer_loss``): cross-entropy against ``share`` of the teacher's softmax, at temperature 1, and the rest
on the wanted token. Source: AmoebaLLM (arXiv 2411.10606), in-place distillation; the authors' code has ``share`` = 1.

Written plainly, this holds four tensors or more of positions x vocabulary at once. Here logits exist for one chunk of
positions: a forward pass computes the loss of a chunk, its derivative by the logits (softmax - target) and, through
whatever the head does, that by the states; what is left for the backward pass is a product. The one thing of full size
is the teacher's logits, and these are given up for a second run of the head where memory is short.

Softmax and sums are float32, whatever the logits are. Everything runs under the caller's autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits [m, vocabulary] from the last block's states [m, hidden]."""

# Each chunk reads the whole head, so what counts is how many positions share that read, not the bytes of their logits.
# On two Zen 5 cores at 32000 x 512, float32, the head and its derivative take 1.1x the time of one chunk with 128
# positions, 1.25x with 64 and 1.6x with 32; softmax takes a fiftieth of it, in cache or not. An accelerator does some
# hundred operations in the time in which it reads a byte, and so needs more (from its data sheets, not measured).
_POSITIONS = {"cpu": 128}
_POSITIONS_ELSEWHERE = 1024


class Teacher:
    """Predictions of the largest subnet at the positions that predict an answer's tokens; ``teacher_loss`` makes it.

    It keeps the states [n, hidden], and the logits too, in the dtype in which the head gave them, if they fit in
    ``memory`` bytes. If not, the head computes them again, so its weights and the autocast around it must be the same
    until the teacher is dropped: that is, within a step.
    """

    def __init__(self, head: Head, states: torch.Tensor, memory: int) -> None:
        self.head, self.memory = head, memory
        self.count = len(states)
        self._states = _split(states.detach())
        self._kept: list[torch.Tensor] = []

    def see(self, logits: torch.Tensor) -> None:
        """Take the logits of the next chunk, before anybody asks for them."""
        if self.count * logits.shape[1] * logits.element_size() <= self.memory:
            self._kept.append(logits)

    def logits(self, chunk: int) -> torch.Tensor:
        """Logits [m, vocabulary] of one chunk, without history."""
        if self._kept:
            return self._kept[chunk]
        with torch.no_grad():
            return self.head(self._states[chunk])


def teacher_loss(
    head: Head, states: torch.Tensor, wanted: torch.Tensor, *, parameters: Sequence[torch.Tensor] = (), memory: int
) -> tuple[torch.Tensor, Teacher]:
    """``answer_loss`` of the largest subnet, against the wanted tokens, and the teacher of the others.

    ``memory`` is how many bytes the teacher may keep of logits; 0 keeps none.
    """
    teacher = Teacher(head, states, memory)
    return _loss(head, states, wanted, parameters, seen=teacher.see), teacher


def answer_loss(
    head: Head,
    states: torch.Tensor,
    wanted: torch.Tensor,
    *,
    parameters: Sequence[torch.Tensor] = (),
    teacher: Teacher | None = None,
    share: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy in nats of a subnet, summed over n positions: a float32 scalar that can be differentiated once.

    ``states`` [n, hidden] are the last block's at the positions that predict the tokens ``wanted`` [n]. The target is
    ``share`` (0 to 1) of the teacher's softmax and 1 - ``share`` of the wanted token; without a teacher it is the
    wanted token. Gradients reach ``states`` and ``parameters``, which are tensors that the head computes with, as far
    as they require any.

    Raises ValueError for no positions, for counts that differ, and for a share out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} of the target is not between 0 and 1")
    if teacher is not None and teacher.count != len(states):
        raise ValueError(f"the teacher predicts {teacher.count} tokens and the subnet {len(states)}")
    return _loss(head, states, wanted, parameters, teacher=teacher, share=share)


def _loss(
    head: Head,
    states: torch.Tensor,
    wanted: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    *,
    teacher: Teacher | None = None,
    share: float = 0.0,
    seen: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """``answer_loss``; ``seen`` is called with the logits of each chunk."""
    if not len(states) or len(states) != len(wanted):
        raise ValueError(f"{len(states)} states cannot predict {len(wanted)} tokens: one or more of each are needed")
    inputs = [each for each in (states, *parameters) if each.requires_grad] if torch.is_grad_enabled() else []
    by_states = any(each is states for each in inputs)
    trained = inputs[1:] if by_states else inputs
    state_gradients: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    losses = []
    for chunk, (part, targets) in enumerate(zip(_split(states.detach()), _split(wanted), strict=True)):
        part.requires_grad_(by_states)
        logits = head(part)
        loss, gradient = _cross_entropy(
            logits.detach(), targets, teacher.logits(chunk) if teacher and share else None, share, bool(inputs)
        )
        losses.append(loss)
        if seen:
            seen(logits.detach())
        if gradient is None:
            continue
        found = torch.autograd.grad(logits, [part, *trained] if by_states else trained, gradient.to(logits.dtype))
        del logits, gradient  # before the next chunk's are made
        state_gradients += found[:by_states]
        _add(sums, found[by_states:])
    total = torch.stack(losses).sum()
    if not inputs:
        return total
    gradients = [torch.cat(state_gradients)] if by_states else []
    gradients += [each.to(like.dtype) for each, like in zip(sums, trained, strict=True)]
    with_history: torch.Tensor = _Known.apply(total, gradients, *inputs)  # type: ignore[no-untyped-call]
    return with_history


def _cross_entropy(
    logits: torch.Tensor, wanted: torch.Tensor, teacher: torch.Tensor | None, share: float, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of logits [m, vocabulary], and its derivative by them in float32 if asked for."""
    values = torch.softmax(logits, dim=-1, dtype=torch.float32)
    # log(sum(exp(logits))), read where the softmax is largest: exact, and cheaper than computing it beside the softmax.
    normaliser = logits.amax(dim=-1).float() - values.amax(dim=-1).log()
    loss = normaliser.sum()
    hard = 1.0 if teacher is None else 1.0 - share
    if hard:
        places = wanted[:, None]
        loss = loss - hard * logits.gather(1, places).float().sum()
        if differentiate:
            values.scatter_add_(1, places, values.new_full(places.shape, -hard))
    if teacher is not None:
        # By quarters: beside the kept logits, those of the chunk and their derivative, a whole one more would count.
        for taught, own, value in zip(teacher.chunk(4), logits.chunk(4), values.chunk(4), strict=True):
            soft = torch.softmax(taught, dim=-1, dtype=torch.float32)
            if differentiate:
                value.sub_(soft, alpha=share)
            loss = loss - share * soft.mul_(own).sum()
            del soft
    return loss, values if differentiate else None


def _add(sums: list[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Add gradients to their sums, which are float32: bfloat16 loses what one chunk adds to many."""
    if not sums:
        sums += [each.float() for each in gradients]
        return
    for total, gradient in zip(sums, gradients, strict=True):
        total += gradient


def _split(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Chunks along the first axis, alike to within one: a short last one would read the whole head for itself."""
    most = _POSITIONS.get(tensor.device.type, _POSITIONS_ELSEWHERE)
    return list(torch.tensor_split(tensor, max(1, -(-len(tensor) // most))))


class _Known(torch.autograd.Function):
    """A loss whose gradients by its inputs are known already."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *_: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient * factor for gradient in ctx.saved_tensors)
