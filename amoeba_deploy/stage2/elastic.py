"""The elastic model: one stock model in memory that runs as any of its subnets, without masks and without copies.

Within each block key/value groups and neurons are put in the order of their scores, best first, in place; that leaves
the function of the full model as it is. Every subnet of the selection then keeps the first units of each block, so it
computes with the first rows and columns of the same matrices, as views. Blocks that are not kept are not run. The
forward pass is the stock one of the model's class: copies of its modules that share all weights (stand_ins.py) stand in
for those that a shape narrows, and are kept, so that going from one shape to another is a look-up.

    elastic = ElasticModel(model, selection, sizes)
    with elastic.shape("6x0.5"):
        logits = elastic(ids)

Backward passes belong inside ``shape`` too: with gradient checkpointing they run blocks again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from amoeba_deploy.architecture import Architecture, Dim
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families import family_of
from amoeba_deploy.families.family import PER_LAYER_LISTS, Axis
from amoeba_deploy.plan import Steps
from amoeba_deploy.selection import Selection
from amoeba_deploy.shape import Policy, Shape
from amoeba_deploy.stage2.mixture import Experts, Mixture, Shares
from amoeba_deploy.stage2.quantised import QuantisedLinear
from amoeba_deploy.stand_ins import logits_of, with_parts

ATTENTION, FEED_FORWARD = "self_attn", "mlp"


@dataclass
class Mixing:
    """What the shape that is running takes of the experts; None outside of any shape."""

    shares: Shares | None = None


@dataclass(frozen=True)
class Kept:
    """The rows and columns that a narrowed matrix keeps: the first so many of each part of a fused axis.

    ``rows`` are (begin, end) pairs; ``columns`` is their number.
    """

    rows: tuple[tuple[int, int], ...]
    columns: int

    def of_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The kept rows of a tensor [out, ...], a view unless several parts are joined."""
        parts = [tensor[begin:end] for begin, end in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The kept rows and columns of a weight [out, in]."""
        return self.of_rows(weight)[:, : self.columns]


class ElasticLinear(nn.Module):
    """A linear layer of the full model run with some of its rows and columns, and with what tuning adds to it.

    ``mean`` [in] are the average inputs: where they are given, the ones of the removed columns are added on as a
    constant (compensation).
    """

    base: Any
    kept: Kept
    experts: Experts | None
    mixing: Mixing
    mean: torch.Tensor | None

    def __init__(
        self,
        base: nn.Module,
        kept: Kept,
        experts: Experts | None,
        mixing: Mixing,
        mean: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        # Not registered: a stand-in owns nothing, and torch would list shared parameters once for every shape.
        self.__dict__.update(base=base, kept=kept, experts=experts, mixing=mixing, mean=mean)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [..., kept rows] of inputs [..., kept columns]."""
        kept = self.kept
        outputs = self._of_base(inputs)
        removed = None if self.mean is None else self.mean[kept.columns :]
        if removed is not None and len(removed):
            others = kept.of_rows(self.base.weight)[:, kept.columns :]
            outputs = outputs + others @ removed.to(others.dtype)
        if self.experts is None:
            return outputs
        if self.mixing.shares is None:
            raise RuntimeError("an elastic model runs, forward and backward, inside 'with model.shape(...)'")
        a, b = self.experts.mixed(self.mixing.shares)
        inner = nn.functional.linear(inputs, a[:, : kept.columns])
        if removed is not None and len(removed):
            inner = inner + a[:, kept.columns :] @ removed
        flat = torch.addmm(outputs.flatten(0, -2), inner.flatten(0, -2), kept.of_rows(b).t())
        return flat.view(outputs.shape)

    def _of_base(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the base model's layer gives."""
        base, kept = self.base, self.kept
        bias = None if base.bias is None else kept.of_rows(base.bias)
        if isinstance(base, QuantisedLinear):
            outputs = base.product(inputs, kept.of_weight)
            return outputs if bias is None else outputs + bias
        return nn.functional.linear(inputs, kept.of_weight(base.weight), bias)


class _Constant(nn.Module):
    """In the place of a sublayer that is gone: adds what compensates for it, or nothing."""

    attention: bool
    compensation: ElasticLinear | None

    def __init__(self, attention: bool, compensation: ElasticLinear | None) -> None:
        super().__init__()
        self.__dict__.update(attention=attention, compensation=compensation)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        added = torch.zeros_like(hidden_states)
        if self.compensation is not None:
            added = added + self.compensation(hidden_states.new_zeros(1, 0))[0]
        return (added, None) if self.attention else added


@dataclass(frozen=True)
class _View:
    """The stock model as one shape: its modules narrowed and its layers picked; and what the gate sees of it."""

    model: Any
    seen: torch.Tensor | None


class ElasticModel(nn.Module):
    """A stock causal language model that runs as any subnet of a selection."""

    def __init__(
        self,
        model: Any,
        selection: Selection,
        sizes: Architecture,
        *,
        steps: Steps | None = None,
        policy: Policy = "uniform",
        bias: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        """Put the model's units in the order of their scores, in place.

        Args:
            model: a stock transformers model of the family and sizes of ``sizes``.
            selection: which blocks each depth keeps, and the scores of units.
            sizes: the architecture of the full model.
            steps: the numbers of units that a block may keep; the finest where left out.
            policy: of shapes that are given as text.
            bias: whether removed channels are replaced by their mean (compensation).
            mixture: experts to run with, their units in the same order.

        Raises:
            BadInput: the selection holds masks, which do not say in which order units go.
        """
        super().__init__()
        if selection.masks is not None:
            raise BadInput("masks say what a few widths keep and not in which order; tune with a selection of scores")
        self.model, self.selection, self.sizes = model, selection, sizes
        self.steps, self.policy, self.bias, self.mixture = steps or Steps.of(sizes), policy, bias, mixture
        self.orders = [unit_orders(selection, sizes, index) for index in range(sizes.depth)]
        self.mixing = Mixing()
        self.noise: torch.Generator | None = None
        """Where the gate's noise is drawn from while training; none is drawn where it is None."""
        self._views: dict[Shape, _View] = {}
        self._layers: dict[tuple[int, int, int, int], Any] = {}
        self._active: _View | None = None
        reorder(model, sizes, self.orders)
        self._means = [self._ordered_means(index) for index in range(sizes.depth)] if bias else []

    def _ordered_means(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Average inputs of a block's o_proj and down_proj, channels in the order of units."""
        scores, order = self.selection.blocks[index], self.orders[index]
        found = torch.from_numpy(scores.o_proj_mean.copy()), torch.from_numpy(scores.down_proj_mean.copy())
        return found[0][order["query"]], found[1][order["neuron"]]

    @property
    def device(self) -> torch.device:
        """Where the model's embedding lies."""
        found: torch.Tensor = self.model.get_input_embeddings().weight
        return found.device

    @contextmanager
    def shape(self, shape: Shape | str) -> Iterator[ElasticModel]:
        """Run as one shape, such as ``24x0.75``, inside the block.

        Raises:
            BadInput: it is not a shape, or the selection does not cover it.
        """
        before = self._active, self.mixing.shares
        self._active = view = self.view(Shape.parse(shape, self.policy) if isinstance(shape, str) else shape)
        if self.mixture is not None and view.seen is not None:
            noise = None
            if self.training and self.noise is not None:
                drawn = torch.randn(self.mixture.settings.experts, generator=self.noise)
                noise = drawn.to(view.seen.device)
            self.mixing.shares = self.mixture.shares(view.seen, noise)
        try:
            yield self
        finally:
            self._active, self.mixing.shares = before

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [rows, length, vocabulary] of token ids [rows, length]."""
        found: torch.Tensor = self._running.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return found

    def states(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What the head would be applied to [rows, length, hidden]."""
        base = self._running.model.model
        found: torch.Tensor = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return found

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From states [n, hidden] to logits [n, vocabulary], as the model's class makes them."""
        return logits_of(self.model, nn.Identity(), self.model.lm_head)

    def head_parameters(self) -> list[torch.Tensor]:
        """What of the head is tuned."""
        return [parameter for parameter in self.model.lm_head.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> ElasticModel:
        """As for any module; stand-ins are made anew, because they carry the mode."""
        if mode != self.training:
            self._views.clear()
            self._layers.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ElasticModel:
        """What torch moves and converts a module by; stand-ins are made anew, because they know where things were."""
        self._views.clear()
        self._layers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _running(self) -> _View:
        if self._active is None:
            raise RuntimeError("an elastic model runs inside 'with model.shape(...)'")
        return self._active

    def view(self, shape: Shape) -> _View:
        """The stock model as one shape; made once."""
        if shape not in self._views:
            self._views[shape] = self._make_view(shape)
        return self._views[shape]

    def _make_view(self, shape: Shape) -> _View:
        kept = self.selection.choice(shape.depth).kept
        parts = self.selection.parts(self.sizes, shape, self.steps)
        layers = [self._layer(index, place, part) for place, (index, part) in enumerate(zip(kept, parts, strict=True))]
        base = with_parts(self.model.model, layers=nn.ModuleList(layers))
        base.config = picked_config(self.model.config, kept)
        model = with_parts(self.model, model=base)
        model.config = base.config
        seen = None if self.mixture is None else self.mixture.seen(kept, shape.width).to(self.device)
        return _View(model, seen)

    def _layer(self, index: int, place: int, part: Architecture) -> Any:
        """A block as it is with so many units, at a place among the kept ones."""
        key = index, place, part.kv_heads, part.neurons
        if key not in self._layers:
            layer = self.model.model.layers[index]
            attention = self._sublayer(layer, index, ATTENTION, part)
            if part.kv_heads:
                attention.layer_idx = place
            feed_forward = self._sublayer(layer, index, FEED_FORWARD, part)
            self._layers[key] = with_parts(layer, **{ATTENTION: attention, FEED_FORWARD: feed_forward})
        return self._layers[key]

    def _sublayer(self, layer: Any, index: int, name: str, part: Architecture) -> Any:
        attention = name == ATTENTION
        linears = {
            tensor.removeprefix(f"{name}.").removesuffix(".weight"): axes
            for tensor, axes in family_of({"model_type": self.sizes.family}).block_tensors(self.sizes).items()
            if tensor.startswith(f"{name}.") and len(axes) == 2
        }
        made = {
            linear: self._linear(layer, index, f"{name}.{linear}", (axes[0], axes[1]), part)
            for linear, axes in linears.items()
        }
        if not (part.kv_heads if attention else part.neurons):
            output = "o_proj" if attention else "down_proj"
            return _Constant(attention, made[output] if self.bias else None)
        found = with_parts(layer.get_submodule(name), **made)
        if attention:
            # One class splits a fused matrix by what its config says; all others follow the outputs' sizes.
            found.config = copy.copy(found.config)
            found.config.num_attention_heads = part.heads
            found.config.num_key_value_heads = found.num_key_value_heads = part.kv_heads
        return found

    def _linear(self, layer: Any, index: int, matrix: str, axes: tuple[Axis, Axis], part: Architecture) -> Any:
        dims = axes[0] if isinstance(axes[0], tuple) else (axes[0],)
        rows, begin = [], 0
        for dim in dims:
            rows.append((begin, begin + part.extent(dim)))
            begin += self.sizes.extent(dim)
        mean = None
        if self.bias and matrix.endswith(("o_proj", "down_proj")):
            mean = self._means[index][matrix.endswith("down_proj")].to(self.device)
        experts = None if self.mixture is None else self.mixture.experts(index, matrix)
        kept = Kept(tuple(rows), part.extent(axes[1]))
        return ElasticLinear(layer.get_submodule(matrix), kept, experts, self.mixing, mean)


Order = Mapping[Dim, torch.Tensor]
"""For a kind of axis the full model's indices, best first."""


def unit_orders(selection: Selection, sizes: Architecture, index: int) -> Order:
    """In which order a block's rows and columns go: by the scores of their units, equal ones by their index."""
    heads, neurons = (torch.from_numpy(scores.astype("float64")) for scores in selection.scores(index))
    # Where no head is ever removed, norms may span all of them; they stay where they are.
    groups = torch.arange(sizes.kv_heads) if sizes.head_rule == "all" else torch.argsort(-heads, stable=True)
    return {
        "query": _rows(groups, sizes.group * sizes.head_dim),
        "key_value": _rows(groups, sizes.head_dim),
        "neuron": torch.argsort(-neurons, stable=True),
    }


def _rows(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def axis_order(sizes: Architecture, axis: Axis, order: Order) -> torch.Tensor | None:
    """The order of one axis of a tensor, fused ones part by part; None where it stays as it is."""
    dims = axis if isinstance(axis, tuple) else (axis,)
    if not all(dim in order for dim in dims):
        return None
    begins = [sum(sizes.extent(dim) for dim in dims[:place]) for place in range(len(dims))]
    return torch.cat([order[dim] + begin for dim, begin in zip(dims, begins, strict=True)])


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The order that undoes another."""
    return torch.argsort(order)


@torch.no_grad()
def reorder(model: Any, sizes: Architecture, orders: list[Order], back: bool = False) -> None:
    """Put the units of every block in an order, in place, or ``back`` as they were."""
    tensors = family_of({"model_type": sizes.family}).block_tensors(sizes)
    for layer, order in zip(model.model.layers, orders, strict=True):
        for name, axes in tensors.items():
            parameter = layer.get_parameter(name)
            for place, axis in enumerate(axes):
                found = axis_order(sizes, axis, order)
                if found is not None:
                    index = inverse(found) if back else found
                    parameter.data = parameter.data.index_select(place, index.to(parameter.device))


def picked_config(config: Any, kept_blocks: tuple[int, ...]) -> Any:
    """A model's config with the entries of its kept blocks only."""
    found = copy.copy(config)
    found.num_hidden_layers = len(kept_blocks)
    for key in PER_LAYER_LISTS:
        values = getattr(config, key, None)
        if isinstance(values, list):
            setattr(found, key, [values[index] for index in kept_blocks])
    return found
