"""From a checkpoint to an elastic model, and from what was tuned to the parts of a checkpoint.

An elastic model holds the units of each block in the order of their scores; files hold them as the base model does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from amoeba_deploy.adapters import NOISE, Adapters, matrices, tensor_names, write_adapters
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.extraction.folder import SHARD_BYTES, other_files
from amoeba_deploy.families import family_of
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.stage2.elastic import ElasticModel, axis_order, inverse, reorder
from amoeba_deploy.stage2.mixture import Mixture, MixtureSettings
from amoeba_deploy.tensors import Array, from_float32, made_source, write_model_tensors

ExpertDtype = Literal["fp32", "bf16", "fp16"]
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
    settings = MixtureSettings(
        adapters.experts, adapters.rank, adapters.alpha, adapters.top_k, adapters.mix, gated=bool(adapters.gate)
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


def write_base(folder: Path, elastic: ElasticModel, base: ModelFolder) -> ModelFolder:
    """Write the tuned weights of a whole model as a folder like its base model's, in the base model's dtypes.

    The elastic model's units are put back in the base model's order, in place.
    """
    reorder(elastic.model, elastic.sizes, elastic.orders, back=True)
    parameters = dict(elastic.model.named_parameters())

    def values(name: str) -> Callable[[], Array]:
        return lambda: from_float32(parameters[name].detach().float().cpu().numpy(), base.tensors.info(name).dtype)

    names = [name for name in base.tensors.infos if name in parameters]
    sources = {
        name: made_source(base.tensors.info(name).dtype, base.tensors.info(name).shape, values(name)) for name in names
    }
    write_model_tensors(folder, sources, SHARD_BYTES, {"format": "pt"})
    for file in (base.path / "config.json", *other_files(base)):
        (folder / file.name).write_bytes(file.read_bytes())
    return ModelFolder(folder)
