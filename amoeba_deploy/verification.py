"""Verification: does a built engine compute what the model computes that it was built from?

The engine is fed ids that cover the vocabulary and a short text, and then the tokens that the reference itself would
choose. At every position its logits must lie within the flow's stated tolerance of the reference's, and the token it
would choose must be the reference's, up to the first step at which the reference's best two logits are closer than
twice the tolerance (there either choice is right). The reference is transformers in float32, with the weights that
the engine really holds: a quantised engine is compared with its own weights dequantised. Where an engine also rounds
activations, the same graph is first run without that rounding and held to a float32 engine's tolerance.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import EXACT_TOLERANCE, Backend, Engine, Ids
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selftest import margin

STEPS = 32
PROBE = 48
PROMPT = "Once upon a time there was"


@dataclass(frozen=True)
class Verification:
    """The largest logit difference, what was allowed (absolute), and whether so many greedy tokens agreed."""

    max_logit_error: float
    tolerance: float
    greedy_tokens_equal: bool
    greedy_tokens: int
    exact_logit_error: float | None = None

    @property
    def passed(self) -> bool:
        """Whether logits and tokens agree."""
        return self.greedy_tokens_equal and self.max_logit_error <= self.tolerance

    @property
    def rounding(self) -> float:
        """How far another right engine's logits may be off this one's, to two digits: what it rounds, they may not."""
        error = self.tolerance if self.exact_logit_error is None else self.max_logit_error
        return float(f"{error:.1e}")

    def to_json(self) -> dict[str, Any]:
        """The entries that ``export --json`` promises, and the tolerance."""
        return {
            "max_logit_error": self.max_logit_error,
            "tolerance": self.tolerance,
            "greedy_tokens_equal": self.greedy_tokens_equal,
            "greedy_tokens": self.greedy_tokens,
            "exact_logit_error": self.exact_logit_error,
        }


def prompt_ids(model: ModelFolder, context: int) -> Ids:
    """Ids [1, n] of the self-test's prompt, half of the context at most; small ids where there is no tokenizer."""
    vocabulary = model.architecture.vocabulary
    try:
        ids = model.tokenizer().encode(PROMPT).ids
    except BadInput:
        ids = list(range(1, 9))
    return np.array([[identifier % vocabulary for identifier in ids[: max(context // 2, 1)]]], dtype=np.int64)


def probe_ids(vocabulary: int, length: int = PROBE) -> Ids:
    """Ids [1, length] spread over the whole vocabulary, always the same."""
    return np.random.default_rng(0).integers(0, vocabulary, (1, length))


def compare(
    engine: Engine, reference: Engine, model: ModelFolder, tolerance: float, context: int, steps: int = STEPS
) -> Verification:
    """Feed both the same ids and compare; ``tolerance`` is a share of the reference's largest logit.

    Args:
        engine: the engine under test.
        reference: the engine that is right.
        model: the folder that both were made from.
        tolerance: the largest difference allowed, relative.
        context: positions that the engine provides for.
        steps: greedy steps to compare; fewer where the context is shorter.
    """
    vocabulary = model.architecture.vocabulary
    worst, scale = 0.0, 0.0

    def both(ids: Ids) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        nonlocal worst, scale
        found, wanted = engine.feed(ids), reference.feed(ids)
        # np.maximum, unlike max, keeps a NaN once there is one.
        worst = float(np.maximum(worst, np.abs(found - wanted).max()))
        scale = max(scale, float(np.abs(wanted).max()))
        return found[0, -1], wanted[0, -1]

    def afresh(ids: Ids) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        engine.reset()
        reference.reset()
        return both(ids)

    afresh(probe_ids(vocabulary, min(PROBE, context)))
    prompt = prompt_ids(model, context)
    found, wanted = afresh(prompt)
    tokens, right, margins = [], [], []
    for _ in range(min(steps, context - prompt.shape[1])):
        tokens.append(int(found.argmax()))
        right.append(int(wanted.argmax()))
        margins.append(margin(wanted))
        found, wanted = both(np.array([[right[-1]]]))
    allowed = tolerance * scale
    decisive = next((i for i, value in enumerate(margins) if value < 2 * allowed), len(margins))
    equal = bool(np.isfinite(worst)) and tokens[:decisive] == right[:decisive]
    return Verification(worst, allowed, equal, decisive)


def verify_artefact(backend: Backend, model: ModelFolder, artefact: Path, precision: str, context: int) -> Verification:
    """Open an artefact that was lowered for ``context`` positions and compare it with transformers.

    Raises:
        VerificationFailed: logits or tokens differ by more than allowed; the message has the numbers.
    """
    with tempfile.TemporaryDirectory(prefix="amoeba-reference-") as work:
        folder = backend.reference_folder(model, artefact, precision, Path(work))
        reference = load_backend("torch").open(folder, "fp32")
        exact = backend.open_exact(artefact, precision)
        strict = compare(exact, reference, model, EXACT_TOLERANCE, context) if exact else None
        opened = backend.open(artefact, precision)
        result = compare(opened, reference, model, backend.tolerance(precision), context)
    if strict is not None:
        _require(strict, f"the {backend.flow} engine in {precision}, run on float32 activations,")
        result = replace(result, exact_logit_error=strict.max_logit_error, greedy_tokens=strict.greedy_tokens)
    _require(result, f"the {backend.flow} engine in {precision}")
    return result


def _require(result: Verification, what: str) -> None:
    if not result.passed:
        tokens = "equal" if result.greedy_tokens_equal else "different"
        raise VerificationFailed(
            f"{what} is wrong: its logits differ from the reference by up to {result.max_logit_error:.3g} where "
            f"{result.tolerance:.3g} is allowed, and its greedy tokens are {tokens}"
        )
