"""The shapes that a search is over: those of a checkpoint, or of a model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend, takes_of
from amoeba_deploy.backends.backend import BuildOptions
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.families import read_architecture
from amoeba_deploy.model_folder import read_config
from amoeba_deploy.plan import NEURON_MULTIPLE, BlockPlan, Plan, Steps, sized
from amoeba_deploy.profiles.source import CheckpointSource, ConfigSource, Source, config_shapes
from amoeba_deploy.quality import Quality
from amoeba_deploy.search import SubnetSizes
from amoeba_deploy.shape import Shape


@dataclass(frozen=True)
class Space:
    """The shapes to search over: those of a checkpoint, or of a model's config alone."""

    name: str
    architecture: Architecture
    quality: Quality | None
    multiple: int
    checkpoint: Checkpoint | None
    config: Path | None = None
    """Where there is no checkpoint, whose shapes these are."""

    @cached_property
    def source(self) -> Source:
        """What this machine measures the shapes of; raises BadInput where it can measure none of them."""
        if self.checkpoint is not None:
            return CheckpointSource(self.checkpoint)
        assert self.config is not None, "a space is of a checkpoint or of a config"
        return ConfigSource.of(self.config, self.name)

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
        return cls(str(path), read_architecture(config), None, NEURON_MULTIPLE, None, path)
