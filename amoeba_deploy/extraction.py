"""Extraction: dense weights of one plan, out of a checkpoint's base model into a folder that stock engines load.

Tensors stream one after the other from memory-mapped shards through a cut along their coupled axes into one output
file; nothing is masked and nothing is computed but, where asked for, a change of dtype. Blocks of different widths
are zero-padded to the widest (``layout="uniform"``), which is exact: a padded neuron has zero gate, up and down
weights, a padded head zero queries, keys, values and o_proj columns. ``layout="ragged"`` leaves every block its own
size, for engines that read sizes from the tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy import __version__
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families.family import Axes, Unit
from amoeba_deploy.files import write_json
from amoeba_deploy.model_card import model_card
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan
from amoeba_deploy.tensors import CONFIG_DTYPES, Array, TensorInfo, TensorSource, convert, write_tensors

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of dense weights, and how a config spells them."""
SUBNET_FORMAT = "amoeba.subnet/1"
Layout = Literal["uniform", "ragged"]
Cut = dict[Unit, NDArray[np.int64]]
"""For each unit the rows of the full tensor that are kept; -1 stands for a row of zeros."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction wrote: the folder, its plan, the subnet's sizes, seconds, and bytes of weights."""

    path: Path
    plan: Plan
    subnet: Architecture
    seconds: float
    bytes: int


def _padded(indices: tuple[int, ...], count: int) -> NDArray[np.int64]:
    return np.array([*indices, *[-1] * (count - len(indices))], dtype=np.int64)


def _rows(units: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Row numbers of whole heads: head u owns rows u*size .. u*size+size-1; -1 stays -1."""
    rows = units[:, None] * size + np.arange(size)
    return np.where(units[:, None] < 0, -1, rows).reshape(-1)


def block_cut(architecture: Architecture, block: BlockPlan, kv_heads: int, neurons: int) -> Cut:
    """Which rows each unit keeps in one block, padded with -1 to ``kv_heads`` groups and ``neurons``."""
    groups, heads = _padded(block.kv_heads, kv_heads), _padded(block.heads, kv_heads * architecture.group)
    return {
        "query": _rows(heads, architecture.head_dim),
        "key_value": _rows(groups, architecture.head_dim),
        "neuron": _padded(block.neurons, neurons),
    }


def cut_tensor(array: Array, axes: Axes, cut: Cut) -> Array:
    """The kept rows and columns of one tensor; the array itself where nothing is cut."""
    for axis, unit in enumerate(axes):
        if unit is None or np.array_equal(cut[unit], np.arange(array.shape[axis])):
            continue
        array = np.take(array, np.maximum(cut[unit], 0), axis=axis)
        padding = cut[unit] < 0
        if padding.any():
            array[(slice(None),) * axis + (padding,)] = 0
    return array


OUTPUT_BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""What a sublayer adds whatever its units give; it goes with the whole sublayer."""


def _units_behind(block: BlockPlan, name: str) -> tuple[int, ...]:
    return block.kv_heads if name.startswith("self_attn") else block.neurons


def _zeros(source: TensorSource) -> TensorSource:
    return replace(source, values=lambda: np.zeros_like(source.values()))


def subnet_tensors(model: ModelFolder, plan: Plan, dtype: str, layout: Layout = "uniform") -> dict[str, TensorSource]:
    """All tensors of a subnet, in the order in which decoding reads them; values are made when they are written."""
    sizes, tensors = model.architecture, model.tensors

    def source(name: str, axes: Axes, cut: Cut) -> TensorSource:
        info = tensors.info(name)
        shape = tuple(len(cut[unit]) if unit else extent for unit, extent in zip(axes, info.shape, strict=True))
        return TensorSource(dtype, shape, lambda: convert(cut_tensor(tensors.raw(name), axes, cut), info.dtype, dtype))

    sources = {"model.embed_tokens.weight": source("model.embed_tokens.weight", (None, None), {})}
    for position, block in enumerate(plan.blocks):
        widths = plan.widest if layout == "uniform" else (len(block.kv_heads), len(block.neurons))
        cut = block_cut(sizes, block, *widths)
        for name, axes in model.family.block_tensors(sizes).items():
            new = f"model.layers.{position}.{name}"
            sources[new] = source(f"model.layers.{block.index}.{name}", axes, cut)
            if name in OUTPUT_BIASES and not _units_behind(block, name):
                sources[new] = _zeros(sources[new])
    for name in model.family.other_tensors(sizes)[1:]:
        sources[name] = source(name, (None,) * len(tensors.info(name).shape), {})
    return sources


def _other_files(model: ModelFolder) -> Iterator[Path]:
    yield from model.tokenizer_files()
    generation = model.path / "generation_config.json"
    if generation.is_file():
        yield generation


def check_plan(model: ModelFolder, plan: Plan) -> None:
    """Raise BadInput where a plan names what the model does not have."""
    sizes = model.architecture
    last = max(block.index for block in plan.blocks)
    if last >= sizes.depth or plan.shape.depth > sizes.depth:
        raise BadInput(f"the plan keeps block {max(last, plan.shape.depth - 1)}; the model has {sizes.depth} blocks")
    if not all(plan.widest):
        missing = "attention" if not plan.widest[0] else "feed-forward"
        raise BadInput(f"the plan of {plan.shape} keeps no {missing} in any block, which no class holds; keep more")


def extract(
    model: ModelFolder,
    plan: Plan,
    output: Path,
    *,
    dtype: str | None = None,
    layout: Layout = "uniform",
    origin: dict[str, Any] | None = None,
) -> Extraction:
    """Write the dense subnet of a plan into an existing, empty folder.

    Args:
        model: the checkpoint's base model.
        plan: what to keep.
        output: the folder to fill.
        dtype: float32, float16 or bfloat16; the model's own where left out.
        layout: ``uniform`` pads blocks of different widths, ``ragged`` does not.
        origin: facts about the checkpoint for subnet.json (digest, name).

    Raises:
        BadInput: the model lacks a tensor, or no stock class can hold the subnet.
    """
    began = time.perf_counter()
    check_plan(model, plan)
    wanted = dtype or str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
    if wanted not in CONFIG_DTYPES:
        raise BadInput(f"the dtype '{wanted}' is none of {', '.join(CONFIG_DTYPES)}")
    subnet = plan.subnet(model.architecture)
    config = model.family.subnet_config(model.config, plan.kept_blocks, subnet, wanted)
    write_json(output / "config.json", config)
    for file in _other_files(model):
        (output / file.name).write_bytes(file.read_bytes())
    sources = subnet_tensors(model, plan, CONFIG_DTYPES[wanted], layout)
    size = write_tensors(output / "model.safetensors", sources, {"format": "pt"})
    parameters = sum(int(np.prod(source.shape)) for source in sources.values())
    facts = {
        "format": SUBNET_FORMAT,
        "tool": f"amoeba-deploy {__version__}",
        **(origin or {}),
        "layout": layout,
        "dtype": wanted,
        "parameters": parameters,
        "width_reached": round(plan.width_reached(model.architecture), 6),
    }
    write_json(output / "subnet.json", facts | {k: v for k, v in plan.to_json().items() if k != "format"})
    (output / "README.md").write_text(model_card(model, plan, facts), encoding="utf-8")
    return Extraction(output, plan, subnet, time.perf_counter() - began, size)


def copy_other_files(model: ModelFolder, output: Path) -> None:
    """Everything of a model's folder that an artefact needs beside weights: config, tokenizer, generation settings."""
    if output == model.path:
        return
    subnet = [model.path / "subnet.json"] if (model.path / "subnet.json").is_file() else []
    for file in (model.path / "config.json", *subnet, *_other_files(model)):
        (output / file.name).write_bytes(file.read_bytes())


def copy_model(
    model: ModelFolder, output: Path, dtype: str, values: Callable[[str, TensorInfo], Array] | None = None
) -> None:
    """The whole model in another folder, its weights in one file and in ``dtype`` (as a config spells it).

    ``values`` makes a tensor's new float32 values from its name; left out, they are the model's own.
    """
    wanted = CONFIG_DTYPES[dtype]

    def source(name: str, info: TensorInfo) -> TensorSource:
        if values is not None:
            return TensorSource(wanted, info.shape, lambda: convert(values(name, info), "F32", wanted))
        return TensorSource(wanted, info.shape, lambda: convert(model.tensors.raw(name), info.dtype, wanted))

    copy_other_files(model, output)
    write_json(output / "config.json", model.config | {"dtype": dtype, "torch_dtype": dtype})
    names = [
        f"model.layers.{index}.{name}"
        for index in range(model.architecture.depth)
        for name in model.family.block_tensors(model.architecture)
    ]
    names += model.family.other_tensors(model.architecture)
    sources = {name: source(name, model.tensors.info(name)) for name in names}
    write_tensors(output / "model.safetensors", sources, {"format": "pt"})
