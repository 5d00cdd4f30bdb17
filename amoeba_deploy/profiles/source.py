"""What is profiled: a checkpoint, or a model of which there is only a config.

The profiler and kits ask a source for its shapes and for their engines, and do not care which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import Artefact, Backend, BuildOptions
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.extraction.folder import NOTHING, Learnt
from amoeba_deploy.lowering import Supernet, lower_plan
from amoeba_deploy.plan import NEURON_MULTIPLE, Plan, Steps, sized, subnet_widths
from amoeba_deploy.profiles.random_model import RandomModel, first_units
from amoeba_deploy.shape import Shape

CONFIG_MINIMUM_WIDTH = Fraction(1, 2)
"""The narrowest width that is considered of a config alone."""


class Source(Protocol):
    """What shapes are profiled of."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def architecture(self) -> Architecture:
        """Sizes of the full model."""
        ...

    def steps(self, backend: Backend, precision: str) -> Steps:
        """The numbers of heads and neurons of its subnets that an engine takes."""
        ...

    def shapes(self, steps: Steps | None = None) -> list[Shape]:
        """Every distinct subnet by its shortest name, in steps of an engine where they are given."""
        ...

    def sized(self, shape: Shape, steps: Steps | None = None) -> Architecture:
        """The sizes of a shape's subnet, without compensating biases."""
        ...

    def check(self, shape: Shape) -> None:
        """Raise BadInput where it has no such shape."""
        ...

    def lower(
        self, shape: Shape, backend: Backend, precision: str, options: BuildOptions, output: Path, work: Path
    ) -> Artefact:
        """Write a shape's artefact into the empty folder ``output``; ``work``, empty too, is used on the way.

        Raises:
            BadInput: it has no such shape, or the backend refuses it.
            ToolchainMissing: what the backend needs is not installed.
        """
        ...


def config_shapes(architecture: Architecture, steps: Steps) -> list[Shape]:
    """All distinct uniform subnets of a model, from half its depth (rounded up) and half its width on."""
    from amoeba_deploy.stage1.pipeline import default_minimum_depth

    full = architecture.depth
    widths = subnet_widths(architecture, CONFIG_MINIMUM_WIDTH, steps)
    depths = range(full, default_minimum_depth(full) - 1, -1)
    return [Shape(depth, width) for depth in depths for width in widths]


@dataclass(frozen=True)
class CheckpointSource:
    """The shapes of a checkpoint, with its weights."""

    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        """Raises BadInput where no latency could be known of the checkpoint's shapes."""
        self.checkpoint.require_whole_blocks()
        self.checkpoint.require_scores()

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def steps(self, backend: Backend, precision: str) -> Steps:
        return backend.takes.steps(self.architecture, self.checkpoint.multiple, precision, self.checkpoint.bias)

    def shapes(self, steps: Steps | None = None) -> list[Shape]:
        return self.checkpoint.shapes(steps)

    def sized(self, shape: Shape, steps: Steps | None = None) -> Architecture:
        return self.checkpoint.sized(shape, steps)

    def check(self, shape: Shape) -> None:
        self.checkpoint.plan(shape)

    def lower(
        self, shape: Shape, backend: Backend, precision: str, options: BuildOptions, output: Path, work: Path
    ) -> Artefact:
        plan = self.checkpoint.plan(shape, self.steps(backend, precision))
        return lower_plan(self.checkpoint, plan, backend, precision, options, output, work)[1]


@dataclass(frozen=True)
class ConfigSource:
    """The uniform shapes of a config, with random weights."""

    name: str
    model: RandomModel

    @classmethod
    def of(cls, config: Path, name: str | None = None) -> ConfigSource:
        """The source of a ``config.json``, or of a folder's; raises BadInput where it is of no known family."""
        return cls(name or str(config), RandomModel(config))

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def steps(self, backend: Backend, precision: str) -> Steps:
        return backend.takes.steps(self.architecture, NEURON_MULTIPLE, precision)

    def shapes(self, steps: Steps | None = None) -> list[Shape]:
        return config_shapes(self.architecture, steps or Steps.of(self.architecture))

    def sized(self, shape: Shape, steps: Steps | None = None) -> Architecture:
        return sized(self.architecture, shape, steps)

    def check(self, shape: Shape) -> None:
        first_units(self.architecture, shape, Steps.of(self.architecture))

    def lower(
        self, shape: Shape, backend: Backend, precision: str, options: BuildOptions, output: Path, work: Path
    ) -> Artefact:
        plan = first_units(self.architecture, shape, self.steps(backend, precision))
        supernet: Supernet = self
        return lower_plan(supernet, plan, backend, precision, options, output, work)[1]

    def learnt(self, _plan: Plan) -> Learnt:
        """Nothing: there are no weights to change."""
        return NOTHING

    def origin(self) -> dict[str, Any]:
        """That the weights are random, and of what."""
        return {"checkpoint": f"random weights of {self.name}"}
