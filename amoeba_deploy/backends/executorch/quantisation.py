"""Quantised weights of an ExecuTorch engine: what XNNPACK's integer kernels take, made by torchao.

Matrices are rounded to nearest, symmetrically: int8 with one scale a row, int4 with one a row and 32 inputs, which
XNNPACK keeps in bfloat16. Their inputs are rounded to 8 bits as the engine runs, with one scale a token. The embedding
is int8 with one scale a row in both; a tied head is a matrix of its own. Nothing here depends on anything but the
weights, so the same weights always give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GROUP = 32
"""Inputs that share a scale in int4; XNNPACK takes multiples of 32."""


class RowEmbedding(nn.Module):
    """An embedding in 8 bits with one scale a row, made of operators that every runtime has."""

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        values, scales = quantised_rows(weight)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(ids, self.values)
        return rows.float() * nn.functional.embedding(ids, self.scales)


class Filled(nn.Module):
    """A linear layer whose inputs are filled up with zeros to whole groups."""

    def __init__(self, linear: nn.Linear, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.linear = nn.Linear(linear.in_features + extra, linear.out_features, bias=linear.bias is not None)
        self.linear.weight = nn.Parameter(nn.functional.pad(linear.weight.detach(), (0, extra)))
        self.linear.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear(nn.functional.pad(states, (0, self.extra)))
        return output


def quantised_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, columns] in int8 and scales [rows, 1] in float32 of a table; all zeros keep the scale 1."""
    largest = weight.abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(weight / scales).to(torch.int8), scales


def quantise_model(model: Any, bits: int) -> None:
    """Quantise all matrices and the embedding of a transformers model in float32, in place."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    table = RowEmbedding(embedding.weight.detach())
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _quantised(linear, bits))
    # A class of its own may scale what it reads, as Gemma 3's does; only the table is replaced.
    scale = getattr(embedding, "embed_scale", None)
    model.model.embed_tokens = table if scale is None else _Scaled(table, float(scale))


class _Scaled(nn.Module):
    def __init__(self, table: RowEmbedding, scale: float) -> None:
        super().__init__()
        self.table, self.scale = table, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.table(ids) * self.scale
        return output


def dequantised(name: str, weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The values that an engine computes with in the place of a float32 tensor, by its name in the dense folder."""
    if weight.ndim != 2:
        return weight
    if name == "model.embed_tokens.weight":
        values, scales = quantised_rows(weight)
        return values.float() * scales
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    made = _quantised(linear, bits)
    inner: Any = made.linear if isinstance(made, Filled) else made
    found: torch.Tensor = inner.weight.dequantize()[:, :columns]
    return found


def _quantised(linear: nn.Linear, bits: int) -> nn.Module:
    from torchao.quantization import (  # type: ignore[import-untyped]
        Int8DynamicActivationIntxWeightConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    whole: Any = linear
    extra = -linear.in_features % GROUP if bits == 4 else 0
    if extra:
        whole = Filled(linear, extra)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        weight_granularity=PerGroup(GROUP) if bits == 4 else PerAxis(0),
    )
    quantize_(whole, config)
    if bits == 4:
        inner: Any = whole.linear if isinstance(whole, Filled) else whole
        scale = inner.weight.scale
        scale.copy_(scale.bfloat16().float())
    found: nn.Module = whole
    return found
