"""Batches to tune on: token ids, which of them are learnt, and in which order.

An example is its source (the token that begins a text, then the prompt) and its target (the answer, then the token that
ends a text), tokenised apart. Position t predicts token t + 1, and only targets are learnt: the first token of an
answer from the last one of its prompt. Of running text, cut into rows of equal length, every next token is learnt.

Rows are padded at their end. Attention looks back only, so padding changes nothing before it and needs no mask. Where
rows are packed, position ids begin again with every example: stock transformers keeps examples apart by them as long as
it gets no attention mask and no cache (``use_cache=False``).

Batches are counted from 0 without end, and batch k follows from the data, the seed and k alone, so tuning goes on from
any step without further state, on any number of processes. The order of an epoch is drawn from seed and epoch.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object
from amoeba_deploy.stage2.instructions import Example, Instructions, RunningText, Template

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from amoeba_deploy.model_folder import ModelFolder

LongAnswers = Literal["refuse", "cut", "drop"]
Grouping = Literal["none", "length", "pack"]
SOURCE_TOKENS, TARGET_TOKENS = 384, 128
"""The windows of the released recipe."""

_TEXTS_AT_ONCE = 2000
_CHARACTERS_AT_ONCE = 500_000
"""Of a running text; the tokenizer takes some 150 bytes for each."""
_BATCHES_SORTED = 50
"""Batches whose rows are sorted by length together: enough that little padding is left, few enough to stay mixed."""


@dataclass(frozen=True)
class Sequences:
    """Tokenised examples, or rows of text, end to end.

    ``ids`` holds the tokens of all; sequence i is ``ids[starts[i]:starts[i + 1]]``, and is learnt from its token
    number ``learnt[i]`` on, which is at least 1 and below its length.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    learnt: NDArray[np.int64]
    length: int
    """The most tokens that a row of a batch has."""
    kind: Literal["instructions", "text"]
    facts: dict[str, Any]

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return len(self.learnt)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.starts)


def special_tokens(model: ModelFolder) -> tuple[int | None, int | None]:
    """The ids that begin and end a text.

    What ``tokenizer_config.json`` says of a token decides, also where it says that there is none; what it leaves out
    is taken from ``generation_config.json``, then ``config.json``, the first where several end a text.

    Raises:
        BadInput: a file is damaged, or an id lies outside the vocabulary.
    """
    tokenizer = model.tokenizer()
    beside = {
        name: read_json_object(model.path / name) if (model.path / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    }
    found = []
    for role in ("bos_token", "eos_token"):
        named = beside["tokenizer_config.json"]
        if role in named:
            content = named[role].get("content") if isinstance(named[role], dict) else named[role]
            value: Any = tokenizer.token_to_id(content) if isinstance(content, str) else None
        else:
            values = [config.get(f"{role}_id") for config in (beside["generation_config.json"], model.config)]
            value = next((each for each in values if each is not None), None)
            value = next(iter(value), None) if isinstance(value, list) else value
        size = model.architecture.vocabulary
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise BadInput(f"{model.path}: its {role} is {value!r}, which is not one of its {size} tokens")
        found.append(value)
    return found[0], found[1]


def tokenise(
    data: Instructions | RunningText,
    tokenizer: Tokenizer,
    *,
    bos: int | None,
    eos: int | None,
    context: int,
    source: int = SOURCE_TOKENS,
    target: int = TARGET_TOKENS,
    template: Template = "alpaca",
    long_answers: LongAnswers | None = None,
) -> Sequences:
    """The token ids of examples, or of text in rows of ``source + target`` tokens.

    Args:
        data: what to tune on.
        tokenizer: the model's; it adds nothing by itself.
        bos: begins each source, where given.
        eos: ends each target that is not cut, where given.
        context: the positions that the model attends to; rows of text are at most so long.
        source: tokens of a source; what is beyond them is cut off and counted.
        target: tokens of a target.
        template: how an instruction and its input become a prompt.
        long_answers: what becomes of an answer beyond its window; left out, files are refused, and data sets by name
            are cut, as the recipe does.

    Raises:
        BadInput: a window is not positive, both exceed the context, an answer is refused, none is left, or a text is
            shorter than one row.
    """
    if source < 1 or target < 1:
        raise BadInput(f"--source-tokens {source} and --target-tokens {target} must be 1 or more")
    plain = _without_settings(tokenizer)
    if isinstance(data, RunningText):
        return _text_rows(data, plain, min(source + target, context))
    if source + target > context:
        raise BadInput(
            f"--source-tokens {source} and --target-tokens {target} make {source + target} tokens, and the model "
            f"attends to {context}; ask for fewer"
        )
    return _Windows(bos, eos, source, target, long_answers or ("cut" if data.named else "refuse")).apply(
        data, plain, template
    )


def _without_settings(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the padding and truncation that its file may ask for."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    bare: Tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    bare.no_padding()
    bare.no_truncation()
    return bare


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that the tokenizer takes in little memory; each but the first begins a line where one does."""
    start = 0
    while start < len(text):
        end = start + _CHARACTERS_AT_ONCE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _text_rows(data: RunningText, tokenizer: Tokenizer, length: int) -> Sequences:
    """Every whole row of a text."""
    ids = np.concatenate([np.array(_encoded(tokenizer, [piece])[0], dtype=np.int32) for piece in _pieces(data.text)])
    count = len(ids) // length
    if not count:
        raise BadInput(
            f"{data.source}: has {len(ids)} tokens where a row takes {length}; give a longer text, or smaller "
            f"--source-tokens and --target-tokens"
        )
    facts = data.facts | {"examples": count, "sequence": length, "answer_tokens": count * (length - 1)}
    starts = np.arange(count + 1, dtype=np.int64) * length
    return Sequences(ids[: starts[-1]], starts, np.ones(count, dtype=np.int64), length, "text", facts)


@dataclass(frozen=True)
class _Windows:
    """How the tokens of prompts and answers become sequences."""

    bos: int | None
    eos: int | None
    source: int
    target: int
    long_answers: LongAnswers

    def apply(self, data: Instructions, tokenizer: Tokenizer, template: Template) -> Sequences:
        parts: list[NDArray[np.int32]] = []
        lengths, learnt = [], []
        counts = dict.fromkeys(("skipped", "cut_sources", "cut_answers", "dropped"), 0)
        counts["skipped"] = data.facts.get("skipped", 0)
        beyond: list[tuple[Example, int]] = []
        for start in range(0, len(data.examples), _TEXTS_AT_ONCE):
            examples = data.examples[start : start + _TEXTS_AT_ONCE]
            prompts = _encoded(tokenizer, [example.prompt(template) for example in examples])
            answers = _encoded(tokenizer, [example.output for example in examples])
            for example, prompt, answer in zip(examples, prompts, answers, strict=True):
                head, tail = self._ends(prompt, answer)
                if not answer or (len(tail) > self.target and self.long_answers == "drop"):
                    counts["dropped" if answer else "skipped"] += 1
                    continue
                if len(tail) > self.target and self.long_answers == "refuse":
                    beyond.append((example, len(tail)))
                counts["cut_sources"] += len(head) > self.source
                counts["cut_answers"] += len(tail) > self.target
                head, tail = head[: self.source], tail[: self.target]
                parts.append(np.array(head + tail, dtype=np.int32))
                lengths.append(len(head) + len(tail))
                learnt.append(len(head))
        if beyond:
            raise BadInput(self._refusal(data.source, beyond))
        if not parts:
            raise BadInput(f"{data.source}: has no answers to learn from within --target-tokens {self.target}")
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        facts = {key: value for key, value in data.facts.items() if key != "skipped"} | {"examples": len(parts)}
        facts |= {key: value for key, value in counts.items() if value}
        facts |= {"template": template, "source_tokens": self.source, "target_tokens": self.target}
        facts["answer_tokens"] = int(starts[-1]) - sum(learnt)
        first = np.array(learnt, dtype=np.int64)
        return Sequences(np.concatenate(parts), starts, first, self.source + self.target, "instructions", facts)

    def _ends(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Source and target with the tokens that begin and end a text."""
        return (
            prompt if self.bos is None else [self.bos, *prompt],
            answer if self.eos is None else [*answer, self.eos],
        )

    def _refusal(self, source: str, beyond: list[tuple[Example, int]]) -> str:
        example, tokens = beyond[0]
        more = f", which {len(beyond) - 1} more exceed too" if len(beyond) > 1 else ""
        return (
            f"{source}, {example.place}: the answer takes {tokens} tokens with its end, and --target-tokens is "
            f"{self.target}{more}; raise it, or give --long-answers cut or drop"
        )


def check_packing(architecture: Architecture, data: Sequences) -> None:
    """Raise BadInput where a packed row would not compute what its examples compute alone.

    Every supported family keeps packed examples apart. But with ``longrope`` the stock forward pass turns all rows of
    a batch by the long factors as soon as one example in it is beyond the original context.
    """
    if architecture.rope.kind != "longrope":
        return
    limit, longest = int(architecture.rope.setting("original_max_position_embeddings")), int(data.lengths.max())
    if longest > limit:
        raise BadInput(
            f"examples of up to {longest} tokens cannot be packed for a model whose rotary positions change beyond "
            f"{limit}; take smaller windows or another grouping"
        )


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and the predictions that are learnt of them.

    ``ids`` [rows, length] int64; ``positions`` [rows, length] begin again with every packed example, and are None where
    rows are not packed. Prediction k is read at the flat position ``places[k]`` (row * length + column) and should give
    ``wanted[k]``.
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    places: torch.Tensor
    wanted: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.ids.to(device), positions, self.places.to(device), self.wanted.to(device))


class Batches:
    """The micro-batches of all processes together, without end; batch k is the same in every run."""

    def __init__(
        self, data: Sequences, rows: int, seed: int, grouping: Grouping | None = None, *, pad: int = 0
    ) -> None:
        """Batches of ``rows`` rows.

        Args:
            data: the sequences; each is read once an epoch.
            rows: of a batch, over all processes.
            seed: of the order.
            grouping: ``none``: shuffled; ``length``: rows of similar length together, which saves padding; ``pack``:
                as many examples in a row as fit, which ones together being the same in every epoch. Left out, it is
                ``length`` for instructions; the rows of a text are all full, and only shuffled.
            pad: the id that fills rows; it is never learnt.
        """
        if rows < 1:
            raise BadInput(f"a batch of {rows} rows holds nothing; give 1 or more")
        self.data, self.rows, self.seed, self.pad = data, rows, seed, pad
        self.grouping: Grouping = grouping or "length"
        self._lengths: list[int] = data.lengths.tolist()
        if data.kind == "text":
            self.grouping = "none"
        self._contents: list[list[int]] | None = self._packed() if self.grouping == "pack" else None
        self._orders: dict[int, list[int]] = {}

    @property
    def rows_an_epoch(self) -> int:
        """Rows in which every sequence is read once; an epoch ends within a batch where they are no whole batches."""
        return self.data.count if self._contents is None else len(self._contents)

    def __getitem__(self, number: int) -> Batch:
        """The whole batch."""
        return self.share(number, 0, 1)

    def share(self, number: int, rank: int, ranks: int) -> Batch:
        """The rows ``rank::ranks`` of a batch, which are those of one process; all shares are of equal size.

        Raises:
            BadInput: the rows do not divide by the number of processes.
        """
        if self.rows % ranks:
            found = f"a batch of {self.rows} rows cannot be spread evenly over {ranks} processes"
            raise BadInput(f"{found}; give a multiple of {ranks}")
        if number < 0 or not 0 <= rank < ranks:
            raise IndexError(f"there is no batch {number} or no process {rank} of {ranks}")
        contents = [self._content(number * self.rows + row) for row in range(self.rows)]
        length = max(sum(self._lengths[index] for index in content) for content in contents)
        return self._filled(contents[rank::ranks], length)

    def _filled(self, contents: Sequence[Sequence[int]], length: int) -> Batch:
        import torch

        ids = np.full((len(contents), length), self.pad, dtype=np.int64)
        positions = np.zeros_like(ids)
        places, wanted = [], []
        for row, content in enumerate(contents):
            column = 0
            for index in content:
                tokens = self.data.ids[self.data.starts[index] : self.data.starts[index + 1]]
                learnt, end = int(self.data.learnt[index]), column + len(tokens)
                ids[row, column:end] = tokens
                positions[row, column:end] = np.arange(len(tokens))
                places.append(np.arange(learnt - 1, len(tokens) - 1) + row * length + column)
                wanted.append(tokens[learnt:].astype(np.int64))
                column = end
        return Batch(
            torch.from_numpy(ids),
            None if self._contents is None else torch.from_numpy(positions),
            torch.from_numpy(np.concatenate(places)),
            torch.from_numpy(np.concatenate(wanted)),
        )

    def _content(self, place: int) -> list[int]:
        """The sequences of a row, by its place in the endless run of all epochs' rows."""
        epoch, index = divmod(place, self.rows_an_epoch)
        order = self._orders.get(epoch)
        if order is None:
            order = self._order(epoch)
            # A batch may span two epochs, or more of them where they are short and soon drawn again.
            self._orders = {known: each for known, each in self._orders.items() if known == epoch - 1} | {epoch: order}
        return [order[index]] if self._contents is None else self._contents[order[index]]

    def _order(self, epoch: int) -> list[int]:
        """The rows of an epoch in their order, a permutation.

        With ``length`` the epoch's whole batches are formed of rows that are alike; the rows before the first and
        after the last, which share a batch with another epoch, stay as they fall.
        """
        count, rows = self.rows_an_epoch, self.rows
        source = random.Random(f"{self.seed}/{epoch}")
        order = list(range(count))
        source.shuffle(order)
        if self.grouping != "length":
            return order
        head = min(-epoch * count % rows, count)
        end = head + (count - head) // rows * rows
        batches = []
        for start in range(head, end, rows * _BATCHES_SORTED):
            window = order[start : min(start + rows * _BATCHES_SORTED, end)]
            window.sort(key=self._lengths.__getitem__)
            batches += [window[at : at + rows] for at in range(0, len(window), rows)]
        source.shuffle(batches)
        return [*order[:head], *(row for batch in batches for row in batch), *order[end:]]

    def _packed(self) -> list[list[int]]:
        """Examples in rows: the longest first, each where it leaves the least space; ties as they are shuffled."""
        order = list(range(self.data.count))
        random.Random(f"{self.seed}/pack").shuffle(order)
        order.sort(key=lambda index: -self._lengths[index])
        rows: list[list[int]] = []
        spaces: list[tuple[int, int]] = []  # free tokens and row, ascending
        for index in order:
            tokens = self._lengths[index]
            at = bisect_left(spaces, (tokens, 0))
            if at == len(spaces):
                rows.append([])
                space, row = self.data.length, len(rows) - 1
            else:
                space, row = spaces.pop(at)
            rows[row].append(index)
            insort(spaces, (space - tokens, row))
        return rows
