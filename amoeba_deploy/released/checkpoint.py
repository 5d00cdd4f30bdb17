"""The authors' released checkpoint: what their research code saved, turned into a one-for-all checkpoint.

A folder with ``dp_selection_strategy.npy``, which holds kept blocks for every depth, masks and biases for a few widths;
and with a PEFT adapter, in ``adapter_model/`` or beside it (released_adapters.py). Facts were read from the code that
writes these files; the files themselves were not at hand, so whatever is not as described is refused by its name.

Assumed: multi-head attention, heads of the base model's head size, modules of Llama's names behind PEFT's prefix. A
width's mask stands on the outputs of q, k, v, gate and up, and multiplies what W x with its adapter gives; its bias is
added behind o_proj and down_proj. So extraction keeps rows of the merged weights, and adds those biases as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy import __version__, families
from amoeba_deploy.adapters import matrices
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.checkpoint import Checkpoint, finish_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of
from amoeba_deploy.masks import BIASED, FULL, BlockMask, Masks
from amoeba_deploy.model_folder import ModelFolder, resolve_model
from amoeba_deploy.released.adapters import LINEARS, PREFIX, import_adapters
from amoeba_deploy.released.pickled import PickledArray, read_pickled_dict
from amoeba_deploy.selection import DepthChoice, Selection, write_selection
from amoeba_deploy.shape import format_width

STRATEGY = "dp_selection_strategy.npy"
_ENTRIES = ("strategy", "metric", "width_mask", "bias")
_HEADS, _NEURONS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_MOST_PARTS = 1000
_LARGEST = sys.float_info.max
Vector = NDArray[np.float64]


def exact_ratio(key: float) -> Fraction:
    """The ratio that was meant by a float: 0.875 is 7/8 and 0.65 is 13/20, though no binary number is.

    A ratio that somebody writes has a small denominator, and two ratios with denominators up to 1000 differ by at least
    a millionth: the one that lies within a tenth of that, the rounding of float32 included, was meant. Where there is
    none, it is the number as its decimals say.
    """
    found = Fraction(key).limit_denominator(_MOST_PARTS)
    return found if abs(found - Fraction(key)) < Fraction(1, 10**7) else Fraction(repr(float(key)))


class _Strategy:
    """The dict of ``dp_selection_strategy.npy``, checked against a model's sizes while it is taken apart."""

    def __init__(self, file: Path, sizes: Architecture) -> None:
        self.file, self.sizes = file, sizes
        self.found = read_pickled_dict(file)
        if set(self.found) != set(_ENTRIES):
            raise self.bad(f"has the entries {', '.join(map(_name, self.found))} where {', '.join(_ENTRIES)} belong")
        for entry in _ENTRIES:
            if type(self.found[entry]) is not dict:
                raise self.bad(f"its '{entry}' is no dict")

    def bad(self, reason: str) -> BadInput:
        return BadInput(f"{self.file}: {reason}; it is not as the authors' code writes it")

    def vector(self, value: Any, length: int, where: str) -> Vector:
        """Finite numbers [length]."""
        if type(value) is PickledArray and value.values is not None:
            numbers = value.values
        elif type(value) in (list, tuple) and all(type(each) in (int, float, bool) for each in value):
            try:
                numbers = np.array(value, np.float64)
            except OverflowError:
                raise self.bad(f"{where} holds a number that is too large") from None
        else:
            raise self.bad(f"{where} is a {type(value).__name__} where an array of {length} numbers belongs")
        if numbers.shape != (length,):
            raise self.bad(f"{where} has the shape {list(numbers.shape)} where {length} numbers belong")
        if not np.isfinite(numbers).all():
            raise self.bad(f"{where} holds numbers that are not finite")
        return numbers.astype(np.float64)

    def zeros_and_ones(self, value: Any, length: int, where: str) -> NDArray[np.uint8]:
        numbers = self.vector(value, length, where)
        if not np.isin(numbers, (0, 1)).all():
            raise self.bad(f"{where} holds other numbers than 0 and 1")
        return numbers.astype(np.uint8)

    # Depth

    def depths(self) -> dict[int, DepthChoice]:
        """Kept blocks by depth; the full depth is added where the file leaves it out."""
        blocks = self.sizes.depth
        metrics, strategies = self.found["metric"], self.found["strategy"]
        removed = {self.removed(key, "strategy"): key for key in strategies}
        known = {self.removed(key, "metric"): self.metric(value, key) for key, value in metrics.items()}
        for extra in set(known) - set(removed) - {0}:
            raise self.bad(f"has a metric for {extra} removed blocks and no strategy")
        found = {blocks: DepthChoice(tuple(range(blocks)), known.get(0))}
        for count, key in removed.items():
            kept = self.zeros_and_ones(strategies[key], blocks, f"the strategy for {count} removed blocks")
            if int(kept.sum()) != blocks - count:
                raise self.bad(f"the strategy for {count} removed blocks removes {blocks - int(kept.sum())}")
            found[blocks - count] = DepthChoice(tuple(np.flatnonzero(kept).tolist()), known.get(count))
        return found

    def removed(self, key: Any, entry: str) -> int:
        if type(key) not in (int, float) or not 0 <= key < self.sizes.depth or key != int(key):
            raise self.bad(f"its '{entry}' has the key {_name(key)}, which is no number of removed blocks")
        return int(key)

    def metric(self, value: Any, key: Any) -> float:
        if type(value) is PickledArray and value.values is not None and value.values.shape == ():
            value = value.values.item()
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise self.bad(f"the metric for {_name(key)} removed blocks is no finite number")
        return float(value)

    # Width

    def by_ratio(self, entry: str, name: str) -> dict[Fraction, Any] | None:
        """What a module has at every ratio; None where it has nothing."""
        value = self.found[entry].get(name)
        if value is None:
            return None
        if type(value) is not dict or not value:
            raise self.bad(f"'{entry}' of {_name(name)} is no dict of ratios")
        found: dict[Fraction, Any] = {}
        for key, numbers in value.items():
            if type(key) not in (int, float) or not 1 / _MOST_PARTS <= key <= 1 or exact_ratio(key) in found:
                raise self.bad(
                    f"'{entry}' of {_name(name)} has the ratio {_name(key)}, which is not in [0.001, 1] or stands twice"
                )
            found[exact_ratio(key)] = numbers
        return found

    def modules(self, entry: str, linears: tuple[str, ...]) -> dict[str, dict[Fraction, Any]]:
        """By module what an entry holds, for all blocks' linears of these names; others must hold nothing."""
        wanted = [module(index, linear) for index in range(self.sizes.depth) for linear in linears]
        held = {name: self.by_ratio(entry, name) for name in self.found[entry]}
        for name, value in held.items():
            if value is not None and name not in set(wanted):
                raise self.bad(
                    f"its '{entry}' has {_name(name)}, which is none of the {', '.join(linears)} of this model"
                )
        found = {name: value for name in wanted if (value := held.get(name)) is not None}
        if entry == "bias" and not found:
            return {}
        for name in wanted:
            if name not in found:
                raise self.bad(f"its '{entry}' lacks '{name}'")
        return found

    def masks(self) -> Masks:
        """The masks at every ratio below 1; at 1, if it is there, nothing may be removed."""
        held, biases = self.modules("width_mask", _HEADS + _NEURONS), self.modules("bias", BIASED)
        ratios = set(next(iter(held.values())))
        for name, value in (*held.items(), *biases.items()):
            if set(value) != ratios:
                raise self.bad(f"'{name}' has the ratios {_list(value)} where others have {_list(ratios)}")
        found = {
            ratio: tuple(self.block(held, biases, index, ratio) for index in range(self.sizes.depth))
            for ratio in sorted(ratios, reverse=True)
        }
        for index, mask in enumerate(found.pop(FULL, ())):
            if not (mask.heads.all() and mask.neurons.all()) or any(bias.any() for bias in mask.biases or ()):
                raise self.bad(f"block {index} loses something, or has a bias, at the ratio 1")
        return Masks(found)

    def block(self, held: Mapping[str, Any], biases: Mapping[str, Any], index: int, ratio: Fraction) -> BlockMask:
        sizes, at = self.sizes, f"at the ratio {format_width(ratio)}"

        def agreed(linears: tuple[str, ...], length: int) -> NDArray[np.uint8]:
            names = [module(index, linear) for linear in linears]
            masks = [self.zeros_and_ones(held[name][ratio], length, f"the mask of '{name}' {at}") for name in names]
            for name, mask in zip(names, masks, strict=True):
                if not np.array_equal(mask, masks[0]):
                    raise self.bad(f"the masks of '{names[0]}' and '{name}' differ {at}")
            return masks[0]

        rows = agreed(_HEADS, sizes.heads * sizes.head_dim).reshape(sizes.heads, sizes.head_dim)
        if (rows != rows[:, :1]).any():
            raise self.bad(
                f"the mask of '{module(index, _HEADS[0])}' {at} does not remove whole heads of {sizes.head_dim}, the "
                f"head size of the base model"
            )
        heads, neurons = np.ascontiguousarray(rows[:, 0]), agreed(_NEURONS, sizes.neurons)
        if not (heads.any() or neurons.any()):
            raise self.bad(f"block {index} keeps neither heads nor neurons {at}, which no subnet holds")
        if not biases:
            return BlockMask(heads, neurons)
        first, second = (self.bias(biases, module(index, linear), ratio) for linear in BIASED)
        return BlockMask(heads, neurons, (first, second))

    def bias(self, biases: Mapping[str, Any], name: str, ratio: Fraction) -> NDArray[np.float32]:
        where = f"the bias of '{name}' at the ratio {format_width(ratio)}"
        numbers = self.vector(biases[name][ratio], self.sizes.hidden, where)
        if np.abs(numbers).max(initial=0) > np.finfo(np.float32).max:
            raise self.bad(f"{where} holds a number that is too large")
        return numbers.astype(np.float32)


def module(index: int, linear: str) -> str:
    """How the released code names a linear layer of a block."""
    return f"{PREFIX}.{index}.{'mlp' if linear in (*_NEURONS, 'down_proj') else 'self_attn'}.{linear}"


def _name(key: object) -> str:
    text = repr(key) if isinstance(key, str | int | float) else type(key).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _list(ratios: Any) -> str:
    return ", ".join(format_width(ratio) for ratio in sorted(ratios, reverse=True)[:8])


def check_base(model: ModelFolder) -> None:
    """Raise BadInput where the released code could not have worked on a model."""
    sizes = model.architecture
    if sizes.kv_heads != sizes.heads:
        raise BadInput(
            f"{model.path}: has {sizes.heads} query heads over {sizes.kv_heads} key/value heads; the authors' released "
            f"files are of multi-head models, so it is not their base model"
        )
    if set(matrices(sizes)) != set(LINEARS) or sizes.head_rule == "all":
        raise BadInput(f"{model.path}: is a {sizes.family}, whose linear layers are not those of the released files")


def import_released(
    folder: Path, model_name: str, output: Path, *, name: str | None = None, include_base: bool = False
) -> tuple[Checkpoint, list[str]]:
    """Turn the authors' released files into a checkpoint, in an existing, empty folder.

    Args:
        folder: what their code saved.
        model_name: the base model, a folder or a hub id.
        output: the folder to fill.
        name: what derived models call it; the folder's name where left out.
        include_base: copy the base model into the checkpoint instead of referring to it.

    Returns:
        the opened checkpoint, and what a user should know of it.

    Raises:
        BadInput: a file is missing, damaged or hostile, or is not of this model.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: is not a folder; give the one with {STRATEGY}")
    model = ModelFolder(resolve_model(model_name).resolve())
    model.check_shapes()
    check_base(model)
    strategy = _Strategy(folder / STRATEGY, model.architecture)
    depths, masks = strategy.depths(), strategy.masks()
    biased = masks.biased and bool(masks.by_width)
    if biased:
        families.compensated(model.architecture)
    kind, notes = import_adapters(folder, model.architecture, output, masks.widths)
    if not biased:
        notes.append(f"{STRATEGY} holds no biases: subnets are not compensated")
    source = {"source": STRATEGY, "digest": f"sha256:{sha256_of(folder / STRATEGY)}"}
    facts = {"tool": f"amoeba-deploy {__version__}", "imported": source}
    write_selection(output, Selection(model.digest, depths, (), facts, masks))
    made = finish_checkpoint(
        output,
        model,
        name or folder.resolve().name,
        include_base=include_base,
        hub_name=None if Path(model_name).is_dir() else model_name,
        policy="adaptive",
        bias=biased,
        multiple=1,
        widths=masks.widths,
        adapters=kind,
    )
    return made, notes
