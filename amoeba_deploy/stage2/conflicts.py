"""What becomes of shapes' gradients that point against each other.

``sum`` adds them up. ``project`` takes from each shape's gradient what points against another shape's, one after the
other in random order, before they are added (PCGrad, arXiv 2001.06782, algorithm 1). That holds one gradient a shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from amoeba_deploy.stage2.processes import Processes

Parameters = Sequence[torch.nn.Parameter]


class Combination(Protocol):
    """How the gradients of a step's shapes become one."""

    def after(self, shape: int) -> None:
        """Take note that the gradients of a shape, by its number in the step, were added to the parameters'."""
        ...

    def finish(self) -> None:
        """Leave the step's gradients, over all processes, in the parameters."""
        ...


class Summed:
    """Gradients added up as they come."""

    def __init__(self, parameters: Parameters, processes: Processes) -> None:
        self.parameters, self.processes = parameters, processes

    def after(self, shape: int) -> None:
        """Nothing: they are added already."""

    def finish(self) -> None:
        """Add up over all processes."""
        self.processes.sum_gradients(self.parameters)


class Projected:
    """Each shape's gradients without what points against another shape's."""

    def __init__(self, parameters: Parameters, processes: Processes, seed: int) -> None:
        """``seed`` decides in which order conflicts are taken away."""
        self.parameters, self.processes, self.seed = parameters, processes, seed
        self.found: dict[int, torch.Tensor] = {}

    def after(self, shape: int) -> None:
        """Move the gradients to the shape's own."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        self.found[shape] = self.found[shape] + flat if shape in self.found else flat
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self) -> None:
        """Project and add up."""
        whole = [self.processes.sum(self.found[shape]) for shape in sorted(self.found)]
        total = torch.zeros_like(whole[0])
        for kept in project(whole, random.Random(f"conflicts/{self.seed}")):
            total += kept
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, torch.split(total, sizes), strict=True):
            parameter.grad = part.view_as(parameter).clone()


def project(gradients: Sequence[torch.Tensor], rng: random.Random) -> Iterator[torch.Tensor]:
    """Each of several gradients [n] in turn, less its part against each other one, taken in random order."""
    norms = [float(gradient @ gradient) for gradient in gradients]
    for index, gradient in enumerate(gradients):
        kept, others = gradient.clone(), [other for other in range(len(gradients)) if other != index]
        rng.shuffle(others)
        for other in others:
            against = float(kept @ gradients[other])
            if against < 0 and norms[other]:
                kept -= against / norms[other] * gradients[other]
        yield kept
