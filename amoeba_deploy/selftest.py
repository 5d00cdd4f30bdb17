"""The self-test of a bundle: a prompt, and the tokens that its engine gave for it when it was built.

A device whose arithmetic rounds otherwise may choose another token where the best two logits are nearly equal. So
the engine's margins between them are kept too. The engine under test is fed the recorded tokens, and at every step
whose margin is at least twice the tolerance it must choose the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Engine
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.files import read_json, write_json

SELFTEST = "selftest.json"
SELFTEST_FORMAT = "amoeba.selftest/1"


def margin(logits: NDArray[np.float32]) -> float:
    """How far the largest of some logits [vocabulary] is above the second largest."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


@dataclass(frozen=True)
class SelfTest:
    """Prompt ids, the ids that the engine chose after them, its margins, and the tolerance of its logits."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    tolerance: float

    @property
    def decisive(self) -> list[int]:
        """Steps at which any right engine chooses the recorded token; the widest margin's where none is that wide."""
        wide = [step for step, value in enumerate(self.margins) if value >= 2 * self.tolerance]
        return wide or [int(np.argmax(self.margins))]


def record(engine: Engine, prompt: tuple[int, ...], steps: int, tolerance: float) -> SelfTest:
    """Let an engine choose ``steps`` tokens after a prompt; ``tolerance`` is absolute."""
    tokens: list[int] = []
    margins = []
    for logits in _fed(engine, prompt, tokens, steps):
        tokens.append(int(logits.argmax()))
        margins.append(round(margin(logits), 3))
    return SelfTest(prompt, tuple(tokens), tuple(margins), round(tolerance, 6))


def _fed(engine: Engine, prompt: tuple[int, ...], tokens: Sequence[int], steps: int) -> Iterator[NDArray[np.float32]]:
    """Logits [vocabulary] after the prompt, and after each token; ``tokens`` may grow while this runs."""
    engine.reset()
    ids = np.array([prompt], dtype=np.int64)
    for step in range(steps):
        yield engine.feed(ids)[0, -1]
        ids = np.array([[tokens[step]]], dtype=np.int64)


def check(engine: Engine, test: SelfTest, where: str) -> int:
    """Run a self-test; returns how many tokens were compared.

    Raises:
        VerificationFailed: the engine chooses other tokens.
    """
    found = [int(logits.argmax()) for logits in _fed(engine, test.prompt, test.tokens, len(test.tokens))]
    for step in test.decisive:
        if found[step] != test.tokens[step]:
            raise VerificationFailed(
                f"{where}: the engine gives token {found[step]} at step {step} where the self-test has "
                f"{test.tokens[step]}; build the bundle again"
            )
    return len(test.decisive)


def write_selftest(folder: Path, test: SelfTest) -> None:
    """Write ``selftest.json``."""
    value = {"format": SELFTEST_FORMAT, "prompt": list(test.prompt), "tokens": list(test.tokens)}
    write_json(folder / SELFTEST, value | {"margins": list(test.margins), "tolerance": test.tolerance})


def read_selftest(folder: Path) -> SelfTest:
    """Read ``selftest.json``; raises BadInput where it is damaged."""
    value = read_json(folder / SELFTEST, SELFTEST_FORMAT)
    try:
        prompt, tokens = tuple(map(int, value["prompt"])), tuple(map(int, value["tokens"]))
        margins, tolerance = tuple(map(float, value["margins"])), float(value["tolerance"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{folder / SELFTEST}: lacks prompt, tokens, margins or tolerance; get the bundle again"
        ) from None
    if not prompt or not tokens or len(tokens) != len(margins):
        raise BadInput(f"{folder / SELFTEST}: its lists are empty or differ in length; get the bundle again")
    return SelfTest(prompt, tokens, margins, tolerance)
