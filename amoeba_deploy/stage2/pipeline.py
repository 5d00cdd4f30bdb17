"""Stage 2 as one step: from a model, its selection and data to a one-for-all checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy import families
from amoeba_deploy.checkpoint import Checkpoint, finish_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import DTYPES
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.model_folder import ModelFolder, load_torch_model, resolve_model
from amoeba_deploy.plan import NEURON_MULTIPLE, Steps
from amoeba_deploy.selection import Selection, read_selection, write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import Batches
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.mixture import Mixture
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.quantised import quantise_blocks
from amoeba_deploy.stage2.result import write_base, write_mixture
from amoeba_deploy.stage2.sandwich import Space
from amoeba_deploy.stage2.settings import Settings
from amoeba_deploy.stage2.trainer import Trainer


@dataclass(frozen=True)
class Subject:
    """What is tuned: a base model and the selection that was made of it, both checked."""

    name: str
    """As the user gave it: a folder or a hub id."""
    model: ModelFolder
    selection: Selection

    @classmethod
    def open(cls, name: str, selection_folder: Path) -> Subject:
        """Open both.

        Raises:
            BadInput: one is missing or damaged, or the selection was made for another model.
        """
        model = ModelFolder(resolve_model(name).resolve())
        refuse_ragged(model.config, model.path)
        model.check_shapes()
        selection = read_selection(selection_folder, model.architecture)
        if selection.base_digest != model.digest:
            raise BadInput(
                f"{selection_folder}: was made for a model of digest {selection.base_digest[:19]}..., "
                f"{name} has {model.digest[:19]}...; select again for this model"
            )
        return cls(name, model, selection)

    def space(self, settings: Settings) -> Space:
        """The shapes to tune: all depths of the selection at the widths asked for, or one alone.

        Raises:
            BadInput: the selection does not cover the one.
        """
        if settings.shape is None:
            return Space(tuple(sorted(self.selection.depths)), settings.widths, settings.policy)
        shape = Shape.parse(settings.shape, settings.policy)
        self.selection.choice(shape.depth)
        return Space((shape.depth,), (shape.width,), settings.policy)


def make_elastic(subject: Subject, settings: Settings, device: torch.device) -> ElasticModel:
    """The elastic model of a run, on a device, with experts whose initial values follow from the seed."""
    sizes = subject.model.architecture
    if settings.bias:
        families.compensated(sizes)
    frozen = settings.mixture is not None
    # On a GPU a frozen base is held as it is computed with; weights that are tuned need all their bits.
    dtype = DTYPES["bf16"] if frozen and settings.mixed_precision == "bf16" and device.type != "cpu" else DTYPES["fp32"]
    model: Any = load_torch_model(subject.model.path, dtype).requires_grad_(not frozen)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mixture = None
    if settings.mixture is not None:
        torch.manual_seed(settings.seed)
        mixture = Mixture(sizes, settings.mixture, settings.widths)
    elastic = ElasticModel(model, subject.selection, sizes, steps=Steps.of(sizes), bias=settings.bias, mixture=mixture)
    if settings.base_bits is not None:
        quantise_blocks(model, settings.base_bits)
    return elastic.to(device)


def tuned_parameters(elastic: ElasticModel) -> dict[str, torch.nn.Parameter]:
    """What a run tunes, by name: the experts and the gate, or all weights of the model."""
    owner = elastic.model if elastic.mixture is None else elastic.mixture
    found = {name: parameter for name, parameter in owner.named_parameters() if parameter.requires_grad}
    if not found:
        raise BadInput("the model has no weights to tune")
    return found


def make_trainer(subject: Subject, batches: Batches, settings: Settings, processes: Processes) -> Trainer:
    """A run at its first step."""
    elastic = make_elastic(subject, settings, processes.device)
    processes.shard(elastic.model.model.layers)
    return Trainer(elastic, tuned_parameters(elastic), batches, subject.space(settings), settings, processes)


def write_result(
    output: Path,
    subject: Subject,
    elastic: ElasticModel,
    settings: Settings,
    *,
    facts: dict[str, Any],
    name: str | None = None,
    include_base: bool = False,
) -> Checkpoint:
    """Write what was tuned as a checkpoint without quality, into an existing, empty folder, and open it.

    Where all weights were tuned, they are the new base model, and the selection is said to be of it.
    """
    selection, model = subject.selection, subject.model
    if elastic.mixture is not None:
        write_mixture(
            output, elastic, elastic.mixture, {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[settings.adapter_dtype]
        )
    else:
        (base := output / "base").mkdir()
        tuned = write_base(base, elastic, model)
        selected = {"selected_on": selection.base_digest}
        selection = Selection(tuned.digest, selection.depths, selection.blocks, selection.facts | selected)
        model = tuned
    write_selection(output, selection)
    return finish_checkpoint(
        output,
        model,
        name or Path(subject.name).name,
        include_base=include_base,
        hub_name=None if Path(subject.name).is_dir() or elastic.mixture is None else subject.name,
        policy=settings.policy,
        bias=settings.bias,
        multiple=NEURON_MULTIPLE,
        widths=sorted(settings.widths, reverse=True),
        adapters=None if elastic.mixture is None else settings.adapter,
        tuning={"settings": settings.to_json(), "data": facts},
    )
