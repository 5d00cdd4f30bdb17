"""Text from an engine, token by token, with its latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import load_tokenizer
from amoeba_deploy.sampling import Logits, greedy

Choose = Callable[[Logits, Sequence[int]], int]
"""The next token from logits [vocabulary] and all ids so far."""


@dataclass
class Timings:
    """Seconds of the first token and of each one after it, filled while text streams."""

    first: float = 0.0
    later: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Time to first token in milliseconds."""
        return 1e3 * self.first

    @property
    def tpot_ms(self) -> float | None:
        """Median time per output token after the first in milliseconds; None after a single token."""
        return 1e3 * median(self.later) if self.later else None


def stop_tokens(folder: Path) -> set[int]:
    """Ids that end a text, from generation_config.json and config.json."""
    values: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json_object(folder / name).get("eos_token_id")
            values += found if isinstance(found, list) else [found]
    return {value for value in values if isinstance(value, int)}


def chosen_tokens(
    engine: Engine, prompt: Sequence[int], tokens: int, stops: Set[int], timings: Timings, choose: Choose
) -> Iterator[int]:
    """Up to ``tokens`` ids after a prompt, each one chosen from the engine's logits; ends before a stop token."""
    engine.reset()
    ids, fed = list(prompt), len(prompt)
    for index in range(tokens):
        began = time.perf_counter()
        chosen = choose(engine.feed(np.array([ids[-fed:]], dtype=np.int64))[0, -1], ids)
        spent = time.perf_counter() - began
        if index == 0:
            timings.first = spent
        else:
            timings.later.append(spent)
        if chosen in stops:
            return
        yield chosen
        ids.append(chosen)
        fed = 1


def prompt_of(folder: Path, text: str) -> list[int]:
    """The ids of a text to continue, as its tokenizer begins one; raises BadInput where it has none."""
    ids: list[int] = load_tokenizer(folder).encode(text).ids
    if not ids:
        raise BadInput("the prompt has no tokens; give a text with -p")
    return ids


def stream_text(
    engine: Engine,
    folder: Path,
    prompt: Sequence[int],
    tokens: int,
    context: int,
    timings: Timings,
    *,
    choose: Choose = greedy,
    stops: Set[int] = frozenset(),
) -> Iterator[str]:
    """Pieces of text as they are generated, whole characters only and no special tokens.

    Args:
        engine: what is fed.
        folder: its tokenizer's and generation settings'.
        prompt: the ids to continue.
        tokens: how many to generate at most.
        context: the positions that the engine provides for.
        timings: filled meanwhile.
        choose: the next token from logits [vocabulary] and all ids so far.
        stops: ids that end the text beside those that the folder names.

    Raises:
        BadInput: the prompt, with the tokens asked for, is longer than the context.
    """
    from tokenizers.decoders import DecodeStream

    if len(prompt) + tokens > context:
        raise BadInput(f"the prompt of {len(prompt)} tokens and --tokens {tokens} exceed the context of {context}")
    tokenizer = load_tokenizer(folder)
    decoder = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    for identifier in chosen_tokens(engine, prompt, tokens, stop_tokens(folder) | stops, timings, choose):
        piece = decoder.step(tokenizer, identifier)
        if piece:
            yield piece
