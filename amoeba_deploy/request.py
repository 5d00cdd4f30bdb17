"""A search as a user asks for it, and its answer: everything between the command line and the modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from amoeba_deploy.entrants import Choices, Entrants, entrants_of, require_measured
from amoeba_deploy.errors import BadInput
from amoeba_deploy.export import Phases
from amoeba_deploy.latency_source import latencies_of
from amoeba_deploy.local_latency import measured_shapes
from amoeba_deploy.options import comma_list
from amoeba_deploy.plan import Plan, write_plan
from amoeba_deploy.profiles.device import Device, load_device
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import Quality
from amoeba_deploy.search import (
    Budget,
    Candidate,
    SearchResult,
    SubnetSizes,
    prediction_to_json,
    quality_to_json,
    search,
)
from amoeba_deploy.search.budget import further_limits
from amoeba_deploy.search.candidate import MeasuredQuality
from amoeba_deploy.search.choice import Axes, comparison
from amoeba_deploy.search.hierarchical import Level, hierarchical
from amoeba_deploy.shape import Shape
from amoeba_deploy.space import Space
from amoeba_deploy.target import Target, resolve_target

BOUNDS = {"tpot": "tpot", "ttft": "ttft", "e2e": "e2e", "size": "size", "loss": "max_loss"}
"""Quantities that options of their own bound, beside --latency and --memory, with the options' names."""
EXHAUSTIVE, HIERARCHICAL, EVOLUTIONARY = "exhaustive", "hierarchical", "evolutionary"


def require_budget(asked: Mapping[str, Any], shape: str | None) -> None:
    """Raise BadInput where there is neither a budget to search within nor a shape to build."""
    bounds = ("latency", "memory", *BOUNDS.values())
    if shape is None and all(asked.get(name) is None for name in bounds):
        raise BadInput(
            "give a budget: --latency with its unit (such as --latency 40ms), --memory, or another limit of 'amoeba "
            "search -h'"
        )


def require_measurable(space: Space) -> None:
    """Raise BadInput where the shapes of a space cannot be measured one by one."""
    if space.checkpoint is None:
        raise BadInput("--measure builds engines, and a config has no weights; give a checkpoint")
    if space.checkpoint.policy != "uniform":
        raise BadInput(
            f"{space.checkpoint.path}: its policy is {space.checkpoint.policy}, and latency tables hold uniform shapes;"
            f" leave --measure out"
        )


def _budget(asked: Mapping[str, Any], device: Device, quality: Quality | None) -> Budget:
    """The limits that were asked for; a device's visible memory is always one."""
    if asked.get("max_loss") is not None and quality is None:
        raise BadInput(
            "--max-loss bounds a loss, and none is known here; measure it with 'amoeba checkpoint create "
            "--quality-text FILE', or leave --max-loss out"
        )
    visible = int(device.memory_visible.base)
    memory = min(visible, int(asked["memory"])) if asked["memory"] else visible
    bounds = [(quantity, asked.get(option)) for quantity, option in BOUNDS.items()]
    return Budget(asked["metric"], asked["latency"], memory, further_limits(asked["metric"], asked["latency"], bounds))


@dataclass(frozen=True)
class Request:
    """One resolved request: the space, the target, the budget, and where latencies come from."""

    space: Space
    target: Target
    budget: Budget
    table: Table | None
    """None where latencies are estimated, or measured while the search goes on."""
    table_digest: str | None
    measured_only: bool
    shape: str | None
    progress: Progress
    axes: Axes | None = None
    """Of the front; the budget metric and quality where none were asked for."""
    method: str = EXHAUSTIVE
    measure: bool = False
    """Whether the shapes that a hierarchical search asks for are measured, on this machine."""
    remarks: tuple[str, ...] = ()
    phases: Phases = field(default_factory=Phases)

    @classmethod
    def of(cls, space: Space, asked: Mapping[str, Any], progress: Progress, shape: str | None = None) -> Request:
        """Resolve the options of ``search`` and ``export``.

        Raises:
            BadInput: no budget and no shape is given, or an option names what does not exist.
            LatencyUnknown: nothing is known of this machine's speed, and it cannot be measured.
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
            plans = []
            if shape is not None and space.checkpoint is not None:
                plans = [space.plan(shape, flow, precision) for flow, precision in target.pairs]
            budget = _budget(asked, device, _quality_of(space, shape, plans))
        measure = bool(asked.get("measure"))
        table, digest, remarks = latencies_of(space, target, asked["table"] or (), plans, measure, progress, phases)
        return cls(
            space,
            target,
            budget,
            table,
            digest,
            bool(asked["measured_only"]),
            shape,
            progress,
            asked.get("front"),
            asked.get("method") or EXHAUSTIVE,
            measure,
            remarks,
            phases,
        )

    def plan(self, flow: str, precision: str) -> Plan | None:
        """The plan that was asked for by ``--shape``, in sizes that an engine takes; None where none was."""
        return None if self.shape is None else self.space.plan(self.shape, flow, precision)

    @cached_property
    def quality(self) -> Quality | None:
        """What is known of the quality of the shapes in question."""
        plans = [self.plan(flow, precision) for flow, precision in self.target.pairs]
        return _quality_of(self.space, self.shape, [plan for plan in plans if plan is not None])

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
        """Search, or judge the shape that was asked for.

        Raises:
            NoShapeFits: nothing fits the budget.
            BadInput: a backend refuses every shape.
            LatencyUnknown: no latency is known, or only estimates where more is demanded.
        """
        began = time.perf_counter()
        entrants, remarks = entrants_of(
            self.target, self.space.architecture, self._choices, self.quality, self.shape is not None
        )
        found: list[Candidate] = []
        levels: list[Level] = []
        gap = 0.0 if self.measure else None
        for one in entrants:
            if self.method == HIERARCHICAL and self.shape is None:
                descent = hierarchical(one.shapes, self._judge(one), self.budget, self.target.workload, self._say)
                found += descent.asked
                levels += descent.levels
                gap = None if gap is None else max(gap, descent.gap)
            else:
                found += one.candidates(self.table)
            remarks += [remark for remark in [one.estimates_for(self.table)] if remark]
        if self.measured_only:
            found = require_measured(found, self.target.device.name)
        result = search(found, self.budget, self.target.workload, self.axes)
        remarks += self._outside(result.best)
        answer = Answer(self, result, (*self.target.remarks, *self.remarks, *remarks), tuple(levels), gap)
        self.phases.seconds["search"] = round(self.phases.seconds["search"] + time.perf_counter() - began, 3)
        return answer

    def _judge(self, entrants: Entrants) -> Callable[[Sequence[Shape]], Sequence[Candidate]]:
        if not self.measure:
            known = entrants.candidates(self.table)
            return lambda _shapes: known
        pair = entrants.flow, entrants.precision

        def measured(shapes: Sequence[Shape]) -> Sequence[Candidate]:
            table, count = measured_shapes(self.space.source, self.target, pair, shapes, self.progress)
            again = "" if count == len(shapes) else f"; {len(shapes) - count} more were known"
            self.progress.say(f"measured {count} shapes in {pair[0]} {pair[1]}{again}")
            return entrants.candidates(table)

        return measured

    def _say(self, level: Level) -> None:
        best = level.best
        said = "none fits yet" if best is None else f"best so far {best.shape} in {best.flow} {best.precision}"
        self.progress.say(f"asked for {level.asked}: {said}")

    def _outside(self, best: Candidate) -> list[str]:
        """A remark where the quality of a named shape is only that of the nearest measured one."""
        if best.quality.metric != "loss" or self.quality is None or self.quality.covers(best.shape, best.precision):
            return []
        return [
            f"{best.shape} lies outside the shapes whose quality was measured: its loss is that of the nearest of "
            f"them, and likely too low"
        ]


def _quality_of(space: Space, shape: str | None, plans: Sequence[Plan]) -> Quality | None:
    """The quality that is known of what is asked for: of a plan by hand, which no shape of the checkpoint is, none."""
    if shape is None or space.quality is None:
        return space.quality
    own = bool(plans) and all(_is_own(plan, shape, space) for plan in plans)
    return space.quality if own else None


def _is_own(plan: Plan, shape: str, space: Space) -> bool:
    """Whether a plan is one of the checkpoint's own shapes, whose quality is known."""
    if space.checkpoint is None:
        return False
    return not shape.endswith(".json") or space.checkpoint.owns(plan)


def _equal_to_json(best: Candidate, other: Candidate) -> dict[str, Any]:
    """A shape that cannot be told apart from the best; its difference where both were measured on the same rows."""
    found = comparison(best, other)
    named = {**other.shape.to_json(), "flow": other.flow, "precision": other.precision}
    return named | {"quality": quality_to_json(other.quality)} | (found.to_json() if found else {})


@dataclass(frozen=True)
class Answer:
    """What a search found."""

    request: Request
    result: SearchResult
    remarks: tuple[str, ...]
    levels: tuple[Level, ...] = ()
    """Of a hierarchical search."""
    gap: float | None = None
    """By how much a shape that was not measured could be better at most, where a hierarchical search measured."""
    measured: tuple[MeasuredQuality, ...] = ()
    """The shapes that were evaluated for real, best first."""

    @property
    def best(self) -> Candidate:
        """The chosen shape."""
        return self.result.best

    def write_plan(self, file: Path, force: bool = False) -> None:
        """Write the plan of the chosen shape in sizes that its engine takes; only of a checkpoint's."""
        space, best = self.request.space, self.best
        assert space.checkpoint is not None, "the command asked for a checkpoint"
        plan = space.checkpoint.plan(best.shape, space.steps(best.flow, best.precision))
        write_plan(file, plan, force)

    @property
    def held_out(self) -> dict[str, float] | None:
        """How far interpolated losses of the best shape's precision are off; None where that is not known."""
        quality, best = self.request.quality, self.best
        if quality is None or best.quality.metric != "loss":
            return None
        found = quality.held_out(best.precision)
        return None if found is None else found.to_json()

    def facts(self) -> dict[str, Any]:
        """Device, workload, budget, prediction and quality, as outputs and manifests hold them."""
        request, best = self.request, self.best
        workload, budget = request.target.workload, request.budget
        further = {limit.name: limit.bound for limit in budget.further}
        return {
            "device": request.target.device.name,
            "flow": best.flow,
            "precision": best.precision,
            "workload": {"batch": workload.batch, "prompt": workload.prompt, "tokens": workload.tokens},
            "budget": {
                "metric": budget.metric,
                "ms": budget.ms,
                "memory_bytes": budget.memory_bytes,
                **({"limits": further} if further else {}),
            },
            "shape": best.shape.to_json(),
            "predicted": prediction_to_json(best.prediction),
            "quality": quality_to_json(best.quality),
        }

    def to_json(self, top: int = 5) -> dict[str, Any]:
        """The object that ``search --json`` prints, with the best ``top`` shapes."""
        facts, request = self.facts(), self.request
        if self.best.quality.metric == "loss":
            facts["quality"] |= {"held_out": self.held_out}
        descent = {
            "levels": [level.to_json() for level in self.levels],
            "gap": None if self.gap is None else round(self.gap, 6),
        }
        return facts | {
            "method": request.method,
            **(descent if self.levels else {}),
            **({"measured_quality": [one.to_json() for one in self.measured]} if self.measured else {}),
            "binding": self.result.binding,
            "equals": [_equal_to_json(self.best, other) for other in self.result.equals],
            "considered": self.result.considered,
            "remarks": list(self.remarks),
            "top": [candidate.to_json() for candidate in self.result.ranked[:top]],
            "front": list(self.result.axes),
            "pareto": [candidate.to_json() for candidate in self.result.front],
        }
