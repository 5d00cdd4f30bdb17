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
from amoeba_deploy.extraction_store import ExtractionStore
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
    store: ExtractionStore | None = None,
) -> tuple[ModelFolder, Artefact]:
    """Write the artefact of a plan into the empty folder ``output``; returns the dense subnet it was made from, too.

    Where the backend uses a dense folder in place, that is ``output`` itself; else the dense subnet is written to the
    empty folder ``work``, in the model's own dtype, and the backend stores weights its own way. Blocks of different
    widths are left so where the backend takes them, and padded to sizes that it takes where it does not. A ``store``
    keeps dense subnets for other engines.
    """
    in_place = backend.folder_dtype(precision, options) is not None
    if store is None:
        subnet = extract_for(supernet, plan, backend, precision, options, output if in_place else work)
    else:
        subnet = _stored(supernet, plan, backend, precision, options, output if in_place else None, store)
    return subnet, backend.lower(subnet, output, precision, options)


def _stored(
    supernet: Supernet,
    plan: Plan,
    backend: Backend,
    precision: str,
    options: BuildOptions,
    output: Path | None,
    store: ExtractionStore,
) -> ModelFolder:
    """As ``extract_for``, by way of a store; into ``output`` where the engine uses the folder in place."""
    wanted = _wanted(supernet, plan, backend, precision, options)
    what = {
        "origin": supernet.origin(),
        "plan": plan.to_json(),
        "shape": str(plan.shape),
        "dtype": wanted["dtype"],
        "layout": wanted["layout"],
        "blocks": None if wanted["blocks"] is None else [repr(block) for block in wanted["blocks"]],
    }

    def write(folder: Path) -> None:
        extract_for(supernet, plan, backend, precision, options, folder)

    if output is None:
        return ModelFolder(store.subnet(what, write))
    store.copy(what, write, output)
    return ModelFolder(output)


def extract_for(
    supernet: Supernet, plan: Plan, backend: Backend, precision: str, options: BuildOptions, dense: Path
) -> ModelFolder:
    """Write the dense subnet of a plan that a backend lowers into the empty folder ``dense``."""
    extract(supernet.model, plan, dense, **_wanted(supernet, plan, backend, precision, options))
    return ModelFolder(dense)


def _wanted(supernet: Supernet, plan: Plan, backend: Backend, precision: str, options: BuildOptions) -> dict[str, Any]:
    """How ``extract`` writes a subnet for a backend."""
    sizes, learnt = supernet.architecture, supernet.learnt(plan)
    held = sizes if learnt.biases is None else replace(sizes, output_bias=True, mlp_bias=True)
    takes_ragged = "ragged" in backend.layouts(held, precision, options)
    layout: Layout = "ragged" if plan.is_ragged and takes_ragged else "uniform"
    multiple = backend.takes.steps(sizes, 1, precision).multiple
    return {
        "dtype": backend.folder_dtype(precision, options),
        "layout": layout,
        "blocks": backend.block_sizes(plan, sizes, multiple) if layout == "ragged" else None,
        "learnt": learnt,
        "facts": supernet.origin(),
        # In a bundle what all subnets have alike is a file of its own, which a registry keeps once.
        "shard_bytes": None if backend.folder_dtype(precision, options) else sys.maxsize,
    }
