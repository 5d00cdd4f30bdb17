"""An export as a user asks for it: a request answered, and the bundle that was built of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.export import Export, Order, export
from amoeba_deploy.extraction_store import ExtractionStore
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.request import Answer, Request
from amoeba_deploy.search import Candidate
from amoeba_deploy.shape import Shape, format_width


@dataclass(frozen=True)
class ExportAnswer:
    """What an export built, and the search that led to it."""

    answer: Answer
    export: Export
    seconds: dict[str, float]

    @property
    def measured_candidate(self) -> Candidate | None:
        """The shape with the engine's own latencies, where it was built for this machine and measured."""
        timing, best = self.export.timing, self.answer.best
        if timing is None:
            return None
        found = replace(best.prediction, tpot_ms=timing.tpot_ms, ttft_ms=timing.ttft_ms, source="measured")
        return replace(best, prediction=found)

    def to_json(self) -> dict[str, Any]:
        """The object that ``export --json`` prints."""
        return self.answer.to_json() | {
            "bundle": str(self.export.path),
            "bytes": self.export.bytes,
            "verified": self.export.verified_json(),
            "seconds": self.seconds,
            "cannot_run": self.export.cannot_run,
            "notes": list(self.export.artefact.notes),
            "steps": [step.to_json() for step in self.export.artefact.steps],
            "usage": [command.to_json() for command in self.export.artefact.usage],
        }


def export_answer(
    checkpoint: Checkpoint,
    request: Request,
    output: Path | None,
    *,
    force: bool,
    verify: bool,
    text: Path | None = None,
    answer: Answer | None = None,
    store: ExtractionStore | None = None,
) -> ExportAnswer:
    """Answer a request, unless its ``answer`` is known, and build its bundle; ``store`` shares extractions."""
    answer = answer or request.answer()
    best, device = answer.best, request.target.device
    plan = request.plan(best.flow, best.precision)
    plan = plan or checkpoint.plan(best.shape, request.space.steps(best.flow, best.precision))
    target = output or Path(f"{device.name}-{best.flow}-{best.precision}-{_folder_name(best.shape)}")
    facts = {
        key: value for key, value in answer.facts().items() if key not in ("flow", "precision", "workload", "shape")
    }
    facts |= {"table": request.table_digest}
    order = Order(
        plan,
        best.flow,
        best.precision,
        request.target.workload,
        request.target.options(best.flow),
        device.name == LOCAL,
        facts,
    )
    done = export(
        checkpoint,
        order,
        target,
        force=force,
        verify=verify,
        text=text,
        phases=request.phases,
        progress=request.progress,
        store=store,
    )
    return ExportAnswer(answer, done, request.phases.seconds)


def _folder_name(shape: Shape) -> str:
    return f"{shape.depth}x{format_width(shape.width)}".replace("/", "of")
