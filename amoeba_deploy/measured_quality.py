"""The best few shapes of a search evaluated for real: each in its precision, through its engine, on a text.

What the search predicted of their quality was interpolated, or of another precision; here it is measured, and they are
ranked anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for, require_toolchain
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, TextLoss, file_digest, text_loss, text_rows
from amoeba_deploy.quality import MEASURED, REFERENCE_PRECISION, QualityValue
from amoeba_deploy.quality_measurement import plan_logits
from amoeba_deploy.request import Answer, Request
from amoeba_deploy.search import Candidate, search
from amoeba_deploy.search.candidate import MeasuredQuality
from amoeba_deploy.search.choice import SearchResult, pareto_front

TOP = 3
"""Candidates that are evaluated where nothing else is said."""


@dataclass(frozen=True)
class QualityCheck:
    """A text to evaluate candidates on, and whether it is the one that the checkpoint's quality was measured on."""

    text: Path
    sequence: int
    own: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, text: Path | None, any_text: bool) -> QualityCheck:
        """Check the options before any work is done.

        Raises:
            BadInput: there is no text or no checkpoint, or the text is another one and ``any_text`` is not set.
        """
        if checkpoint is None:
            raise BadInput("--measure-quality evaluates subnets, and a config has no weights; give a checkpoint")
        if text is None:
            raise BadInput(
                "--measure-quality needs the text to measure on: give --quality-text FILE, the one that the "
                "checkpoint's quality was measured on"
            )
        digest = file_digest(text) if text.is_file() else None
        if digest is None:
            raise BadInput(f"{text}: is not a file; give the text that the checkpoint's quality was measured on")
        known = checkpoint.quality
        own = known is not None and known.text.get("digest") == digest
        if known is not None and not own and not any_text:
            raise BadInput(
                f"{text}: has the digest {digest[:19]}..., and the checkpoint's quality was measured on a text with "
                f"{str(known.text.get('digest'))[:19]}...; give that one, or add --any-text to rank by this one"
            )
        sequence = int(known.text.get("sequence", SEQUENCE)) if known is not None and own else SEQUENCE
        return cls(text, min(sequence, checkpoint.architecture.context), own)


def with_measured_quality(answer: Answer, check: QualityCheck, top: int = TOP) -> Answer:
    """Evaluate the best of an answer's shapes and rank them by what is found; those behind them keep their order.

    Raises:
        BadInput: a shape's engine cannot be run here.
        NoShapeFits: none of them keeps the limit on loss, now that it is measured.
    """
    request, chosen = answer.request, answer.result.ranked[:top]
    checkpoint = request.space.checkpoint
    assert checkpoint is not None, "checked beforehand"
    for candidate in chosen:
        _require_runnable(request, candidate)
    rows = text_rows(check.text, checkpoint.model.tokenizer(), check.sequence)
    found: list[MeasuredQuality] = []
    with request.progress.bar("quality", len(chosen)) as step:
        for candidate in chosen:
            loss = _loss(checkpoint, request, candidate, rows)
            value = QualityValue("loss", loss.loss, MEASURED, np.array(loss.rows, dtype=np.float32))
            found.append(MeasuredQuality(candidate.quality, replace(candidate, quality=value), loss.standard_error))
            step()
    result = _ranked_anew(answer, [one.candidate for one in found], check.own)
    order = {_key(candidate): place for place, candidate in enumerate(result.ranked)}
    found.sort(key=lambda one: order.get(_key(one.candidate), len(order)))
    remarks = answer.remarks
    if not check.own:
        said = f"the losses of the first {len(found)} were measured on {check.text}, and compare with no others"
        remarks = (*remarks, said)
    return replace(answer, result=result, remarks=remarks, measured=tuple(found))


def _key(candidate: Candidate) -> tuple[Any, ...]:
    return candidate.shape, candidate.flow, candidate.precision


def _ranked_anew(answer: Answer, measured: Sequence[Candidate], own: bool) -> SearchResult:
    """The result with measured candidates first; on the checkpoint's own text the front has their losses, too."""
    request, before = answer.request, answer.result
    first = search(measured, request.budget, request.target.workload, request.axes)
    ranked = (*first.ranked, *before.ranked[len(measured) :])
    result = replace(before, best=first.best, ranked=ranked, equals=first.equals)
    if not own:
        return result
    known = {_key(candidate): candidate for candidate in measured}
    found = tuple(known.get(_key(candidate), candidate) for candidate in before.found)
    tokens, axes = request.target.workload.tokens, before.axes
    standing = {_key(candidate) for candidate in before.front} | set(known)
    front = pareto_front((c for c in found if _key(c) in standing), axes[0], tokens, axes[1])
    return replace(result, found=found, front=tuple(front))


def _require_runnable(request: Request, candidate: Candidate) -> None:
    """Raise BadInput where an engine cannot be evaluated on this machine."""
    if candidate.precision == REFERENCE_PRECISION:
        return
    backend = load_backend(candidate.flow)
    require_toolchain(backend)
    options = options_for(backend, request.target.context, 1, None, request.target.settings)
    unable = backend.cannot_run(candidate.precision, options)
    if unable is None and not backend.opens:
        unable = "only its own tools run it"
    if unable:
        raise BadInput(
            f"the loss of {candidate.shape} in {candidate.flow} {candidate.precision} cannot be measured on this "
            f"machine: {unable}; leave --measure-quality out, or search on a machine that runs it"
        )


def _loss(checkpoint: Checkpoint, request: Request, candidate: Candidate, rows: Any) -> TextLoss:
    """Of one candidate's subnet, as its engine computes on this machine."""
    flow, precision = candidate.flow, candidate.precision
    plan = request.plan(flow, precision)
    plan = plan or checkpoint.plan(candidate.shape, request.space.steps(flow, precision))
    context = max(request.target.context, rows.shape[1])
    options = options_for(load_backend(flow), context, 1, None, request.target.settings)
    with tempfile.TemporaryDirectory(prefix="amoeba-quality-") as work:
        return text_loss(plan_logits(checkpoint, plan, flow, precision, options, Path(work)), rows)
