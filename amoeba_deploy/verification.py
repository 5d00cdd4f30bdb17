"""Verification: does a built engine compute what the model computes that it was built from?

The engine is fed ids that cover the vocabulary and a short text, and then the tokens that the reference itself would
choose. At every position its logits must lie within the flow's stated tolerance of the reference's, and the token it
would choose must be the reference's, up to the first step at which the reference's best two logits are closer than
twice the tolerance (there either choice is right). The reference is transformers in float32, with the weights that
the engine really holds: a quantised engine is compared with its own weights dequantised. Where an engine also rounds
activations, the same graph is first run without that rounding and held to a float32 engine's tolerance.

Dequantised weights could hide a mistake in the weights themselves, so they must lie within what rounding explains of
the subnet's own; and the engine's perplexity must not rise above the unquantised subnet's by more than the flow states.
Where no dequantised weights can be had, that perplexity alone decides.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import EXACT_TOLERANCE, Backend, BuildOptions, Engine, Ids
from amoeba_deploy.backends.torch import torch_reference
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.evaluation import SEQUENCE, text_rows
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selftest import margin

STEPS = 32
PROBE = 48
PROMPT = "Once upon a time there was"
SAMPLE = 128
"""Tokens that the model writes to measure perplexity on where no text is given."""
TEXT_ROWS = 8
"""Rows of a text that perplexity is measured on."""


@dataclass(frozen=True)
class Perplexity:
    """Of an engine and of the unquantised subnet on the same tokens, and by what share it may rise."""

    engine: float
    reference: float
    allowed_rise: float
    tokens: int

    @property
    def rise(self) -> float:
        """How far the engine's is above the reference's, as a share of that."""
        return self.engine / self.reference - 1

    @property
    def passed(self) -> bool:
        """Whether it did not rise by more than allowed; a NaN did not pass."""
        return self.rise <= self.allowed_rise

    def to_json(self) -> dict[str, Any]:
        """Rounded to six digits."""
        shown = {key: float(f"{getattr(self, key):.6g}") for key in ("engine", "reference", "rise", "allowed_rise")}
        return shown | {"tokens": self.tokens}


@dataclass(frozen=True)
class Verification:
    """The largest logit difference, what was allowed (absolute), and whether so many greedy tokens agreed."""

    max_logit_error: float
    tolerance: float
    greedy_tokens_equal: bool
    greedy_tokens: int
    exact_logit_error: float | None = None
    perplexity: Perplexity | None = None
    weight_error: float | None = None
    """The largest relative error of a dequantised tensor; None where nothing was quantised, or it cannot be had."""
    held_to_logits: bool = True
    """Whether logits and tokens decide; without a dequantised reference only perplexity does."""

    @property
    def passed(self) -> bool:
        """Whether logits and tokens agree, and perplexity did not rise by more than allowed."""
        if self.perplexity is not None and not self.perplexity.passed:
            return False
        agree = self.greedy_tokens_equal and self.max_logit_error <= self.tolerance
        return agree or not self.held_to_logits

    @property
    def rounding(self) -> float:
        """How far another right engine's logits may be off this one's, to two digits: what it rounds, they may not."""
        error = self.tolerance if self.exact_logit_error is None else self.max_logit_error
        return float(f"{error:.1e}")

    def rule(self, tolerance: float) -> dict[str, Any]:
        """What the engine was held to and passed, without figures that differ from run to run."""
        rise = None if self.perplexity is None else self.perplexity.allowed_rise
        logits = tolerance if self.held_to_logits else None
        return {"logit_tolerance": logits, "allowed_perplexity_rise": rise, "passed": self.passed}

    def to_json(self) -> dict[str, Any]:
        """The entries that ``export --json`` promises, and the tolerance."""
        return {
            "max_logit_error": self.max_logit_error,
            "tolerance": self.tolerance,
            "greedy_tokens_equal": self.greedy_tokens_equal,
            "greedy_tokens": self.greedy_tokens,
            "exact_logit_error": self.exact_logit_error,
            "held_to_logits": self.held_to_logits,
            "weight_error": None if self.weight_error is None else float(f"{self.weight_error:.6g}"),
            "perplexity": None if self.perplexity is None else self.perplexity.to_json(),
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


def verify_artefact(
    backend: Backend,
    model: ModelFolder,
    artefact: Path,
    precision: str,
    options: BuildOptions,
    text: Path | None = None,
) -> Verification:
    """Open an artefact that was lowered from a model with some options and compare it with transformers.

    Args:
        backend: the artefact's.
        model: the dense subnet that it was lowered from.
        artefact: the folder.
        precision: the artefact's.
        options: those that it was lowered with.
        text: what perplexity is measured on; where left out, what the unquantised subnet itself writes.

    Raises:
        VerificationFailed: logits, tokens, weights or perplexity differ by more than allowed; the message has the
            numbers.
        BadInput: the text is shorter than a row.
    """
    context = options.context
    with tempfile.TemporaryDirectory(prefix="amoeba-reference-") as work:
        folder = backend.reference_folder(model, artefact, precision, Path(work))
        what = f"the {backend.flow} engine in {precision}"
        plain = torch_reference(model.path)
        rows = perplexity_rows(model, plain, context, text)
        wanted = perplexity(plain, rows)
        if folder is not None and folder != model.path:
            error = weight_error(model, ModelFolder(folder))
            allowed = allowed_weight_error(backend, precision)
            if not error <= allowed:
                raise VerificationFailed(
                    f"{what} is wrong: its dequantised weights are {error:.1%} off the subnet's, where {allowed:.1%} is"
                    f" allowed"
                )
            reference: Engine | None = torch_reference(folder)
        else:
            reference, error = (plain if folder is not None else None), None
        exact = backend.open_exact(artefact, precision)
        strict = compare(exact, reference, model, EXACT_TOLERANCE, context) if exact and reference else None
        del exact
        if strict is not None:
            _require(strict, f"{what}, run on float32 activations,")
        opened = backend.open(artefact, precision, context=context, batch=options.batch)
        result = compare(opened, reference or plain, model, backend.tolerance(precision), context)
        found = Perplexity(perplexity(opened, rows), wanted, backend.allowed_rise(precision), rows.size)
    result = replace(result, perplexity=found, weight_error=error, held_to_logits=reference is not None)
    if strict is not None:
        result = replace(result, exact_logit_error=strict.max_logit_error, greedy_tokens=strict.greedy_tokens)
    _require(result, what)
    return result


def perplexity_rows(model: ModelFolder, plain: Engine, context: int, text: Path | None) -> Ids:
    """Ids [rows, length] to measure perplexity on: of a text, or one row that the model itself writes.

    A sample of the model's own (temperature 1, always the same) suits every model: the rise of perplexity on it is
    exp of the Kullback-Leibler divergence of the engine from the model, as estimated from so many tokens.
    """
    if text is not None:
        rows = text_rows(text, model.tokenizer(), min(SEQUENCE, context))
        return rows[:TEXT_ROWS]
    ids = prompt_ids(model, context)[:, :1]
    rng, written = np.random.default_rng(0), [ids]
    plain.reset()
    for _ in range(min(SAMPLE, context) - 1):
        logits = plain.feed(written[-1])[0, -1].astype(np.float64)
        chances = np.exp(logits - logits.max())
        written.append(np.array([[rng.choice(len(chances), p=chances / chances.sum())]]))
    return np.concatenate(written, axis=1).astype(np.int64)


def perplexity(engine: Engine, rows: Ids) -> float:
    """exp of the mean negative log-likelihood of all next tokens of some rows, each fed at once."""
    losses = []
    for row in rows:
        engine.reset()
        logits = engine.feed(row[None])[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, row[1:, None], 1)[:, 0])
    return float(np.exp(np.mean(losses)))


def weight_error(model: ModelFolder, dequantised: ModelFolder) -> float:
    """The largest error of any of a model's dequantised tensors: root mean square, relative to the tensor's own."""
    worst = 0.0
    for name in dequantised.tensors.infos:
        own, other = model.tensors.float32(name), dequantised.tensors.float32(name)
        norm = float(np.linalg.norm(own))
        error = float(np.linalg.norm(own - other)) / norm if norm else float(np.abs(other).max())
        worst = float(np.maximum(worst, error))
    return worst


def allowed_weight_error(backend: Backend, precision: str) -> float:
    """What rounding to a precision's bits can do: 25% with 4 bits, half of it with every further one.

    Rounding normally distributed weights to b bits in blocks of 32 gives about 2.3 / 2^(b-1) / sqrt(12): 8% with 4.
    """
    return float(4 * 2.0 ** -int(backend.storage(precision).matrix_bits))


def _require(result: Verification, what: str) -> None:
    if result.passed:
        return
    said = []
    if result.held_to_logits:
        tokens = "equal" if result.greedy_tokens_equal else "different"
        said.append(
            f"its logits differ from the reference by up to {result.max_logit_error:.3g} where "
            f"{result.tolerance:.3g} is allowed, and its greedy tokens are {tokens}"
        )
    if result.perplexity is not None:
        found = result.perplexity
        said.append(
            f"its perplexity is {found.engine:.4g} where the unquantised subnet has {found.reference:.4g} and a rise "
            f"of {found.allowed_rise:.1%} is allowed"
        )
    raise VerificationFailed(f"{what} is wrong: {'; '.join(said)}")
