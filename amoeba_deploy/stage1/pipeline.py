"""Stage 1 as one step: from a model and calibration data to a selection."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from amoeba_deploy import __version__
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import BlockScores, DepthChoice, Selection, depth_choice
from amoeba_deploy.stage1.blocks import UNITS_A_BLOCK, Blocks, Units, open_blocks
from amoeba_deploy.stage1.calibration import Calibration, Metric, metric_value, read_calibration
from amoeba_deploy.stage1.depth import Column, check_finite, choose, naive_evaluations, prefix_evaluations
from amoeba_deploy.stage1.importance import BlockMoments, WidthMethod, activation_moments, block_scores, merge_batches
from amoeba_deploy.stage1.interrupted import SavedTable
from amoeba_deploy.stage1.moments import Vector
from amoeba_deploy.stage1.removal import LocalRemover, Removed, Remover, Trial, total

if TYPE_CHECKING:
    from amoeba_deploy.stage1.cluster import Cluster

DepthMethod = Literal["dp", "shortened-ppl", "shortened-taylor", "angular", "first"]
STATE_MEMORY = 4 * 10**9
"""Bytes of hidden states that are kept where nothing else is said."""


def default_minimum_depth(depth: int) -> int:
    """Half of the blocks, rounded up."""
    return -(-depth // 2)


@dataclass(frozen=True)
class Settings:
    """How to select; what is left out has the meaning that ``amoeba select -h`` gives."""

    depth_method: DepthMethod = "dp"
    width_method: WidthMethod = "flap"
    metric: Metric | None = None
    samples: int | None = None
    sequence: int = SEQUENCE
    minimum_depth: int | None = None
    keep_last: int = 1
    units: Units = "block"
    beam: int = 1
    offload: bool = False
    state_memory: int = STATE_MEMORY
    workers: int | None = None
    resume: bool = False

    def lowest(self, depth: int) -> int:
        """The smallest depth to select for, of a model of ``depth`` blocks: half of them where none is given."""
        return default_minimum_depth(depth) if self.minimum_depth is None else self.minimum_depth


@dataclass
class Stage1:
    """A model, its calibration data, and what measuring them needs; made once, used for depth and for width."""

    model: ModelFolder
    calibration: Calibration
    width_calibration: Calibration
    settings: Settings
    progress: Progress
    cluster: Cluster | None = None
    _blocks: Blocks | None = field(default=None, repr=False)
    _saliences: dict[str, list[tuple[Vector, Vector]]] = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> Blocks:
        """The model's blocks on this machine, opened when they are first needed."""
        if self._blocks is None:
            self._blocks = open_blocks(self.model, self.settings.offload)
        return self._blocks

    @property
    def metric(self) -> Metric:
        """The metric asked for, else the plain one of the data: loss of a text, accuracy on questions."""
        return self.settings.metric or ("loss" if self.calibration.kind == "text" else "accuracy")

    @property
    def removals(self) -> int:
        """The most blocks to remove."""
        depth = self.model.architecture.depth
        return depth - max(self.settings.lowest(depth), self.settings.keep_last)

    def remover(self) -> Remover:
        """What measures sets of removed units: the cluster, or this machine."""
        settings = self.settings
        if self.cluster is not None:
            return self.cluster.remover(self.metric, settings.units)
        return LocalRemover(self.blocks, self.calibration.batches, self.metric, settings.units, settings.state_memory)

    def saliences(self, calibration: Calibration) -> list[tuple[Vector, Vector]]:
        """Taylor saliences of every block's groups and neurons, on this machine."""
        from amoeba_deploy.stage1.gradients import taylor_saliences

        key = str(calibration.facts)
        if key not in self._saliences:
            with self.progress.bar("gradients", self.model.architecture.depth) as step:
                self._saliences[key] = taylor_saliences(
                    self.blocks,
                    calibration.text,
                    self.model.architecture,
                    self.settings.state_memory,
                    step,
                )
        return self._saliences[key]

    def moments(self) -> list[BlockMoments]:
        """Moments of every block's activations over the width's calibration data."""
        batches = self.width_calibration.text
        with self.progress.bar("width", len(batches)) as step:
            if self.cluster is not None:
                return merge_batches(self.cluster.moments(step))
            return merge_batches(activation_moments(self.blocks, batches, self.settings.state_memory, step))

    def widths(self) -> tuple[BlockScores, ...]:
        """Scores of every block's heads and neurons, and the means of their activations."""
        method = self.settings.width_method
        saliences = self.saliences(self.width_calibration) if method == "taylor" else None
        return block_scores(self.model, method, self.moments(), saliences)

    def depths(self) -> tuple[dict[int, DepthChoice], dict[str, Any]]:
        """What is kept at every depth, and facts about the work that it took."""
        remover, metric, count = self.remover(), self.metric, self.calibration.count
        full = total(remover.costs(remover.units, [Trial(())])[0])
        check_finite((), full, self.settings.units)
        if self.settings.depth_method == "dp":
            found = self._by_programming(remover, full)
        else:
            found = self._by_one_shot(remover, full)
        depth, step = self.model.architecture.depth, UNITS_A_BLOCK[self.settings.units]
        depths = {
            depth - m // step: depth_choice(depth, removed, metric_value(metric, cost, count), step == 2)
            for m, (removed, cost) in enumerate(found)
            if m % step == 0
        }
        return depths, self._work_facts(remover)

    def _by_programming(self, remover: Remover, full: float) -> list[tuple[Removed, float]]:
        settings = self.settings
        scale = UNITS_A_BLOCK[settings.units]
        removals, keep_last = scale * self.removals, scale * settings.keep_last
        saved = SavedTable.of(self._identity())
        start = saved.read(remover.units - keep_last, removals, settings.beam) if settings.resume else None
        if start is not None:
            self.progress.say(f"going on from column {start.candidates} of {remover.units - keep_last}")
        with self.progress.bar("depth", remover.units - keep_last - (start.candidates if start else 0)) as step:

            def done(column: Column) -> None:
                saved.write(column)
                step()

            found = choose(
                remover, removals, keep_last, full,
                units=settings.units, beam=settings.beam, start=start, done=done,
            )  # fmt: skip
        saved.remove()
        return found

    def _by_one_shot(self, remover: Remover, full: float) -> list[tuple[Removed, float]]:
        sets = self._one_shot_sets(remover)
        with self.progress.bar("depth", 1) as step:
            costs = [full, *map(total, remover.costs(0, [Trial(removed) for removed in sets[1:]]))]
            step()
        for removed, cost in zip(sets, costs, strict=True):
            check_finite(removed, cost, "block")
        return list(zip(sets, costs, strict=True))

    def _one_shot_sets(self, remover: Remover) -> list[Removed]:
        from amoeba_deploy.stage1 import depth_baselines as baselines

        candidates, removals = self.model.architecture.depth - self.settings.keep_last, self.removals
        method = self.settings.depth_method
        if method == "first":
            return baselines.first_blocks(candidates, removals)
        if method == "angular":
            states = baselines.last_token_states(self.blocks, self.calibration.text, self.settings.state_memory)
            return baselines.nearest_runs(states, candidates, removals)
        if method == "shortened-taylor":
            importance = [float(h.sum() + n.sum()) for h, n in self.saliences(self.calibration)][:candidates]
        else:
            importance = baselines.single_removals(remover, candidates)
        return baselines.least_important(importance, removals)

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the table of the dynamic programming."""
        settings = self.settings
        return {
            "tool": __version__,
            "model": self.model.digest,
            "calibration": self.calibration.facts,
            "metric": self.metric,
            "removals": self.removals,
            "keep_last": settings.keep_last,
            "units": settings.units,
            "beam": settings.beam,
        }

    def _work_facts(self, remover: Remover) -> dict[str, Any]:
        """What measuring took, in evaluations of one unit over all calibration data, beside the plain ways' counts."""
        tokens = sum(batch.tokens for batch in self.calibration.batches)
        work, scale = remover.work, UNITS_A_BLOCK[self.settings.units]
        evaluations: dict[str, Any] = {
            "measured": round(work.tokens / tokens, 2),
            "untouched": round(work.tokens_untouched / tokens, 2),
            "repeated": round(work.tokens_repeated / tokens, 2),
        }
        if self.settings.depth_method == "dp" and self.settings.beam == 1:
            sizes = scale * self.model.architecture.depth, scale * self.removals, scale * self.settings.keep_last
            evaluations |= {"naive": naive_evaluations(*sizes), "prefix": prefix_evaluations(*sizes)}
        return {"evaluations": work.trials, "given_up_early": work.given_up, "block_evaluations": evaluations}


def _check(settings: Settings, depth: int) -> None:
    lowest = settings.lowest(depth)
    if not 1 <= lowest <= depth:
        raise BadInput(f"--min-depth {lowest} is not within 1..{depth}, the blocks of this model")
    if not 0 <= settings.keep_last <= depth:
        raise BadInput(f"--keep-last {settings.keep_last} is not within 0..{depth}, the blocks of this model")
    if settings.depth_method != "dp":
        for name, given in (("--units sublayer", settings.units != "block"), ("--beam", settings.beam != 1)):
            if given:
                raise BadInput(f"{name} goes with --depth-method dp only; {settings.depth_method} removes whole blocks")


def open_stage1(
    model: ModelFolder,
    calibration: str,
    settings: Settings,
    progress: Progress,
    width_calibration: str | None = None,
) -> Stage1:
    """Read and check everything that a selection needs, before any work.

    Args:
        model: the base model.
        calibration: a text file, a JSON-lines file of questions, or a data set's name.
        settings: how to select.
        progress: told of every measurement.
        width_calibration: other data for heads and neurons; the same where left out.

    Raises:
        BadInput: the data is too short or of the wrong kind, or the depths asked for are impossible.
    """
    sizes = model.architecture
    _check(settings, sizes.depth)
    context = min(sizes.context, sizes.sliding_window or sizes.context)

    def read(source: str, samples: int | None) -> Calibration:
        return read_calibration(source, model.tokenizer(), context, samples=samples, sequence=settings.sequence)

    data = read(calibration, settings.samples)
    if settings.metric is not None:
        data.check(settings.metric)
    other = data if width_calibration in (None, calibration) else read(str(width_calibration), None)
    return Stage1(model, data, other, settings, progress)


def select(
    model: ModelFolder,
    calibration: str | Path,
    settings: Settings = Settings(),  # frozen
    *,
    width_calibration: str | Path | None = None,
    progress: Progress,
) -> Selection:
    """Choose blocks for every depth, and score heads and neurons.

    Raises:
        BadInput: see ``open_stage1``; or the model is a ragged subnet, or logits are not finite.
        ToolchainMissing: a library that the calibration data or the workers need is not installed.
    """
    refuse_ragged(model.config, model.path)
    began = time.perf_counter()
    other = None if width_calibration is None else str(width_calibration)
    stage = open_stage1(model, str(calibration), settings, progress, other)
    if settings.workers is not None:
        from amoeba_deploy.stage1.cluster import Cluster

        cluster = Cluster(
            stage.model,
            stage.calibration,
            stage.width_calibration,
            count=settings.workers,
            offload=settings.offload,
            memory=settings.state_memory,
        )
        with cluster as stage.cluster:
            return _selection(stage, began)
    return _selection(stage, began)


def _selection(stage: Stage1, began: float) -> Selection:
    settings = stage.settings
    depths, work = stage.depths()
    blocks = stage.widths()
    facts: dict[str, Any] = {
        "tool": f"amoeba-deploy {__version__}",
        "depth_method": settings.depth_method,
        "width_method": settings.width_method,
        "metric": stage.metric,
        "units": settings.units,
        "beam": settings.beam,
        "keep_last": settings.keep_last,
        "calibration": stage.calibration.facts,
    }
    if stage.width_calibration is not stage.calibration:
        facts["width_calibration"] = stage.width_calibration.facts
    facts |= work | {"seconds": round(time.perf_counter() - began, 2)}
    return Selection(stage.model.digest, depths, blocks, facts)
