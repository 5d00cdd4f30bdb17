"""What ``evaluate`` measures: model folders, built engines and shapes of a checkpoint, on texts, questions and tasks.

A shape of a checkpoint is run by the elastic model, without being extracted; plans made by hand, and checkpoints that
hold masks instead of scores, are extracted into a folder that is thrown away. Results are remembered by content
(``evaluation_cache.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.bundle import MANIFEST, verify_files
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.evaluation import (
    Ids,
    LogitsFunction,
    TaskAccuracy,
    file_digest,
    read_questions,
    task_accuracy,
    text_loss,
    text_rows,
)
from amoeba_deploy.evaluation_cache import remembered
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.files import sha256_of
from amoeba_deploy.installation import engine_versions
from amoeba_deploy.model_folder import ModelFolder, load_tokenizer
from amoeba_deploy.plan import Plan
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality_measurement import engine_logits
from amoeba_deploy.shape import Shape
from amoeba_deploy.subject import find_subject
from amoeba_deploy.tasks.harness import TaskRequest, check_names, task_results
from amoeba_deploy.tasks.result import TaskResult

ROWS_OF_TORCH = 8
"""Requests that PyTorch takes at once; engines take one."""


@dataclass(frozen=True)
class Evaluated:
    """Something that gives logits: where its tokenizer lies, the most tokens that it takes, and what identifies it.

    ``logits`` is asked for only when something is to be computed: opening an engine takes time.
    """

    logits: Callable[[], LogitsFunction]
    folder: Path
    context: int
    identity: dict[str, Any]
    rows: int = 1


@dataclass(frozen=True)
class Wanted:
    """What to measure: a text, files of questions, and tasks by name."""

    text: Path | None = None
    sequence: int = 256
    questions: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    asked: TaskRequest = field(default_factory=TaskRequest)
    fresh: bool = False

    @classmethod
    def of(cls, text: Path | None, names: Sequence[str], sequence: int, asked: TaskRequest, fresh: bool) -> Wanted:
        """From names as users give them: a file at hand, or a name with a suffix or folders, is a file of questions.

        Raises:
            BadInput: a name is neither a file nor a task.
            ToolchainMissing: a task is named and the harness is not installed.
        """
        files = tuple(Path(name) for name in names if Path(name).suffix or "/" in name or Path(name).is_file())
        tasks = tuple(name for name in names if Path(name) not in files)
        check_names(tasks)
        return cls(text, sequence, files, tasks, asked, fresh)


def evaluate_one(subject: Evaluated, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    """Everything wanted of one subject; the entries of ``evaluate --json``.

    Raises:
        BadInput: a text or file of questions is damaged, or a task's data cannot be had.
    """
    opened = _Opened(subject)
    result: dict[str, Any] = {}
    known = []
    if wanted.text is not None:
        found, was_known = _text(opened, wanted.text, wanted, progress)
        result |= found
        known.append(was_known)
    named: dict[str, Any] = {}
    for file in wanted.questions:
        named[file.stem], was_known = _questions(opened, file, wanted, progress)
        known.append(was_known)
    for name in wanted.tasks:
        task, was_known = _task(opened, name, wanted, progress)
        named[name] = task.to_json()
        known.append(was_known)
    if named:
        result["tasks"] = named
    return result | {"remembered": all(known)}


@dataclass(frozen=True)
class _Opened:
    """A subject whose engine is opened the first time that it is needed."""

    subject: Evaluated

    @cached_property
    def logits(self) -> LogitsFunction:
        """The logits function, opened once."""
        return self.subject.logits()


def _text(opened: _Opened, file: Path, wanted: Wanted, progress: Progress) -> tuple[dict[str, Any], bool]:
    subject = opened.subject
    length = min(wanted.sequence, subject.context)
    rows = text_rows(file, load_tokenizer(subject.folder), length)

    def measure() -> dict[str, Any]:
        with progress.bar(file.name, -(-len(rows) // 8)) as step:
            loss = text_loss(opened.logits, rows, step)
        return {
            "loss": loss.loss,
            "loss_se": loss.standard_error,
            "perplexity": loss.perplexity,
            "tokens": loss.tokens,
            "rows": len(rows),
        }

    facts = {"who": subject.identity, "text": file_digest(file), "sequence": length}
    return remembered(facts, measure, fresh=wanted.fresh)


def _questions(opened: _Opened, file: Path, wanted: Wanted, progress: Progress) -> tuple[dict[str, Any], bool]:
    subject = opened.subject
    questions = read_questions(file)[: wanted.asked.limit]

    def measure() -> dict[str, Any]:
        with progress.bar(file.name, len(questions)) as step:
            found: TaskAccuracy = task_accuracy(
                opened.logits, questions, load_tokenizer(subject.folder), subject.context, step
            )
        return {
            "accuracy": found.accuracy,
            "accuracy_se": found.standard_error,
            "n": found.questions,
            "chance": found.chance,
        }

    facts = {"who": subject.identity, "questions": file_digest(file), "limit": wanted.asked.limit}
    return remembered(facts, measure, fresh=wanted.fresh)


def _task(opened: _Opened, name: str, wanted: Wanted, progress: Progress) -> tuple[TaskResult, bool]:
    subject, asked = opened.subject, wanted.asked
    was_known = [False]

    def remember(facts: Any, find: Callable[[], TaskResult]) -> TaskResult:
        own = {"who": subject.identity, **facts}
        value, was_known[0] = remembered(own, lambda: find().saved(), fresh=wanted.fresh)
        try:
            return TaskResult.restored(value)
        except (KeyError, TypeError):
            # Somebody wrote into the memory.
            value, was_known[0] = remembered(own, lambda: find().saved(), fresh=True)
            return TaskResult.restored(value)

    results = task_results(
        [name],
        lambda ids: opened.logits(ids),
        subject.folder,
        subject.context,
        shots=asked.shots,
        limit=asked.limit,
        data=asked.data,
        rows=subject.rows,
        remember=remember,
        progress=progress,
    )
    return results[name], was_known[0]


def evaluated_subjects(
    path: Path | None, shapes: Sequence[str], open_checkpoint: Callable[[Path | None], Checkpoint]
) -> Iterator[tuple[str, Evaluated]]:
    """Named subjects: the bundle or model at a path, or shapes of a checkpoint (the full one where none is named).

    Raises:
        BadInput: the path is none of these, or a shape is not one of the checkpoint.
    """
    if path is not None and not (path / "amoeba.json").is_file() and not shapes:
        yield str(path), _built(path)
        return
    checkpoint = open_checkpoint(path)
    elastic = _Elastic(checkpoint)
    for text in shapes or [f"{checkpoint.architecture.depth}x1"]:
        plan = checkpoint.plan_of(text)
        if checkpoint.selection.masks is None and checkpoint.owns(plan):
            yield text, elastic.subject(plan)
        else:
            with _extracted(checkpoint, plan) as subject:
                yield text, subject


def _built(path: Path) -> Evaluated:
    """A bundle's engine, or a model folder in float32; raises VerificationFailed where a bundle's files are others."""
    found = find_subject(path)
    who: dict[str, Any] = {"flow": found.flow, "precision": found.precision, "versions": _versions(found.flow)}
    if (path / MANIFEST).is_file():
        # A result is remembered under the manifest's digests, so the files must be those.
        verify_files(path)
        who["manifest"] = sha256_of(path / MANIFEST)
    else:
        who["model"] = ModelFolder(path).digest
    rows = ROWS_OF_TORCH if found.flow == "torch" else 1
    return Evaluated(lambda: engine_logits(found.open().engine), found.folder, found.context, who, rows)


@dataclass(frozen=True)
class _Elastic:
    """A checkpoint in memory, opened when its first shape computes and kept for the others."""

    checkpoint: Checkpoint

    @cached_property
    def _model(self) -> Any:
        from amoeba_deploy.stage2.result import elastic_model

        return elastic_model(self.checkpoint)

    def subject(self, plan: Plan) -> Evaluated:
        """A shape of the checkpoint, by the plan that is its own."""
        checkpoint = self.checkpoint
        who = {"checkpoint": checkpoint.digest, "plan": plan.to_json(), "versions": _versions("torch")}
        return Evaluated(
            lambda: partial(self._logits, plan.shape),
            checkpoint.model.path,
            checkpoint.architecture.context,
            who,
            ROWS_OF_TORCH,
        )

    def _logits(self, shape: Shape, ids: Ids) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode(), self._model.shape(shape):
            found: torch.Tensor = self._model(torch.from_numpy(ids))
        return np.asarray(found.float().numpy())


@contextmanager
def _extracted(checkpoint: Checkpoint, plan: Plan) -> Iterator[Evaluated]:
    with tempfile.TemporaryDirectory(prefix="amoeba-evaluate-") as work:
        extract(checkpoint.model, plan, Path(work), learnt=checkpoint.learnt(plan))
        yield _built(Path(work))


def _versions(flow: str) -> dict[str, str]:
    """Of the engine: another version may compute otherwise."""
    return engine_versions().get(flow, {})
