"""What ``run`` and ``evaluate`` work on: a bundle's engine, a model folder, or shapes of a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.bundle import ENGINE, MANIFEST, open_engine, read_manifest, require_runnable
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import read_questions, task_accuracy, text_loss, text_rows
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.families import read_architecture
from amoeba_deploy.model_folder import ModelFolder, load_tokenizer, read_config
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality_measurement import engine_logits


@dataclass(frozen=True)
class Subject:
    """An opened engine, the folder with its tokenizer and config, and what it is."""

    engine: Engine
    folder: Path
    flow: str
    precision: str
    context: int


@dataclass(frozen=True)
class Found:
    """A bundle or a model folder that is not opened yet: its texts can be read before its engine is loaded."""

    folder: Path
    flow: str
    precision: str
    context: int
    engine: Callable[[], Engine]

    def open(self) -> Subject:
        """Open its engine; raises BadInput where it is damaged."""
        return Subject(self.engine(), self.folder, self.flow, self.precision, self.context)


def find_subject(path: Path) -> Found:
    """A bundle, to be opened through its engine, or a model folder, through the torch flow in float32.

    Raises:
        BadInput: the path is neither, or a bundle's engine was built for another machine or version.
        ToolchainMissing: a bundle's engine does not run here, or steps of it are still to be run.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        require_runnable(path, manifest)
        folder = text_folder(path, path / ENGINE)
        context = int(manifest.get("context") or read_architecture(read_config(folder)).context)
        opened = partial(open_engine, path, manifest)
        return Found(folder, manifest["flow"], manifest["precision"], context, opened)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path}: is neither a bundle nor a model folder")
    model = ModelFolder(path)
    model.check_shapes()
    return Found(path, "torch", "fp32", model.architecture.context, partial(load_backend("torch").open, path, "fp32"))


def open_subject(path: Path) -> Subject:
    """Open a bundle or a model folder; raises what ``find_subject`` and ``Found.open`` raise."""
    return find_subject(path).open()


def text_folder(bundle: Path, engine: Path) -> Path:
    """Where a bundle's tokenizer, config and generation settings lie: beside the manifest, or with the engine."""
    return bundle if (bundle / "tokenizer.json").is_file() and (bundle / "config.json").is_file() else engine


def subjects(
    path: Path | None, shapes: Sequence[str], open_checkpoint: Callable[[Path | None], Checkpoint]
) -> Iterator[tuple[str, Subject]]:
    """Named subjects: the bundle or model at a path, or shapes of a checkpoint (the full one where none is named)."""
    if path is not None and not (path / "amoeba.json").is_file() and not shapes:
        yield str(path), open_subject(path)
        return
    checkpoint = open_checkpoint(path)
    for text in shapes or [f"{checkpoint.architecture.depth}x1"]:
        plan = checkpoint.plan_of(text)
        with tempfile.TemporaryDirectory(prefix="amoeba-evaluate-") as work:
            extract(checkpoint.model, plan, Path(work), learnt=checkpoint.learnt(plan))
            yield text, open_subject(Path(work))


def evaluate_subject(
    subject: Subject, text: Path | None, tasks: Sequence[Path], sequence: int, progress: Progress
) -> dict[str, Any]:
    """Loss and perplexity on a text, accuracy on files of questions; the entries of ``evaluate --json``."""
    tokenizer, logits = load_tokenizer(subject.folder), engine_logits(subject.engine)
    result: dict[str, Any] = {}
    if text is not None:
        rows = text_rows(text, tokenizer, min(sequence, subject.context))
        with progress.bar(text.name, -(-len(rows) // 8)) as step:
            loss = text_loss(logits, rows, step)
        result |= {"loss": loss.loss, "perplexity": loss.perplexity, "tokens": loss.tokens}
    if tasks:
        result["tasks"] = {}
    for file in tasks:
        questions = read_questions(file)
        with progress.bar(file.name, len(questions)) as step:
            found = task_accuracy(logits, questions, tokenizer, subject.context, step)
        result["tasks"][file.stem] = {"accuracy": found.accuracy, "n": found.questions, "chance": found.chance}
    return result
