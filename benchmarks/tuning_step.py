"""One sandwich step of tuning against the same step with masks, and tokens a second beside the machine's peak.

Masking is what research code does: every linear layer is computed whole, and what a shape removes is multiplied by
zero. Two kinds are timed: one that skips removed blocks and masks heads and neurons, and one that also runs removed
blocks and throws their outputs away. All steps are over the same rows and shapes, with the same frozen base, experts
and loss, and their losses and gradients are compared first. The bound is the ratio of the multiplications that each
step does in the linear layers of the blocks, the experts', the attention's and the head's included; nothing that only
computes less can be faster than that.

The loss alone has a benchmark of its own, ``python -m benchmarks.distillation``.

    python -m benchmarks.tuning_step                       # on the CPU
    python -m benchmarks.tuning_step --device cuda --dtype bfloat16 --hidden 4096 --neurons 11008 --depth 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families import read_architecture
from amoeba_deploy.selection import BlockScores, DepthChoice, Selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.distillation import answer_loss, teacher_loss
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.mixture import Mixture, MixtureSettings
from amoeba_deploy.stage2.sandwich import Space, sandwich
from amoeba_deploy.stage2.settings import RECIPE_WIDTHS
from amoeba_deploy.stand_ins import with_parts


class _Masked(nn.Module):
    """A linear layer whose inputs are masked."""

    def __init__(self, linear: nn.Module, mask: torch.Tensor) -> None:
        super().__init__()
        self.__dict__.update(linear=linear, mask=mask)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs * self.mask)


class _Thrown(nn.Module):
    """A layer that runs and changes nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(layer=layer)

    def forward(self, states: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return states + 0 * self.layer(states, **keywords)


class MaskedModel(ElasticModel):
    """The elastic model with everything computed whole and masked."""

    runs_removed = False

    def _make_view(self, shape: Shape) -> Any:
        narrow = self.selection.parts(self.sizes, shape, self.steps)[0]
        kept = self.selection.choice(shape.depth).kept
        view = super()._make_view(
            Shape(self.sizes.depth if self.runs_removed else shape.depth, Fraction(1), shape.policy)
        )
        base = view.model.model
        masks = {
            "o_proj": torch.arange(self.sizes.extent("query"), device=self.device) < narrow.extent("query"),
            "down_proj": torch.arange(self.sizes.neurons, device=self.device) < narrow.neurons,
        }
        layers = []
        for place, layer in enumerate(base.layers):
            attention = with_parts(layer.self_attn, o_proj=_Masked(layer.self_attn.o_proj, masks["o_proj"]))
            feed_forward = with_parts(layer.mlp, down_proj=_Masked(layer.mlp.down_proj, masks["down_proj"]))
            made = with_parts(layer, self_attn=attention, mlp=feed_forward)
            layers.append(_Thrown(made) if self.runs_removed and place not in kept else made)
        base._modules["layers"] = nn.ModuleList(layers)
        assert self.mixture is not None
        return type(view)(view.model, self.mixture.seen(kept, shape.width).to(self.device))


class FullyMaskedModel(MaskedModel):
    """The same, in which removed blocks run too."""

    runs_removed = True


def make(kind: type[ElasticModel], arguments: argparse.Namespace) -> ElasticModel:
    """A random Llama with random scores and experts, equal for every kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.neurons,
        num_hidden_layers=arguments.depth,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    sizes = read_architecture(config.to_dict())
    model: Any = LlamaForCausalLM._from_config(config, dtype=getattr(torch, arguments.dtype))
    mixture = Mixture(sizes, MixtureSettings(rank=arguments.rank), RECIPE_WIDTHS)
    for parameter in mixture.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.02)
    elastic = kind(model.requires_grad_(False), random_selection(sizes), sizes, mixture=mixture)
    return elastic.to(arguments.device).train()


def random_selection(sizes: Architecture) -> Selection:
    """Random scores; removed blocks are the last ones, down to 5 in 8 of the depth, as in the recipe's 20 of 32."""
    rng = np.random.default_rng(0)

    def numbers(count: int) -> Any:
        return rng.standard_normal(count).astype(np.float32)

    query = sizes.heads * sizes.head_dim
    blocks = tuple(
        BlockScores(numbers(sizes.kv_heads), numbers(sizes.neurons), numbers(query), numbers(sizes.neurons))
        for _ in range(sizes.depth)
    )
    depths = range(sizes.depth * 5 // 8, sizes.depth + 1)
    return Selection("", {d: DepthChoice(tuple(range(d)), 0.0) for d in depths}, blocks, {})


Step = Callable[[ElasticModel, torch.Tensor, list[Shape], str], list[float]]


def body(elastic: ElasticModel, ids: torch.Tensor, shapes: list[Shape], dtype: str) -> list[float]:
    """The blocks of a sandwich step, forward and backward for each shape, under the same loss of the last states."""
    elastic.noise, losses = torch.Generator().manual_seed(0), []
    for shape in shapes:
        with elastic.shape(shape):
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                states = elastic.states(ids)
            loss = states.float().pow(3).mean()
            loss.backward()
        losses.append(float(loss.detach()))
    return losses


def whole(elastic: ElasticModel, ids: torch.Tensor, shapes: list[Shape], dtype: str) -> list[float]:
    """The same with the head and distillation; all but the optimiser."""
    elastic.noise, losses = torch.Generator().manual_seed(0), []
    head, teacher = elastic.head(), None
    for shape in shapes:
        with elastic.shape(shape):
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                states = elastic.states(ids)[:, :-1].flatten(0, 1)
                wanted = ids[:, 1:].flatten()
                if teacher is None:
                    loss, teacher = teacher_loss(head, states, wanted, memory=1 << 30)
                else:
                    loss = answer_loss(head, states, wanted, teacher=teacher)
                loss = loss / len(wanted)
            loss.backward()
        losses.append(float(loss.detach()))
    return losses


STEPS: dict[str, Step] = {"blocks": body, "whole step": whole}


def flops(
    elastic: ElasticModel, shapes: list[Shape], length: int, masked: type[ElasticModel] | None, with_head: bool
) -> float:
    """Floating-point operations of a step's matrix products, a token.

    A frozen matrix is used twice, forward and for its input's gradient; an expert's three times. Attention is two
    products of length x length a head (half of it is masked and counted as computed), three times. The head is used
    twice by every shape.
    """
    sizes, total = elastic.sizes, 0.0
    assert elastic.mixture is not None
    rank = elastic.mixture.settings.rank
    for shape in shapes:
        parts = elastic.selection.parts(sizes, shape, elastic.steps)
        if masked is not None:
            count = sizes.depth if masked is FullyMaskedModel else len(parts)
            parts = (sizes.subnet(1, sizes.kv_heads, sizes.neurons),) * count
        for part in parts:
            query, key_value = part.extent("query"), part.extent("key_value")
            ends = 4 * sizes.hidden + 2 * query + 2 * key_value + 3 * (sizes.hidden + part.neurons)
            total += 2 * 2 * part.block_matrix_parameters + 3 * 2 * rank * ends + 3 * 2 * 2 * length * query
        total += 2 * 2 * sizes.vocabulary * sizes.hidden if with_head else 0
    return total


def peak(device: str, dtype: str) -> float:
    """Floating-point operations a second of a large matrix product here, the best of several."""
    size = 8192 if device != "cpu" else 1536
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(7))


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds that some work takes."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def gradient_of(elastic: ElasticModel) -> torch.Tensor:
    """All gradients in one row; they are taken away."""
    assert elastic.mixture is not None
    found = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in elastic.mixture.parameters()]
    elastic.zero_grad(set_to_none=True)
    return torch.cat([each.cpu() for each in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 512, "neurons": 1408, "depth": 8, "vocabulary": 4096, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kinds: dict[str, type[ElasticModel]] = {
        "elastic": ElasticModel,
        "masked widths": MaskedModel,
        "masked widths and depth": FullyMaskedModel,
    }
    models = {name: make(kind, arguments) for name, kind in kinds.items()}
    sizes = models["elastic"].sizes
    space = Space(tuple(models["elastic"].selection.depths), RECIPE_WIDTHS, "uniform")
    ids = torch.randint(sizes.vocabulary, (arguments.rows, arguments.length), device=arguments.device)
    sandwiches = [sandwich(space, 2, 0, number) for number in range(arguments.repeats + 1)]

    best = peak(arguments.device, arguments.dtype)
    print(
        f"{sizes.parameters / 1e6:.0f} M parameters, {arguments.dtype}, {ids.numel()} tokens and 4 shapes a step, "
        f"{arguments.device}; peak {best / 1e9:.0f} GFLOP/s (measured)"
    )
    for part, run in STEPS.items():
        compare(run, models, ids, sandwiches[-1], arguments.dtype)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for shapes in sandwiches[:-1]:
            for name, model in models.items():
                work = partial(run, model, ids, shapes, arguments.dtype)
                seconds[name].append(timed(work, arguments.device))
                model.zero_grad(set_to_none=True)
        operations = {
            name: statistics.fmean(
                flops(model, shapes, arguments.length, None if name == "elastic" else kinds[name], run is whole)
                for shapes in sandwiches[:-1]
            )
            for name, model in models.items()
        }
        print(f"\n| {part} | seconds | tokens/s | share of peak | against elastic | bound |")
        print("|---|---|---|---|---|---|")
        for name in models:
            taken = statistics.median(seconds[name])
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["elastic"], strict=True))
            print(
                f"| {name} | {taken:.3f} | {ids.numel() / taken:.0f} | "
                f"{operations[name] * ids.numel() / taken / best:.0%} | {ratio:.2f}x | "
                f"{operations[name] / operations['elastic']:.2f}x |"
            )


def compare(run: Step, models: dict[str, ElasticModel], ids: torch.Tensor, shapes: list[Shape], dtype: str) -> None:
    """Say how far the models' losses and gradients are apart; they should be the same but for rounding."""
    found = {name: (run(model, ids, shapes, dtype), gradient_of(model)) for name, model in models.items()}
    losses, gradient = found["elastic"]
    print()
    for name in list(models)[1:]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(found[name][0], losses, strict=True))
        error = float((found[name][1] - gradient).abs().max() / gradient.abs().max())
        print(f"{name}: losses {apart:.1e}, gradients {error:.1e} apart from the elastic model's, relatively")


if __name__ == "__main__":
    main()
