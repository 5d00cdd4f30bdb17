"""The search per block as ``amoeba search --method evolutionary`` asks for it: where a block's latency comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.entrants import estimator_of
from amoeba_deploy.errors import BadInput
from amoeba_deploy.per_block.costs import BlockCosts, RooflineCosts
from amoeba_deploy.per_block.pipeline import BlockSearchResult, search_blocks
from amoeba_deploy.profiles.curve import Curve
from amoeba_deploy.profiles.report import KINDS
from amoeba_deploy.request import Request


@dataclass(frozen=True)
class MeasuredCosts:
    """The additive part of what was fitted to a table's rows."""

    architecture: Architecture
    curve: Curve

    @property
    def fixed_ms(self) -> float:
        """What every token costs."""
        return self.curve.trend.fixed

    def block_ms(self, kv_heads: int, neurons: int) -> float:
        """What one block adds."""
        return self.curve.trend.block(self.architecture.subnet(1, kv_heads, neurons))


@dataclass(frozen=True)
class BlockAnswer:
    """What the search found for a device, and where its latencies come from."""

    request: Request
    result: BlockSearchResult
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``search --method evolutionary --json`` prints."""
        target = self.request.target
        workload = {"batch": target.workload.batch, "prompt": target.workload.prompt, "tokens": target.workload.tokens}
        head = {"device": target.device.name, "workload": workload}
        return head | self.result.to_json() | {"remarks": list(self.remarks)}


def require_block_search(asked: Mapping[str, Any], text: Path | None) -> Path:
    """The calibration text; raises BadInput where something is asked for that this search does not do."""
    if text is None:
        raise BadInput("--method evolutionary measures what each block loses: give a text with --quality-text FILE")
    if asked["latency"] is None or asked["metric"] != "tpot":
        raise BadInput("--method evolutionary searches within a TPOT: give --latency, such as --latency 40ms")
    others = [name for name in ("memory", "tpot", "ttft", "e2e", "size", "max_loss", "front") if asked.get(name)]
    if others:
        name = others[0].replace("_", "-")
        raise BadInput(f"--method evolutionary searches within --latency alone; leave --{name} out")
    return text


def answer_blocks(request: Request, text: Path) -> BlockAnswer:
    """Search the widths of single blocks.

    Raises:
        BadInput: several engines are considered, there is no checkpoint, or the engine takes blocks of one width only.
        NoShapeFits: no plan is within the budget.
        LatencyUnknown: nothing is known of the engine on the device.
    """
    target, checkpoint = request.target, request.space.checkpoint
    if checkpoint is None:
        raise BadInput("--method evolutionary measures losses, and a config alone has none; give a checkpoint")
    if len(target.pairs) > 1:
        raise BadInput("--method evolutionary searches for one engine; name one with --flow and --precision")
    ((flow, precision),) = target.pairs
    costs, source = _costs(request, flow, precision)
    assert request.budget.ms is not None, "the command asked for a latency"
    result = search_blocks(
        checkpoint,
        text,
        costs,
        request.budget.ms,
        flow=flow,
        precision=precision,
        context=target.context,
        settings=dict(target.settings),
        progress=request.progress,
    )
    return BlockAnswer(request, result, (*target.remarks, *request.remarks, source))


def _costs(request: Request, flow: str, precision: str) -> tuple[BlockCosts, str]:
    """What a block costs, from the table where it has rows, and a remark on where it is from."""
    space, target = request.space, request.target
    rows = None if request.table is None else target.rows(request.table, flow, precision)
    if rows is None or not rows.rows:
        estimates = estimator_of(target, flow, precision, space.architecture, request.table)
        named = space.architecture, target.device, flow, precision, target.workload
        return RooflineCosts.of(*named, estimates.factors), estimates.remark
    steps = space.steps(flow, precision)
    curve = rows.model(lambda shape: space.sized(shape, steps).mean, flow, precision, target.workload).tpot
    said = f"latencies of {flow} {precision} are fitted to {len(rows.rows)} measured shapes, {KINDS[curve.kind]}"
    held = curve.additive_held_out
    if held is not None:
        said += (
            f"; the additive part errs by {held.median:.1%} (median) and {held.worst:.1%} (worst) on shapes left out"
        )
    return MeasuredCosts(space.architecture, curve), said
