"""Stage 2 as one step: from a model, its selection and data to a one-for-all checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy import families
from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, read_questions, text_rows
from amoeba_deploy.extraction.folder import DTYPES
from amoeba_deploy.files import check_target, sha256_of, whole_folder
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.plan import Steps
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import write_quality
from amoeba_deploy.quality_measurement import measure_quality
from amoeba_deploy.stage2.batches import Batches, Sequences
from amoeba_deploy.stage2.data import DataSettings
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.log import TuningLog, require_board
from amoeba_deploy.stage2.mixture import Mixture
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.quantised import bits_library, quantise_blocks
from amoeba_deploy.stage2.result import write_result
from amoeba_deploy.stage2.saved import LOG, SavedRun, latest_state, newest_step, run_folder
from amoeba_deploy.stage2.selected import Selected
from amoeba_deploy.stage2.settings import Settings
from amoeba_deploy.stage2.trainer import Diverged, Step, Trainer


def make_elastic(selected: Selected, settings: Settings, device: torch.device) -> ElasticModel:
    """The elastic model of a run, on a device, with experts whose initial values follow from the seed."""
    sizes = selected.model.architecture
    frozen = settings.mixture is not None
    # On a GPU a frozen base is held as it is computed with; weights that are tuned need all their bits.
    dtype = DTYPES["bf16"] if frozen and settings.mixed_precision == "bf16" and device.type != "cpu" else DTYPES["fp32"]
    model: Any = load_torch_model(selected.model.path, dtype).requires_grad_(not frozen)
    without_dropout(model)
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mixture = None
    if settings.mixture is not None:
        torch.manual_seed(settings.seed)
        mixture = Mixture(sizes, settings.mixture, settings.widths)
    elastic = ElasticModel(model, selected.selection, sizes, steps=Steps.of(sizes), bias=settings.bias, mixture=mixture)
    if settings.base_bits is not None:
        quantise_blocks(model, settings.base_bits, device)
    return elastic.to(device)


def tuned_parameters(elastic: ElasticModel) -> dict[str, torch.nn.Parameter]:
    """What a run tunes, by name: the experts and the gate, or all weights of the model."""
    owner = elastic.model if elastic.mixture is None else elastic.mixture
    return {name: parameter for name, parameter in owner.named_parameters() if parameter.requires_grad}


def without_dropout(model: Any) -> None:
    """Let a model drop nothing while it is tuned: the shapes of a step should see the same, and runs repeat."""
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def make_trainer(selected: Selected, batches: Batches, settings: Settings, processes: Processes) -> Trainer:
    """A run at its first step."""
    elastic = make_elastic(selected, settings, processes.device)
    processes.shard(elastic.model.model.layers)
    return Trainer(elastic, tuned_parameters(elastic), batches, selected.space(settings), settings, processes)


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
    tensorboard: Path | None = None
    cpu: bool = False
    name: str | None = None
    include_base: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Paths that the run reads."""
        named = [Path(self.model), self.selection, Path(self.data.source), self.quality_text, self.quality_tasks]
        return [path for path in named if path is not None and path.exists()]

    def check(self, selected: Selected) -> None:
        """Raise what would otherwise be raised when the work is done, or half of it.

        Raises:
            BadInput: the output may not be written, or what quality is to be measured on is not fit for it.
            ToolchainMissing: a library that was asked for is not installed.
        """
        if self.quality_tasks and not self.quality_text:
            raise BadInput("--quality-tasks needs --quality-text too: shapes are ranked by their loss on a text")
        model = selected.model
        if self.quality_text:
            text_rows(self.quality_text, model.tokenizer(), min(SEQUENCE, model.architecture.context))
        if self.quality_tasks:
            read_questions(self.quality_tasks)
        if self.settings.bias:
            families.compensated(model.architecture)
        if self.settings.base_bits:
            bits_library()
        if self.tensorboard:
            require_board()

    def decisive(self, selected: Selected, batches: Batches, processes: Processes) -> dict[str, Any]:
        """All that decides the result, by the names of options."""
        settings = {name: value for name, value in self.settings.to_json().items() if name != "gradient_checkpointing"}
        return settings | {
            **{f"data {name.replace('_', ' ')}": value for name, value in batches.data.facts.items()},
            "grouping": batches.grouping,
            "base model": selected.model.digest,
            "kept blocks": {str(d): list(c.kept) for d, c in sorted(selected.selection.depths.items())},
            "scores": sha256_of(self.selection / "selection.safetensors"),
            "number of processes": processes.count,
        }


def tune_checkpoint(run: Run) -> Checkpoint | None:
    """Tune, measure quality, and write the checkpoint; None in processes other than the first.

    Raises:
        BadInput: something that is read is missing, damaged or does not fit, a setting contradicts another, or a loss
            was not finite; what the run has saved stays.
        ToolchainMissing: a library that was asked for is not installed.
    """
    check_target(run.output, run.force, run.inputs)
    selected = Selected.open(run.model, run.selection)
    space = selected.space(run.settings)
    run.check(selected)
    sequences, held = run.data.read(selected.model, held_out=run.quality_text is None)
    processes = Processes(run.settings.mixed_precision, run.cpu)
    if processes.sharded and run.settings.adapter == "none" and run.settings.conflicts == "project":
        raise BadInput("--conflicts project needs whole gradients; leave out sharding, or tune adapters")
    batches = Batches(sequences, run.settings.batch, run.settings.seed, run.data.grouping)
    batches.share(0, processes.rank, processes.count)  # refuses rows that cannot be spread over the processes
    progress = run.progress if processes.main else Progress(quiet=True)
    progress.say(data_line(sequences))
    count = len(space.depths) * len(space.widths)
    several = "" if processes.count == 1 else f"; {processes.count} processes"
    progress.say(f"shapes to tune: {count}, {space.smallest} to {space.largest}{several}")
    folder = run_folder(run.output)
    saved = None
    if processes.main:
        wanted = run.decisive(selected, batches, processes)
        saved = SavedRun.begin(folder, wanted, resume=run.resume, force=run.force, progress=progress)
    try:
        processes.wait()
        trainer = train(run, selected, batches, processes, saved, progress)
        weights = processes.collected(trainer.parameters)
        processes.end()
        if saved is None:
            return None
        with whole_folder(run.output, run.force, run.inputs) as output:
            made = write_result(
                output,
                selected,
                trainer.elastic,
                run.settings,
                weights=weights,
                facts=sequences.facts,
                name=run.name,
                include_base=run.include_base,
            )
            shutil.copyfile(saved.log, output / "tuning.jsonl")
            del trainer, weights  # a GPU has room for one model at a time
            measure(run, made, held, output, processes.device, progress)
        saved.remove()
        return open_checkpoint(run.output)
    except BaseException as error:
        kept = newest_step(folder)
        if saved is not None and kept is None:
            saved.remove()
        elif saved is not None and isinstance(error, KeyboardInterrupt):
            progress.say(f"the state behind step {kept} is kept in {folder}; go on with --resume")
        raise
    finally:
        if saved is not None:
            saved.close()


def data_line(sequences: Sequences) -> str:
    """What was read, in one line."""
    facts = {name: value for name, value in sequences.facts.items() if name != "digest" and not isinstance(value, dict)}
    return "data: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def train(
    run: Run,
    selected: Selected,
    batches: Batches,
    processes: Processes,
    saved: SavedRun | None,
    progress: Progress,
) -> Trainer:
    """Do all steps that are left to do, saving and reporting in the process that has the saved run."""
    settings, folder = run.settings, run_folder(run.output)
    trainer = make_trainer(selected, batches, settings, processes)
    state = latest_state(folder, progress) if run.resume else None
    if state is not None:
        trainer.load(*state)
        progress.say(f"resuming behind step {trainer.done} of {settings.steps}")
    if not processes.agree(trainer.done):
        raise BadInput(f"{folder}: not all processes see the same states; put the output on a disk that all share")
    log = TuningLog(folder / LOG, run.tensorboard, progress, settings.steps, trainer.done, main=saved is not None)
    with log:
        try:
            for step in trainer.run(settings.steps):
                report(log, step)
                if step.number % run.save_every == 0 or step.number == settings.steps:
                    state_now = trainer.state()
                    if saved is not None:
                        saved.write(step.number, state_now)
        except Diverged as error:
            kept = newest_step(folder)
            last = f"the state behind step {kept} is kept in {folder}" if kept else "no state was saved before it"
            raise Diverged(f"{error}; {last}; begin again with a lower --lr, or with other data") from None
    return trainer


def report(log: TuningLog, step: Step) -> None:
    """Tell a log of a step."""
    log.step(
        step.number,
        {str(shape): loss for shape, loss in step.losses.items()},
        rate=step.rate,
        gradient=step.gradient_norm,
        tokens=step.tokens,
        seconds=step.seconds,
    )


def measure(run: Run, made: Checkpoint, held: str, folder: Path, device: torch.device, progress: Progress) -> None:
    """Measure the quality of every shape of the grid, on the text asked for or on what was held out, and write it."""
    where = str(device)
    if run.quality_text is not None or held:
        progress.say("measuring the quality of every shape")
    if run.quality_text is not None:
        found = measure_quality(made, run.quality_text, run.quality_tasks, device=where, progress=progress)
        write_quality(folder, found)
        return
    if not held:
        progress.say("note: no --quality-text was given and nothing was held out, so no quality was measured")
        return
    with tempfile.TemporaryDirectory(prefix="amoeba-held-") as work:
        text = Path(work, "held-out.txt")
        text.write_text(held, encoding="utf-8")
        try:
            found = measure_quality(made, text, None, device=where, progress=progress)
        except BadInput as error:
            reason = str(error).removeprefix(f"{text}: ")
            progress.say(f"note: no quality was measured: what was held out {reason}; or name a --quality-text")
            return
    progress.say(f"quality was measured on the last {run.data.hold_out:.0%} of the data, which were not tuned on")
    write_quality(folder, found)
