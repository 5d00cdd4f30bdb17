"""A layer of a static cache that is read as far as it is filled."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import StaticLayer


class LiveLayer(StaticLayer):  # type: ignore[misc]
    """A static layer that gives its first ``end`` positions; a step that read all of them would cost the whole context.

    ``end`` is a size of the step's inputs, so that one graph serves every value of it. It must stay below the positions
    that the layer has: all of them would be a case, and a graph, of its own.
    """

    end: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0
