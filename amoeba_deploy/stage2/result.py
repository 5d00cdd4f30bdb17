"""From a checkpoint to an elastic model, and from what was tuned to the parts of a checkpoint.

An elastic model holds the units of each block in the order of their scores; files hold them as the base model does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from amoeba_deploy.adapters import GATE, NOISE, Adapters, matrices, tensor_names, write_adapters
from amoeba_deploy.checkpoint import Checkpoint, finish_checkpoint
from amoeba_deploy.extraction.folder import SHARD_BYTES, copy_files, other_files
from amoeba_deploy.families import family_of
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.selection import Selection, write_selection
from amoeba_deploy.stage2.elastic import ElasticModel, axis_order, inverse
from amoeba_deploy.stage2.mixture import Mixture, MixtureSettings
from amoeba_deploy.stage2.selected import Selected
from amoeba_deploy.stage2.settings import ExpertDtype, Settings
from amoeba_deploy.tensors import Array, from_float32, made_source, write_model_tensors

_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
SAFETENSORS_OF: dict[ExpertDtype, Literal["F32", "BF16", "F16"]] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def elastic_model(checkpoint: Checkpoint) -> ElasticModel:
    """A checkpoint as one model in memory that runs as any of its shapes, in float32 and for evaluation.

    Raises:
        BadInput: it was imported with masks instead of scores.
    """
    mixture = None if checkpoint.adapters is None else _mixture_of(checkpoint, checkpoint.adapters)
    elastic = ElasticModel(
        load_torch_model(checkpoint.model.path),
        checkpoint.selection,
        checkpoint.architecture,
        steps=checkpoint.steps,
        policy=checkpoint.policy,
        bias=checkpoint.bias,
        mixture=mixture,
    )
    if checkpoint.adapters is not None and mixture is not None:
        names = [name for name in checkpoint.adapters.infos if name not in NOISE or mixture.gate is not None]
        stored = {name: torch.from_numpy(checkpoint.adapters.tensor(name)) for name in names}
        mixture.load(ordered(elastic, stored))
    return elastic.requires_grad_(False).eval()


def _mixture_of(checkpoint: Checkpoint, adapters: Adapters) -> Mixture:
    inner = len(adapters.gate[GATE[0]]) if adapters.gate else 16
    settings = MixtureSettings(
        adapters.experts,
        adapters.rank,
        adapters.alpha,
        adapters.top_k,
        adapters.mix,
        gated=bool(adapters.gate),
        inner=inner,
    )
    return Mixture(checkpoint.architecture, settings, adapters.widths)


def ordered(
    elastic: ElasticModel, tensors: Mapping[str, torch.Tensor], *, back: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of the mixture with their units in the elastic model's order, or ``back`` in the base model's."""
    sizes, found = elastic.sizes, dict(tensors)
    axes = family_of({"model_type": sizes.family}).block_tensors(sizes)
    for block, order in enumerate(elastic.orders):
        for matrix in matrices(sizes):
            outputs, inputs = axes[f"{matrix}.weight"]
            # a is [experts, rank, inputs], b is [experts, outputs, rank]
            for name, place, axis in zip(tensor_names(block, matrix), (2, 1), (inputs, outputs), strict=True):
                index = axis_order(sizes, axis, order)
                if index is not None:
                    index = (inverse(index) if back else index).to(found[name].device)
                    found[name] = found[name].index_select(place, index)
    return found


def write_mixture(folder: Path, elastic: ElasticModel, mixture: Mixture, dtype: ExpertDtype = "fp32") -> None:
    """Write ``smol.safetensors``; ``dtype`` is that of the experts, the gate is always float32."""
    settings = mixture.settings
    tensors = {name: tensor.detach().cpu() for name, tensor in mixture.tensors().items()}
    arrays = {name: np.ascontiguousarray(t.float().numpy()) for name, t in ordered(elastic, tensors, back=True).items()}
    write_adapters(
        folder,
        arrays,
        rank=settings.rank,
        alpha=settings.alpha,
        top_k=settings.top_k,
        widths=mixture.widths,
        mix=settings.mix,
        dtype=SAFETENSORS_OF[dtype],
    )


def base_order(elastic: ElasticModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the elastic model, such as ``model.layers.3.mlp.up_proj.weight``, as its base model has it."""
    found = _BLOCK_TENSOR.fullmatch(name)
    if found is None:
        return tensor
    sizes, order = elastic.sizes, elastic.orders[int(found[1])]
    for place, axis in enumerate(family_of({"model_type": sizes.family}).block_tensors(sizes)[found[2]]):
        index = axis_order(sizes, axis, order)
        if index is not None:
            tensor = tensor.index_select(place, inverse(index).to(tensor.device))
    return tensor


def write_base(
    folder: Path, elastic: ElasticModel, weights: Mapping[str, torch.Tensor], base: ModelFolder
) -> ModelFolder:
    """Write tuned weights of a whole model, in the elastic model's order, as a folder like its base model's.

    Dtypes are the base model's.
    """

    def values(name: str) -> Callable[[], Array]:
        def made() -> Array:
            ordered_back = base_order(elastic, name, weights[name].detach()).float().cpu().numpy()
            return from_float32(np.ascontiguousarray(ordered_back), base.tensors.info(name).dtype)

        return made

    infos = {name: base.tensors.info(name) for name in base.tensors.infos if name in weights}
    sources = {name: made_source(info.dtype, info.shape, values(name)) for name, info in infos.items()}
    write_model_tensors(folder, sources, SHARD_BYTES, {"format": "pt"})
    copy_files(base, (base.path / "config.json", *other_files(base)), folder)
    return ModelFolder(folder)


def write_result(
    output: Path,
    selected: Selected,
    elastic: ElasticModel,
    settings: Settings,
    *,
    weights: Mapping[str, torch.Tensor],
    facts: dict[str, Any],
    name: str | None = None,
    include_base: bool = False,
) -> Checkpoint:
    """Write what was tuned as a checkpoint without quality, into an existing, empty folder, and open it.

    Where all weights were tuned, they are the new base model, and the selection is said to be of it.
    """
    selection, model = selected.selection, selected.model
    if elastic.mixture is not None:
        write_mixture(output, elastic, elastic.mixture, settings.adapter_dtype)
    else:
        (base := output / "base").mkdir()
        model = write_base(base, elastic, weights, model)
        origin = {"selected_on": selection.base_digest}
        selection = Selection(model.digest, selection.depths, selection.blocks, selection.facts | origin)
    write_selection(output, selection)
    return finish_checkpoint(
        output,
        model,
        name or Path(selected.name).name,
        include_base=include_base,
        hub_name=None if Path(selected.name).is_dir() or elastic.mixture is None else selected.name,
        policy=settings.policy,
        bias=settings.bias,
        widths=sorted({Fraction(1), *selected.space(settings).widths}, reverse=True),
        adapters=None if elastic.mixture is None else settings.adapter,
        tuning={"settings": settings.to_json(), "data": facts},
    )
