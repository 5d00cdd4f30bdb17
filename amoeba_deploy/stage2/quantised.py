"""A frozen base in 4 or 8 bits, through bitsandbytes: what QLoRA (arXiv 2305.14314) holds the base model in.

4 bits are NF4 in blocks of 64 with quantised scales; 8 bits are whole numbers with a scale a row. Weights are spelled
out again for each product, forward and backward, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from amoeba_deploy.errors import ToolchainMissing

Narrow = Callable[[torch.Tensor], torch.Tensor]
"""From a whole weight [out, in] to the part that takes part in a product."""


def bits_library() -> Any:
    """bitsandbytes' functions; raises ToolchainMissing where it is not installed."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it does not need here
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise ToolchainMissing(
            f"a base in 4 or 8 bits needs bitsandbytes ({error}); run pip install 'amoeba-deploy[quantised]'"
        ) from None
    return library


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is held in few bits; its bias stays as it is."""

    def __init__(self, linear: nn.Linear, bits: Literal[4, 8], device: torch.device) -> None:
        super().__init__()
        library = bits_library()
        self.bits, self.dtype, self.bias = bits, linear.weight.dtype, linear.bias
        self.state: Any
        weight = linear.weight.detach().to(device)
        if bits == 4:
            packed, self.state = library.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        else:
            packed, self.state, _ = library.int8_vectorwise_quant(weight.half())
        self.register_buffer("packed", packed)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in] that the bits stand for."""
        library = bits_library()
        found: torch.Tensor
        if self.bits == 4:
            found = library.dequantize_4bit(self.packed, self.state)
        else:
            found = library.int8_vectorwise_dequant(self.packed, self.state)
        return found.to(self.dtype)

    def product(self, inputs: torch.Tensor, narrow: Narrow) -> torch.Tensor:
        """inputs @ narrow(weight)^T, with a gradient for the inputs."""
        found: torch.Tensor = _Product.apply(inputs, self, narrow)  # type: ignore[no-untyped-call]
        return found


class _Product(torch.autograd.Function):
    """A product that does not keep the weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, linear: QuantisedLinear, narrow: Narrow) -> torch.Tensor:
        ctx.linear, ctx.narrow = linear, narrow
        return nn.functional.linear(inputs, narrow(linear.weight).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.narrow(ctx.linear.weight).to(gradient.dtype), None, None


def quantise_blocks(model: Any, bits: Literal[4, 8], device: torch.device) -> None:
    """Hold all linear layers of a model's blocks in few bits on a device, one after the other, in place."""
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(layer.get_submodule(parent), last, QuantisedLinear(module, bits, device))
