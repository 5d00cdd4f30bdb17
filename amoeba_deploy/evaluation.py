"""Loss on text and accuracy on multiple-choice questions, for anything that turns token ids into logits.

A ``LogitsFunction`` takes token ids [rows, length] and gives logits [rows, length, vocabulary] in float32, whether a
transformers model or a built engine stands behind it, so both are measured by the same code.

Text is tokenised whole with no special tokens added and cut into rows of equal length; the loss is the mean
cross-entropy in nats over all next-token predictions inside the rows. A question is answered by the choice with the
highest log-likelihood after it, divided by the choice's UTF-8 bytes; ties go to the lowest index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

Ids = NDArray[np.int64]
LogitsFunction = Callable[[Ids], NDArray[np.float32]]

SEQUENCE = 256
"""Tokens a row where nothing else is said."""
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class TextLoss:
    """Mean loss in nats a predicted token, its standard error over rows, and what it was measured on."""

    loss: float
    standard_error: float
    tokens: int
    rows: tuple[float, ...] = ()
    """The mean loss of each row: two models that read the same rows are compared by them in pairs."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class TaskAccuracy:
    """Share of right answers in [0, 1], the number of questions, and what guessing would give."""

    accuracy: float
    questions: int
    chance: float
    right: tuple[bool, ...] = ()
    """Of each question, whether it was answered right."""

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy over questions: the sample's deviation over the square root of their number."""
        if self.questions < 2:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (self.questions - 1))


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; ``gold`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    gold: int


def read_text(file: Path) -> str:
    """A text file in UTF-8; raises BadInput where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadInput(f"{file}: is not a text file in UTF-8") from None


def text_rows(file: Path, tokenizer: Tokenizer, length: int = SEQUENCE) -> Ids:
    """Token ids [rows, length] of a text file: every whole row.

    Raises:
        BadInput: the text is shorter than a single row.
    """
    ids = tokenizer.encode(read_text(file), add_special_tokens=False).ids
    if len(ids) < length:
        raise BadInput(f"{file}: has {len(ids)} tokens where {length} are needed; give a longer text or ask for fewer")
    count = len(ids) // length
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def read_questions(file: Path) -> list[Question]:
    """A JSON-lines file of ``question``, ``choices``, ``gold``; raises BadInput with the line that is wrong."""
    questions = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item = Question(str(row["question"]), tuple(map(str, row["choices"])), row["gold"])
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{file}, line {number}: is not a JSON object of question, choices and gold") from None
        if type(item.gold) is not int or not 0 <= item.gold < len(item.choices) or not all(item.choices):
            raise BadInput(f"{file}, line {number}: 'gold' must be the index of one of the choices, none of them empty")
        questions.append(item)
    if not questions:
        raise BadInput(f"{file}: holds no questions")
    return questions


def file_digest(file: Path) -> str:
    """The digest by which results name the file that they were measured on."""
    return "sha256:" + sha256_of(file)


def log_probabilities(logits: NDArray[np.float32], ids: Ids) -> NDArray[np.float64]:
    """Log-probability of each next token [rows, length-1] from logits [rows, length, vocabulary] and ids."""
    scores = logits[:, :-1].astype(np.float32)
    top = scores.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scores - top, dtype=np.float32).sum(axis=-1, dtype=np.float64))
    chosen = np.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(chosen - top[..., 0] - total, dtype=np.float64)


def text_loss(logits: LogitsFunction, rows: Ids, step: Callable[[], None] | None = None) -> TextLoss:
    """Loss over rows of token ids [rows, length]; ``step`` is called after each batch."""
    means = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        means.append(-log_probabilities(logits(batch), batch).mean(axis=1))
        if step is not None:
            step()
    losses = np.concatenate(means)
    if not np.isfinite(losses).all():
        raise BadInput("the model gives logits that are not finite on this text; its weights are damaged")
    error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return TextLoss(float(losses.mean()), float(error), rows.size, tuple(map(float, losses)))


def choice_rows(question: Question, tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
    """For each choice the ids of question and choice together, and how many of them the question takes, at least 1.

    Raises:
        BadInput: they are more than the model's context, or a single one, before which nothing stands.
    """
    prefix = len(tokenizer.encode(question.question).ids)
    for choice in question.choices:
        ids = tokenizer.encode(f"{question.question} {choice}").ids
        if not 2 <= len(ids) <= context:
            raise BadInput(
                f"a question takes {len(ids)} tokens, and the model reads 2 to {context}; shorten it or leave it out"
            )
        yield ids, max(1, min(prefix, len(ids) - 1))  # nothing predicts the first token


def choice_scores(logits: LogitsFunction, question: Question, tokenizer: Tokenizer, context: int) -> list[float]:
    """Log-likelihood of each choice after the question, divided by the choice's UTF-8 bytes."""
    rows = list(choice_rows(question, tokenizer, context))
    width = max(len(ids) for ids, _ in rows)
    padded = np.array([ids + [0] * (width - len(ids)) for ids, _ in rows], dtype=np.int64)
    chances = log_probabilities(logits(padded), padded)
    return [
        float(chances[row, prefix - 1 : len(ids) - 1].sum()) / len(choice.encode())
        for row, ((ids, prefix), choice) in enumerate(zip(rows, question.choices, strict=True))
    ]


def task_accuracy(
    logits: LogitsFunction,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    context: int,
    step: Callable[[], None] | None = None,
) -> TaskAccuracy:
    """Share of questions whose right choice scores highest."""
    right = []
    for question in questions:
        scores = choice_scores(logits, question, tokenizer, context)
        right.append(int(np.argmax(scores)) == question.gold)
        if step is not None:
            step()
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    return TaskAccuracy(sum(right) / len(questions), len(questions), chance, tuple(right))


def torch_logits(model: Any) -> LogitsFunction:
    """The logits function of a transformers model."""
    import torch

    def logits(ids: Ids) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: torch.Tensor = model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False).logits
        return np.asarray(output.float().cpu().numpy())

    return logits
