"""The Python interface: a checkpoint that subnets are derived from in one call.

import amoeba_deploy

checkpoint = amoeba_deploy.open("CHECKPOINT")
folder = checkpoint.extract("24x0.75", "subnet")
model = checkpoint.extract("24x0.75")
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.extraction.ragged import Layout
from amoeba_deploy.shape import Policy
from amoeba_deploy.subnet import Wishes, derive_folder, derive_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amoeba_deploy.stage2.elastic import ElasticModel

Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, repr=False)
class OneForAll(Checkpoint):
    """An opened checkpoint that gives its subnets."""

    @overload
    def extract(
        self,
        shape: str,
        output: None = None,
        *,
        policy: Policy | None = None,
        layout: Layout = "uniform",
        flow: str | None = None,
        precision: str | None = None,
        bias: bool | None = None,
        dtype: Dtype | None = None,
        multiple: int | None = None,
    ) -> PreTrainedModel: ...

    @overload
    def extract(
        self,
        shape: str,
        output: str | Path,
        *,
        policy: Policy | None = None,
        layout: Layout = "uniform",
        flow: str | None = None,
        precision: str | None = None,
        bias: bool | None = None,
        dtype: Dtype | None = None,
        multiple: int | None = None,
        force: bool = False,
    ) -> Path: ...

    def extract(
        self,
        shape: str,
        output: str | Path | None = None,
        *,
        policy: Policy | None = None,
        layout: Layout = "uniform",
        flow: str | None = None,
        precision: str | None = None,
        bias: bool | None = None,
        dtype: Dtype | None = None,
        multiple: int | None = None,
        force: bool = False,
    ) -> Path | PreTrainedModel:
        """Derive a subnet, as a folder or in memory.

        Args:
            shape: a shape such as 24x0.75, or the path of a plan file.
            output: the folder to write; left out, nothing is kept on disk.
            policy: how the width is spread over blocks; the checkpoint's own where left out.
            layout: pad blocks of different widths, or leave each its own.
            flow: an engine, such as gguf: only numbers of heads and neurons that it takes are kept.
            precision: of that engine; its strictest rules where left out.
            bias: whether to add biases that compensate for what is removed; the checkpoint's choice where left out.
            dtype: of the weights; the base model's where left out.
            multiple: keep neurons in multiples of this; the engine's, else the checkpoint's, where left out.
            force: replace a folder that Amoeba wrote.

        Returns:
            The folder's path, or a stock transformers model in evaluation mode where no folder was named.

        Raises:
            BadInput: the shape is not one of the checkpoint, no class or engine takes it, or the folder exists.
        """
        wishes = Wishes(shape, policy, layout, flow, precision, bias, dtype, multiple)
        if output is None:
            return derive_model(self, wishes)
        return derive_folder(self, wishes, Path(output), force=force).path

    def elastic(self) -> ElasticModel:
        """The checkpoint as one model in memory that runs as any of its shapes, in float32 and for evaluation.

        Raises:
            BadInput: it was imported with masks instead of scores.
        """
        from amoeba_deploy.stage2.result import elastic_model

        return elastic_model(self)


def open_one_for_all(path: Path | None) -> OneForAll:
    """Open a checkpoint, the embedded one where no path is given; raises BadInput where it is missing or damaged."""
    opened = open_checkpoint(path)
    return OneForAll(**{field.name: getattr(opened, field.name) for field in fields(opened)})
