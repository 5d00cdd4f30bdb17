"""The blocks of a model, run one at a time: all in memory, or each read from disk when it is its turn.

Both kinds run the layers of stock transformers, in float32, over whole rows and without a cache. What stage 1 needs of
a model is small: hidden states from token ids, one block applied to them, and log-probabilities at their end.

A *unit* is what can be removed: a block, or a sublayer, which is a block's attention (even units) or its feed-forward
(odd units), each with the norm in front of it and the sum behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from amoeba_deploy.calibration import Batch
from amoeba_deploy.lanes import Lanes
from amoeba_deploy.model_folder import ModelFolder, load_torch_model

if TYPE_CHECKING:
    import torch

Units = Literal["block", "sublayer"]
_PREDICTIONS_AT_ONCE = 1024


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

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, length, head size]."""
        ...

    def head(self) -> tuple[Any, torch.Tensor]:
        """The final norm, and the output matrix [vocabulary, hidden]."""
        ...


def _rotary(module: Any, length: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    cosines, sines = module(torch.empty(1, length, hidden), torch.arange(length)[None])
    return cosines, sines


class ResidentBlocks:
    """A stock model that lies in memory as a whole."""

    streamed = False

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False)
        self.depth = len(model.model.layers)
        self.hidden = int(model.config.hidden_size)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.model.embed_tokens(ids)
        return found

    def block(self, index: int) -> Any:
        return self.model.model.layers[index]

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotary(self.model.model.rotary_emb, length, self.hidden)

    def head(self) -> tuple[Any, torch.Tensor]:
        return self.model.model.norm, self.model.lm_head.weight


class StreamedBlocks:
    """A model of which one block, or the head, is in memory at a time; the rest stays in its safetensors files."""

    streamed = True

    def __init__(self, folder: ModelFolder) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        self.depth, self.hidden = folder.architecture.depth, folder.architecture.hidden
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.rotary_module = type(self.skeleton.model.rotary_emb)(config)
        self._loaded: tuple[int, Any] | None = None

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        values = self.folder.tensors.float32(name)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        from amoeba_deploy.tensors import as_float32

        name = "model.embed_tokens.weight"
        rows = self.folder.tensors.raw(name)[ids.numpy()]
        return torch.from_numpy(as_float32(rows, self.folder.tensors.info(name).dtype))

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

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotary(self.rotary_module, length, self.hidden)

    def head(self) -> tuple[Any, torch.Tensor]:
        self._loaded = None
        norm = copy.deepcopy(self.skeleton.model.norm)
        norm.load_state_dict({"weight": self._tensor("model.norm.weight")}, assign=True)
        norm.requires_grad_(False)
        tied = self.folder.architecture.tied
        return norm, self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight")


def open_blocks(folder: ModelFolder, offload: bool) -> Blocks:
    """The blocks of a model folder, streamed from disk where ``offload`` is asked for."""
    return StreamedBlocks(folder) if offload else ResidentBlocks(load_torch_model(folder.path))


UNITS_A_BLOCK: dict[Units, int] = {"block": 1, "sublayer": 2}
"""How many units make a block; unit u belongs to block u // that."""


class Forward:
    """Runs units over hidden states, a batch a lane; rotary angles are kept by length."""

    def __init__(self, blocks: Blocks, units: Units = "block", lanes: Lanes | None = None) -> None:
        self.blocks, self.units, self.lanes = blocks, units, lanes or Lanes()
        self.count = blocks.depth * UNITS_A_BLOCK[units]
        self._rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if length not in self._rotary:
            self._rotary[length] = self.blocks.rotary(length)
        return self._rotary[length]

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
        self, head: tuple[Any, torch.Tensor], batches: Sequence[Batch], states: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """``log_likelihood`` for several batches, without gradients."""
        return self.lanes.map(lambda batch, state: self.log_likelihood(head, batch, state), batches, states)

    def run(self, unit: int, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, length, hidden] behind a unit from those in front of it."""
        layer = self.blocks.block(unit // UNITS_A_BLOCK[self.units])
        angles = self._angles(states.shape[1])
        if self.units == "block":
            output = layer(states, attention_mask=None, position_embeddings=angles)
        elif unit % 2 == 0:
            inner = layer.input_layernorm(states)
            output = states + layer.self_attn(inner, position_embeddings=angles, attention_mask=None)[0]
        else:
            output = states + layer.mlp(layer.post_attention_layernorm(states))
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def log_likelihood(self, head: tuple[Any, torch.Tensor], batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """float32 log-probability [k] of every wanted token of a batch, from the last block's states."""
        import torch

        norm, matrix = head
        picked = states.flatten(0, 1).index_select(0, batch.places)
        size = _PREDICTIONS_AT_ONCE
        parts = zip(torch.split(picked, size), torch.split(batch.wanted, size), strict=True)
        return torch.cat(
            [
                -torch.nn.functional.cross_entropy(norm(part) @ matrix.T, wanted, reduction="none")
                for part, wanted in parts
            ]
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
