"""Measuring quality over a checkpoint's grid of shapes, in float32 and in the precisions that engines here can run.

Every shape is really extracted; float32 is measured through transformers, other precisions through a built engine,
so the figures are those of what would ship.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, Engine, Ids, options_for
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.evaluation import (
    SEQUENCE,
    LogitsFunction,
    Question,
    TaskAccuracy,
    TextLoss,
    file_digest,
    read_questions,
    task_accuracy,
    text_loss,
    text_rows,
    torch_logits,
)
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.plan import Plan
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import REFERENCE_PRECISION, Quality, QualityRow, grid
from amoeba_deploy.shape import Shape

PRECISION_FLOWS = {"int8": "onnx", "int4": "onnx"}
"""Which flow's engine stands for a precision when its quality is measured."""


def engine_logits(engine: Engine) -> LogitsFunction:
    """The logits function of an engine: each row is fed alone and from an empty cache, which every engine can do."""

    def logits(ids: Ids) -> NDArray[np.float32]:
        found = []
        for row in ids:
            engine.reset()
            found.append(engine.feed(row[None]))
        return np.concatenate(found)

    return logits


def measured_precisions(sizes: Architecture, say: Callable[[str], None] = lambda _: None) -> tuple[str, ...]:
    """The precisions whose quality can be measured of a model with what is installed; ``say`` hears why not others."""
    found = [REFERENCE_PRECISION]
    for precision, flow in PRECISION_FLOWS.items():
        backend = load_backend(flow)
        if backend.toolchain().missing:
            continue
        refused = backend.refusal(sizes, precision, options_for(backend, sizes.context))
        if refused:
            say(f"no quality is measured in {precision}: the flow '{flow}' cannot lower this model, {refused}")
        else:
            found.append(precision)
    return tuple(found)


def shape_logits(
    checkpoint: Checkpoint, shape: Shape, precision: str, folder: Path, device: str = "cpu"
) -> LogitsFunction:
    """Logits of a shape in a precision of ``PRECISION_FLOWS`` or float32, through folders made below ``folder``."""
    plan, flow = checkpoint.plan(shape), PRECISION_FLOWS.get(precision, "torch")
    options = options_for(load_backend(flow), checkpoint.architecture.context)
    return plan_logits(checkpoint, plan, flow, precision, options, folder, device)


def plan_logits(
    checkpoint: Checkpoint,
    plan: Plan,
    flow: str,
    precision: str,
    options: BuildOptions,
    folder: Path,
    device: str = "cpu",
) -> LogitsFunction:
    """Logits of a plan in a flow and precision, through folders made below ``folder``.

    Float32 is computed by transformers on a torch ``device``, whatever the flow: engines give the same within rounding.
    """
    dense, artefact = folder / "dense", folder / "engine"
    dense.mkdir()
    if precision == REFERENCE_PRECISION:
        extract(checkpoint.model, plan, dense, learnt=checkpoint.learnt(plan))
        model: Any = load_torch_model(dense)
        return torch_logits(model.to(device))
    artefact.mkdir()
    backend = load_backend(flow)
    lower_plan(checkpoint, plan, backend, precision, options, artefact, dense)
    return engine_logits(backend.open(artefact, precision, context=options.context, batch=options.batch))


def measure_quality(
    checkpoint: Checkpoint,
    text: Path,
    questions: Path | None,
    *,
    sequence: int = SEQUENCE,
    precisions: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Progress,
) -> Quality:
    """Loss on every whole row of a text, and accuracy on questions, for every shape of the grid and every precision.

    What is float32 is computed on a torch ``device``, engines on the CPU.

    Raises:
        BadInput: the text is shorter than one row, or a file is damaged.
    """
    tokenizer, sizes = checkpoint.model.tokenizer(), checkpoint.architecture
    length = min(sequence, sizes.context)
    rows = text_rows(text, tokenizer, length)
    asked: list[Question] = read_questions(questions) if questions else []
    wanted = precisions or measured_precisions(sizes, progress.say)
    shapes = grid(sizes, checkpoint.minimum_depth, checkpoint.widths, checkpoint.multiple, checkpoint.policy)
    found = []
    with progress.bar("quality", len(shapes) * len(wanted)) as step:
        for precision in wanted:
            for shape in shapes:
                with tempfile.TemporaryDirectory(prefix="amoeba-quality-") as work:
                    logits = shape_logits(checkpoint, shape, precision, Path(work), device)
                    loss = text_loss(logits, rows)
                    task = task_accuracy(logits, asked, tokenizer, sizes.context) if asked else None
                found.append(_row(shape, precision, loss, task))
                step()
    facts = {"digest": file_digest(text), "tokens": int(rows.size), "sequence": length}
    return Quality(sizes, checkpoint.multiple, checkpoint.bias, facts, tuple(found))


def _row(shape: Shape, precision: str, loss: TextLoss, task: TaskAccuracy | None) -> QualityRow:
    losses = np.array(loss.rows, dtype=np.float32)
    if task is None:
        return QualityRow(shape, precision, loss.loss, loss.standard_error, None, 0, losses)
    right = np.array(task.right, dtype=np.uint8)
    accuracy = round(task.accuracy, 6)
    return QualityRow(shape, precision, loss.loss, loss.standard_error, accuracy, task.questions, losses, right)
