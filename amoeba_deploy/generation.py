"""Greedy text from an engine, token by token, with its latencies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import load_tokenizer


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


def greedy_tokens(engine: Engine, prompt: list[int], tokens: int, stops: set[int], timings: Timings) -> Iterator[int]:
    """Up to ``tokens`` ids, each the most likely one; ends after a stop token."""
    engine.reset()
    ids = np.array([prompt], dtype=np.int64)
    for index in range(tokens):
        began = time.perf_counter()
        chosen = int(engine.feed(ids)[0, -1].argmax())
        spent = time.perf_counter() - began
        if index == 0:
            timings.first = spent
        else:
            timings.later.append(spent)
        if chosen in stops:
            return
        yield chosen
        ids = np.array([[chosen]], dtype=np.int64)


def stream_text(
    engine: Engine, folder: Path, prompt: str, tokens: int, context: int, timings: Timings
) -> Iterator[str]:
    """Pieces of text as they are generated.

    Raises:
        BadInput: the prompt is empty or, with the tokens asked for, longer than the context.
    """
    from tokenizers.decoders import DecodeStream

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise BadInput("the prompt has no tokens; give a text with -p")
    if len(ids) + tokens > context:
        raise BadInput(f"the prompt of {len(ids)} tokens and --tokens {tokens} exceed the context of {context}")
    decoder = DecodeStream(ids=ids, skip_special_tokens=True)
    for identifier in greedy_tokens(engine, ids, tokens, stop_tokens(folder), timings):
        piece = decoder.step(tokenizer, identifier)
        if piece:
            yield piece
