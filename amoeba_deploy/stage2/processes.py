"""The processes of a run, as ``accelerate launch`` or ``torchrun`` started them, and what they add up.

Every process runs the same shapes on its own rows. What they agree on is summed explicitly: the losses of a shape,
because balancing needs them before the backward pass, and the gradients, once a step. (DistributedDataParallel reduces
in the backward pass of one forward pass, in which every parameter takes part; here a step has several, over different
blocks and experts.)

Under ``accelerate launch --use_fsdp --fsdp_version 2`` each process holds a share of every block of the model (FSDP2)
and gathers a block while it runs; what lies outside the blocks, and the experts, is held by all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from amoeba_deploy.errors import BadInput

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

        self.accelerator: Any = Accelerator(cpu=cpu or not torch.accelerator.is_available())
        self.mixed_precision = mixed_precision
        if self.accelerator.mixed_precision not in ("no", mixed_precision):
            raise BadInput(
                f"the launcher asks for the mixed precision {self.accelerator.mixed_precision} and the command for "
                f"{mixed_precision}; give the same to both, or none to the launcher"
            )
        self.rank, self.count = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        started = os.environ.get("WORLD_SIZE", "1")
        if started != str(self.count):
            raise BadInput(
                f"{started} processes were started and accelerate has put {self.count} together; check its settings "
                f"with 'accelerate env', or start them with torchrun"
            )
        self.sharded = self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        """Whether blocks are held in shares. Read from the launcher, because accelerate ignores it on the CPU."""
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise BadInput("blocks are sharded by FSDP2 only; add --fsdp_version 2 to accelerate launch")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """What runs inside computes in the mixed precision asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, the same in each."""
        if self.count == 1:
            return values
        found: torch.Tensor = self.accelerator.reduce(values, reduction="sum")
        return found

    def shard(self, blocks: Iterable[torch.nn.Module]) -> None:
        """Leave this process its share of each block, where the launcher asked for that."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in blocks:
            # Of a block that is its own root, FSDP2 would otherwise keep all of it after a forward pass.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum all gradients over all processes, in place; what has none in this process counts as zero."""
        if self.count == 1:
            return
        waiting: list[torch.Tensor] = []
        size = 0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if isinstance(parameter.grad, DTensor):  # the mean was taken in the backward pass
                parameter.grad.mul_(self.count)
                continue
            waiting.append(parameter.grad)
            size += parameter.numel()
            if size >= _BUCKET:
                self._sum_in_place(waiting)
                waiting, size = [], 0
        if waiting:
            self._sum_in_place(waiting)

    def _sum_in_place(self, tensors: list[torch.Tensor]) -> None:
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def clip(self, parameters: Iterable[torch.nn.Parameter], limit: float) -> float:
        """Scale all gradients so that their norm together is at most ``limit``, 0 for no limit; returns what it was."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shares = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        local = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        squares = torch.nn.utils.get_total_norm(local) ** 2 if local else torch.zeros((), device=self.device)
        if shares:
            own = torch.nn.utils.get_total_norm([share.to_local() for share in shares]) ** 2
            squares = squares + self.sum(own)
        norm = math.sqrt(float(squares))
        if limit and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    def collected(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of which each process may hold a share, whole, in the first process; none in the others.

        All processes must ask for the same ones. One tensor at a time is whole in the others.
        """
        found = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
            if self.main:
                found[name] = whole
        return found

    def agree(self, value: int) -> bool:
        """Whether a number is the same in all processes."""
        every = self.sum(torch.tensor([value, value * value], device=self.device)).tolist()
        return bool(every == [value * self.count, value * value * self.count])

    def share(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's share of a whole tensor, where another like it is held in shares."""
        tensor = tensor.to(like.device)
        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor, like.device_mesh, like.placements)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the others; what comes after is this process's own."""
        self.wait()
        self.accelerator.end_training()
        if torch.distributed.is_initialized():  # also the groups of shards, whose threads would outlive the interpreter
            torch.distributed.destroy_process_group()
