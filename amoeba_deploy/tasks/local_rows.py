"""Tasks from files at hand: rows of question, choices and gold become a dataset in the columns that the harness reads.

For a task such as ``piqa`` the folder ``DATA/piqa`` is looked at. Where it holds JSON-lines files of the form
``{"question", "choices", "gold"}`` (MMLU: also ``subject``; BoolQ: ``passage``, and gold 1 for yes; WikiText-2: the raw
text), they are rewritten into the columns of the hub's dataset, and the harness's own definition of the task asks them.
Any other folder is taken for a copy of the hub's dataset repository. Where there is no such folder the harness gets the
dataset from the hub.

One thing the form cannot hold: HellaSwag's rows on the hub name an activity before the context, which these lack, so
the figures of such files are not those of the hub's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import read_text
from amoeba_deploy.tasks.names import NamedTask

Row = dict[str, Any]
Spec = dict[str, Any]
"""A task or group in the harness's own words."""

LETTERS = "ABCDEFGHIJ"
_TITLE = re.compile(r"^ = [^=].*[^=] = $")
"""An article of WikiText begins with its title between single equals signs."""


@dataclass(frozen=True)
class Form:
    """How the rows of one task are rewritten.

    ``splits`` names for every split of the hub's dataset the files that may hold it, the first that exists; the first
    split is the one that is asked. ``config`` is the dataset's configuration that the harness opens.
    """

    splits: Mapping[str, tuple[str, ...]]
    rewrite: Callable[[Row], Row]
    config: str = "default"
    more: Mapping[str, Any] | None = None
    """What of the harness's definition does not fit such rows, replaced."""


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value


def _choices(row: Row) -> list[str]:
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise TypeError("choices")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError("gold")
    return choices


def _lettered(row: Row) -> Row:
    choices = _choices(row)
    if len(choices) > len(LETTERS):
        raise ValueError("choices")
    letters = list(LETTERS[: len(choices)])
    return {"choices": {"text": choices, "label": letters}, "answerKey": letters[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": _text(row, "question"), **_lettered(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": _text(row, "question"), **_lettered(row)}


def _piqa(row: Row) -> Row:
    first, second = _choices(row)
    return {"goal": _text(row, "question"), "sol1": first, "sol2": second, "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    first, second = _choices(row)
    if "_" not in (sentence := _text(row, "question")):
        raise ValueError("question")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(row["gold"] + 1)}


def _boolq(row: Row) -> Row:
    if type(row["gold"]) is not int or row["gold"] not in (0, 1):
        raise ValueError("gold")
    return {"passage": _text(row, "passage"), "question": _text(row, "question"), "label": row["gold"]}


def _mmlu(row: Row) -> Row:
    choices = _choices(row)
    if len(choices) != 4:
        raise ValueError("choices")
    subject = _text(row, "subject")
    return {"question": _text(row, "question"), "subject": subject, "choices": choices, "answer": row["gold"]}


def _without_marks(text: str) -> str:
    """A context or ending without WikiHow's marks in square brackets; a title becomes a sentence of its own."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Row:
    endings = [_without_marks(choice) for choice in _choices(row)]
    return {"query": _without_marks(_text(row, "question")), "choices": endings, "label": row["gold"]}


_HELD_OUT = ("validation*.jsonl", "valid*.jsonl", "test*.jsonl", "dev*.jsonl")
_TESTED = ("test*.jsonl", "validation*.jsonl", "dev*.jsonl")
_TRAINED = {"train": ("train*.jsonl",)}

FORMS: dict[str, Form] = {
    "mmlu": Form({"test": ("test*.jsonl",), "dev": ("dev*.jsonl",)}, _mmlu),
    "boolq": Form({"validation": _HELD_OUT, **_TRAINED}, _boolq, "boolq"),
    "piqa": Form({"validation": _HELD_OUT, **_TRAINED}, _piqa),
    # As they stand here the rows are what the harness's own preparation would make of the hub's.
    "hellaswag": Form({"validation": _HELD_OUT, **_TRAINED}, _hellaswag, more={"process_docs": None}),
    "winogrande": Form({"validation": _HELD_OUT, **_TRAINED}, _winogrande, "winogrande_xl"),
    "arc_easy": Form({"test": _TESTED, **_TRAINED}, _arc, "ARC-Easy"),
    "arc_challenge": Form({"test": _TESTED, **_TRAINED}, _arc, "ARC-Challenge"),
    "openbookqa": Form({"test": _TESTED, **_TRAINED}, _openbookqa, "main"),
    "wikitext": Form({"test": ("*test*.txt", "*.txt")}, lambda row: row, "wikitext-2-raw-v1"),
}
"""Every task that files at hand can hold."""


def local_folder(task: NamedTask, data: Path | None) -> Path | None:
    """The folder of a task's files: below ``data``, else below ``$AMOEBA_DATA``; None where there is none.

    Raises:
        BadInput: ``data`` is not a folder.
    """
    if data is not None and not data.is_dir():
        raise BadInput(f"{data}: is not a folder; give one that holds a folder a task, such as {data}/piqa")
    root = data or (Path(os.environ["AMOEBA_DATA"]) if os.environ.get("AMOEBA_DATA") else None)
    if root is None:
        return None
    folder = root / (task.local or task.name)
    return folder.absolute() if folder.is_dir() else None


def local_spec(task: NamedTask, folder: Path, work: Path) -> Spec | list[Spec]:
    """The harness's words for a task asked from a folder, its dataset rewritten below ``work``.

    Raises:
        BadInput: a file is damaged, or does not hold rows of the form.
    """
    form = FORMS.get(task.name)
    files = _files(form, folder) if form else {}
    if form is None or not files:
        return {"task": task.harness, "dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(work / "cache")}}
    if task.name == "wikitext":
        rows = {split: list(_pages(read_text(file))) for split, file in files.items()}
    else:
        rows = {split: list(_rewritten(file, form.rewrite)) for split, file in files.items()}
    opened = {
        "dataset_path": str(work / "data"),
        "dataset_kwargs": {"cache_dir": str(work / "cache")},
        **_splits(files),
    }
    if task.name != "mmlu":
        _write_dataset(work / "data", {form.config: rows})
        return {"task": task.harness, **opened, **(form.more or {})}
    subjects = sorted({row["subject"] for row in rows["test"]})
    configs = {
        subject: {split: [row for row in found if row["subject"] == subject] for split, found in rows.items()}
        for subject in subjects
    }
    _write_dataset(work / "data", configs)
    return [{"task": f"mmlu_{subject}", **opened} for subject in subjects]


def _splits(files: Mapping[str, Path]) -> dict[str, str | None]:
    """The splits that there are: the harness opens every one that a task names, whether it needs it or not."""
    asked = next(iter(files))
    named = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    # Worked examples never come from the questions that are asked.
    examples = next((split for split in ("dev", "train") if split in files), None)
    return {entry: split if split in files else None for split, entry in named.items()} | {
        "fewshot_split": examples or asked
    }


def examples_missing(task: NamedTask, folder: Path) -> bool:
    """Whether a folder of files of the form holds no worked examples for its questions."""
    form = FORMS.get(task.name)
    files = _files(form, folder) if form else {}
    return bool(files) and not {"dev", "train"} & set(files)


def _files(form: Form, folder: Path) -> dict[str, Path]:
    """The file of every split that the folder holds in the form; none where the first split is missing."""
    found: dict[str, Path] = {}
    for split, patterns in form.splits.items():
        match = next((files[0] for pattern in patterns if (files := sorted(folder.glob(pattern)))), None)
        if match is not None:
            found[split] = match
        elif not found:
            return {}
    return found


def _rewritten(file: Path, rewrite: Callable[[Row], Row]) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield rewrite(json.loads(line))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else "does not hold what this task asks"
            raise BadInput(f"{file}, line {number}: {what}; docs/evaluation.md shows the form of the rows") from None
        count += 1
    if not count:
        raise BadInput(f"{file}: holds no rows; docs/evaluation.md shows their form")


def _pages(text: str) -> Iterator[Row]:
    """The articles of a raw text of WikiText, whole; what stands before the first title goes with it."""
    page: list[str] = []
    begun = False
    for line in text.split("\n"):
        if _TITLE.match(line) and begun:
            yield {"page": "\n".join(page)}
            page = []
        begun = begun or bool(_TITLE.match(line))
        page.append(line)
    if any(line.strip() for line in page):
        yield {"page": "\n".join(page)}


def _write_dataset(folder: Path, configs: Mapping[str, Mapping[str, Iterable[Row]]]) -> None:
    """A dataset repository as the hub has them: files, and a card that says which split each is."""
    folder.mkdir()
    card: list[dict[str, Any]] = []
    for config, splits in configs.items():
        (folder / config).mkdir()
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / config / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
        card.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n", encoding="utf-8")
