"""The loss on the answer's tokens, against the same written plainly over full logits in float32.

Both are float32 and differ only in the order of their sums, over 512 tokens of vocabulary and hundreds of positions:
TOLERANCE is some hundred roundings of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amoeba_deploy.stage2 import distillation
from amoeba_deploy.stage2.distillation import Head, Teacher, answer_loss, teacher_loss

TOLERANCE = 1e-5
HIDDEN, VOCABULARY = 48, 512
COUNTS = (1, 100, 128, 300)  # less than a chunk, one exactly, and chunks that do not divide the positions
EVERYTHING = 1 << 40


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(9))


def heads(weight: torch.Tensor) -> dict[str, Head]:
    """What families do between states and logits, the last two as Gemma 2 and Granite."""
    return {
        "linear": lambda states: states @ weight.T,
        "capped": lambda states: torch.tanh(states @ weight.T / 5) * 5,
        "divided": lambda states: (states * 1.5) @ weight.T / 3,
    }


def plain(
    head: Head, states: torch.Tensor, wanted: torch.Tensor, taught: torch.Tensor | None = None, share: float = 1.0
) -> torch.Tensor:
    """The loss as the method writes it, with the teacher's states ``taught``."""
    log_shares = torch.log_softmax(head(states).float(), dim=-1)
    hard = -log_shares[torch.arange(len(wanted)), wanted].sum()
    if taught is None:
        return hard
    soft = -(torch.softmax(head(taught).detach().float(), dim=-1) * log_shares).sum()
    return share * soft + (1 - share) * hard


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max() / wanted.detach().abs().max())


def weight_and_states(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's weight, the states of a subnet, and those of the teacher."""
    weight = numbers(VOCABULARY, HIDDEN, seed=0, scale=0.5)
    return weight, numbers(count, HIDDEN, seed=1).requires_grad_(), numbers(count, HIDDEN, seed=2)


def teacher_of(head: Head, states: torch.Tensor, memory: int = EVERYTHING) -> Teacher:
    return teacher_loss(head, states, tokens(len(states)), memory=memory)[1]


@pytest.mark.parametrize("name", ["linear", "capped", "divided"])
@pytest.mark.parametrize("share", [None, 1.0, 0.3, 0.0])
@pytest.mark.parametrize("count", COUNTS)
def test_loss_and_gradients_are_those_of_full_logits(count: int, share: float | None, name: str) -> None:
    weight, states, taught = weight_and_states(count)
    weight.requires_grad_()
    head, wanted = heads(weight)[name], tokens(count)
    teacher = None if share is None else teacher_of(head, taught)
    found = answer_loss(head, states, wanted, parameters=[weight], teacher=teacher, share=share or 0.0)
    reference = plain(head, states, wanted, None if share is None else taught, share or 0.0)
    assert found.dtype == torch.float32
    assert relative(found, reference) < TOLERANCE
    # A factor on the loss, as balancing puts there, scales the gradients.
    gradients = torch.autograd.grad(found * 0.25, [states, weight])
    for gradient, expected in zip(gradients, torch.autograd.grad(reference * 0.25, [states, weight]), strict=True):
        assert relative(gradient, expected) < TOLERANCE


@pytest.mark.parametrize("trained", ["states", "weight"])
def test_gradients_reach_what_requires_them(trained: str) -> None:
    weight, states, _ = weight_and_states(300)
    one = {"states": states, "weight": weight}[trained]
    states.requires_grad_(False)
    one.requires_grad_()
    head, wanted = heads(weight)["linear"], tokens(300)
    loss = answer_loss(head, states, wanted, parameters=[weight])
    (expected,) = torch.autograd.grad(plain(head, states, wanted), one)
    loss.backward()
    assert one.grad is not None
    assert relative(one.grad, expected) < TOLERANCE
    assert {"states": weight, "weight": states}[trained].grad is None


def test_the_largest_subnet_learns_from_the_answer() -> None:
    weight, states, _ = weight_and_states(300)
    head, wanted = heads(weight)["capped"], tokens(300)
    loss, _ = teacher_loss(head, states, wanted, memory=EVERYTHING)
    reference = plain(head, states, wanted)
    assert relative(loss, reference) < TOLERANCE
    assert relative(*(torch.autograd.grad(each, states)[0] for each in (loss, reference))) < TOLERANCE


def test_a_teacher_computes_again_what_it_has_no_memory_for() -> None:
    weight, states, taught = weight_and_states(300)
    calls = []

    def head(part: torch.Tensor) -> torch.Tensor:
        calls.append(len(part))
        return part @ weight.T

    size = 4 * 300 * VOCABULARY
    found, runs = [], []
    for memory in (size, size - 1):
        teacher = teacher_of(head, taught, memory)
        calls.clear()
        loss = answer_loss(head, states, tokens(300), teacher=teacher)
        found.append((loss.detach(), torch.autograd.grad(loss, states)[0]))
        runs.append(sum(calls))
    assert runs == [300, 600]
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def test_a_teacher_is_no_part_of_what_is_differentiated() -> None:
    weight, states, taught = weight_and_states(100)
    taught.requires_grad_()
    for memory in (0, EVERYTHING):
        teacher = teacher_of(heads(weight)["linear"], taught, memory)
        answer_loss(heads(weight)["linear"], states, tokens(100), teacher=teacher).backward()
    assert taught.grad is None


def test_softmax_stays_finite_where_logits_are_far_apart() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0], [-1e4, 1e4, 0.0]])
    found = answer_loss(lambda states: states, logits, torch.tensor([1, 0]))
    assert found == plain(lambda states: states, logits, torch.tensor([1, 0])) == 400 + 2e4


class Largest(TorchDispatchMode):
    """Sees the elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        found = function(*arguments, **(keywords or {}))
        sizes = [each.numel() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


@pytest.mark.parametrize("memory", [0, EVERYTHING])
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(memory: int) -> None:
    count = 6 * 128
    weight, states, taught = weight_and_states(count)
    head, wanted = heads(weight)["capped"], tokens(count)
    with Largest() as largest:
        loss, teacher = teacher_loss(head, taught.requires_grad_(), wanted, memory=memory)
        loss = loss + answer_loss(head, states, wanted, teacher=teacher, share=0.5)
        loss.backward()
    assert largest.elements == 128 * VOCABULARY
    assert taught.grad is not None
    assert states.grad is not None


def test_without_gradients_the_head_runs_once_and_nothing_else() -> None:
    weight, states, taught = weight_and_states(300)
    head, wanted = heads(weight)["linear"], tokens(300)
    with torch.no_grad():
        found = answer_loss(head, states, wanted, teacher=teacher_of(head, taught), share=0.3)
    unasked = answer_loss(head, states.detach(), wanted, teacher=teacher_of(head, taught), share=0.3)
    assert not found.requires_grad
    assert not unasked.requires_grad
    assert found == unasked
    assert relative(found, plain(head, states, wanted, taught, 0.3)) < TOLERANCE


@pytest.mark.parametrize("memory", [0, EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_the_head_and_nothing_else(dtype: torch.dtype, memory: int) -> None:
    weight, states, taught = weight_and_states(300)
    weight, states = weight.requires_grad_(), states.detach().to(dtype).requires_grad_()
    head, wanted = heads(weight)["capped"], tokens(300)
    with torch.autocast("cpu", torch.bfloat16):
        teacher = teacher_of(head, taught, memory)
        found = answer_loss(head, states, wanted, parameters=[weight], teacher=teacher, share=0.3)
    exact = states.detach().float().requires_grad_()
    reference = plain(head, exact, wanted, taught, 0.3)
    gradients = torch.autograd.grad(found, [states, weight])
    assert [each.dtype for each in gradients] == [dtype, torch.float32]
    assert found.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of up to 5 are off by 1/100, which averages out in the loss over all positions.
    assert relative(found, reference) < 1e-3
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, [exact, weight]), strict=True):
        assert relative(gradient, expected) < 0.03


def test_sums_over_chunks_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_POSITIONS", {"cpu": 1})
    weight, states, _ = weight_and_states(600)
    weight = weight.bfloat16().requires_grad_()
    head, wanted = heads(weight)["linear"], tokens(600)
    found = answer_loss(head, states.bfloat16(), wanted, parameters=[weight])
    (gradient,) = torch.autograd.grad(found, weight)
    exact = weight.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(plain(heads(exact)["linear"], states.bfloat16().float(), wanted), exact)
    assert gradient.dtype == torch.bfloat16
    # Each of the 600 terms is off by some 1/256 of itself; a sum kept in bfloat16 would be off by several times that.
    assert float((gradient.float() - expected).norm() / expected.norm()) < 5e-3


REFUSED: dict[str, Callable[[Head, torch.Tensor], Any]] = {
    "0 states cannot predict 0 tokens": lambda head, states: answer_loss(head, states[:0], tokens(0)),
    "3 states cannot predict 2 tokens": lambda head, states: answer_loss(head, states, tokens(2)),
    "teacher predicts 2 tokens": lambda head, states: answer_loss(
        head, states, tokens(3), teacher=teacher_of(head, states[:2])
    ),
    "share of 1.5": lambda head, states: answer_loss(head, states, tokens(3), share=1.5),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_cannot_be_computed_is_refused(match: str) -> None:
    weight, states, _ = weight_and_states(3)
    with pytest.raises(ValueError, match=match):
        REFUSED[match](heads(weight)["linear"], states)


def test_gradients_of_gradients_are_refused() -> None:
    weight, states, _ = weight_and_states(3)
    loss = answer_loss(heads(weight)["linear"], states, tokens(3)) ** 2
    (gradient,) = torch.autograd.grad(loss, states, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
