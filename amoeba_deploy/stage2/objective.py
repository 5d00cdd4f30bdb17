"""The objective: in-place distillation over a sandwich of shapes, balanced by the magnitude of their losses.

The largest shape learns the answers; its predictions, detached, are what every other shape learns (in-place
distillation, arXiv 1903.05134). Each loss is rescaled to the largest shape's magnitude by a factor without gradient,
L_i * (L_largest / L_i), so that no shape's gradients drown the others' (AmoebaLLM, arXiv 2411.10606). The objective is
the mean over the shapes and over all answer tokens of a step, whichever process holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import Batch
from amoeba_deploy.stage2.distillation import Teacher, answer_loss, teacher_loss
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.processes import Processes

TEACHER_BYTES = 1 << 30
"""Of a teacher's logits that are kept; beyond, they are computed again for each shape."""


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``distillation`` is the teacher's share in what smaller shapes learn, the rest is labels."""

    distillation: float = 1.0
    balance: bool = True


def backward(
    elastic: ElasticModel,
    shapes: Sequence[Shape],
    batch: Batch,
    processes: Processes,
    objective: Objective,
    *,
    weight: float,
    count: int,
    after: Callable[[int], None] = lambda _index: None,
) -> list[float]:
    """Add one batch's gradients for all shapes, the largest first; returns each shape's mean loss in nats.

    Args:
        elastic: the model.
        shapes: the largest first.
        batch: this process's rows.
        processes: over which means are taken.
        objective: its parts.
        weight: the batch's share in the step.
        count: answer tokens of this batch over all processes.
        after: told of each shape when its gradients are there.

    A loss that is not finite adds no gradients; it and nan for the shapes behind it are returned.
    """
    head, parameters = elastic.head(), elastic.head_parameters()
    teacher: Teacher | None = None
    means: list[float] = []
    for index, shape in enumerate(shapes):
        with elastic.shape(shape):
            with processes.autocast():
                states = elastic.states(batch.ids, batch.positions).flatten(0, 1)[batch.places]
                if index == 0 and len(shapes) > 1 and objective.distillation > 0:
                    loss, teacher = teacher_loss(
                        head, states, batch.wanted, parameters=parameters, memory=TEACHER_BYTES
                    )
                else:
                    loss = answer_loss(
                        head, states, batch.wanted, parameters=parameters, teacher=teacher, share=objective.distillation
                    )
            mean = float(processes.sum(loss.detach())) / count
            means.append(mean)
            if not math.isfinite(mean):
                return means + [math.nan] * (len(shapes) - len(means))
            factor = means[0] / mean if objective.balance and mean else 1.0
            torch.autograd.backward(loss * (factor * weight / (count * len(shapes))))
        after(index)
    return means
