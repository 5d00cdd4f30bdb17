"""The training loop: sandwich steps over an elastic model, whose every number follows from the settings and the step.

Which rows and shapes a step takes, and the gate's noise, depend on the seed and the step alone; the state of a run is
what it tunes, the optimiser's moments and the number of the step. So a run that is resumed goes on bit for bit, and
all processes do the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from amoeba_deploy.errors import BadInput
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import Batches
from amoeba_deploy.stage2.conflicts import Combination, Projected, Summed
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.objective import Objective, backward
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.sandwich import Space, sandwich
from amoeba_deploy.stage2.settings import Settings

Tensors = dict[str, torch.Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Step:
    """What a step did: each shape's mean loss in nats an answer token, the largest first, and how it went."""

    number: int
    """Steps done, this one included."""
    losses: Mapping[Shape, float]
    rate: float
    gradient_norm: float
    tokens: int
    """Token positions of all its rows, over all processes."""
    seconds: float


class Diverged(BadInput):
    """A loss was not finite."""


class Trainer:
    """One run: the elastic model, what is tuned of it, and the optimiser."""

    def __init__(
        self,
        elastic: ElasticModel,
        parameters: Mapping[str, torch.nn.Parameter],
        batches: Batches,
        space: Space,
        settings: Settings,
        processes: Processes,
    ) -> None:
        """Prepare a run that tunes the named ``parameters`` of ``elastic``."""
        self.elastic, self.parameters, self.batches = elastic.train(), dict(parameters), batches
        self.space, self.settings, self.processes = space, settings, processes
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            weight_decay=0.0,
            foreach=False if processes.sharded else None,  # shares and whole tensors cannot be updated together
        )
        self.objective = Objective(settings.distillation, settings.balance)
        self.done = 0

    def shapes(self, step: int) -> list[Shape]:
        """The shapes of a step, the largest first; a single one where one alone is tuned."""
        return sandwich(self.space, self.settings.random_shapes, self.settings.seed, step)

    def run(self, steps: int) -> Iterator[Step]:
        """Do the steps up to number ``steps``, one at a time.

        Raises:
            Diverged: a loss is not finite; nothing was changed by that step.
        """
        while self.done < steps:
            yield self.step()

    def step(self) -> Step:
        """Do one step."""
        began, settings, number = time.perf_counter(), self.settings, self.done
        rate = settings.rate(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        shapes = self.shapes(number)
        combination = self._combination(number)
        losses, tokens = self._gradients(number, shapes, combination)
        for shape, loss in zip(shapes, losses, strict=True):
            if not math.isfinite(loss):
                self.optimiser.zero_grad(set_to_none=True)
                raise Diverged(f"the loss of {shape} in step {number + 1} is not finite")
        combination.finish()
        norm = self.processes.clip(self.parameters.values(), settings.clip)
        if not math.isfinite(norm):
            self.optimiser.zero_grad(set_to_none=True)
            raise Diverged(f"the gradient of step {number + 1} is not finite, its losses are")
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        by_shape = dict(zip(shapes, losses, strict=True))
        return Step(self.done, by_shape, rate, norm, tokens, time.perf_counter() - began)

    def _combination(self, number: int) -> Combination:
        parameters = list(self.parameters.values())
        if self.settings.conflicts == "project":
            return Projected(parameters, self.processes, self.settings.seed * 1_000_003 + number)
        return Summed(parameters, self.processes)

    def _gradients(self, number: int, shapes: Sequence[Shape], combination: Combination) -> tuple[list[float], int]:
        """Gradients of a step's batches; each shape's mean loss over all their answer tokens, and how many tokens."""
        settings, processes = self.settings, self.processes
        self.elastic.noise = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        first = number * settings.accumulate
        found = [
            self.batches.share(first + place, processes.rank, processes.count) for place in range(settings.accumulate)
        ]
        sizes = torch.tensor([[len(batch.wanted), batch.ids.numel()] for batch in found], device=processes.device)
        answers, tokens = processes.sum(sizes).t().tolist()
        losses = [0.0] * len(shapes)
        for batch, count in zip(found, answers, strict=True):
            share = count / sum(answers)
            means = backward(
                self.elastic,
                shapes,
                batch.to(processes.device),
                processes,
                self.objective,
                weight=share,
                count=count,
                after=combination.after,
            )
            losses = [loss + share * mean for loss, mean in zip(losses, means, strict=True)]
            if not all(map(math.isfinite, losses)):
                break
        return losses, int(sum(tokens))

    def state(self) -> Tensors:
        """All that a run needs to go on, by name; all processes must ask for it together, the first one gets it."""
        found: Tensors = {}
        for name, parameter in self.parameters.items():
            found[name] = parameter.detach()
            # What no shape has used yet has no moments.
            found |= {f"{moment}:{name}": value for moment, value in self.optimiser.state.get(parameter, {}).items()}
        return self.processes.collected(found)

    def load(self, done: int, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``state`` gave after so many steps."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.processes.share(state[name], parameter))
                saved = {moment: state[f"{moment}:{name}"] for moment in _MOMENTS if f"{moment}:{name}" in state}
                if saved:
                    self.optimiser.state[parameter] = {
                        # The count of steps is on the CPU, where torch keeps it unless the update is fused.
                        moment: value.clone() if moment == "step" else self.processes.share(value, parameter)
                        for moment, value in saved.items()
                    }
        self.done = done
