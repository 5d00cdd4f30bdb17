"""Data by name: text, multiple-choice questions and instructions, read through the optional ``datasets`` library.

A name stands for one split of one dataset on the Hugging Face hub. Where the folder ``$AMOEBA_DATA/<name>`` exists it
is taken for a copy of that dataset's repository and nothing else is asked; otherwise the library gets the rows from
the hub, or from its own cache where the hub is out of reach. Rows always come in the split's own order, so the same
call gives the same data. What is huge is streamed: only the rows that are asked for are read, and no cache is kept.

Sources of the formats: WikiText-2's blank lines are " \\n" in the published ``wiki.train.raw`` and empty rows on the
hub; the five-shot prompt is that of MMLU's authors (github.com/hendrycks/test, ``evaluate.py``), with one space before
the subject where their code puts two.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.evaluation import Question
from amoeba_deploy.quiet import quiet_data

LETTERS = ("A", "B", "C", "D")
"""The choices of an MMLU question."""
SHOTS = 5
"""Worked examples before each MMLU question."""

_PARQUET_BRANCH = "refs/convert/parquet"
"""Where the hub keeps what it converted itself; its files have no card, so no configuration has a name there."""
_ENDINGS = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_MMLU_COLUMNS = ("question", "subject", "choices", "answer")


@dataclass(frozen=True)
class NamedData:
    """Where the rows of a name are, and how they become text, questions or instructions.

    ``files`` matches a split's files inside the repository, less their ending. Text is the ``column`` of the rows with
    ``join`` between them; an empty row stands for ``blank``. Questions take their worked examples from ``examples``.
    An instruction, its input and its output are the ``columns`` of a row.
    """

    name: str
    kind: Literal["text", "questions", "instructions"]
    dataset: str
    config: str
    split: str
    files: str
    revision: str | None = None
    streamed: bool = False
    column: str = "text"
    join: str = ""
    blank: str = ""
    examples: str = ""
    columns: tuple[str, str, str] = ("instruction", "input", "output")


def _by_name(*entries: NamedData) -> dict[str, NamedData]:
    return {entry.name: entry for entry in entries}


TEXTS: dict[str, NamedData] = _by_name(
    NamedData(
        "wikitext2",
        "text",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "train",
        "wikitext-2-raw-v1/{split}*",
        blank=" \n",
    ),
    NamedData(
        "bookcorpus",
        "text",
        "bookcorpus/bookcorpus",
        "plain_text",
        "train",
        "plain_text/{split}/*",
        revision=_PARQUET_BRANCH,
        streamed=True,
        join="\n",
    ),
    NamedData("c4", "text", "allenai/c4", "en", "train", "en/c4-{split}*", streamed=True, join="\n\n"),
    NamedData(
        "ptb",
        "text",
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "train",
        "penn_treebank/{split}/*",
        revision=_PARQUET_BRANCH,
        streamed=True,
        column="sentence",
        join="\n",
    ),
)
"""Every text that has a name."""

QUESTIONS: dict[str, NamedData] = _by_name(
    NamedData("mmlu", "questions", "cais/mmlu", "all", "validation", "all/{split}*", examples="dev"),
)
"""Every set of questions that has a name."""

INSTRUCTIONS: dict[str, NamedData] = _by_name(
    NamedData("alpaca-gpt4", "instructions", "vicgalle/alpaca-gpt4", "default", "train", "data/{split}*"),
    NamedData("alpaca", "instructions", "tatsu-lab/alpaca", "default", "train", "data/{split}*"),
    NamedData(
        "dolly",
        "instructions",
        "databricks/databricks-dolly-15k",
        "default",
        "train",
        "databricks-dolly-15k*",
        columns=("instruction", "context", "response"),
    ),
)
"""Every set of instructions that has a name."""


def text_by_name(name: str, characters: int) -> tuple[str, dict[str, Any]]:
    """The first rows of a named text, joined, and the facts that say where they come from.

    Whole rows are taken until the text has at least ``characters`` characters or the split ends; a caller that needs
    more calls again with a larger number and gets the same text, continued.

    Raises:
        BadInput: the name is unknown, the local copy lacks the split or its column, or the hub gives nothing.
        ToolchainMissing: the ``datasets`` library is not installed.
    """
    data = _known(name, TEXTS, "text")
    with _opened(data) as source:
        taken, length = [], 0
        for row in source.rows(data.split, (data.column,)):
            if length >= characters:
                break
            if not isinstance(row[data.column], str):
                raise BadInput(f"{source.place}: the column '{data.column}' of '{data.split}' holds more than text")
            taken.append(row[data.column] or data.blank)
            length += len(taken[-1]) + (len(data.join) if len(taken) > 1 else 0)
    if not length:
        raise BadInput(f"{source.place}: the split '{data.split}' holds no text; use another copy")
    return data.join.join(taken), source.facts


def questions_by_name(name: str, count: int) -> tuple[list[Question], dict[str, Any]]:
    """The first ``count`` five-shot questions of a named set, spread over its subjects, and where they come from.

    Subjects take turns in alphabetical order: the first question of each, then the second of each, and so on. Each
    question ends with "Answer:" and no space; its choices are the letters.

    Raises:
        BadInput: the name is unknown, the local copy lacks a split or a column, the hub gives nothing, a subject has
            too few worked examples, or there are fewer questions than asked for.
        ToolchainMissing: the ``datasets`` library is not installed.
    """
    data = _known(name, QUESTIONS, "questions")
    with _opened(data) as source:
        examples = _by_subject(source, data.examples)
        asked = _by_subject(source, data.split)
    turns = itertools.zip_longest(*(asked[subject] for subject in sorted(asked)))
    rows = [row for turn in turns for row in turn if row is not None]
    if len(rows) < count:
        raise BadInput(f"{source.place}: has {len(rows)} questions where {count} are needed; ask for fewer")
    questions = []
    for row in rows[:count]:
        shots = examples.get(row["subject"], [])[:SHOTS]
        if len(shots) < SHOTS:
            found = f"'{data.examples}' has {len(shots)} questions about '{row['subject']}'"
            raise BadInput(f"{source.place}: {found} where {SHOTS} are needed; use a whole copy")
        questions.append(Question(_prompt(row, shots), LETTERS, row["answer"]))
    return questions, source.facts | {"shots": SHOTS, "shots_split": data.examples}


def instructions_by_name(name: str) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Instruction, input and output of every row of a named set in order, and where they come from.

    A row without input has an empty one.

    Raises:
        BadInput: the name is unknown, the local copy lacks the split or a column, or the hub gives nothing.
        ToolchainMissing: the ``datasets`` library is not installed.
    """
    data = _known(name, INSTRUCTIONS, "instructions")
    instruction, given, output = data.columns
    taken = []
    with _opened(data) as source:
        for number, row in enumerate(source.rows(data.split, data.columns)):
            values = (row[instruction], row[given] or "", row[output])
            if not all(isinstance(value, str) for value in values):
                raise BadInput(f"{source.place}: row {number} of '{data.split}' holds more than text in its columns")
            taken.append(values)
    if not taken:
        raise BadInput(f"{source.place}: the split '{data.split}' has no rows; use another copy")
    return taken, source.facts


def _known(name: str, table: dict[str, NamedData], kind: str) -> NamedData:
    if name not in table:
        raise BadInput(f"{name}: is not the name of {kind} that Amoeba knows; give one of {', '.join(sorted(table))}")
    return table[name]


@dataclass(frozen=True)
class _Source:
    """An opened dataset: the library's builder, and the place by which errors name it."""

    data: NamedData
    builder: Any
    place: str
    local: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the data; the revision is the hub's commit, and unknown for a local copy."""
        data = self.data
        facts = {"source": data.name, "dataset": data.dataset, "config": data.config, "split": data.split}
        if self.local:
            return facts | {"from": "local copy"}
        commit = str(self.builder.hash)
        known = commit if re.fullmatch("[0-9a-f]{40}", commit) else data.revision
        return facts | {"from": "hub"} | ({"revision": known} if known else {})

    def rows(self, split: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The rows of a split in order; raises BadInput where they cannot be had or lack a column."""
        rows = self._loaded(split)
        for row in rows:
            missing = [column for column in columns if column not in row]
            if missing:
                found = f"the split '{split}' has no column '{missing[0]}' but {', '.join(row)}"
                raise BadInput(f"{self.place}: {found}; use files as {self.data.dataset} has them")
            yield row

    def _loaded(self, split: str) -> Iterator[dict[str, Any]]:
        try:
            if self.local or self.data.streamed:
                yield from self.builder.as_streaming_dataset(split=split)
            else:
                self.builder.download_and_prepare()
                yield from self.builder.as_dataset(split=split)
        except Exception as error:  # the library raises whatever its parts raise
            raise _unreadable(self.data, self.place if self.local else None, error) from None


def _unreadable(data: NamedData, folder: str | None, error: Exception) -> BadInput:
    """One sentence for whatever kept the library from reading a folder or the hub."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if folder:
        return BadInput(f"{folder}: cannot be read ({reason}); copy the files of {data.dataset} again")
    what = f"the hub did not give {data.dataset} ({reason})"
    return BadInput(f"{data.name}: {what}; connect to it, or keep a copy in the folder $AMOEBA_DATA/{data.name}")


@contextmanager
def _opened(data: NamedData) -> Iterator[_Source]:
    """The dataset of a name; while it is read, the library's progress bars and remarks stay off the terminal."""
    with ExitStack() as stack:
        try:
            stack.enter_context(quiet_data())
        except ImportError:
            found = f"{data.name} is read by the datasets library, which is not installed"
            raise ToolchainMissing(f"{found}; run pip install 'amoeba-deploy[evaluate]'") from None
        yield _open(data)


def _open(data: NamedData) -> _Source:
    """The dataset of a name, from its local copy where there is one."""
    from datasets import load_dataset_builder

    folder = _local_copy(data)
    try:
        if folder is not None:
            # The folder of the files themselves: a card above them may list files that the copy lacks.
            splits = {split: _files(data, split, folder) for split in (data.split, data.examples) if split}
            inside = splits[data.split][0].parent
            names = {split: [file.name for file in files] for split, files in splits.items()}
            return _Source(data, load_dataset_builder(str(inside), data_files=names), str(folder), True)
        config = None if data.revision == _PARQUET_BRANCH else data.config
        return _Source(data, load_dataset_builder(data.dataset, config, revision=data.revision), data.dataset, False)
    except BadInput:
        raise
    except Exception as error:  # the library raises whatever its parts raise
        raise _unreadable(data, str(folder) if folder else None, error) from None


def _local_copy(data: NamedData) -> Path | None:
    root = os.environ.get("AMOEBA_DATA")
    folder = Path(root, data.name).absolute() if root else None
    return folder if folder and folder.is_dir() else None


def _files(data: NamedData, split: str, folder: Path) -> list[Path]:
    """A split's files in a local copy, all of one ending; raises BadInput where there are none."""
    pattern = data.files.format(split=split)
    for ending in _ENDINGS:
        found = sorted(folder.glob(pattern + ending))
        if found:
            return found
    wanted = f"{pattern}.parquet or {pattern}.jsonl"
    raise BadInput(f"{folder}: has no file {wanted}; copy the split '{split}' of {data.dataset} there")


def _by_subject(source: _Source, split: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a split by their subject, in order; raises BadInput at a row that is no question of four choices."""
    subjects: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(source.rows(split, _MMLU_COLUMNS)):
        words = isinstance(row["question"], str) and isinstance(row["subject"], str)
        choices = isinstance(row["choices"], list) and len(row["choices"]) == len(LETTERS)
        if not words or not choices or row["answer"] not in range(len(LETTERS)):
            raise BadInput(f"{source.place}: row {number} of '{split}' is not a question of four choices and an answer")
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


def _prompt(row: dict[str, Any], shots: list[dict[str, Any]]) -> str:
    """Introduction, worked examples and the question, up to "Answer:"."""
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return head + "".join(f"{_ask(shot)} {LETTERS[shot['answer']]}\n\n" for shot in shots) + _ask(row)


def _ask(row: dict[str, Any]) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"], *choices, "Answer:"])
