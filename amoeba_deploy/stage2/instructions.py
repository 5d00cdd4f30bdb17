"""What stage 2 tunes on: instructions with their answers, or running text, from a file or a data set by name.

A ``.json`` file is a list of objects, a ``.jsonl`` file holds one a line: ``instruction``, ``input`` (may be left out)
and ``output``; or ``instruction`` and ``instances``, a list of ``input`` and ``output``, as self-instruct writes them.
Any other file is text in UTF-8. Examples without an answer are left out and counted.

The ``alpaca`` template is QLoRA's, which the released recipe tuned with: its prompt ends in a space. ``plain`` is for
base models that never saw those words.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import file_digest, read_text
from amoeba_deploy.named_data import INSTRUCTIONS, QUESTIONS, TEXTS, instructions_by_name, text_by_name

Template = Literal["alpaca", "plain"]
TEXT_CHARACTERS = 16_000_000
"""Read of a text by name where nothing else is said: some four million tokens, eight thousand rows of 512."""

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


@dataclass(frozen=True)
class Example:
    """An instruction, its input (empty where it needs none) and its answer; ``place`` says where in its source."""

    instruction: str
    input: str
    output: str
    place: str

    def prompt(self, template: Template) -> str:
        """What stands before the answer."""
        if template == "plain":
            return f"{self.instruction}\n" + (f"{self.input}\n" if self.input else "")
        form = _ALPACA_WITH_INPUT if self.input else _ALPACA
        return form.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Instructions:
    """Examples in the order of their source, by which errors name it, and facts for the record."""

    examples: tuple[Example, ...]
    source: str
    named: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class RunningText:
    """Text of which every token is learnt, its source, and facts for the record."""

    text: str
    source: str
    facts: dict[str, Any]


def read_examples(source: str, *, characters: int = TEXT_CHARACTERS) -> Instructions | RunningText:
    """Examples or text from a file, or from a data set by name.

    Args:
        source: a path, where a file exists or the name has a suffix; else a name such as alpaca-gpt4 or wikitext2.
        characters: how much of a text by name is read, in whole rows.

    Raises:
        BadInput: it is missing or damaged, has no answers to learn from, or is no name that Amoeba knows.
        ToolchainMissing: a name needs the ``datasets`` library, which is not installed.
    """
    path = Path(source)
    if path.is_file() or path.suffix:
        return _read_file(path)
    if source in INSTRUCTIONS:
        rows, facts = instructions_by_name(source)
        examples = [Example(*row, place=f"row {number}") for number, row in enumerate(rows)]
        digest = hashlib.sha256(json.dumps(rows).encode())
        return _answered(examples, source, True, facts | {"digest": f"sha256:{digest.hexdigest()}"})
    if source in TEXTS:
        text, facts = text_by_name(source, characters)
        digest = hashlib.sha256(text.encode())
        return RunningText(text, source, facts | {"digest": f"sha256:{digest.hexdigest()}"})
    if source in QUESTIONS:
        raise BadInput(f"{source}: holds multiple-choice questions; tune on instructions or a text")
    known = sorted((*INSTRUCTIONS, *TEXTS))
    close = difflib.get_close_matches(source, known, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise BadInput(f"{source}: is neither a file nor a data set known by name ({', '.join(known)}){hint}")


def split(
    data: Instructions | RunningText, share: float, template: Template = "alpaca"
) -> tuple[Instructions | RunningText, str]:
    """The data without its last share, and that share as text, on which tuning can be measured.

    Of instructions these are the last examples, prompt and answer, with an empty line between them; text is cut where
    a line begins, if one does near there.

    Raises:
        BadInput: the share is not between 0 and 1, or leaves nothing to tune on or to measure on.
    """
    if not 0 < share < 1:
        raise BadInput(f"a share of {share} cannot be held out; give one between 0 and 1")
    whole = len(data.text) if isinstance(data, RunningText) else len(data.examples)
    kept = whole - max(1, int(whole * share + 0.5))
    if isinstance(data, RunningText):
        kept = data.text.rfind("\n", max(0, 2 * kept - whole), kept) + 1 or kept
    if kept < 1:
        raise BadInput(f"{data.source}: is too short to hold out a share of {share}; give more data or a smaller share")
    if isinstance(data, RunningText):
        facts = data.facts | {"held_out_characters": whole - kept}
        return replace(data, text=data.text[:kept], facts=facts), data.text[kept:]
    held = "\n\n".join(example.prompt(template) + example.output for example in data.examples[kept:])
    return replace(data, examples=data.examples[:kept], facts=data.facts | {"held_out": whole - kept}), held


def _answered(examples: list[Example], source: str, named: bool, facts: dict[str, Any]) -> Instructions:
    """The examples that have an answer; the others are counted."""
    kept = tuple(example for example in examples if example.output.strip())
    if not kept:
        raise BadInput(f"{source}: has no answers to learn from; give instructions with an 'output' each")
    skipped = len(examples) - len(kept)
    return Instructions(kept, source, named, facts | ({"skipped": skipped} if skipped else {}))


def _read_file(path: Path) -> Instructions | RunningText:
    text, source = read_text(path), str(path)
    facts: dict[str, Any] = {"source": path.name, "digest": file_digest(path)}
    if not text.strip():
        raise BadInput(f"{path}: is empty; give instructions or a text to tune on")
    if path.suffix not in (".json", ".jsonl"):
        return RunningText(text, source, facts)
    rows = _lines(path, text) if path.suffix == ".jsonl" else _entries(path, text)
    return _answered([each for place, row in rows for each in _examples(path, place, row)], source, False, facts)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON-lines file; a line ends at a line feed only."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number}: is not valid JSON ({_reason(error)})") from None


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "; a file of one object a line is named .jsonl"
        raise BadInput(f"{path}{line}: is not valid JSON ({_reason(error)}){hint}") from None
    if not isinstance(value, list):
        raise BadInput(f"{path}: is not a JSON list of objects with instruction, input and output")
    yield from ((f"entry {number}", row) for number, row in enumerate(value, 1))


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _examples(path: Path, place: str, row: Any) -> Iterator[Example]:
    """The examples of one object; raises BadInput, naming the place, where it is not of either form."""
    where = f"{path}, {place}"
    if not isinstance(row, dict):
        raise BadInput(f"{where}: is not a JSON object of instruction, input and output")
    instruction = _words(row, "instruction", where)
    instances = row.get("instances", [row])
    if not isinstance(instances, list) or not all(isinstance(each, dict) for each in instances):
        raise BadInput(f"{where}: 'instances' is not a list of objects with input and output")
    for each in instances:
        given = "" if each.get("input") is None else _words(each, "input", where)
        yield Example(instruction, given, _words(each, "output", where), place)


def _words(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise BadInput(f"{where}: has no '{key}'; each example needs an instruction and an output")
    value = row[key]
    if not isinstance(value, str):
        raise BadInput(f"{where}: '{key}' is not text but {type(value).__name__}; put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:  # an escape such as \ud800 alone
        raise BadInput(f"{where}: '{key}' holds half a character (a lone surrogate)") from None
    return value
