"""The surrogate loss: the whole model's, and for each block the rise that its option causes when it alone takes it.

loss(plan) = loss(whole) + sum over blocks of rise(block, option), each rise measured on calibration text; the
decomposition by which Puzzle scores replacements of blocks (Bercovich et al., arXiv 2411.19146, section 4). It leaves
out what blocks do to each other, so the loss of a chosen plan is measured in the end.

Everything runs in float32 on the weights that extraction writes, rounded to the model's own dtype as there. Blocks are
walked from first to last: all options of a block start from the same states, those behind the whole blocks in front of
it, and only what follows is run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, Ids, file_digest, text_loss, text_rows, torch_logits
from amoeba_deploy.extraction.folder import Learnt, extract, model_dtype, subnet_tensors
from amoeba_deploy.files import cache_folder, json_text, read_json, whole_file
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.per_block.options import BlockOption, one_block, options_width
from amoeba_deploy.per_block.problem import Floats
from amoeba_deploy.plan import Plan
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import CONFIG_DTYPES, NUMPY_OF, Span, TensorSource, as_float32

if TYPE_CHECKING:
    import torch

    from amoeba_deploy.stage1.blocks import Forward
    from amoeba_deploy.stage1.calibration import Batch

RISES_FORMAT = "amoeba.block-rises/1"
ROWS = 16
"""Rows of calibration text, where nothing else is said and the text has as many."""
STATE_BYTES = 10**9
"""Hidden states of options of one block that are run together."""


@dataclass(frozen=True)
class Rises:
    """The whole model's loss, and what each option of each block adds to it when that block alone takes it.

    ``losses`` [blocks, options] are the measured losses, in nats a predicted token.
    """

    options: tuple[BlockOption, ...]
    whole: float
    losses: Floats
    facts: dict[str, Any]
    """The text's name and digest, rows and sequence."""
    seconds: float
    """What measuring took; next to nothing where all of it was in the cache."""
    measured: int
    """Losses that were measured, the others were in the cache."""
    depths: dict[int, float]
    """By depth the measured loss with the blocks that the selection keeps there, all of them whole."""

    @cached_property
    def rises(self) -> Floats:
        """[blocks, options] in nats."""
        return self.losses - self.whole

    def loss(self, choices: Sequence[int]) -> float:
        """The surrogate loss of a plan, from the option's index of each block."""
        return self.whole + float(self.rises[np.arange(len(choices)), list(choices)].sum())


def measure_rises(
    checkpoint: Checkpoint,
    options: Sequence[BlockOption],
    text: Path,
    *,
    rows: int | None = None,
    sequence: int = SEQUENCE,
    progress: Progress,
) -> Rises:
    """Measure every option of every block, but for what the cache folder holds.

    Args:
        checkpoint: what the blocks are of; its model must fit in memory in float32.
        options: of a block; all blocks have the same.
        text: calibration text, of which the first rows are taken.
        rows: how many; ``ROWS`` or as many as the text has where left out.
        sequence: tokens a row, at most the model's context.
        progress: told of every option.

    Raises:
        BadInput: the text is too short, or the model's loss on it is not finite.
    """
    began = time.perf_counter()
    batches, facts = _batches(checkpoint, text, rows, sequence)
    identity = {"checkpoint": checkpoint.digest, "base": checkpoint.selection.base_digest, **facts}
    saved = _Saved.of(identity, checkpoint.architecture.depth)
    missing = [[o for o in options if o not in known] for known in saved.blocks]
    depths = [depth for depth in checkpoint.selection.depths if depth not in saved.depths]
    count = sum(map(len, missing)) + (saved.whole is None)
    if depths:
        length = facts["sequence"]
        ids = text_rows(text, checkpoint.model.tokenizer(), length)[: facts["rows"]]
        with progress.bar("depths", len(depths)) as step:
            for depth in depths:
                plan = checkpoint.plan(Shape(depth, Fraction(1), "uniform"))
                saved.add_depth(depth, plan_loss(checkpoint, plan, ids)[0])
                step()
    if count:
        with progress.bar("blocks", count) as step, tempfile.TemporaryDirectory(prefix="amoeba-whole-") as work:
            scorer = _Scorer(checkpoint, batches, Path(work))
            for index, wanted in enumerate(missing):
                found = {}
                for option, loss in scorer.option_losses(index, wanted):
                    found[option] = loss
                    step(f"block {index}")
                saved.add(index, found)
                scorer.pass_block(index)
            if saved.whole is None:
                saved.set_whole(scorer.loss())
                step()
    assert saved.whole is not None
    losses = np.array([[known[option] for option in options] for known in saved.blocks])
    said = {"text": text.name, **facts}
    return Rises(
        tuple(options), saved.whole, losses, said, time.perf_counter() - began, count + len(depths), saved.depths
    )


def plan_loss(checkpoint: Checkpoint, plan: Plan, *rows: Ids) -> list[float]:
    """The losses of a plan, really extracted, on rows of token ids [rows, length], measured as ``evaluate`` does."""
    with tempfile.TemporaryDirectory(prefix="amoeba-plan-") as work:
        extract(checkpoint.model, plan, Path(work), learnt=checkpoint.learnt(plan))
        logits = torch_logits(load_torch_model(Path(work)))
        return [text_loss(logits, each).loss for each in rows]


def _batches(
    checkpoint: Checkpoint, text: Path, rows: int | None, sequence: int
) -> tuple[tuple[Batch, ...], dict[str, Any]]:
    from amoeba_deploy.stage1.calibration import text_calibration

    length = min(sequence, checkpoint.architecture.context)
    ids = text_rows(text, checkpoint.model.tokenizer(), length)
    if rows is not None and not 1 <= rows <= len(ids):
        raise BadInput(f"{text}: has {len(ids)} rows of {length} tokens where {rows} are asked for; ask for those")
    taken = rows or min(ROWS, len(ids))
    facts = {"digest": file_digest(text), "rows": taken, "sequence": length}
    return text_calibration(ids.reshape(-1).tolist(), taken, length, {"source": str(text)}).batches, facts


class _Scorer:
    """The whole model in memory, walked from its first block to its last, and options in the place of each."""

    def __init__(self, checkpoint: Checkpoint, batches: Sequence[Batch], work: Path) -> None:
        from amoeba_deploy.stage1.blocks import Forward, ResidentBlocks

        whole = checkpoint.plan(checkpoint.full_shape)
        # Ragged, so that layers are of the base model's own class also where compensating biases need another one.
        extract(checkpoint.model, whole, work, layout="ragged", learnt=checkpoint.learnt(whole))
        self.checkpoint, self.batches = checkpoint, batches
        folder: Any = load_torch_model(work)
        self.model = folder.stock
        self.forward: Forward = Forward(ResidentBlocks(self.model))
        self.states = self.forward.embed_all(batches)
        tokens = sum(batch.tokens for batch in batches)
        self.at_once = max(1, STATE_BYTES // (4 * tokens * checkpoint.architecture.hidden))
        self.count = sum(batch.count for batch in batches)

    def pass_block(self, index: int) -> None:
        """Move on behind a whole block."""
        self.states = self.forward.run_all(index, self.states)

    def loss(self) -> float:
        """The whole model's loss, once all blocks were passed."""
        return self._losses(self.states)[0]

    def option_losses(self, index: int, options: Sequence[BlockOption]) -> list[tuple[BlockOption, float]]:
        """The loss with each of the options in the place of block ``index``, in front of which the states stand."""
        found: list[tuple[BlockOption, float]] = []
        for begin in range(0, len(options), self.at_once):
            some = options[begin : begin + self.at_once]
            states: list[torch.Tensor] = []
            for option in some:
                states += self._behind(index, option)
            for later in range(index + 1, self.forward.count):
                states = self.forward.run_all(later, states)
            found += zip(some, self._losses(states), strict=True)
        return found

    def _behind(self, index: int, option: BlockOption) -> list[torch.Tensor]:
        if option.dropped:
            return self.states
        layer = option_layer(self.checkpoint, self.model, index, option)
        return self.forward.lanes.map(lambda state: self.forward.apply(layer, index, state), self.states)

    def _losses(self, states: Sequence[torch.Tensor]) -> list[float]:
        from amoeba_deploy.stage1.calibration import batch_cost

        copies = len(states) // len(self.batches)
        batches = [*self.batches] * copies
        found = self.forward.log_likelihood_all(self.forward.blocks.head(), batches, states)
        costs = [batch_cost("loss", batch, values) for batch, values in zip(batches, found, strict=True)]
        own = len(self.batches)
        losses = [sum(costs[k * own : (k + 1) * own]) / self.count for k in range(copies)]
        if not all(map(math.isfinite, losses)):
            raise BadInput("the model gives logits that are not finite on this text; its weights are damaged")
        return losses


def option_learnt(checkpoint: Checkpoint, option: BlockOption) -> Learnt:
    """What the checkpoint adds to the weights of a block that takes an option, all other blocks being whole."""
    full = checkpoint.architecture
    width = options_width(full, [option])
    blocks = tuple(one_block(checkpoint, index, option) for index in range(full.depth))
    return checkpoint.learnt(Plan(Shape(full.depth, width, "adaptive"), blocks))


def option_layer(checkpoint: Checkpoint, model: Any, index: int, option: BlockOption) -> Any:
    """A stock layer [hidden -> hidden] in an option's own size, with the weights that extraction writes for it.

    ``model`` is the whole one, of the stock class; of it come the layer's class and config.
    """
    import torch

    from amoeba_deploy.extraction.modeling_amoeba import sized_layer

    learnt = option_learnt(checkpoint, option)
    full, block = checkpoint.architecture, one_block(checkpoint, index, option)
    plan = Plan(Shape(1, options_width(full, [option]), "adaptive"), (block,))
    sources = subnet_tensors(checkpoint.model, plan, CONFIG_DTYPES[model_dtype(checkpoint.model)], "ragged", learnt)
    stem = "model.layers.0."
    values = {
        name.removeprefix(stem): torch.from_numpy(_values(source))
        for name, source in sources.items()
        if name.startswith(stem)
    }
    sizes = {
        "num_attention_heads": len(block.heads),
        "num_key_value_heads": len(block.kv_heads),
        "intermediate_size": len(block.neurons),
    }
    layer = sized_layer(model.model.layers[index], model.config, index, sizes, learnt.biases is not None)
    layer.load_state_dict(values, assign=True)
    return layer.eval().requires_grad_(False)


def _values(source: TensorSource) -> Any:
    """The values of a tensor that is not written, in float32."""
    kind = np.dtype(NUMPY_OF[source.dtype])
    found, at = np.empty(source.length // kind.itemsize, kind), 0
    for part in source.parts():
        count = part.length // kind.itemsize if isinstance(part, Span) else part.size
        if isinstance(part, Span):
            part.file.read_into(found[at : at + count], part.offset)
        else:
            found[at : at + count] = part.reshape(-1)
        at += count
    return as_float32(found.reshape(source.shape), source.dtype)


@dataclass
class _Saved:
    """Losses of a text and a checkpoint in the cache folder: one file a block, and one of the whole model."""

    folder: Path
    identity: dict[str, Any]
    blocks: list[dict[BlockOption, float]]
    whole: float | None
    depths: dict[int, float]

    @classmethod
    def of(cls, identity: dict[str, Any], depth: int) -> _Saved:
        """What is there already."""
        key = hashlib.sha256(json.dumps([RISES_FORMAT, identity], sort_keys=True).encode()).hexdigest()[:24]
        found = cls(cache_folder() / "block-rises" / key, identity, [], None, {})
        found.blocks = [found._read(f"block-{index:03}") for index in range(depth)]
        found.whole = next(iter(found._read("whole").values()), None)
        found.depths = {option.kv_heads: loss for option, loss in found._read("depths").items()}
        return found

    def add(self, index: int, losses: dict[BlockOption, float]) -> None:
        """Keep what was measured of a block."""
        if losses:
            self.blocks[index] |= losses
            self._write(f"block-{index:03}", self.blocks[index])

    def add_depth(self, depth: int, loss: float) -> None:
        """Keep the loss with the blocks that the selection keeps at a depth."""
        self.depths[depth] = loss
        self._write("depths", {BlockOption(number, 0): value for number, value in self.depths.items()})

    def set_whole(self, loss: float) -> None:
        """Keep the whole model's loss."""
        self.whole = loss
        self._write("whole", {BlockOption(0, 0): loss})

    def _read(self, name: str) -> dict[BlockOption, float]:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return {}
        try:
            value = read_json(file, RISES_FORMAT)
            losses = {BlockOption(int(g), int(n)): float(loss) for g, n, loss in value["losses"]}
            if not all(map(math.isfinite, losses.values())):
                raise ValueError
        except (BadInput, KeyError, TypeError, ValueError):
            raise BadInput(f"{file}: is damaged; remove it, and it is measured again") from None
        return losses

    def _write(self, name: str, losses: dict[BlockOption, float]) -> None:
        rows = [[option.kv_heads, option.neurons, loss] for option, loss in sorted(losses.items())]
        with whole_file(self.folder / f"{name}.json", force=True) as file:
            file.write_text(json_text({"format": RISES_FORMAT, **self.identity, "losses": rows}), encoding="utf-8")
