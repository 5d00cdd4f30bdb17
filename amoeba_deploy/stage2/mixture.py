"""The shape-aware mixture of LoRAs as it is tuned: experts on every linear layer of the blocks, and their gate.

What a shape gets of them is the same as in extraction (adapters.py), which reads what is written here; in training the
gate draws noise, so that experts share the shapes among them (AmoebaLLM, arXiv 2411.10606; noisy top-k gating, arXiv
1701.06538). One expert without a gate is an ordinary LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from amoeba_deploy.adapters import GATE, NOISE, Mix, matrices, tensor_names, width_code
from amoeba_deploy.architecture import Architecture


@dataclass(frozen=True)
class MixtureSettings:
    """How many experts of which rank, how many of them a shape uses, and how they are mixed."""

    experts: int = 5
    rank: int = 64
    alpha: float = 16.0
    top_k: int = 2
    mix: Mix = "factors"
    """``factors``: (sum g B) (sum g A), as released; ``products``: sum g (B A)."""
    gated: bool = True
    """Without a gate there is one expert."""
    inner: int = 16
    """Values between the gate's two linear maps, as in the released code."""


@dataclass(frozen=True)
class Shares:
    """What one shape takes of the experts: ``kept`` [k] of them, and ``weights`` [k] that sum to one."""

    kept: torch.Tensor
    weights: torch.Tensor


class Gate(nn.Module):
    """From what a shape keeps to the experts that serve it."""

    def __init__(self, inputs: int, experts: int, top_k: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, inner), nn.Linear(inner, experts)
        self.noise = nn.Linear(inputs, experts)
        self.top_k = top_k

    def forward(self, seen: torch.Tensor, noise: torch.Tensor | None = None) -> Shares:
        """The shares for what the gate sees [N + W]; ``noise`` [E], standard normal, is drawn in training only."""
        logits = self.second(self.first(seen))
        if noise is not None:
            logits = logits + noise * nn.functional.softplus(self.noise(seen))
        kept = torch.sort(logits.detach(), descending=True, stable=True).indices[: self.top_k]
        return Shares(kept, torch.softmax(logits[kept], 0))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters by their names in smol.safetensors."""
        maps = (self.first, self.second, self.noise)
        return dict(zip((*GATE, *NOISE), (p for linear in maps for p in (linear.weight, linear.bias)), strict=True))


class Experts(nn.Module):
    """The experts of one linear layer: ``a`` [E, r, in] and ``b`` [E, out, r]."""

    def __init__(self, settings: MixtureSettings, rows: int, columns: int) -> None:
        super().__init__()
        self.settings = settings
        self.a = nn.Parameter(torch.empty(settings.experts, settings.rank, columns))
        self.b = nn.Parameter(torch.zeros(settings.experts, rows, settings.rank))
        nn.init.uniform_(self.a, -1 / math.sqrt(columns), 1 / math.sqrt(columns))  # what LoRA's Kaiming rule amounts to

    def mixed(self, shares: Shares) -> tuple[torch.Tensor, torch.Tensor]:
        """What a shape's shares make of them: a [r, in] and b [out, r], the scale in ``b``.

        Where products are mixed, the factors of the kept experts stand side by side and r is k times the rank.
        """
        weights = shares.weights * (self.settings.alpha / self.settings.rank)
        if self.settings.experts == 1:
            return self.a[0], self.b[0] * weights
        a, b = self.a[shares.kept], self.b[shares.kept]
        if self.settings.mix == "products":
            return a.flatten(0, 1), (b * weights[:, None, None]).transpose(0, 1).flatten(1)
        mixed_a = (shares.weights @ a.flatten(1)).view(a.shape[1:])
        return mixed_a, (weights @ b.flatten(1)).view(b.shape[1:])


class Mixture(nn.Module):
    """All experts of a model, by block and matrix, and the gate. Initial values follow from torch's random state."""

    def __init__(self, sizes: Architecture, settings: MixtureSettings, widths: Sequence[Fraction]) -> None:
        super().__init__()
        self.settings, self.widths, self.depth = settings, tuple(sorted(widths, reverse=True)), sizes.depth
        self.names = tuple(matrices(sizes))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({_key(name): Experts(settings, *shape) for name, shape in matrices(sizes).items()})
            for _ in range(sizes.depth)
        )
        inputs = sizes.depth + len(self.widths)
        self.gate = Gate(inputs, settings.experts, settings.top_k, settings.inner) if settings.gated else None

    def experts(self, block: int, matrix: str) -> Experts:
        """The experts of a linear layer such as ``mlp.up_proj``."""
        found = self.blocks[block]
        assert isinstance(found, nn.ModuleDict)
        experts = found[_key(matrix)]
        assert isinstance(experts, Experts)
        return experts

    def seen(self, kept_blocks: Sequence[int], width: Fraction) -> torch.Tensor:
        """What the gate sees of a shape [N + W]: which blocks are kept, and the code of its width."""
        kept = np.zeros(self.depth)
        kept[list(kept_blocks)] = 1
        seen: NDArray[np.float64] = np.concatenate([kept, width_code(width, self.widths)])
        return torch.from_numpy(seen).float()

    def shares(self, seen: torch.Tensor, noise: torch.Tensor | None = None) -> Shares:
        """The shares of what the gate sees; the whole of the only expert where there is no gate."""
        if self.gate is None:
            device = next(self.parameters()).device
            return Shares(torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, device=device))
        shares: Shares = self.gate(seen, noise)
        return shares

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters by their names in smol.safetensors, units in the order in which they are held."""
        found: dict[str, torch.Tensor] = {}
        for block in range(self.depth):
            for matrix in self.names:
                experts = self.experts(block, matrix)
                found |= dict(zip(tensor_names(block, matrix), (experts.a, experts.b), strict=True))
        return found | (self.gate.tensors() if self.gate else {})

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over values by the names of ``tensors``; what tuning drew noise with may be missing, or of other sizes.

        It is not needed to run, and the files of others may have it differently.
        """
        with torch.no_grad():
            for name, parameter in self.tensors().items():
                if name not in NOISE or (name in tensors and tensors[name].shape == parameter.shape):
                    assert tensors[name].shape == parameter.shape
                    parameter.copy_(tensors[name])


def _key(matrix: str) -> str:
    """A matrix as a name that torch takes for a submodule."""
    return matrix.rpartition(".")[2]
