"""Latencies of this machine for a request: what its table lacks is measured now and remembered.

A search wants as many shapes as predict the others, a shape that was named wants only itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import LatencyUnknown
from amoeba_deploy.plan import Plan
from amoeba_deploy.profiles.local import profile_to
from amoeba_deploy.profiles.profiler import Pair, empty_table, local_table
from amoeba_deploy.profiles.source import CheckpointSource, Source
from amoeba_deploy.profiles.spread import corner_shapes
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape
from amoeba_deploy.target import Target

SPREAD = "spread"
FIRST_USE_SECONDS = 60.0
"""After which no further run begins where a search has to measure first; ``amoeba profile`` takes its time."""


def searched_table(source: Source, target: Target, progress: Progress) -> Table:
    """This machine's table with rows for a search: at least the largest and smallest depth and width of every pair.

    Pairs without them are profiled over a spread of shapes.

    Raises:
        LatencyUnknown: an engine cannot run here.
    """
    missing = [pair for pair in target.pairs if not _covers(source, target, pair)]
    if missing and not isinstance(source, CheckpointSource):
        # Measuring a model of any size, with random weights, is for the user to begin.
        raise LatencyUnknown(
            f"nothing is measured on this machine for {missing[0][0]} in {missing[0][1]} of this config; run "
            f"'{target.measure_command(*missing[0])} --config {source.name}', or give --table or another --device"
        )
    _profile(source, target, missing, SPREAD, progress)
    return _table(source, target)


def named_table(source: Source, target: Target, plans: Sequence[Plan], progress: Progress) -> Table:
    """This machine's table with a row for a named shape, by its plan in every pair of the target.

    Where the shapes around it are measured it is interpolated; else it is measured, and no other. A plan that is no
    uniform shape of the source, such as one by hand, has no row of its own: it needs the rows of a search.

    Raises:
        LatencyUnknown: an engine cannot run here.
        BadInput: it refuses the shape.
    """
    alone, shape = [], Shape(plans[0].shape.depth, plans[0].shape.width)
    for pair, plan in zip(target.pairs, plans, strict=True):
        if _covers(source, target, pair):
            continue
        if not _is_uniform(source, pair, plan):
            _profile(source, target, [pair], SPREAD, progress)
        elif _missing(source, target, pair, [shape]):
            alone.append(pair)
    _profile(source, target, alone, str(shape), progress)
    return _table(source, target)


def measured_shapes(
    source: Source, target: Target, pair: Pair, shapes: Sequence[Shape], progress: Progress
) -> tuple[Table, int]:
    """This machine's table with rows for some shapes in a flow and precision, and how many had to be measured."""
    missing = _missing(source, target, pair, shapes)
    if missing:
        _profile(source, target, [pair], ",".join(map(str, missing)), progress, aloud=False)
    return _table(source, target), len(missing)


def _table(source: Source, target: Target) -> Table:
    return local_table(source) or empty_table(source, target.context)


def _missing(source: Source, target: Target, pair: Pair, shapes: Sequence[Shape]) -> list[Shape]:
    """Those of some shapes that have no row in a flow and precision."""
    table, steps = _table(source, target), source.steps(load_backend(pair[0]), pair[1])
    known = {source.sized(row.shape, steps) for row in target.rows(table, *pair).rows}
    return [shape for shape in shapes if source.sized(shape, steps) not in known]


def _covers(source: Source, target: Target, pair: Pair) -> bool:
    """Whether the corners of depth and width are measured, so that every shape lies between rows."""
    corners = corner_shapes(source.shapes(source.steps(load_backend(pair[0]), pair[1])))
    return not _missing(source, target, pair, corners)


def _is_uniform(source: Source, pair: Pair, plan: Plan) -> bool:
    """Whether a plan is what the source itself makes of a uniform shape, of which alone rows are held."""
    assert isinstance(source, CheckpointSource), "a config has no plans"
    checkpoint, shape = source.checkpoint, Shape(plan.shape.depth, plan.shape.width)
    if shape.depth not in checkpoint.selection.depths:
        return False
    return plan.blocks == checkpoint.plan(shape, source.steps(load_backend(pair[0]), pair[1])).blocks


def _profile(
    source: Source, target: Target, pairs: Sequence[Pair], shapes: str, progress: Progress, aloud: bool = True
) -> None:
    for flow, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        precisions = [precision for _, precision in group]
        own = target.own_settings(flow)
        named = f"{flow} {', '.join(precisions)}" + "".join(f" {name}={value}" for name, value in own.items())
        for precision in precisions:
            unable = load_backend(flow).cannot_run(precision, target.options(flow))
            if unable:
                raise LatencyUnknown(
                    f"{named} cannot run on this machine, {unable}, so nothing is known of its speed; name the device "
                    f"that it is for with --device"
                )
        if aloud:
            what = "" if shapes == SPREAD else f" {shapes} in"
            progress.say(f"profiling{what} {named} on this machine (first use; remembered afterwards)")
        how = target.workload, target.context
        profile_to(source, [flow], precisions, shapes, *how, budget=FIRST_USE_SECONDS, settings=own, progress=progress)
