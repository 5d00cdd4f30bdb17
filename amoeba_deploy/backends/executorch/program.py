"""The program of an ExecuTorch engine: a stock transformers model over caches of fixed size, traced and lowered.

One method, ``forward(ids [1, n], positions [n]) -> logits [1, n, vocabulary]``, does prompts and single tokens alike: n
is dynamic. That is the order and the meaning of inputs in which ExecuTorch's own text runner calls a program
(https://github.com/pytorch/executorch/tree/main/extension/llm/runner), as are the constants beside it.

The attention is written here, not transformers' own. Keys lie [head size, context], so that products read them as they
are; only positions that hold tokens are read, which is what decoding costs; and nothing in it guards against rows
without any visible key, which a causal mask does not have.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from amoeba_deploy.static_cache import static_cache

_ATTENTION = "amoeba_export"


class _Layer(StaticLayer):  # type: ignore[misc]
    """A layer's cache for one sequence: keys [1, heads, head size, context], values [1, heads, context, head size]."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    """Where the new keys and values go [n]."""
    end: Any
    """How many positions hold tokens, the new ones included: a symbolic number."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self.keys.transpose(2, 3).contiguous()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys.index_copy_(3, self.positions, key_states.transpose(2, 3))
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys[:, :, :, : self.end], self.values[:, :, : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.end, 0

    def get_seq_length(self) -> Any:
        return self.positions[0]


def _attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float = 1.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries [1, heads, n, size] over keys [1, groups, size, t] and values [1, groups, t, size].

    The query heads of a group go through one product together, so that its keys are not repeated.
    """
    heads, count, size = query.shape[1:]
    groups, seen = key.shape[1], key.shape[3]
    share = heads // groups
    rows = (query * scaling).contiguous().view(groups, share * count, size)
    scores = torch.bmm(rows, key.view(groups, size, seen))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(groups, share, count, seen) + attention_mask
    weights = torch.softmax(scores, -1).view(groups, share * count, seen)
    # In two steps: in one, tracing could not prove what it must of a dynamic n.
    output = torch.bmm(weights, value.view(groups, seen, size)).view(groups, share, count, size)
    return output.view(1, heads, count, size).transpose(1, 2).contiguous(), None


class Decoder(torch.nn.Module):
    """A model with its caches as buffers, in the form that is traced."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        model.set_attn_implementation(_ATTENTION)
        self.model, self.context = model, context
        self.cache: StaticCache = static_cache(model, context, 1, _Layer)
        for index, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [1, n, vocabulary] of ids [1, n] at consecutive positions [n]."""
        start: Any = positions[0].item()
        end = start + ids.shape[1]
        # What tracing cannot know of a number that it reads from a tensor.
        check: Any = torch._check
        for holds in (start >= 0, start < self.context, end >= 1, end <= self.context):
            check(holds)
        for index, layer in enumerate(self.cache.layers):
            layer.positions, layer.end = positions, end
            layer.keys, layer.values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
        output = self.model(input_ids=ids, position_ids=positions[None], past_key_values=self.cache, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits


def write_program(model: Any, file: Path, context: int, most: int, constants: dict[str, Any]) -> None:
    """Lower a model, in float32 or quantised, to one ``.pte`` file for XNNPACK.

    Args:
        model: from transformers; it is changed, and of no further use.
        file: what to write.
        context: positions that its caches hold.
        most: ids that one call takes at most; memory is planned for so many.
        constants: methods without inputs that give these values.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    # XNNPACK computes the exact GELU also where the tanh approximation is asked for, without a word.
    delegated = [config for config in ALL_PARTITIONER_CONFIGS if config.target_name != "gelu.default"]
    with _no_warnings(), torch.no_grad():
        decoder = Decoder(model.requires_grad_(False), context).eval()
        count = torch.export.Dim("count", min=1, max=most)
        example = min(7, most)
        traced = torch.export.export(
            decoder,
            (torch.zeros(1, example, dtype=torch.int64), torch.arange(example)),
            dynamic_shapes=({1: count}, {0: count}) if most > 1 else None,
            strict=False,
        )
        edge = to_edge_transform_and_lower(
            traced,
            partitioner=[XnnpackPartitioner(configs=delegated)],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=constants,
        )
        # Without the pass every step would copy each cache twice: out, with the new column, and back.
        program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    with file.open("wb") as stream:
        program.write_to_file(stream)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """The libraries' warnings are about their own code; no user can act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
