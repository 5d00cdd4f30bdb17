"""From a plan to an engine's artefact: extract once, straight into the dtype that the engine reads, then lower."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import Artefact, Backend, BuildOptions
from amoeba_deploy.extraction.folder import Learnt, extract
from amoeba_deploy.extraction.ragged import Layout
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan


class Supernet(Protocol):
    """What subnets are cut from: a checkpoint, or random weights of a config."""

    @property
    def architecture(self) -> Architecture:
        """Sizes of the full model."""
        ...

    @property
    def model(self) -> ModelFolder:
        """The weights of the full model."""
        ...

    def learnt(self, plan: Plan, /) -> Learnt:
        """What is added to the model's own weights in one plan."""
        ...

    def origin(self) -> dict[str, Any]:
        """What derived models say about where they come from."""
        ...


def lower_plan(
    supernet: Supernet,
    plan: Plan,
    backend: Backend,
    precision: str,
    options: BuildOptions,
    output: Path,
    work: Path,
) -> tuple[ModelFolder, Artefact]:
    """Write the artefact of a plan into the empty folder ``output``; returns the dense subnet it was made from, too.

    Where the backend uses a dense folder in place, that is ``output`` itself; else the dense subnet is written to the
    empty folder ``work``, in the model's own dtype, and the backend stores weights its own way. Blocks of different
    widths are left so where the backend takes them, and padded to sizes that it takes where it does not.
    """
    dense = output if backend.folder_dtype(precision, options) else work
    subnet = extract_for(supernet, plan, backend, precision, options, dense)
    return subnet, backend.lower(subnet, output, precision, options)


def extract_for(
    supernet: Supernet, plan: Plan, backend: Backend, precision: str, options: BuildOptions, dense: Path
) -> ModelFolder:
    """Write the dense subnet of a plan that a backend lowers into the empty folder ``dense``."""
    sizes, learnt = supernet.architecture, supernet.learnt(plan)
    held = sizes if learnt.biases is None else replace(sizes, output_bias=True, mlp_bias=True)
    takes_ragged = "ragged" in backend.layouts(held, precision, options)
    layout: Layout = "ragged" if plan.is_ragged and takes_ragged else "uniform"
    multiple = backend.takes.steps(sizes, 1, precision).multiple
    wanted: dict[str, Any] = {
        "dtype": backend.folder_dtype(precision, options),
        "layout": layout,
        "blocks": backend.block_sizes(plan, sizes, multiple) if layout == "ragged" else None,
        "learnt": learnt,
        "facts": supernet.origin(),
        # Engines point into one file of weights, whatever its size.
        "shard_bytes": sys.maxsize,
    }
    extract(supernet.model, plan, dense, **wanted)
    return ModelFolder(dense)
