"""The ways to choose blocks that the paper compares the dynamic programming against.

* ``shortened-ppl`` and ``shortened-taylor`` (Shortened LLaMA, arXiv 2402.02834): every block gets one importance, and
  the least important ones go, all at once. The importance is the metric without that block, or the sum over its
  weights of |weight x gradient of the loss|. That paper's rule for Taylor, never to remove the first four and the last
  two blocks, is not applied: ``--keep-last`` says what is never removed.
* ``angular`` ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887): the run of m neighbouring
  blocks goes whose input and output states at each row's last token have the smallest mean angle, arccos(cosine) / pi.
* ``first``: the first blocks stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amoeba_deploy.stage1.blocks import Blocks, Forward, chunks
from amoeba_deploy.stage1.calibration import Batch
from amoeba_deploy.stage1.depth import check_finite
from amoeba_deploy.stage1.removal import Removed, Remover, Trial, total

if TYPE_CHECKING:
    import torch


def least_important(importance: Sequence[float], removals: int) -> list[Removed]:
    """For m = 0 .. removals the m units of least importance; of equals the later ones go, so that the lower is kept."""
    order = sorted(range(len(importance)), key=lambda unit: (importance[unit], -unit))
    return [tuple(sorted(order[:m])) for m in range(removals + 1)]


def single_removals(remover: Remover, candidates: int) -> list[float]:
    """The metric's sum without each single candidate; raises BadInput where one is not finite."""
    trials = [Trial((unit,)) for unit in range(candidates)]
    found = [total(costs) for costs in remover.costs(0, trials)]
    for trial, cost in zip(trials, found, strict=True):
        check_finite(trial.removed, cost, "block")
    return found


def first_blocks(candidates: int, removals: int) -> list[Removed]:
    """For m = 0 .. removals the last m candidates."""
    return [tuple(range(candidates - m, candidates)) for m in range(removals + 1)]


def _last_states(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    import torch

    rows = torch.arange(len(batch.lengths))
    return states[rows, torch.tensor(batch.lengths) - 1].double()


def last_token_states(blocks: Blocks, batches: Sequence[Batch], memory: int) -> list[torch.Tensor]:
    """The state [rows, hidden] of each row's last token in front of every block, and behind the last."""
    import torch

    forward = Forward(blocks)
    found: list[list[torch.Tensor]] = [[] for _ in range(blocks.depth + 1)]
    for chunk in chunks(forward, batches, memory, 2):
        states = forward.embed_all([batches[number] for number in chunk])
        for unit in range(blocks.depth + 1):
            found[unit] += [_last_states(s, batches[n]) for s, n in zip(states, chunk, strict=True)]
            if unit < blocks.depth:
                states = forward.run_all(unit, states)
    return [torch.cat(parts) for parts in found]


def angular_distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean over rows of arccos(cosine of the two states [rows, hidden]) / pi, in [0, 1]."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return float(torch.arccos(cosine).mean()) / math.pi


def nearest_runs(states: Sequence[torch.Tensor], candidates: int, removals: int) -> list[Removed]:
    """For m = 0 .. removals the run of m candidates with the smallest angular distance; the later one of equals."""
    found: list[Removed] = [()]
    for m in range(1, removals + 1):
        distances = [(angular_distance(states[i], states[i + m]), -i) for i in range(candidates - m + 1)]
        begin = -min(distances)[1]
        found.append(tuple(range(begin, begin + m)))
    return found
