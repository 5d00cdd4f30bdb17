"""Stage 1 spread over a Ray cluster (https://docs.ray.io): calibration batches, and sets of removed blocks.

Every worker opens the model from its folder, which all machines must reach by the same path, and gets a share of the
calibration batches. Where there are more workers than batches, the sets of one column are shared out too. Workers give
back one number for each set and batch, and moments for each batch; they are summed here in the order of the batches,
as on one machine. Results are therefore the same bit for bit, as long as one block over one batch is: workers that run
with another number of threads, or on other processors, may round differently in float32, about 1e-6 relative.

A worker knows only its own batches, so it gives up a set later than one machine would; what it gives up could not have
won either way. Gradients (Taylor methods) and angular distances are taken on the machine that the command runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.stage1.blocks import UNITS_A_BLOCK, Blocks, Units, open_blocks
from amoeba_deploy.stage1.calibration import Batch, Calibration, Metric
from amoeba_deploy.stage1.importance import BlockMoments, activation_moments
from amoeba_deploy.stage1.lanes import Lanes
from amoeba_deploy.stage1.removal import Costs, LocalRemover, Trial, Work


def shares(count: int, parts: int) -> list[range]:
    """So many things in so many neighbouring runs, as even as can be, none of them empty where there are enough."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


class Worker:
    """What one worker does: the model, and its share of the batches."""

    blocks: Blocks
    memory: int
    lanes: Lanes
    remover: LocalRemover

    def open(self, folder: Path, digest: str, offload: bool, memory: int, threads: int) -> None:
        """Open the model; raises BadInput where this machine has none there, or another one."""
        model = ModelFolder(folder)
        if model.digest != digest:
            raise BadInput(f"{folder}: holds another model on a worker's machine; put the same one there")
        self.blocks, self.memory, self.lanes = open_blocks(model, offload), memory, Lanes(threads)

    def prepare(self, batches: Sequence[Batch], metric: Metric, units: Units) -> None:
        """Take a share of the calibration batches."""
        self.remover = LocalRemover(self.blocks, batches, metric, units, self.memory, self.lanes)

    def costs(self, boundary: int, trials: Sequence[Trial]) -> tuple[list[Costs], Work]:
        """The metric's sums over this worker's batches, and all its work so far."""
        return self.remover.costs(boundary, trials), self.remover.work

    def moments(self, batches: Sequence[Batch]) -> list[list[BlockMoments]]:
        """Moments of every block over each of some batches."""
        return activation_moments(self.blocks, batches, self.memory, lanes=self.lanes)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ToolchainMissing(
            "--workers ray needs Ray, which is not installed; run pip install 'amoeba-deploy[distributed]'"
        ) from None
    return ray


class Cluster:
    """Workers on the Ray cluster that RAY_ADDRESS names, else on a Ray of this machine that is started for the run."""

    def __init__(
        self,
        model: ModelFolder,
        calibration: Calibration,
        width_calibration: Calibration,
        *,
        count: int,
        offload: bool,
        memory: int,
    ) -> None:
        """``count`` workers (0: one a machine), each with its own blocks and ``memory`` bytes of hidden states."""
        self.model, self.count, self.offload, self.memory = model, count, offload, memory
        self.batches, self.width_batches = calibration.batches, width_calibration.text
        self.workers: list[Any] = []
        self._started = False

    def __enter__(self) -> Cluster:
        ray = _ray()
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = os.environ.get("RAY_ADDRESS")
            local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if address is None else {}
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
            self._started = True
        try:
            self._start_workers(ray)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start_workers(self, ray: Any) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        count = self.count or len(nodes)
        processors = int(sum(node["Resources"]["CPU"] for node in nodes))
        if count > processors:
            raise BadInput(f"--workers ray:{count} asks for more workers than the cluster's {processors} processors")
        threads = max(1, processors // count)
        actor = ray.remote(num_cpus=threads, max_restarts=0)(Worker)
        opening = self.model.path.resolve(), self.model.digest, self.offload, self.memory, threads
        self.workers = [actor.remote() for _ in range(count)]
        self.get([worker.open.remote(*opening) for worker in self.workers])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray = _ray()
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self._started:
            ray.shutdown()

    def get(self, futures: Sequence[Any]) -> list[Any]:
        """Results of calls to workers; a failure that was expected is raised as it was there."""
        ray = _ray()
        try:
            return list(ray.get(list(futures)))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AmoebaError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError:
            raise AmoebaError(
                "a worker of the Ray cluster died; run the command again with --resume to go on from the last column"
            ) from None

    def remover(self, metric: Metric, units: Units) -> ClusterRemover:
        """What measures sets of removed units on the workers."""
        return ClusterRemover(self, metric, units)

    def moments(self, step: Callable[[], None]) -> list[list[BlockMoments]]:
        """Moments of every block over each batch, in the batches' order."""
        parts = shares(len(self.width_batches), min(len(self.workers), len(self.width_batches)))
        futures = [
            worker.moments.remote([self.width_batches[i] for i in part])
            for worker, part in zip(self.workers, parts, strict=False)
        ]
        found: list[list[BlockMoments]] = [batch for part in self.get(futures) for batch in part]
        for _ in found:
            step()
        return found


class ClusterRemover:
    """Measures on the workers: batches are shared out first, and sets where workers are left over."""

    def __init__(self, cluster: Cluster, metric: Metric, units: Units) -> None:
        self.cluster, self.metric = cluster, metric
        self.units = cluster.model.architecture.depth * UNITS_A_BLOCK[units]
        count = len(cluster.workers)
        self.parts = shares(len(cluster.batches), min(count, len(cluster.batches)))
        self.groups = max(1, count // len(self.parts))
        cluster.get(
            [
                worker.prepare.remote([cluster.batches[i] for i in self.parts[number // self.groups]], metric, units)
                for number, worker in enumerate(self._used)
            ]
        )
        self._work = [Work() for _ in self._used]
        self._trials = self._given_up = 0

    @property
    def _used(self) -> list[Any]:
        return self.cluster.workers[: len(self.parts) * self.groups]

    @property
    def work(self) -> Work:
        """The work of all workers; a set is given up where any of its shares was."""
        made = Work()
        for each in self._work:
            made.add(each)
        made.trials, made.given_up = self._trials, self._given_up
        return made

    def costs(self, boundary: int, trials: Sequence[Trial]) -> list[Costs]:
        """For each trial the metric's sums over batches; see ``removal.Remover``."""
        groups = [part for part in shares(len(trials), self.groups) if len(part)]
        calls = [
            (number * self.groups + place, group)
            for number in range(len(self.parts))
            for place, group in enumerate(groups)
        ]
        results = self.cluster.get(
            [self._used[worker].costs.remote(boundary, [trials[i] for i in group]) for worker, group in calls]
        )
        found: list[Costs] = [()] * len(trials)
        for (worker, group), (costs, work) in zip(calls, results, strict=True):
            self._work[worker] = work
            for trial, part in zip(group, costs, strict=True):
                found[trial] += part
        self._trials += len(trials)
        self._given_up += sum(len(costs) < len(self.cluster.batches) for costs in found)
        return found
