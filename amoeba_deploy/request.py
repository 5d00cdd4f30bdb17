"""A search or export as a user asks for it, and the answer: everything between the command line and the modules."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend, takes_of
from amoeba_deploy.backends.backend import BuildOptions
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.export import Export, Order, Phases, export
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.families import read_architecture
from amoeba_deploy.files import sha256_of
from amoeba_deploy.model_folder import read_config
from amoeba_deploy.options import comma_list
from amoeba_deploy.plan import NEURON_MULTIPLE, BlockPlan, Plan, Steps, sized
from amoeba_deploy.profiles.device import LOCAL, load_device
from amoeba_deploy.profiles.local import table_with
from amoeba_deploy.profiles.prediction import Metric, Prediction
from amoeba_deploy.profiles.profiler import local_table_file
from amoeba_deploy.profiles.source import config_shapes
from amoeba_deploy.profiles.table import Table, read_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import Quality
from amoeba_deploy.search import Budget, Candidate, SearchResult, SubnetSizes, prediction_to_json, quality_to_json
from amoeba_deploy.shape import Shape, format_width
from amoeba_deploy.target import Choices, Target, resolve_target, search_target


@dataclass(frozen=True)
class Space:
    """The shapes to search over: those of a checkpoint, or of a model's config alone."""

    name: str
    architecture: Architecture
    quality: Quality | None
    multiple: int
    checkpoint: Checkpoint | None

    def shapes(self, steps: Steps) -> list[Shape]:
        """All distinct subnets that keep only so many heads and neurons, by their shortest names."""
        if self.checkpoint is not None:
            return self.checkpoint.shapes(steps)
        return config_shapes(self.architecture, steps)

    def sized(self, shape: Shape, steps: Steps) -> SubnetSizes:
        """The sizes of a shape's subnet."""
        checkpoint = self.checkpoint
        padded = checkpoint.sized(shape, steps) if checkpoint else sized(self.architecture, shape, steps)
        alike = checkpoint is None or shape.policy == "uniform"
        parts = [padded] if alike or checkpoint is None else checkpoint.parts(shape, steps)
        return SubnetSizes.of(padded, parts, checkpoint is not None and checkpoint.compensates(shape))

    def plan(self, shape: str, flow: str, precision: str) -> Plan:
        """The plan of ``--shape`` in sizes that an engine takes.

        Raises:
            BadInput: the shape is none of the checkpoint's, or a plan file keeps what the engine does not take.
        """
        checkpoint = self.checkpoint
        if checkpoint is None:
            raise BadInput(f"{shape}: a config has no plans; give a checkpoint")
        plan = checkpoint.plan_of(shape, self.steps(flow, precision))
        if not plan.whole_blocks:
            raise BadInput(
                f"{shape}: keeps blocks without their attention or feed-forward, of which no latency is known; "
                f"extract it, or keep whole blocks"
            )
        takes = takes_of(flow)
        for block in plan.blocks:
            refused = takes.count_refusal(self.architecture, len(block.heads), len(block.neurons), precision)
            if refused:
                nearest = self._nearest(block, flow, precision)
                raise BadInput(
                    f"{shape} cannot be lowered to {flow} {precision}: {refused}; the nearest that it takes is "
                    f"{nearest[0]} key/value heads and {nearest[1]} neurons"
                )
        return plan

    def refusal(self, shape: str | None, flow: str, precision: str, options: BuildOptions) -> str | None:
        """Why a backend takes none of the shapes, or not the one that is asked for, as half a sentence, or None."""
        steps, backend = self.steps(flow, precision), load_backend(flow)
        shapes: Sequence[Shape] = self.shapes(steps) if shape is None else ()
        subnets = (self.sized(candidate, steps).padded for candidate in shapes)
        if shape is not None and self.checkpoint is not None:
            try:
                subnets = (plan.subnet(self.architecture) for plan in [self.plan(shape, flow, precision)])
            except BadInput:
                return None  # said where the plan is asked for again
        first = None
        for subnet in subnets:
            refused = families.refusal(subnet) or backend.refusal(subnet, precision, options)
            if not refused:
                return None
            first = first or refused
        return first

    def _nearest(self, block: BlockPlan, flow: str, precision: str) -> tuple[int, int]:
        full = self.architecture
        ratios = Fraction(len(block.kv_heads), full.kv_heads), Fraction(len(block.neurons), full.neurons)
        return self.steps(flow, precision).kept(full, *ratios)

    def steps(self, flow: str, precision: str) -> Steps:
        """The numbers of heads and neurons that an engine takes."""
        compensated = self.checkpoint is not None and self.checkpoint.bias
        return takes_of(flow).steps(self.architecture, self.multiple, precision, compensated)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Space:
        """All distinct subnets of a checkpoint; raises BadInput where no latency could be known of them."""
        checkpoint.require_whole_blocks()
        return cls(
            checkpoint.name,
            checkpoint.architecture,
            checkpoint.quality,
            checkpoint.multiple,
            checkpoint,
        )

    @classmethod
    def of_config(cls, path: Path) -> Space:
        """All distinct subnets of a config, from half its depth and half its width up; no weights are needed."""
        config = read_config(path)
        refuse_ragged(config, path)
        return cls(str(path), read_architecture(config), None, NEURON_MULTIPLE, None)


def require_budget(asked: Mapping[str, Any], shape: str | None) -> None:
    """Raise BadInput where there is neither a budget to search within nor a shape to build."""
    if asked["latency"] is None and asked["memory"] is None and shape is None:
        raise BadInput("give a budget: --latency with its unit (such as --latency 40ms), --memory, or both")


@dataclass(frozen=True)
class Request:
    """One resolved request: the space, the target, the budget, and where latencies come from."""

    space: Space
    target: Target
    budget: Budget
    table: Table | None
    table_digest: str | None
    measured_only: bool
    shape: str | None
    progress: Progress
    phases: Phases = field(default_factory=Phases)

    @classmethod
    def of(cls, space: Space, asked: Mapping[str, Any], progress: Progress, shape: str | None = None) -> Request:
        """Resolve the options of ``search`` and ``export``.

        Raises:
            BadInput: no budget and no shape is given, or an option names what does not exist.
        """
        require_budget(asked, shape)
        phases = Phases()
        with phases.phase("search"):
            device = load_device(asked["device"])
            workload = Workload(asked["batch"], asked["prompt"], asked["tokens"])
            context = workload.context_for(space.architecture.context, asked["context"])
            target = resolve_target(
                device,
                comma_list(asked["flow"]),
                comma_list(asked["precision"]),
                workload,
                context,
                dict(asked.get("settings") or ()),
                partial(space.refusal, shape),
            )
            if shape is not None and space.checkpoint is not None:
                for flow, precision in target.pairs:
                    space.plan(shape, flow, precision)
        file: Path | None = asked["table"]
        if file is None and device.name == LOCAL:
            with phases.phase("profile"):
                table: Table | None = _local_table(space, target, progress)
            file = local_table_file(space.checkpoint) if space.checkpoint else None
        else:
            table = read_table(file) if file else None
        if table is not None and table.device != device.name:
            raise BadInput(
                f"{file}: was measured on '{table.device}', not on '{device.name}'; give that device's table"
            )
        visible = int(device.memory_visible.base)
        memory = min(visible, int(asked["memory"])) if asked["memory"] else visible
        budget = Budget(asked["metric"], asked["latency"], memory)
        digest = "sha256:" + sha256_of(file) if file is not None and file.is_file() else None
        return cls(space, target, budget, table, digest, bool(asked["measured_only"]), shape, progress, phases)

    def plan(self, flow: str, precision: str) -> Plan | None:
        """The plan that was asked for by ``--shape``, in sizes that an engine takes; None where none was."""
        return None if self.shape is None else self.space.plan(self.shape, flow, precision)

    def _choices(self, flow: str, precision: str) -> Choices:
        """The shapes to consider in a flow and precision, with their sizes."""
        space, plan = self.space, self.plan(flow, precision)
        steps = space.steps(flow, precision)

        @cache
        def sizes_of(shape: Shape) -> SubnetSizes:
            if plan is None or shape != plan.shape:
                return space.sized(shape, steps)
            bias = space.checkpoint is not None and space.checkpoint.compensates(shape)
            blocks = [space.architecture.subnet(1, len(block.kv_heads), len(block.neurons)) for block in plan.blocks]
            return SubnetSizes.of(plan.subnet(space.architecture), blocks, bias)

        return [plan.shape] if plan else space.shapes(steps), sizes_of

    def answer(self) -> Answer:
        """Search, or judge the shape that was asked for."""
        began = time.perf_counter()
        quality = self.space.quality
        if self.shape is not None:
            plans = [self.plan(flow, precision) for flow, precision in self.target.pairs]
            quality = quality if all(_is_own(plan, self.shape, self.space) for plan in plans) else None
        result, remarks = search_target(
            self.target, self.space.architecture, self._choices, quality, self.budget, self.table, self.measured_only
        )
        answer = Answer(self, result, (*self.target.remarks, *remarks))
        self.phases.seconds["search"] = round(self.phases.seconds["search"] + time.perf_counter() - began, 3)
        return answer


def _is_own(plan: Plan | None, shape: str, space: Space) -> bool:
    """Whether a plan is one of the checkpoint's own shapes, whose quality is known; a plan by hand has none."""
    if plan is None or space.checkpoint is None:
        return False
    return not shape.endswith(".json") or space.checkpoint.owns(plan)


def _local_table(space: Space, target: Target, progress: Progress) -> Table:
    if space.checkpoint is None:
        raise LatencyUnknown("no latency is known for this config on this machine; give --table, or another --device")
    return table_with(space.checkpoint, target.pairs, target.workload, target.context, progress)


@dataclass(frozen=True)
class Answer:
    """What a search found."""

    request: Request
    result: SearchResult
    remarks: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The chosen shape."""
        return self.result.best

    def facts(self) -> dict[str, Any]:
        """Device, workload, budget, prediction and quality, as outputs and manifests hold them."""
        request, best = self.request, self.best
        workload = request.target.workload
        return {
            "device": request.target.device.name,
            "flow": best.flow,
            "precision": best.precision,
            "workload": {"batch": workload.batch, "prompt": workload.prompt, "tokens": workload.tokens},
            "budget": {
                "metric": request.budget.metric,
                "ms": request.budget.ms,
                "memory_bytes": request.budget.memory_bytes,
            },
            "shape": best.shape.to_json(),
            "predicted": prediction_to_json(best.prediction),
            "quality": quality_to_json(best.quality),
        }

    def to_json(self) -> dict[str, Any]:
        """The object that ``search --json`` prints."""
        return self.facts() | {
            "binding": self.result.binding,
            "considered": self.result.considered,
            "remarks": list(self.remarks),
            "top": [candidate.to_json() for candidate in self.result.ranked[:5]],
            "pareto": [candidate.to_json() for candidate in self.result.front],
        }


@dataclass(frozen=True)
class ExportAnswer:
    """What an export built, and the search that led to it."""

    answer: Answer
    export: Export
    seconds: dict[str, float]

    def measured(self, metric: Metric) -> float | None:
        """The engine's own latency in milliseconds, where it was built for this machine and measured."""
        timing = self.export.timing
        if timing is None:
            return None
        found = Prediction(timing.tpot_ms, timing.ttft_ms, 0, "measured")
        return found.value(metric, self.answer.request.target.workload.tokens)

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
) -> ExportAnswer:
    """Answer a request and build its bundle."""
    answer = request.answer()
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
    )
    return ExportAnswer(answer, done, request.phases.seconds)


def _folder_name(shape: Shape) -> str:
    return f"{shape.depth}x{format_width(shape.width)}".replace("/", "of")
