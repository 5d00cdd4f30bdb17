"""The processes of a run, as ``accelerate launch`` or ``torchrun`` started them, and what they add up.

Every process runs the same shapes on its own rows. What they agree on is summed explicitly: the losses of a shape,
because balancing needs them before the backward pass, and the gradients, once a step. (DistributedDataParallel reduces
in the backward pass of one forward pass, in which every parameter takes part; here a step has several, over different
blocks and experts.)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

MixedPrecision = Literal["no", "bf16"]
_BUCKET = 1 << 25
"""Numbers that are sent at once."""


class Processes:
    """This process among those of its run; a run of one process needs nothing to be started."""

    def __init__(self, mixed_precision: MixedPrecision, cpu: bool = False) -> None:
        """Join the processes that a launcher started, or be the only one.

        ``cpu``: stay on the CPU where a GPU is at hand.
        """
        from accelerate import Accelerator

        self.accelerator: Any = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
        self.rank, self.count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """What runs inside computes in the mixed precision asked for."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, the same in each."""
        if self.count == 1:
            return values
        found: torch.Tensor = self.accelerator.reduce(values, reduction="sum")
        return found

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum all gradients over all processes, in place; what has none in this process counts as zero."""
        if self.count == 1:
            return
        waiting: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            size += parameter.numel()
            if size >= _BUCKET:
                self._sum_in_place(waiting)
                waiting, size = [], 0
        if waiting:
            self._sum_in_place(waiting)

    def _sum_in_place(self, tensors: list[torch.Tensor]) -> None:
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the others; what comes after is this process's own."""
        self.accelerator.end_training()
