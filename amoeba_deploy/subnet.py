"""A subnet as it is asked for: which plan, for which engine, with or without compensation, and what is said of it.

Everything that can be refused is refused before a tensor is read.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amoeba_deploy import families
from amoeba_deploy.backends import load_backend, takes_of
from amoeba_deploy.backends.takes import Takes
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.comparison import Comparison, compare
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, TextLoss, file_digest, text_loss, text_rows, torch_logits
from amoeba_deploy.extraction.compensation import Biases, compensate
from amoeba_deploy.extraction.folder import (
    DTYPES,
    SHARD_BYTES,
    Extraction,
    check_plan,
    extract,
    model_dtype,
    written_sizes,
)
from amoeba_deploy.extraction.ragged import BlockSizes, Layout
from amoeba_deploy.files import whole_folder
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.plan import Plan, Steps
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDED = 4


@dataclass(frozen=True)
class Wishes:
    """How a subnet is wanted; what is left out follows the checkpoint, or any engine."""

    shape: str
    policy: Policy | None = None
    layout: Layout = "uniform"
    flow: str | None = None
    precision: str | None = None
    bias: bool | None = None
    dtype: str | None = None
    """fp32, fp16 or bf16."""
    multiple: int | None = None
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Raises BadInput where a field holds what it cannot."""
        legal: dict[str, tuple[Any, ...]] = {
            "policy": (None, "uniform", "adaptive"),
            "layout": ("uniform", "ragged"),
            "bias": (None, True, False),
            "dtype": (None, *DTYPES),
        }
        for name, values in legal.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise BadInput(f"the {name} {getattr(self, name)!r:.60} is none of {known}")
        if not isinstance(self.shape, str):
            raise BadInput(f"the shape {self.shape!r:.60} is no text; write DEPTHxWIDTH such as 24x0.75")
        if self.multiple is not None and (type(self.multiple) is not int or self.multiple < 1):
            raise BadInput(f"the multiple {self.multiple!r:.60} is no whole number of at least 1")


class Subnet:
    """One subnet of a checkpoint, decided and checked, and not yet extracted."""

    def __init__(self, checkpoint: Checkpoint, wishes: Wishes) -> None:
        """Decide on the plan and check it against the engine that it is for.

        Raises:
            BadInput: the shape is not one of the checkpoint, no stock class holds it, or the engine refuses it.
        """
        self.checkpoint, self.wishes = checkpoint, wishes
        if wishes.precision is not None and self.takes is None:
            raise BadInput("a precision belongs to an engine; name it with --for, or the weights' dtype with --dtype")
        if (wishes.policy or wishes.multiple) and wishes.shape.endswith(".json"):
            option = "--policy" if wishes.policy else "--multiple"
            raise BadInput(f"{wishes.shape}: says itself what every block keeps; leave out {option}")
        if self.takes is not None and wishes.precision is not None:
            self.takes.check_precision(self.precision)
        self.bias = checkpoint.bias if wishes.bias is None else wishes.bias
        self.ragged = wishes.layout == "ragged"
        self.plan: Plan = checkpoint.plan_of(wishes.shape, self._steps(), wishes.policy)
        check_plan(checkpoint.model, self.plan)
        self.bias = checkpoint.compensates(self.plan.shape, wishes.bias)
        # A ragged folder has a class of its own, which adds biases to any family.
        self.sizes = written_sizes(self.plan, checkpoint.architecture, self.bias and not self.ragged)
        if self.takes is not None:
            self._check_engine(self.takes)

    @property
    def takes(self) -> Takes | None:
        """The rules of the engine that it is for, if any."""
        return takes_of(self.wishes.flow) if self.wishes.flow else None

    @property
    def precision(self) -> str:
        """The engine's precision; empty where none was named, which stands for the strictest rules."""
        named = self.wishes.precision or ""
        return self.takes.own_name(named) if self.takes else named

    def _steps(self) -> Steps:
        if self.checkpoint.selection.masks is not None and self.wishes.multiple is not None:
            raise BadInput(f"{self.checkpoint.path}: its masks say which neurons are kept; leave out --multiple")
        multiple = self.wishes.multiple or self.checkpoint.multiple
        sizes = self.checkpoint.architecture
        if self.takes is None:
            return Steps.of(sizes, multiple)
        found = self.takes.steps(sizes, multiple, self.precision, self.bias and not self.ragged)
        return Steps(found.groups, self.wishes.multiple) if self.wishes.multiple else found

    def _check_engine(self, takes: Takes) -> None:
        full = self.checkpoint.architecture
        refused = takes.refusal(self.sizes, self.precision, self.bias and not full.output_bias)
        for block in self.plan.blocks if refused is None else ():
            refused = refused or takes.count_refusal(full, len(block.heads), len(block.neurons), self.precision)
        if refused:
            raise BadInput(f"{self.plan.shape} cannot be extracted for '{takes.flow}': {refused}")
        if self.ragged and not takes.varying:
            raise BadInput(
                f"'{takes.flow}' takes blocks of one width only; leave --layout uniform, which pads them exactly"
            )
        if self.ragged and self.bias and not takes.biases:
            raise BadInput(f"'{takes.flow}' adds no biases on o_proj and down_proj; choose --bias off")

    @cached_property
    def notes(self) -> list[str]:
        """What the user should know before or after: choices that were not the checkpoint's, and fewer engines."""
        checkpoint, found = self.checkpoint, []
        if self.wishes.bias is not None and self.bias != checkpoint.bias:
            own, asked = ("on" if value else "off" for value in (checkpoint.bias, self.bias))
            found.append(f"the checkpoint was made with bias {own}; this subnet has bias {asked}, as asked for")
        policy = self.plan.shape.policy
        if policy != checkpoint.policy:
            found.append(f"the checkpoint was made for the policy {checkpoint.policy}; this subnet is {policy}")
        alone = checkpoint.tuning.get("settings", {}).get("shape")
        if alone and str(self.plan.shape) != alone:
            found.append(f"the checkpoint was tuned for {alone} alone; this subnet is {self.plan.shape}")
        found += self._rounding()
        if self.ragged and not self.plan.is_ragged and not self.bias:
            found.append("all blocks are alike, so the uniform layout would need no code of its own")
        held_by = self.sizes.family if self.ragged else families.held_by(self.sizes)
        if held_by == "granite" and checkpoint.architecture.family != "granite":
            found.append(
                f"{self.sizes.heads} heads do not divide the hidden size {self.sizes.hidden} and there are biases, so "
                f"it is written as a Granite, which fewer engines run; a width whose heads divide it, or --bias off, "
                f"gives a Llama or a Mistral"
            )
        return found

    def _rounding(self) -> list[str]:
        """A note where the engine's rules changed what the shape keeps."""
        checkpoint, takes, asked = self.checkpoint, self.takes, self.wishes.shape
        if takes is None or asked.endswith(".json"):
            return []
        free = checkpoint.plan_of(asked, None, self.wishes.policy)
        if free == self.plan:
            return []
        (groups, neurons), (any_groups, any_neurons) = self.plan.widest, free.widest
        finer = "" if self.wishes.precision else "; --precision names an engine's precision, whose rules may be finer"
        reached = [plan.width_reached(checkpoint.architecture) for plan in (self.plan, free)]
        return [
            f"for {takes.flow} blocks keep up to {groups} key/value heads and {neurons} neurons, the nearest that it "
            f"takes to the {any_groups} and {any_neurons} of {asked} without an engine: {reached[0]:.1%} of their "
            f"matrices' parameters instead of {reached[1]:.1%}{finer}"
        ]

    def quality(self, text: Path | None, subnet: Path, progress: Progress) -> dict[str, Any] | None:
        """What is known of its quality: measured on a text if one is given, else from the checkpoint, else None.

        On a text the loss of the full model, of the subnet, and of the subnet with the other choice of compensating
        biases are measured, in float32.
        """
        if text is not None:
            return self._measured_quality(text, subnet, progress)
        known, plan = self.checkpoint.quality, self.plan
        if known is None or self.bias != self.checkpoint.bias or not self.checkpoint.owns(plan):
            return None
        if plan.shape.width < known.minimum_width or plan.shape.depth < known.minimum_depth:
            return None  # beyond what was measured there are only guesses
        full = self.checkpoint.full_shape
        before, after = known.loss(full, "fp32"), known.loss(plan.shape, "fp32")
        return {
            "metric": "loss",
            "before": round(before.value, _ROUNDED),
            "after": round(after.value, _ROUNDED),
            **_difference(compare(before.losses, after.losses)),
            "source": after.source,
            "text": known.text["digest"],
        }

    def _measured_quality(self, text: Path, subnet: Path, progress: Progress) -> dict[str, Any]:
        checkpoint = self.checkpoint
        rows = text_rows(text, checkpoint.model.tokenizer(), min(SEQUENCE, checkpoint.architecture.context))

        def measured(model: PreTrainedModel) -> TextLoss:
            with progress.bar(text.name, -(-len(rows) // 8)) as step:
                return text_loss(torch_logits(model), rows, step)

        full = checkpoint.plan(checkpoint.full_shape)
        with tempfile.TemporaryDirectory(prefix="amoeba-full-") as work:
            extract(checkpoint.model, full, Path(work), learnt=checkpoint.learnt(full))
            before = measured(load_torch_model(Path(work)))
        loaded = load_torch_model(subnet)
        after = measured(loaded)
        pairs = [np.array(each.rows, dtype=np.float32) for each in (before, after)]
        found: dict[str, Any] = {
            "metric": "loss",
            "before": round(before.loss, _ROUNDED),
            "after": round(after.loss, _ROUNDED),
            **_difference(compare(*pairs)),
        }
        biases = self._other_biases()
        if biases is not None:
            compensate(loaded, self.plan, biases, -1.0 if self.bias else 1.0)
            found["after_with_bias_" + ("off" if self.bias else "on")] = round(measured(loaded).loss, _ROUNDED)
        return found | {"source": "measured", "text": file_digest(text)}

    def _other_biases(self) -> Biases | None:
        """What would be added or taken away by the other choice of compensation; None where that cannot be measured.

        Masks may have come without biases; and a ragged folder keeps norms behind sublayers that are gone only where
        biases pass through them.
        """
        if self.ragged and not self.plan.whole_blocks:
            return None
        try:
            return self.checkpoint.biases(self.plan)
        except BadInput:
            return None

    def _blocks(self) -> tuple[BlockSizes, ...] | None:
        """The sizes that an engine with a way of its own to say that blocks differ wants them padded to."""
        if self.takes is None or not self.ragged:
            return None
        backend = load_backend(self.takes.flow)
        return backend.block_sizes(self.plan, self.checkpoint.architecture, self._steps().multiple)

    def _facts(self, text: Path | None) -> dict[str, Any]:
        wishes = self.wishes
        made_for = {"flow": wishes.flow} if wishes.flow else {}
        tuned = {"adapters": True} if self.checkpoint.adapters else {}
        return self.checkpoint.origin() | made_for | tuned | {"command": self._command(text)}

    def _command(self, text: Path | None) -> str:
        """The command that makes this subnet again; a plan file is the subnet's own subnet.json."""
        wishes, owned = self.wishes, not self.wishes.shape.endswith(".json")
        options = {
            "shape": str(self.plan.shape) if owned else "subnet.json",
            "policy": self.plan.shape.policy if owned and self.plan.shape.policy != self.checkpoint.policy else None,
            "layout": wishes.layout if wishes.layout != "uniform" else None,
            "for": wishes.flow,
            "precision": wishes.precision,
            "bias": None if self.bias == self.checkpoint.bias else "on" if self.bias else "off",
            "dtype": wishes.dtype,
            "multiple": wishes.multiple,
            "shard-size": None if wishes.shard_bytes == SHARD_BYTES else f"{wishes.shard_bytes / 1e6:g}MB",
            "quality-text": text.name if text else None,
        }
        said = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
        return f"amoeba extract CHECKPOINT {said} -o DIR"

    def extract(self, output: Path, text: Path | None, progress: Progress) -> Extraction:
        """Write it into an existing, empty folder."""

        def quality(folder: Path) -> dict[str, Any] | None:
            return self.quality(text, folder, progress)

        wishes = self.wishes
        return extract(
            self.checkpoint.model,
            self.plan,
            output,
            dtype=DTYPES[wishes.dtype] if wishes.dtype else None,
            layout=wishes.layout,
            learnt=self.checkpoint.learnt(self.plan, self.bias),
            facts=self._facts(text),
            shard_bytes=wishes.shard_bytes,
            quality=quality,
            blocks=self._blocks(),
        )


def _difference(found: Comparison | None) -> dict[str, Any]:
    """By how much the loss rises in pairs of rows, where that is known."""
    if found is None:
        return {}
    return {
        "difference": round(found.difference, _ROUNDED),
        "difference_se": round(found.standard_error, _ROUNDED),
        "rows": found.pairs,
    }


def derive_folder(
    checkpoint: Checkpoint,
    wishes: Wishes,
    output: Path,
    *,
    force: bool = False,
    quality_text: Path | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Decide on a subnet and write its folder, which appears whole or not at all.

    Args:
        checkpoint: what to derive from.
        wishes: the shape, and how it is wanted.
        output: the folder to write.
        force: replace a folder that Amoeba wrote.
        quality_text: a text to measure the loss on before and after.
        progress: told of notes.

    Raises:
        BadInput: the subnet is refused, or the output may not be written.
    """
    return write_folder(Subnet(checkpoint, wishes), output, force=force, quality_text=quality_text, progress=progress)


def write_folder(
    subnet: Subnet,
    output: Path,
    *,
    force: bool = False,
    quality_text: Path | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """``derive_folder`` of a subnet that is decided already."""
    said, checkpoint = progress or Progress(quiet=True), subnet.checkpoint
    for note in subnet.notes:
        said.say(f"note: {note}")
    inputs = (checkpoint.path, checkpoint.model.path, *([quality_text] if quality_text else []))
    with whole_folder(output, force, inputs) as folder:
        done = subnet.extract(folder, quality_text, said)
    return replace(done, path=output)


def derive_model(checkpoint: Checkpoint, wishes: Wishes) -> PreTrainedModel:
    """A subnet as a stock transformers model in memory, in the dtype that was asked for, else the base model's."""
    dtype = DTYPES[wishes.dtype] if wishes.dtype else model_dtype(checkpoint.model)
    with tempfile.TemporaryDirectory(prefix="amoeba-subnet-") as work:
        Subnet(checkpoint, wishes).extract(Path(work), None, Progress(quiet=True))
        return load_torch_model(Path(work), dtype)
