"""What is tuned on, selected by and tested on: three texts that share nothing, and questions.

The embedded model's world is made anew for every seed: calibration text and tuning text from seeds that neither its
training nor its validation used. Its held-out questions are told apart by what they ask. Any other model takes files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from amoeba_deploy.checkpoint import EMBEDDED
from amoeba_deploy.evaluation import (
    Ids,
    LogitsFunction,
    Question,
    file_digest,
    read_questions,
    task_accuracy,
    text_loss,
    text_rows,
)
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.progress import Progress

DEMO = EMBEDDED.parent
KINDS = {
    "food": r"food|like to eat",
    "colour": r"colour",
    "pet": r"pet|animal lives with",
    "job": r"job|work as",
    "home": r"does \w+ live\?|is the home",
    "other": r"",
}
"""The embedded model's questions by what they ask; the first that matches."""
CALIBRATION_SEED, TUNING_SEED = 300, 400
CALIBRATION_DOCUMENTS, TUNING_DOCUMENTS = 600, 6000


@dataclass(frozen=True)
class SeedData:
    """The files of one seed."""

    calibration: Path
    tuning: str
    """A file, or the name of a data set."""


@dataclass(frozen=True)
class Data:
    """Where a model's texts and questions are; ``of_seed`` gives each seed its own."""

    held_out: Path
    questions: tuple[Path, ...]
    tasks: tuple[str, ...]
    of_seed: Callable[[int], SeedData]
    folder: Path | None = None
    limit: int | None = None

    def facts(self, seed: int) -> dict[str, Any]:
        """What identifies them."""
        own = self.of_seed(seed)
        files = [self.held_out, *self.questions, own.calibration]
        tuning = file_digest(Path(own.tuning)) if Path(own.tuning).is_file() else own.tuning
        digests = [*map(file_digest, files), tuning]
        return {"files": digests, "tasks": list(self.tasks), "limit": self.limit}


def demo_data(work: Path) -> Data:
    """The embedded model's own."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import demo_corpus

    def made(name: str, seed: int, documents: int) -> Path:
        file = work / f"{name}-{seed}.txt"
        if not file.is_file():
            text = "\n\n".join(islice(demo_corpus.documents(demo_corpus.build_world(), seed), documents)) + "\n"
            file.write_text(text, encoding="utf-8")
        return file

    def of_seed(seed: int) -> SeedData:
        return SeedData(
            made("calibration", CALIBRATION_SEED + seed, CALIBRATION_DOCUMENTS),
            str(made("tuning", TUNING_SEED + seed, TUNING_DOCUMENTS)),
        )

    return Data(DEMO / "validation.txt", (DEMO / "questions.jsonl",), (), of_seed)


def file_data(
    calibration: Path,
    tuning: str,
    held_out: Path,
    questions: Sequence[Path],
    tasks: Sequence[str],
    folder: Path | None,
    limit: int | None,
) -> Data:
    """Another model's: the same files for every seed, which then differ in the order of rows and in shapes alone."""
    same = SeedData(calibration, tuning)
    return Data(held_out, tuple(questions), tuple(tasks), lambda _seed: same, folder, limit)


def kind_of(question: Question) -> str:
    """What a question of the embedded model's world asks about."""
    return next(kind for kind, words in KINDS.items() if re.search(words, question.question))


def measure(logits: LogitsFunction, model: ModelFolder, data: Data) -> dict[str, Any]:
    """Loss on the held-out text, row by row, and accuracies: of every file of questions and task, and by kind."""
    tokenizer, context = model.tokenizer(), model.architecture.context
    rows: Ids = text_rows(data.held_out, tokenizer, min(256, context))
    loss = text_loss(logits, rows)
    tasks: dict[str, dict[str, Any]] = {}
    for file in data.questions:
        questions = read_questions(file)
        found = task_accuracy(logits, questions, tokenizer, context)
        tasks[file.stem] = {"right": [int(right) for right in found.right], "chance": found.chance}
        if file.parent == DEMO:
            for kind in KINDS:
                own = [int(r) for q, r in zip(questions, found.right, strict=True) if kind_of(q) == kind]
                tasks[kind] = {"right": own, "chance": found.chance}
    if data.tasks:
        from amoeba_deploy.tasks import task_results

        results = task_results(
            data.tasks, logits, model.path, context, limit=data.limit, data=data.folder, rows=8, progress=Progress()
        )
        tasks |= {name: {"right": list(one.scores), "chance": one.chance} for name, one in results.items()}
    return {"loss": loss.loss, "losses": list(loss.rows), "tasks": tasks}
