"""A report's content: what was found out for it, before any of it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.progress import Progress
from amoeba_deploy.report.asked import searches_of
from amoeba_deploy.report.board import DeviceBoards, boards_of
from amoeba_deploy.report.built import Built, read_built
from amoeba_deploy.report.case import Case
from amoeba_deploy.report.command import export_command
from amoeba_deploy.report.kept import Kept, kept_units
from amoeba_deploy.report.left_out import Prediction, predictions_of
from amoeba_deploy.report.quality import ShapeQuality, qualities_of
from amoeba_deploy.request import Request
from amoeba_deploy.several import of_device
from amoeba_deploy.space import Space


@dataclass(frozen=True)
class Report:
    """All that a page shows of a checkpoint."""

    checkpoint: Checkpoint
    named: Path | None
    """How the command line names the checkpoint; None where it is left out."""
    devices: tuple[DeviceBoards, ...]
    kept: tuple[Kept, ...]
    qualities: Mapping[str, Sequence[ShapeQuality]]
    predictions: tuple[Prediction, ...]
    bundles: tuple[Built, ...]

    @property
    def request(self) -> Request:
        """The first search: of its workload and metric are all."""
        return self.devices[0].boards[0].widest.request

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.checkpoint.name}: what to ship"

    @property
    def singles(self) -> list[Case]:
        """Every device in every engine."""
        return [case for device in self.devices for board in device.boards for case in board.singles]

    def to_json(self) -> dict[str, Any]:
        """What ``report --json`` prints, but for the file."""
        workload, budget = self.request.target.workload, self.request.budget
        return {
            "checkpoint": self.checkpoint.name,
            "checkpoint_digest": self.checkpoint.digest,
            "metric": budget.metric,
            "workload": {"batch": workload.batch, "prompt": workload.prompt, "tokens": workload.tokens},
            "devices": [
                {
                    "device": device.boards[0].device,
                    "cases": [self._case(case) for board in device.boards for case in board.cases],
                    "remarks": list(device.remarks),
                }
                for device in self.devices
            ],
            "shapes": len({str(candidate.shape) for case in self.singles for candidate in case.found}),
            "bundles": [str(built.path) for built in self.bundles],
        }

    def _case(self, case: Case) -> dict[str, Any]:
        return {
            "flows": [{"flow": flow, "precision": precision} for flow, precision in case.pairs],
            "considered": len(case.found),
            "choices": [
                {"from_ms": step.ms, **step.best.shape.to_json(), "flow": step.best.flow}
                | {"precision": step.best.precision, "command": self.command(case) + step.budget + "ms"}
                for step in case.choices
            ],
        }

    def command(self, case: Case) -> str:
        """The ``amoeba export`` of a case up to the number of its budget."""
        return export_command(self.named, case.asked)


def make_report(
    checkpoint: Checkpoint, named: Path | None, asked: Mapping[str, Any], bundles: Sequence[Path], progress: Progress
) -> Report:
    """Search every device at every budget, and read what else there is; nothing is measured.

    Raises:
        AmoebaError: what a search raises, or a bundle is damaged.
    """
    space = Space.of_checkpoint(checkpoint)
    built = tuple(read_built(folder, checkpoint) for folder in bundles)
    each, devices = searches_of(space, asked), []
    for one in each:
        progress.say(f"searching for {one['device']} at every budget")
        try:
            devices.append(boards_of(space, one, progress))
        except AmoebaError as error:
            raise error if len(each) == 1 else of_device(one["device"], error) from None
    cases = [case for device in devices for board in device.boards for case in board.singles]
    return Report(
        checkpoint,
        named,
        tuple(devices),
        _kept(space, cases),
        {} if space.quality is None else qualities_of(checkpoint, space.quality),
        tuple(prediction for case in cases for prediction in predictions_of(case)),
        built,
    )


def _kept(space: Space, cases: Sequence[Case]) -> tuple[Kept, ...]:
    """The units of all shapes; engines that take the same numbers of units keep the same."""
    assert space.checkpoint is not None, "a report is of a checkpoint"
    engines: dict[Any, dict[str, None]] = {}
    for case in cases:
        flow, precision = case.pairs[0]
        engines.setdefault(space.steps(flow, precision), {})[f"{flow} {precision}"] = None
    return tuple(kept_units(space.checkpoint, steps, space.shapes(steps), named) for steps, named in engines.items())
