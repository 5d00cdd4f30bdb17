"""The loss of one step of in-place distillation, in chunks and written plainly: its memory and its time.

A step is the largest subnet's loss on the answer and three subnets' losses against its predictions, each forward and
backward as far as the last block's states; the head is frozen, all is float32, shapes are those of --rows. The ways:

  plain     full logits, F.cross_entropy for the teacher, -(softmax(teacher) * log_softmax(subnet)).sum() for the rest.
            It drops each tensor as soon as it can; the teacher's logits live as long as the step.
  chunks    amoeba_deploy.stage2.distillation, the teacher's logits kept.
  again     the same, the teacher's logits computed again for each subnet.

Memory is the most that a step held at once of what torch's allocator gave out within it, from torch's profiler: so
what ATen allocates inside an operation counts, the states and the head, which were there before, do not, nor does what
a matrix product packs for itself. Its limit is one tensor of logits, where the teacher's are kept.

Time is the median of interleaved repeats, and so is the ratio, of each repeat's two times. Its limit is the step's
eight matrix products alone, over all positions at once and into tensors that are there already, in the same repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from amoeba_deploy.stage2.distillation import Head, answer_loss, teacher_loss

STUDENTS = 3
TIMED = "512x32000x512,512x32000x1024,256x32000x1024"
WEIGHED = "512x128256x512"
EVERYTHING = 1 << 50

Step = Callable[[], list[float]]
"""Runs a step and gives its four losses."""


def plain_step(head: Head, states: list[torch.Tensor], wanted: torch.Tensor) -> list[float]:
    """The losses of a step over full logits."""
    logits = head(states[0])
    loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    teacher = logits.detach()
    del logits
    loss.backward()
    losses = [loss.item()]
    for each in states[1:]:
        loss = -(torch.softmax(teacher, -1) * torch.log_softmax(head(each), -1)).sum()
        loss.backward()
        losses.append(loss.item())
    return losses


def chunked_step(head: Head, states: list[torch.Tensor], wanted: torch.Tensor, memory: int) -> list[float]:
    """The losses of a step by chunks, with so many bytes for the teacher's logits."""
    loss, teacher = teacher_loss(head, states[0], wanted, memory=memory)
    loss.backward()
    losses = [loss.item()]
    for each in states[1:]:
        loss = answer_loss(head, each, wanted, teacher=teacher)
        loss.backward()
        losses.append(loss.item())
    return losses


def most_memory(step: Step) -> int:
    """The most bytes that were allocated at once within a step, beyond what there was before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        most = max(most, held)
    return most


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(positions: int, vocabulary: int, hidden: int, repeats: int) -> None:
    """Print one shape's figures; no times for no repeats."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden) / hidden**0.5
    states = [(2 * torch.randn(positions, hidden)).requires_grad_() for _ in range(1 + STUDENTS)]
    wanted = torch.randint(0, vocabulary, (positions,))

    def head(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(part, weight)

    steps: dict[str, Step] = {
        "plain": lambda: plain_step(head, states, wanted),
        "chunks": lambda: chunked_step(head, states, wanted, EVERYTHING),
        "again": lambda: chunked_step(head, states, wanted, 0),
    }
    losses = {}
    for way, step in steps.items():
        for each in states:  # gradients are there before the step, as the states are
            each.grad = torch.zeros_like(each)
        losses[way] = step()
    apart = max(abs(a / b - 1) for way in steps for a, b in zip(losses[way], losses["plain"], strict=True))
    one = 4 * positions * vocabulary
    print(f"{positions} positions, vocabulary {vocabulary}, hidden {hidden}; losses agree to {apart:.0e}")
    memory = {way: most_memory(step) for way, step in steps.items()}
    for way, most in memory.items():
        print(f"  {way:8}{most / 1e6:7.0f} MB, {most / one:.2f} of logits; plain takes {memory['plain'] / most:.2f}x")
    print(f"  limit   {one / 1e6:7.0f} MB: one tensor of logits")
    if not repeats:
        return
    logits, gradient = torch.randn(positions, vocabulary), torch.empty(positions, hidden)
    inputs = states[0].detach()

    def products() -> None:
        for _ in range(1 + STUDENTS):
            torch.mm(inputs, weight.T, out=logits)
            torch.mm(logits, weight, out=gradient)

    works: dict[str, Callable[[], object]] = {**steps, "limit": products}
    times: dict[str, list[float]] = {way: [] for way in works}
    for _ in range(repeats):
        for way, work in works.items():
            times[way].append(seconds(work))
    operations = 4 * (1 + STUDENTS) * positions * vocabulary * hidden
    for way, found in times.items():
        ratios = [mine / its for mine, its in zip(found, times["plain"], strict=True)]
        middle = statistics.median(found)
        print(
            f"  {way:8}{1000 * middle:7.0f} ms ({1000 * min(found):.0f} to {1000 * max(found):.0f}), "
            f"{statistics.median(ratios):.3f}x of plain"
            + (f": {operations / middle / 1e9:.0f} GFLOP/s in matrix products" if way == "limit" else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=TIMED, help="positions x vocabulary x hidden, separated by commas")
    parser.add_argument("--memory-rows", default=WEIGHED, help="the same, for memory alone")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for rows, repeats in ((asked.rows, asked.repeats), (asked.memory_rows, 0)):
        for row in filter(None, rows.split(",")):
            positions, vocabulary, hidden = map(int, row.split("x"))
            compare(positions, vocabulary, hidden, repeats)


if __name__ == "__main__":
    main()
