"""The loss on answer tokens, fused with the output head: a subnet's logits never exist as a whole.

Tokens go through the head some at a time. Of each part the loss and its gradient are computed at once,

    d loss / d logits = softmax(logits) - target,

taken back through the head, and the logits are dropped; the backward pass only scales what was kept (the way of Liger
Kernel's fused linear cross-entropy, arXiv 2410.10989). The target is the next token, or a teacher's softmax at
temperature 1 (distillation, arXiv 1503.02531), or a mixture of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
"""From states [n, hidden] to logits [n, vocabulary]."""
TEACHER_BYTES = 1 << 30
"""A teacher's logits are kept up to this size, and computed again for each subnet beyond."""
_PART_TOKENS = {"cpu": 128, "cuda": 1024}
"""Positions a part: enough that reading the head's weight once a part costs little beside multiplying with it."""


class Teacher:
    """What the largest subnet predicts at the answer positions: logits [n, vocabulary], kept or computed again."""

    def __init__(self, head: Head, states: torch.Tensor, memory: int = TEACHER_BYTES) -> None:
        """A teacher of states [n, hidden], whose head stays as it is while the teacher is in use."""
        self.head, self.states, self.memory = head, states.detach(), memory
        self.kept: torch.Tensor | None = None

    def keep(self, begin: int, logits: torch.Tensor) -> None:
        """Take over logits [m, vocabulary] of the positions from ``begin`` on, if all fit."""
        count, size = len(self.states), logits.shape[-1] * logits.element_size()
        if count * size > self.memory:
            return
        if self.kept is None:
            self.kept = logits.new_empty(count, logits.shape[-1])
        self.kept[begin : begin + len(logits)] = logits.detach()

    def logits(self, begin: int, end: int) -> torch.Tensor:
        """Logits [end - begin, vocabulary] of some positions."""
        if self.kept is not None:
            return self.kept[begin:end]
        with torch.no_grad():
            return self.head(self.states[begin:end])


def answer_loss(
    head: Head,
    states: torch.Tensor,
    wanted: torch.Tensor,
    *,
    parameters: Sequence[torch.Tensor] = (),
    teacher: Teacher | None = None,
    share: float = 1.0,
    taught: Teacher | None = None,
) -> torch.Tensor:
    """The sum over answer tokens of the cross-entropy in nats, a float32 scalar.

    Args:
        head: what makes logits of states.
        states: [n, hidden], at the positions that predict an answer token.
        wanted: [n], those tokens.
        parameters: tensors of the head that are tuned themselves.
        teacher: whose predictions are learnt.
        share: of the teacher's predictions in the target; the rest is the wanted token. Without a teacher all of it is.
        taught: a teacher to be, which takes over the logits that are computed here.

    Raises:
        ValueError: there is no answer token.
    """
    if not len(wanted):
        raise ValueError("there is no answer token to learn from")
    found: torch.Tensor = _AnswerLoss.apply(  # type: ignore[no-untyped-call]
        states, head, wanted, teacher if share > 0 else None, share if teacher else 0.0, taught, *parameters
    )
    return found


class _AnswerLoss(torch.autograd.Function):
    """The loss with its gradients, computed part by part in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: Head,
        wanted: torch.Tensor,
        teacher: Teacher | None,
        share: float,
        taught: Teacher | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        need_states, need = ctx.needs_input_grad[0], list(ctx.needs_input_grad[6:])
        learns = need_states or any(need)
        tuned = [parameter for parameter, needed in zip(parameters, need, strict=True) if needed]
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states) if need_states else None
        sums = [torch.zeros_like(parameter) for parameter in tuned]
        size = _PART_TOKENS.get(states.device.type, 1024)
        for begin in range(0, len(wanted), size):
            end = min(begin + size, len(wanted))
            part = states[begin:end].detach().requires_grad_(need_states)
            with torch.set_grad_enabled(learns):
                logits = head(part)
            if taught is not None:
                taught.keep(begin, logits)
            soft = None if teacher is None else teacher.logits(begin, end)
            loss, upstream = _loss_and_gradient(logits.detach(), wanted[begin:end], soft, share, learns)
            total += loss
            if learns:
                inputs = ([part] if need_states else []) + tuned
                found = list(torch.autograd.grad(logits, inputs, upstream.to(logits.dtype)))
                if gradient is not None:
                    gradient[begin:end] = found.pop(0)
                for whole, added in zip(sums, found, strict=True):
                    whole += added
        ctx.need = need
        ctx.save_for_backward(*([] if gradient is None else [gradient]), *sums)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:  # type: ignore[override]
        kept = list(ctx.saved_tensors)
        states = kept.pop(0) * scale if ctx.needs_input_grad[0] else None
        rest = iter(kept)
        return (states, None, None, None, None, None, *(next(rest) * scale if needed else None for needed in ctx.need))


def _loss_and_gradient(
    logits: torch.Tensor, wanted: torch.Tensor, soft: torch.Tensor | None, share: float, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a part and its gradient for the logits [m, vocabulary], both in float32."""
    scores = logits.float()
    shift = torch.logsumexp(scores, -1, keepdim=True)
    loss = shift.sum() - (1 - share) * scores.gather(-1, wanted[:, None]).sum()
    target = None
    if soft is not None:
        target = torch.softmax(soft.float(), -1)
        loss = loss - share * torch.linalg.vecdot(target, scores).sum()
    if not learns:
        return loss, scores
    gradient = (scores - shift).exp_()
    if target is not None:
        gradient.add_(target, alpha=-share)
    if share < 1:
        gradient.scatter_add_(-1, wanted[:, None], gradient.new_full((len(wanted), 1), share - 1))
    return loss, gradient
