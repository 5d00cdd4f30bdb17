"""Extraction: dense weights of one plan, out of a checkpoint into a folder that stock engines load.

Tensors stream one after the other from shards through a cut along their coupled axes into output shards; nothing is
masked. What a checkpoint learnt beyond its base model's weights goes in on the way: low-rank changes of a tuned one,
and biases that compensate for what was removed.

Blocks of different widths are zero-padded to the widest (``layout="uniform"``), which is exact: a padded neuron has
zero gate, up and down weights, a padded head zero queries, keys, values and o_proj columns. ``layout="ragged"`` leaves
every block its own size, and writes a modelling file beside the weights (ragged.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy import __version__, families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.cutting import LowRank, axis_cut, block_cuts, cut_source
from amoeba_deploy.extraction.model_card import model_card
from amoeba_deploy.extraction.ragged import (
    MODELLING_FILE,
    BlockSizes,
    Layout,
    block_tensors,
    plan_sizes,
    ragged_config,
    refuse_ragged,
)
from amoeba_deploy.families.family import OUTPUT_BIASES
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import SUBNET_FORMAT, BlockPlan, Plan
from amoeba_deploy.tensors import (
    CONFIG_DTYPES,
    Array,
    TensorInfo,
    TensorSource,
    from_float32,
    made_source,
    write_model_tensors,
    write_tensors,
)

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precisions of dense weights, and how a config spells them."""
SHARD_BYTES = 5 * 10**9
"""The most data in one file of weights, unless told otherwise; transformers' own limit until its version 5."""


@dataclass(frozen=True)
class Learnt:
    """What a checkpoint adds to its base model's weights in one plan; nothing unless told otherwise."""

    low_rank: Callable[[int, str], LowRank | None] = lambda _block, _matrix: None
    """For a block of the full model and a matrix of it, such as ``mlp.up_proj``, its change."""
    biases: Callable[[BlockPlan], tuple[Array, Array]] | None = None
    """For a block the compensating biases [hidden] of o_proj and down_proj, in float32; None without compensation."""


NOTHING = Learnt()


@dataclass(frozen=True)
class Extraction:
    """What an extraction wrote: the folder, its plan, the widest block's sizes, seconds, and bytes of weights."""

    path: Path
    plan: Plan
    subnet: Architecture
    seconds: float
    bytes: int
    layout_bytes: dict[str, int | None] | None
    """Bytes of weights in the uniform and in the ragged layout, where blocks differ."""
    quality: dict[str, Any] | None
    """What is known of its quality, as subnet.json holds it."""


def _zeros(dtype: str, length: int) -> TensorSource:
    return made_source(dtype, (length,), lambda: from_float32(np.zeros(length, np.float32), dtype))


def subnet_tensors(
    model: ModelFolder,
    plan: Plan,
    dtype: str,
    layout: Layout = "uniform",
    learnt: Learnt = NOTHING,
    blocks: Sequence[BlockSizes] | None = None,
) -> dict[str, TensorSource]:
    """All tensors of a subnet, in the order in which decoding reads them; values are made when they are written.

    In the ragged layout ``blocks`` are sizes to pad each block to; left out, none is padded.
    """
    sizes, tensors = model.architecture, model.tensors
    own = model.family.block_tensors(sizes)
    compensated = learnt.biases is not None
    if layout == "uniform":
        held = written_sizes(plan, sizes, compensated)
        shared = families.family_of({"model_type": held.family}).block_tensors(held)
        blocks = [BlockSizes(held.heads, held.kv_heads, held.neurons)] * len(plan.blocks)
    sized = blocks or plan_sizes(plan)

    def whole(name: str) -> TensorSource:
        return cut_source(tensors, name, (None,) * len(tensors.info(name).shape), dtype)

    def block_sources(block: BlockPlan, position: int) -> Iterator[tuple[str, TensorSource]]:
        wide = sized[position]
        cuts = block_cuts(sizes, block, wide.kv_heads, wide.heads, wide.neurons)
        wanted = shared if layout == "uniform" else block_tensors(model.family, sizes, wide, compensated)
        for name, axes in wanted.items():
            if name in OUTPUT_BIASES and (learnt.biases or not _units_behind(block, name)):
                source = _output_bias(model, block, name, dtype, learnt)
            elif name in own:
                matrix = name.removesuffix(".weight")
                source = cut_source(
                    tensors,
                    f"model.layers.{block.index}.{name}",
                    tuple(axis_cut(sizes, axis, cuts) for axis in axes),
                    dtype,
                    partial(learnt.low_rank, block.index, matrix),
                )
            else:
                (axis,) = axes
                cut = axis_cut(sizes, axis, cuts)
                source = _zeros(dtype, sizes.extent(axis) if cut is None else cut.length)
            yield f"model.layers.{position}.{name}", source

    sources = {"model.embed_tokens.weight": whole("model.embed_tokens.weight")}
    for position, block in enumerate(plan.blocks):
        sources |= block_sources(block, position)
    for name in model.family.other_tensors(sizes)[1:]:
        sources[name] = whole(name)
    return sources


def _units_behind(block: BlockPlan, name: str) -> tuple[int, ...]:
    return block.kv_heads if name.startswith("self_attn") else block.neurons


def _output_bias(model: ModelFolder, block: BlockPlan, name: str, dtype: str, learnt: Learnt) -> TensorSource:
    """A sublayer's constant output: the model's own while any unit is kept, and what compensates for removed ones."""
    hidden = model.architecture.hidden

    def values() -> Array:
        found = np.zeros(hidden, np.float32)
        full = f"model.layers.{block.index}.{name}"
        if name in model.family.block_tensors(model.architecture) and _units_behind(block, name):
            found += model.tensors.float32(full)
        if learnt.biases is not None:
            found += learnt.biases(block)[OUTPUT_BIASES.index(name)]
        return from_float32(found, dtype)

    return made_source(dtype, (hidden,), values)


def written_sizes(plan: Plan, sizes: Architecture, compensated: bool) -> Architecture:
    """The sizes of a plan's dense subnet, in the family whose class holds it; raises BadInput where there is none."""
    subnet = plan.subnet(sizes)
    held = families.compensated(subnet) if compensated else subnet
    refused = families.refusal(held)
    if refused:
        raise BadInput(f"the subnet cannot be written: {refused}")
    return held


def other_files(model: ModelFolder) -> Iterator[Path]:
    """What a derived model takes over as it is: tokenizer and generation settings."""
    yield from model.tokenizer_files()
    generation = model.path / "generation_config.json"
    if generation.is_file():
        yield generation


def copy_files(model: ModelFolder, files: Iterable[Path], output: Path) -> None:
    """Copy files of a model's folder as they are to the same places in another folder."""
    for file in files:
        target = output / file.relative_to(model.path)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())


def check_plan(model: ModelFolder, plan: Plan) -> None:
    """Raise BadInput where a plan names what the model does not have."""
    refuse_ragged(model.config, model.path)
    sizes = model.architecture
    last = max(block.index for block in plan.blocks)
    if last >= sizes.depth or plan.shape.depth > sizes.depth:
        raise BadInput(f"the plan keeps block {max(last, plan.shape.depth - 1)}; the model has {sizes.depth} blocks")
    cut = [block.index for block in plan.blocks if 0 < len(block.kv_heads) < sizes.kv_heads]
    if sizes.head_rule == "all" and cut:
        raise BadInput(
            f"the plan keeps some of the heads of block {cut[0]}; from this {sizes.family} only blocks, whole "
            f"sublayers and neurons can be removed"
        )
    if not all(plan.widest):
        missing = "attention" if not plan.widest[0] else "feed-forward"
        raise BadInput(f"the plan of {plan.shape} keeps no {missing} in any block, which no class holds; keep more")


def model_dtype(model: ModelFolder) -> str:
    """The dtype that a model's config names, as it spells it."""
    return str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")


def extract(
    model: ModelFolder,
    plan: Plan,
    output: Path,
    *,
    dtype: str | None = None,
    layout: Layout = "uniform",
    blocks: Sequence[BlockSizes] | None = None,
    learnt: Learnt = NOTHING,
    facts: dict[str, Any] | None = None,
    shard_bytes: int | None = SHARD_BYTES,
    quality: Callable[[Path], dict[str, Any] | None] = lambda _: None,
) -> Extraction:
    """Write the dense subnet of a plan into an existing, empty folder.

    Args:
        model: the checkpoint's base model.
        plan: what to keep.
        output: the folder to fill.
        dtype: float32, float16 or bfloat16; the model's own where left out.
        layout: ``uniform`` pads blocks of different widths, ``ragged`` does not.
        blocks: in the ragged layout, sizes to pad each block to (native_layouts.py); none is padded where left out.
        learnt: what the checkpoint adds to the model's own weights.
        facts: about the checkpoint for subnet.json (digest, name, ...).
        shard_bytes: the most data in one file of weights; None stands for one of the blocks, and one of the rest.
        quality: gives what is known of the subnet's quality, once its weights are written.

    Raises:
        BadInput: the model lacks a tensor, or no stock class can hold the subnet.
    """
    began = time.perf_counter()
    check_plan(model, plan)
    wanted = dtype or model_dtype(model)
    if wanted not in CONFIG_DTYPES:
        raise BadInput(f"the dtype '{wanted}' is none of {', '.join(CONFIG_DTYPES)}")
    sources = subnet_tensors(model, plan, CONFIG_DTYPES[wanted], layout, learnt, blocks)
    write_json(output / "config.json", written_config(model, plan, wanted, layout, learnt, blocks))
    copy_files(model, other_files(model), output)
    if layout == "ragged":
        (output / MODELLING_FILE.name).write_bytes(MODELLING_FILE.read_bytes())
    threads = min(len(os.sched_getaffinity(0)), 4)
    size = write_model_tensors(output, sources, shard_bytes, {"format": "pt"}, threads)
    seconds = time.perf_counter() - began
    said = {
        "format": SUBNET_FORMAT,
        "tool": f"amoeba-deploy {__version__}",
        **(facts or {}),
        "layout": layout,
        "dtype": wanted,
        "bias": "off" if learnt.biases is None else "on",
        "parameters": sum(int(np.prod(source.shape)) for source in sources.values()),
        "width_reached": round(plan.width_reached(model.architecture), 6),
        "quality": quality(output),
    }
    layout_bytes = compared_bytes(model, plan, wanted, learnt, blocks)
    if layout_bytes:
        said["layout_bytes"] = layout_bytes
    write_json(output / "subnet.json", said | {k: v for k, v in plan.to_json().items() if k != "format"})
    (output / "README.md").write_text(model_card(model, plan, said), encoding="utf-8")
    compensated = learnt.biases is not None and layout == "uniform"
    subnet = written_sizes(plan, model.architecture, compensated)
    return Extraction(output, plan, subnet, seconds, size, layout_bytes, said["quality"])


def written_config(
    model: ModelFolder,
    plan: Plan,
    dtype: str,
    layout: Layout,
    learnt: Learnt,
    blocks: Sequence[BlockSizes] | None = None,
) -> dict[str, Any]:
    """The config of a subnet in a layout; raises BadInput where the uniform one has no stock class."""
    compensated = learnt.biases is not None
    if layout == "uniform":
        subnet = written_sizes(plan, model.architecture, compensated)
        held_by = families.family_of({"model_type": subnet.family})
        return held_by.subnet_config(model.config, plan.kept_blocks, subnet, dtype)
    # With all heads, which the model's own class holds; those of each block are in ``block_sizes`` alone.
    full = replace(model.architecture, depth=len(plan.blocks))
    config = model.family.subnet_config(model.config, plan.kept_blocks, full, dtype)
    return ragged_config(config, blocks or plan_sizes(plan), compensated)


def compared_bytes(
    model: ModelFolder, plan: Plan, dtype: str, learnt: Learnt, blocks: Sequence[BlockSizes] | None = None
) -> dict[str, int | None] | None:
    """Bytes of weights in either layout, where blocks differ; None for one that no stock class holds."""
    if not plan.is_ragged:
        return None

    def weights(layout: Layout) -> int | None:
        try:
            sources = subnet_tensors(model, plan, CONFIG_DTYPES[dtype], layout, learnt, blocks)
        except BadInput:
            return None
        return sum(source.length for source in sources.values())

    return {"uniform": weights("uniform"), "ragged": weights("ragged")}


def copy_other_files(model: ModelFolder, output: Path) -> None:
    """Everything of a model's folder that an artefact needs beside weights: config, tokenizer, generation settings."""
    if output == model.path:
        return
    subnet = [model.path / "subnet.json"] if (model.path / "subnet.json").is_file() else []
    copy_files(model, (model.path / "config.json", *subnet, *other_files(model)), output)
    if model.blocks is not None:
        (output / MODELLING_FILE.name).write_bytes(MODELLING_FILE.read_bytes())


def copy_model(
    model: ModelFolder, output: Path, dtype: str, values: Callable[[str, TensorInfo], Array] | None = None
) -> None:
    """The whole model in another folder, its weights in one file and in ``dtype`` (as a config spells it).

    ``values`` makes a tensor's new float32 values from its name; left out, they are the model's own.
    """
    wanted = CONFIG_DTYPES[dtype]

    def source(name: str, info: TensorInfo) -> TensorSource:
        if values is not None:
            return made_source(wanted, info.shape, lambda: from_float32(values(name, info), wanted))
        return cut_source(model.tensors, name, (None,) * len(info.shape), wanted)

    copy_other_files(model, output)
    write_json(output / "config.json", model.config | {"dtype": dtype, "torch_dtype": dtype})
    names = [
        f"model.layers.{index}.{name}"
        for index in range(model.architecture.depth)
        for name in model.block_shapes(index)
    ]
    names += model.family.other_tensors(model.architecture)
    sources = {name: source(name, model.tensors.info(name)) for name in names}
    write_tensors(output / "model.safetensors", sources, {"format": "pt"})
