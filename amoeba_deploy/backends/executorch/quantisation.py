"""Quantised weights of an ExecuTorch engine: what XNNPACK's integer kernels take, made by torchao.

Matrices are rounded to nearest, symmetrically: int8 with one scale a row, int4 with one a row and 32 inputs, which
XNNPACK keeps in bfloat16. Their inputs are rounded to 8 bits as the engine runs, with one scale a token. The embedding
is int8 with one scale a row, or has the very numbers of the head where the two are tied. Nothing here depends on
anything but the weights, so the same weights always give the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GROUP = 32
"""Inputs that share a scale in int4; XNNPACK takes multiples of 32."""


class Table(nn.Module):
    """An embedding in int8 with scales, made of operators that every runtime has.

    Values [rows, width] and scales [rows, groups], each for as many neighbours of a row; of the products the first
    ``columns`` are given, times ``factor``.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, columns: int, factor: float) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales * factor)
        self.columns = columns

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, count = ids.shape
        groups, width = self.scales.shape[1], self.values.shape[1]
        rows = nn.functional.embedding(ids, self.values).float()
        scales = nn.functional.embedding(ids, self.scales)
        if groups > 1:
            scales = scales[..., None]
            rows = (rows.view(batch, count, groups, width // groups) * scales).view(batch, count, width)
        else:
            rows = rows * scales
        return rows if self.columns == width else rows[..., : self.columns]


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
    tied = head.weight is embedding.weight
    table = embedding.weight.detach().clone()
    if tied:
        head.weight = nn.Parameter(table, requires_grad=False)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _quantised(linear, bits))
    # A class of its own may scale what it reads, as Gemma 3's does.
    factor = float(getattr(embedding, "embed_scale", 1.0))
    if tied:
        weight = _weight(model.lm_head)
        values, scales = weight.qdata, weight.scale
    else:
        values, scales = quantised_rows(table)
    model.model.embed_tokens = Table(values, scales.reshape(len(table), -1), table.shape[1], factor)


def dequantised(name: str, weight: torch.Tensor, bits: int, tied: bool) -> torch.Tensor:
    """The values that an engine computes with in the place of a float32 tensor, by its name in the dense folder."""
    if weight.ndim != 2:
        return weight
    if name == "model.embed_tokens.weight" and not tied:
        values, scales = quantised_rows(weight)
        return values.float() * scales
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    found: torch.Tensor = _weight(_quantised(linear, bits)).dequantize()[:, :columns]
    return found


def _weight(module: nn.Module) -> Any:
    """The quantised weight of a linear layer, filled or not."""
    return module.linear.weight if isinstance(module, Filled) else module.weight


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
        scale = _weight(whole).scale
        scale.copy_(scale.bfloat16().float())
    found: nn.Module = whole
    return found
