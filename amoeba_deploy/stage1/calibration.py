"""Calibration data: the rows of tokens that stage 1 measures models on.

Text is cut into rows of equal length, and every next token inside them is predicted. A question gives one row for each
choice, and only the tokens of the choices are predicted; choices whose tokens are read after the same input (single
tokens, as in A, B, C, D) share one row. Rows lie in batches, which are the unit of work everywhere in stage 1: sums run
over whole batches in their order, so a result does not depend on how work was cut up or spread.

Rows of a batch are padded at their end. Attention looks back only, so padding changes nothing before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import Question, choice_rows, file_digest, read_questions, read_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

Item = TypeVar("Item")
Metric = Literal["loss", "accuracy", "choice-loss"]
"""Mean next-token loss on text; share of questions answered rightly; mean loss in nats of the right choice."""
QUESTION_METRICS = ("accuracy", "choice-loss")
TOKENS_AT_ONCE = 1024
"""Of a batch: enough to keep a processor busy with matrices, few enough to stay in its cache."""
CUT_TOKENS = 32
"""Tokens read beyond what is asked for where a text is cut."""
SAMPLES, NAMED_QUESTIONS = 64, 40
"""Rows of text, and questions of a data set by name, where nothing else is said."""


@dataclass(frozen=True)
class Choices:
    """The choices of a batch's questions, flat: how long each text is in UTF-8, where each question's choices begin.

    ``starts`` [questions + 1]; ``gold`` [questions] is the right choice's flat index.
    """

    utf8_bytes: tuple[int, ...]
    starts: tuple[int, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and the predictions that are wanted of them.

    ``ids`` [rows, length], padded at the end with 0; ``lengths`` [rows] without padding. Prediction k is read at the
    flat position ``places[k]`` (row * length + column) and should give ``wanted[k]``. With questions, ``owners[k]`` is
    the flat index of the choice that it belongs to.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...]
    places: torch.Tensor
    wanted: torch.Tensor
    choices: Choices | None = None
    owners: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Positions that a model runs over, padding included."""
        return int(self.ids.numel())

    @property
    def count(self) -> int:
        """What a metric's mean is over: questions, or predicted tokens."""
        return len(self.choices.gold) if self.choices else len(self.wanted)

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """The values [tokens, n] of all positions that are not padding, from [rows, length, n]."""
        length = self.ids.shape[1]
        if all(each == length for each in self.lengths):
            return values.flatten(0, 1)
        import torch

        inside = torch.arange(length)[None] < torch.tensor(self.lengths)[:, None]
        return values[inside]


@dataclass(frozen=True)
class Calibration:
    """Batches to measure on, and facts for the record: source, digest, samples, sequence.

    ``text`` is the same data as running text (for questions, each with its right choice): what activations and
    gradients are taken from.
    """

    kind: Literal["text", "questions"]
    batches: tuple[Batch, ...]
    text: tuple[Batch, ...]
    facts: dict[str, Any]

    @property
    def count(self) -> int:
        """Predicted tokens of a text, or questions."""
        return sum(batch.count for batch in self.batches)

    def check(self, metric: Metric) -> None:
        """Raise BadInput where the metric cannot be measured on this kind of data."""
        if metric in QUESTION_METRICS and self.kind != "questions":
            raise BadInput(
                f"--metric {metric} needs multiple-choice questions, and {self.facts['source']} is text; give a "
                f".jsonl file of questions, or take --metric loss"
            )
        if metric == "loss" and self.kind == "questions":
            raise BadInput(
                f"--metric loss needs a text, and {self.facts['source']} holds questions; take --metric accuracy or "
                f"choice-loss, or give a text"
            )


def batch_cost(metric: Metric, batch: Batch, log_likelihood: torch.Tensor) -> float:
    """The sum that a metric takes over a batch, never negative: loss in nats, or the number of wrong answers.

    Args:
        metric: what to sum.
        batch: the predictions.
        log_likelihood: float32 log-probability [k] of each wanted token.

    Returns:
        NaN where a log-probability is not finite.
    """
    import torch

    if not bool(torch.isfinite(log_likelihood).all()):
        return float("nan")
    values = log_likelihood.double()
    if batch.choices is None or batch.owners is None:
        return float(-values.sum())
    choices = batch.choices
    sums = torch.zeros(len(choices.utf8_bytes), dtype=torch.float64).index_add_(0, batch.owners, values)
    if metric == "choice-loss":
        return float(-sums[list(choices.gold)].sum())
    scores = (sums / torch.tensor(choices.utf8_bytes)).numpy()
    bounds = zip(choices.starts, choices.starts[1:], choices.gold, strict=False)
    return float(sum(begin + int(np.argmax(scores[begin:end])) != gold for begin, end, gold in bounds))


def metric_value(metric: Metric, cost: float, count: int) -> float:
    """The metric from its sum over all batches and what it is a mean over."""
    return 1 - cost / count if metric == "accuracy" else cost / count


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch

    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def running_batch(rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of token ids in which every next token is predicted."""
    import torch

    ids = _padded(rows)
    length = ids.shape[1]
    places = torch.cat([torch.arange(len(row) - 1) + index * length for index, row in enumerate(rows)])
    wanted = torch.cat([torch.tensor(row[1:], dtype=torch.int64) for row in rows])
    return Batch(ids, tuple(map(len, rows)), places, wanted)


@dataclass(frozen=True)
class _Asked:
    """A tokenised question: distinct input rows, and per choice its row, the tokens it takes, and where they begin."""

    question: Question
    inputs: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[int, tuple[int, ...], int], ...]

    @property
    def longest(self) -> int:
        return max(map(len, self.inputs))

    @property
    def right(self) -> list[int]:
        """All tokens of the question with its right choice."""
        row, tokens, _ = self.choices[self.question.gold]
        return [*self.inputs[row], tokens[-1]]


def _asked(question: Question, tokenizer: Tokenizer, context: int) -> _Asked:
    inputs: dict[tuple[int, ...], int] = {}
    choices = []
    for ids, begin in choice_rows(question, tokenizer, context):
        row = inputs.setdefault(tuple(ids[:-1]), len(inputs))
        choices.append((row, tuple(ids[begin:]), begin))
    return _Asked(question, tuple(inputs), tuple(choices))


def _question_batch(asked: Sequence[_Asked]) -> Batch:
    import torch

    ids = _padded([row for each in asked for row in each.inputs])
    length = ids.shape[1]
    places: list[int] = []
    wanted: list[int] = []
    owners: list[int] = []
    starts = [0]
    first_row = 0
    for each in asked:
        for number, (row, tokens, begin) in enumerate(each.choices):
            at = (first_row + row) * length + begin - 1
            places += range(at, at + len(tokens))
            wanted += tokens
            owners += [starts[-1] + number] * len(tokens)
        first_row += len(each.inputs)
        starts.append(starts[-1] + len(each.choices))
    choices = Choices(
        tuple(len(choice.encode()) for each in asked for choice in each.question.choices),
        tuple(starts),
        tuple(start + each.question.gold for start, each in zip(starts, asked, strict=False)),
    )
    lengths = tuple(len(row) for each in asked for row in each.inputs)
    return Batch(ids, lengths, torch.tensor(places), torch.tensor(wanted), choices, torch.tensor(owners))


def _grouped(items: Iterable[Item], rows: Callable[[Item], int], length: Callable[[Item], int]) -> list[list[Item]]:
    """Items in batches of at most ``TOKENS_AT_ONCE`` padded tokens (or one item), in the order given."""
    groups: list[list[Item]] = []
    taken = longest = 0
    for item in items:
        wide = max(longest, length(item))
        if groups and (taken + rows(item)) * wide <= TOKENS_AT_ONCE:
            groups[-1].append(item)
            taken, longest = taken + rows(item), wide
        else:
            groups.append([item])
            taken, longest = rows(item), length(item)
    return groups


def text_calibration(ids: Sequence[int], samples: int, sequence: int, facts: dict[str, Any]) -> Calibration:
    """The first ``samples * sequence`` token ids in rows of ``sequence``; raises BadInput where there are fewer."""
    if len(ids) < samples * sequence:
        raise BadInput(
            f"{facts['source']}: has {len(ids)} tokens where {samples * sequence} are needed, {samples} rows of "
            f"{sequence}; give a longer text, or ask for fewer with --samples"
        )
    rows = [ids[start : start + sequence] for start in range(0, samples * sequence, sequence)]
    at_once = max(1, TOKENS_AT_ONCE // sequence)
    batches = tuple(running_batch(rows[start : start + at_once]) for start in range(0, samples, at_once))
    return Calibration("text", batches, batches, facts | {"samples": samples, "sequence": sequence})


def question_calibration(
    questions: Sequence[Question], tokenizer: Tokenizer, context: int, facts: dict[str, Any]
) -> Calibration:
    """Questions, the shortest first, so that batches hold little padding."""
    asked = sorted((_asked(question, tokenizer, context) for question in questions), key=lambda each: each.longest)
    batches = _grouped(asked, lambda each: len(each.inputs), lambda each: each.longest)
    rows = _grouped([each.right for each in asked], lambda _: 1, len)
    return Calibration(
        "questions",
        tuple(map(_question_batch, batches)),
        tuple(map(running_batch, rows)),
        facts | {"samples": len(questions)},
    )


def _named_text_ids(name: str, tokenizer: Tokenizer, tokens: int) -> tuple[list[int], dict[str, Any]]:
    """At least so many token ids from the head of a text by name, or all that it has.

    Where the text is cut its last tokens may not be those of the whole, so some more are read and do not count.
    """
    from amoeba_deploy.named_data import text_by_name

    characters, before = 8 * tokens, -1
    while True:
        text, facts = text_by_name(name, characters)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= tokens + CUT_TOKENS or len(text) == before:
            return ids, facts | {"digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}
        characters, before = 2 * characters, len(text)


def read_calibration(
    source: str, tokenizer: Tokenizer, context: int, *, samples: int | None = None, sequence: int = 256
) -> Calibration:
    """Calibration data from a text file, a JSON-lines file of questions, or a data set by name.

    Args:
        source: a path, where one exists or the name has a suffix; else a name such as wikitext2 or mmlu.
        tokenizer: the model's.
        context: the most tokens that a row may have.
        samples: rows of text (64 where left out), or questions (all of a file, 40 of a data set by name).
        sequence: tokens a row of text.

    Raises:
        BadInput: it is missing or damaged, too short, or its rows exceed the context.
    """
    from amoeba_deploy.named_data import QUESTIONS, TEXTS, questions_by_name

    path = Path(source)
    if path.exists() or path.suffix:
        facts: dict[str, Any] = {"source": path.name, "digest": ""}
        if path.suffix == ".jsonl":
            questions = read_questions(path)
            if samples is not None and samples > len(questions):
                raise BadInput(f"{path}: holds {len(questions)} questions where --samples asks for {samples}")
            facts["digest"] = file_digest(path)
            return question_calibration(questions[:samples], tokenizer, context, facts)
        text = read_text(path)
        facts["digest"] = file_digest(path)
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
    elif source in QUESTIONS:
        questions, facts = questions_by_name(source, samples or NAMED_QUESTIONS)
        asked = "".join(f"{q.question}\0{q.choices}\0{q.gold}\n" for q in questions)
        facts |= {"digest": "sha256:" + hashlib.sha256(asked.encode()).hexdigest()}
        return question_calibration(questions, tokenizer, context, facts)
    elif source in TEXTS:
        ids, facts = _named_text_ids(source, tokenizer, (samples or SAMPLES) * sequence)
    else:
        known = ", ".join(sorted((*TEXTS, *QUESTIONS)))
        raise BadInput(f"{source}: is neither a file nor a data set known by name ({known})")
    if sequence > context:
        raise BadInput(f"--sequence {sequence} exceeds the {context} positions that the model attends to")
    return text_calibration(ids, samples or SAMPLES, sequence, facts)
