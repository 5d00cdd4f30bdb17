"""Which blocks to keep at every depth, by dynamic programming over single blocks (AmoebaLLM, section 3.2).

Cell (n, m) holds the best choice that removes m blocks among the n *last* candidate blocks, all earlier ones kept:

    cell(n, m) = the better of   cell(n-1, m)                       the n-th candidate stays
                                 cell(n-1, m-1) plus the n-th one   measured by running the shrunken model

A tie keeps the first. The last ``keep_last`` blocks are never candidates. Each cell is measured by the loss of the
remaining blocks on calibration text. In cell (n, m) everything before the n-th candidate is the untouched model, so
its hidden states are computed once for all cells and each measurement starts from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.selection import DepthChoice

if TYPE_CHECKING:
    import torch

Measure = Callable[[int, tuple[int, ...]], float]
"""(boundary, removed) -> loss: all blocks before ``boundary`` are kept; ``removed`` lie at or after it."""


def cells(blocks: int, removals: int, keep_last: int) -> list[tuple[int, int]]:
    """All (n, m) whose second option is measured, in the order in which they are filled."""
    candidates = blocks - keep_last
    return [(n, m) for n in range(1, candidates + 1) for m in range(1, min(n, removals) + 1)]


def choose_blocks(
    blocks: int,
    removals: int,
    keep_last: int,
    full_loss: float,
    measure: Measure,
    step: Callable[[], None] | None = None,
) -> dict[int, DepthChoice]:
    """The kept blocks for every depth from ``blocks`` down to ``blocks - removals``.

    Raises:
        BadInput: more blocks are to be removed than there are candidates, or a loss is not finite.
    """
    if not 0 <= removals <= blocks - keep_last or keep_last < 0:
        raise BadInput(
            f"{removals} of {blocks} blocks cannot be removed while the last {keep_last} are kept; raise --min-depth"
        )
    best: dict[tuple[int, int], tuple[tuple[int, ...], float]] = {(0, 0): ((), full_loss)}
    for n, m in cells(blocks, removals, keep_last):
        boundary = blocks - keep_last - n
        best[n, 0] = ((), full_loss)
        kept = best.get((n - 1, m))
        removed = (boundary, *best[n - 1, m - 1][0])
        loss = measure(boundary, removed)
        if not math.isfinite(loss):
            raise BadInput(f"the model without blocks {list(removed)} gives logits that are not finite")
        best[n, m] = kept if kept is not None and kept[1] <= loss else (removed, loss)
        if step is not None:
            step()
    last = blocks - keep_last
    table = {m: best[last, m] if last else ((), full_loss) for m in range(removals + 1)}
    return {
        blocks - m: DepthChoice(tuple(i for i in range(blocks) if i not in removed), loss)
        for m, (removed, loss) in table.items()
    }


class BlockRunner:
    """Runs chosen blocks of a stock transformers model over fixed calibration rows [rows, length]."""

    def __init__(self, model: Any, rows: torch.Tensor, rows_at_once: int = 16) -> None:
        import torch

        self.model, self.rows = model.model, rows
        self.head = model.lm_head
        self.batches = torch.split(rows, rows_at_once)
        length = rows.shape[1]
        self.positions = torch.arange(length)[None]
        self.evaluations = 0
        self._boundary = 0
        with torch.inference_mode():
            self._states = [self.model.embed_tokens(batch) for batch in self.batches]
            self._rotary = self.model.rotary_emb(self._states[0], self.positions)

    def _run(self, state: torch.Tensor, index: int) -> torch.Tensor:
        output = self.model.layers[index](
            state, attention_mask=None, position_ids=self.positions, position_embeddings=self._rotary
        )
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def _states_at(self, boundary: int) -> list[torch.Tensor]:
        """Hidden states of the untouched model in front of a block."""
        if boundary < self._boundary:
            self._boundary, self._states = 0, [self.model.embed_tokens(batch) for batch in self.batches]
        for index in range(self._boundary, boundary):
            self._states = [self._run(state, index) for state in self._states]
            self.evaluations += 1
        self._boundary = boundary
        return self._states

    def loss(self, boundary: int, removed: tuple[int, ...]) -> float:
        """Mean next-token loss in nats with all blocks but ``removed``, none of which lies before ``boundary``."""
        import torch

        kept = [index for index in range(boundary, len(self.model.layers)) if index not in removed]
        total = 0.0
        with torch.inference_mode():
            for state, batch in zip(self._states_at(boundary), self.batches, strict=True):
                for index in kept:
                    state = self._run(state, index)
                logits = self.head(self.model.norm(state))[:, :-1].float()
                wanted = batch[:, 1:].flatten()
                total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
        self.evaluations += len(kept)
        return total / (self.rows.shape[0] * (self.rows.shape[1] - 1))
