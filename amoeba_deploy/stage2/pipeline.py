"""Stage 2 as one step: from a model, its selection and data to a one-for-all checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy import families
from amoeba_deploy.checkpoint import Checkpoint, finish_checkpoint, open_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import DTYPES
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.files import check_target, sha256_of, whole_folder
from amoeba_deploy.model_folder import ModelFolder, load_torch_model, resolve_model
from amoeba_deploy.plan import NEURON_MULTIPLE, Steps
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import write_quality
from amoeba_deploy.quality_measurement import measure_quality
from amoeba_deploy.selection import Selection, read_selection, write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import (
    SOURCE_TOKENS,
    TARGET_TOKENS,
    Batches,
    Grouping,
    LongAnswers,
    Sequences,
    check_packing,
    special_tokens,
    tokenise,
)
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.instructions import Template, read_examples, split
from amoeba_deploy.stage2.log import TuningLog
from amoeba_deploy.stage2.mixture import Mixture
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.quantised import quantise_blocks
from amoeba_deploy.stage2.result import write_base, write_mixture
from amoeba_deploy.stage2.sandwich import Space
from amoeba_deploy.stage2.saved import LOG, SavedRun, latest_state, run_folder
from amoeba_deploy.stage2.settings import Settings
from amoeba_deploy.stage2.trainer import Diverged, Trainer


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
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mixture = None
    if settings.mixture is not None:
        torch.manual_seed(settings.seed)
        mixture = Mixture(sizes, settings.mixture, settings.widths)
    elastic = ElasticModel(model, subject.selection, sizes, steps=Steps.of(sizes), bias=settings.bias, mixture=mixture)
    if settings.base_bits is not None:
        quantise_blocks(model, settings.base_bits, device)
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


@dataclass(frozen=True)
class DataSettings:
    """How data become rows; what is left out has the meaning that ``amoeba tune -h`` gives."""

    source: str
    template: Template = "alpaca"
    source_tokens: int = SOURCE_TOKENS
    target_tokens: int = TARGET_TOKENS
    long_answers: LongAnswers | None = None
    grouping: Grouping | None = None
    hold_out: float = 0.02

    def read(self, model: ModelFolder, held_out: bool) -> tuple[Sequences, str]:
        """The data as token ids of a model, and what is ``held_out`` of it as text.

        Raises:
            BadInput: they are missing, damaged, or hold nothing to learn.
        """
        data, held = read_examples(self.source), ""
        if held_out and self.hold_out:
            data, held = split(data, self.hold_out, self.template)
        bos, eos = special_tokens(model)
        sizes = model.architecture
        sequences = tokenise(
            data,
            model.tokenizer(),
            bos=bos,
            eos=eos,
            context=sizes.context,
            source=self.source_tokens,
            target=self.target_tokens,
            template=self.template,
            long_answers=self.long_answers,
        )
        if self.grouping == "pack":
            check_packing(sizes, sequences)
        return sequences, held


@dataclass(frozen=True)
class Run:
    """Everything that ``amoeba tune`` was asked for."""

    model: str
    selection: Path
    output: Path
    data: DataSettings
    settings: Settings
    progress: Progress
    quality_text: Path | None = None
    quality_tasks: Path | None = None
    save_every: int = 500
    resume: bool = False
    force: bool = False
    log: Path | None = None
    cpu: bool = False
    name: str | None = None
    include_base: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Paths that the run reads."""
        named = [Path(self.model), self.selection, Path(self.data.source), self.quality_text, self.quality_tasks]
        return [path for path in named if path is not None and path.exists()]

    def decisive(self, subject: Subject, sequences: Sequences, processes: Processes) -> dict[str, Any]:
        """All that decides the result, by the names of options."""
        return {
            **self.settings.to_json(),
            "data": sequences.facts,
            "grouping": self.data.grouping,
            "base model": subject.model.digest,
            "selection digest": sha256_of(self.selection / "selection.safetensors"),
            "number of processes": processes.count,
        }


def tune_checkpoint(run: Run) -> Checkpoint | None:
    """Tune, measure quality, and write the checkpoint; None in processes other than the first.

    Raises:
        BadInput: something that is read is missing, damaged or does not fit, a setting contradicts another, or a loss
            was not finite; what the run has saved stays.
    """
    if run.quality_tasks and not run.quality_text:
        raise BadInput("--quality-tasks needs --quality-text too: shapes are ranked by their loss on a text")
    check_target(run.output, run.force, run.inputs)
    subject = Subject.open(run.model, run.selection)
    space = subject.space(run.settings)
    if run.settings.bias:
        families.compensated(subject.model.architecture)
    sequences, held = run.data.read(subject.model, held_out=run.quality_text is None)
    processes = Processes(run.settings.mixed_precision, run.cpu)
    batches = Batches(sequences, run.settings.batch, run.settings.seed, run.data.grouping)
    batches.share(0, processes.rank, processes.count)  # refuses rows that cannot be spread over the processes
    progress = run.progress if processes.main else Progress(quiet=True)
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sequences.facts.items() if name != "digest")
    progress.say(f"data: {said}")
    progress.say(f"shapes: {len(space.depths) * len(space.widths)}, {space.smallest} to {space.largest}")
    trainer, saved = train(run, subject, sequences, batches, processes, progress)
    if saved is None:
        processes.end()
        return None
    with saved:
        processes.end()
        with whole_folder(run.output, run.force, run.inputs) as folder:
            made = write_result(
                folder,
                subject,
                trainer.elastic,
                run.settings,
                facts=sequences.facts,
                name=run.name,
                include_base=run.include_base,
            )
            shutil.copyfile(saved.log, folder / "tuning.jsonl")
            measure(run, made, held, folder, progress)
        saved.remove()
    return open_checkpoint(run.output)


def train(
    run: Run,
    subject: Subject,
    sequences: Sequences,
    batches: Batches,
    processes: Processes,
    progress: Progress,
) -> tuple[Trainer, SavedRun | None]:
    """Do all steps that are left to do; the saved run in the first process, which the caller closes."""
    settings, folder = run.settings, run_folder(run.output)
    saved = None
    if processes.main:
        wanted = run.decisive(subject, sequences, processes)
        saved = SavedRun.begin(folder, wanted, resume=run.resume, force=run.force, progress=progress)
    processes.wait()
    try:
        trainer = make_trainer(subject, batches, settings, processes)
        state = latest_state(folder, progress) if run.resume else None
        processes.wait()
        if state is not None:
            trainer.load(*state)
            progress.say(f"resuming behind step {trainer.done} of {settings.steps}")
        with TuningLog(folder / LOG, run.log, progress, settings.steps, trainer.done, main=processes.main) as log:
            for step in trainer.run(settings.steps):
                losses = {str(shape): loss for shape, loss in step.losses.items()}
                log.step(
                    step.number,
                    losses,
                    rate=step.rate,
                    gradient=step.gradient_norm,
                    tokens=step.tokens,
                    seconds=step.seconds,
                )
                if step.number % run.save_every == 0 or step.number == settings.steps:
                    tensors = trainer.state()
                    if saved is not None:
                        saved.write(step.number, tensors)
    except Diverged as error:
        if saved is not None:
            saved.close()
        kept = trainer.done // run.save_every * run.save_every
        last = f"the state behind step {kept} is kept in {folder}" if kept else "no state was saved before it"
        raise Diverged(f"{error}; {last}; begin again with a lower --lr, or with other data") from None
    except BaseException:
        if saved is not None:
            saved.close()
        raise
    return trainer, saved


def measure(run: Run, made: Checkpoint, held: str, folder: Path, progress: Progress) -> None:
    """Measure the quality of every shape of the grid, on the text asked for or on what was held out, and write it."""
    if run.quality_text is not None:
        write_quality(folder, measure_quality(made, run.quality_text, run.quality_tasks, progress=progress))
        return
    if not held:
        progress.say("note: no --quality-text was given and nothing was held out, so no quality was measured")
        return
    with tempfile.TemporaryDirectory(prefix="amoeba-held-") as work:
        text = Path(work, "held-out.txt")
        text.write_text(held, encoding="utf-8")
        try:
            found = measure_quality(made, text, None, progress=progress)
        except BadInput as error:
            progress.say(f"note: no quality was measured on the data held out ({error}); give --quality-text")
            return
    progress.say(f"quality was measured on the last {run.data.hold_out:.0%} of the data, which were not tuned on")
    write_quality(folder, found)


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
        write_mixture(output, elastic, elastic.mixture, settings.adapter_dtype)
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
