"""The blocks of a model, run one at a time: all in memory, or each read from disk when it is its turn.

Both kinds run the layers of stock transformers, in float32, over whole rows and without a cache. What stage 1 needs of
a model is small: hidden states from token ids, one block applied to them, and log-probabilities at their end. Nothing
here knows a family: what one does around its layers is taken from its own forward pass (stand_ins.py).

A *unit* is what can be removed: a block, or a sublayer, which is a block's attention (even units) or its feed-forward
(odd units), each with its norms and the sum behind it. A sublayer runs as its block with zeros in the place of the
other one, which a norm or a factor leaves zeros.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.stage1.calibration import Batch
from amoeba_deploy.stage1.lanes import Lanes
from amoeba_deploy.tensors import as_float32

if TYPE_CHECKING:
    import torch

Units = Literal["block", "sublayer"]
_PREDICTIONS_AT_ONCE = 1024
Keywords = list[dict[str, Any]]
"""For each layer what it is called with beside hidden states."""
Head = Callable[["torch.Tensor"], "torch.Tensor"]
"""Logits [n, vocabulary] from the last block's states [n, hidden]."""


class Blocks(Protocol):
    """What runs a model block by block."""

    depth: int
    hidden: int
    streamed: bool
    """Whether a block costs a read from disk, so that as many rows as fit should pass it at once."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, hidden] in front of the first block, from token ids [rows, length]."""
        ...

    def block(self, index: int) -> Any:
        """A decoder layer; the one given before may become invalid."""
        ...

    def keywords(self, length: int) -> Keywords:
        """What each layer is called with for rows of so many tokens. Not for several threads at once."""
        ...

    def head(self) -> Head:
        """What turns the last block's states into logits."""
        ...


class ResidentBlocks:
    """A stock model that lies in memory as a whole."""

    streamed = False

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        self.depth = len(model.model.layers)
        self.hidden = int(model.config.hidden_size)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        from amoeba_deploy.stand_ins import front

        return front(self.model, self.model.model.embed_tokens, ids)

    def block(self, index: int) -> Any:
        return self.model.model.layers[index]

    def keywords(self, length: int) -> Keywords:
        from amoeba_deploy.stand_ins import layer_keywords

        return layer_keywords(self.model, length)

    def head(self) -> Head:
        from amoeba_deploy.stand_ins import logits_of

        return logits_of(self.model, self.model.model.norm, self.model.lm_head)


class StreamedBlocks:
    """A model of which one block, or the head, is in memory at a time; the rest stays in its safetensors files."""

    streamed = True

    def __init__(self, folder: ModelFolder) -> None:
        quiet_imports()
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from amoeba_deploy.stand_ins import outline

        self.folder = folder
        self.depth, self.hidden = folder.architecture.depth, folder.architecture.hidden
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.outline = outline(self.skeleton)
        self._loaded: tuple[int, Any] | None = None

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        values = self.folder.tensors.float32(name)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        from amoeba_deploy.stand_ins import front, with_weight

        name = "model.embed_tokens.weight"
        numbers, places = np.unique(ids.numpy(), return_inverse=True)
        rows = as_float32(self.folder.tensors.raw(name)[numbers], self.folder.tensors.info(name).dtype)
        # The rows that are needed, under numbers of their own.
        embedding = with_weight(self.outline.model.embed_tokens, torch.from_numpy(rows))
        return front(self.outline, embedding, torch.from_numpy(places.reshape(ids.shape)))

    def block(self, index: int) -> Any:
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = None  # frees the block before, so that there is never more than one
            names = self.folder.family.block_tensors(self.folder.architecture)
            layer = copy.deepcopy(self.skeleton.model.layers[index])
            values = {name: self._tensor(f"model.layers.{index}.{name}") for name in names}
            layer.load_state_dict(values, assign=True)
            layer.requires_grad_(False)
            self._loaded = index, layer
        return self._loaded[1]

    def keywords(self, length: int) -> Keywords:
        from amoeba_deploy.stand_ins import layer_keywords

        return layer_keywords(self.outline, length)

    def head(self) -> Head:
        from amoeba_deploy.stand_ins import logits_of, with_weight

        self._loaded = None
        norm = with_weight(self.outline.model.norm, self._tensor("model.norm.weight"))
        table = "model.embed_tokens.weight" if self.folder.architecture.tied else "lm_head.weight"
        return logits_of(self.outline, norm, with_weight(self.outline.lm_head, self._tensor(table)))


def open_blocks(folder: ModelFolder, offload: bool) -> Blocks:
    """The blocks of a model folder, streamed from disk where ``offload`` is asked for."""
    return StreamedBlocks(folder) if offload else ResidentBlocks(load_torch_model(folder.path))


UNITS_A_BLOCK: dict[Units, int] = {"block": 1, "sublayer": 2}
"""How many units make a block; unit u belongs to block u // that."""


class Forward:
    """Runs units over hidden states, a batch a lane; what layers are called with is kept by length."""

    def __init__(self, blocks: Blocks, units: Units = "block", lanes: Lanes | None = None) -> None:
        self.blocks, self.units, self.lanes = blocks, units, lanes or Lanes()
        self.count = blocks.depth * UNITS_A_BLOCK[units]
        self._keywords: dict[int, Keywords] = {}
        self._making = threading.Lock()

    def _keywords_of(self, index: int, length: int) -> dict[str, Any]:
        with self._making:
            if length not in self._keywords:
                self._keywords[length] = self.blocks.keywords(length)
        return self._keywords[length][index]

    def embed_all(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Hidden states [rows, length, hidden] of batches in front of the first unit."""
        return self.lanes.map(lambda batch: self.blocks.embed(batch.ids), batches)

    def run_all(self, unit: int, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``run`` for several batches, without gradients."""
        if not states:
            return []
        self.blocks.block(
            unit // UNITS_A_BLOCK[self.units]
        )  # a streamed block is read once, before the lanes ask for it
        return self.lanes.map(lambda state: self.run(unit, state), states)

    def log_likelihood_all(
        self, head: Head, batches: Sequence[Batch], states: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """``log_likelihood`` for several batches, without gradients."""
        return self.lanes.map(lambda batch, state: self.log_likelihood(head, batch, state), batches, states)

    def run(self, unit: int, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, hidden] behind a unit from those in front of it."""
        from amoeba_deploy.stand_ins import sublayer

        index = unit // UNITS_A_BLOCK[self.units]
        layer = self.blocks.block(index)
        if self.units == "sublayer":
            layer = sublayer(layer, attention=unit % 2 == 0)
        return self.apply(layer, index, states)

    def apply(self, layer: Any, index: int, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, hidden] behind any layer that stands in the place of block ``index``."""
        output = layer(states, **self._keywords_of(index, states.shape[1]))
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def log_likelihood(self, head: Head, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """float32 log-probability [k] of every wanted token of a batch, from the last block's states."""
        import torch

        picked = states.flatten(0, 1).index_select(0, batch.places)
        size = _PREDICTIONS_AT_ONCE
        parts = zip(torch.split(picked, size), torch.split(batch.wanted, size), strict=True)
        return torch.cat(
            [-torch.nn.functional.cross_entropy(head(part), wanted, reduction="none") for part, wanted in parts]
        )


def state_bytes(batch: Batch, hidden: int) -> int:
    """Bytes of a batch's hidden states in float32."""
    return 4 * batch.tokens * hidden


def chunks(forward: Forward, batches: Sequence[Batch], limit: int, copies: int = 1) -> list[range]:
    """Batches to run together, as ranges of their indices.

    A model in memory takes one batch a lane. A streamed one takes as many as ``limit`` bytes hold ``copies`` of their
    states, and at least one, so that each block is read for as many rows as possible.
    """
    blocks, lanes = forward.blocks, forward.lanes.count
    if not blocks.streamed:
        return [range(begin, min(begin + lanes, len(batches))) for begin in range(0, len(batches), lanes)]
    found, begin, taken = [], 0, 0
    for index, batch in enumerate(batches):
        size = copies * state_bytes(batch, blocks.hidden)
        if index > begin and taken + size > limit:
            found.append(range(begin, index))
            begin, taken = index, 0
        taken += size
    return [*found, range(begin, len(batches))]
