"""The one-for-all checkpoint: a base model with what stage 1 and stage 2 learnt about it.

A folder with ``amoeba.json``, the selection, ``quality.json`` where quality was measured, and the base model, inside
or referred to by its digest. From it a subnet of any shape is derived by extraction alone.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__, families
from amoeba_deploy.adapters import Adapters, read_adapters
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.compensation import LowRanks, block_biases
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction import Learnt
from amoeba_deploy.files import read_json, sha256_of, write_json
from amoeba_deploy.model_folder import ModelFolder, resolve_model
from amoeba_deploy.plan import NEURON_MULTIPLE, Plan, Steps, read_plan, sized, subnet_widths
from amoeba_deploy.quality import WIDTHS, Quality, read_quality
from amoeba_deploy.ragged import refuse_ragged
from amoeba_deploy.selection import Selection, read_selection
from amoeba_deploy.shape import Policy, Shape, parse_width, width_to_json

CHECKPOINT_FORMAT = "amoeba.checkpoint/1"
ADAPTER_KINDS = ("smol", "lora")
EMBEDDED = Path(__file__).parent / "demo" / "checkpoint"
_PARTS = ("amoeba.json", "selection.json", "selection.safetensors", "smol.safetensors", "quality.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its base model's digest was found to be the one that it was made for."""

    path: Path
    name: str
    model: ModelFolder
    selection: Selection
    quality: Quality | None
    multiple: int
    widths: tuple[Fraction, ...]
    policy: Policy
    bias: bool
    """Whether its subnets carry compensating biases, unless told otherwise."""
    adapters: Adapters | None

    @property
    def architecture(self) -> Architecture:
        """Sizes of the full model."""
        return self.model.architecture

    @property
    def steps(self) -> Steps:
        """The numbers of heads and neurons that its subnets may keep, as far as no engine asks for others."""
        return Steps.of(self.architecture, self.multiple)

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of the checkpoint's own files, of which amoeba.json names the base."""
        files = [self.path / part for part in _PARTS if (self.path / part).is_file()]
        lines = [f"{file.name} {sha256_of(file)}\n" for file in files]
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def minimum_width(self) -> Fraction:
        """The narrowest width that search considers: the narrowest measured or tuned."""
        return self.quality.minimum_width if self.quality else min(self.widths)

    @property
    def minimum_depth(self) -> int:
        """The smallest depth that the selection covers."""
        return self.selection.minimum_depth

    def shapes(self) -> list[Shape]:
        """Every distinct subnet, by its shortest name: all depths and all legal widths."""
        widths = subnet_widths(self.architecture, self.minimum_width, self.steps)
        depths = range(self.architecture.depth, self.minimum_depth - 1, -1)
        return [Shape(depth, width, self.policy) for depth in depths for width in widths]

    def sized(self, shape: Shape) -> Architecture:
        """The sizes of a shape's subnet."""
        return sized(self.architecture, shape, self.steps)

    def require_whole_blocks(self) -> None:
        """Raise BadInput where depths remove attention and feed-forward apart: no latency is known of such blocks."""
        if not self.selection.whole_blocks:
            raise BadInput(
                f"{self.path}: its selection removes attention and feed-forward apart, and latencies are known of "
                f"whole blocks only; extract and evaluate its shapes, or select again with --units block"
            )

    def plan(self, shape: Shape, steps: Steps | None = None) -> Plan:
        """The exact units of a shape; raises BadInput where the selection does not cover its depth."""
        if shape.depth > self.architecture.depth:
            raise BadInput(f"the shape {shape} asks for {shape.depth} blocks; the model has {self.architecture.depth}")
        return self.selection.plan(self.architecture, shape, steps or self.steps)

    def plan_of(self, text: str, steps: Steps | None = None, policy: Policy | None = None) -> Plan:
        """The plan of ``--shape``: a shape such as 24x0.75, under the checkpoint's policy unless told otherwise, or
        the path of a plan file."""
        if text.endswith(".json"):
            return read_plan(Path(text), self.architecture)
        return self.plan(Shape.parse(text, policy or self.policy), steps)

    def learnt(self, plan: Plan, bias: bool | None = None) -> Learnt:
        """What the checkpoint adds to its base model's weights in one plan.

        ``bias`` asks for compensating biases or forbids them; left out, the checkpoint's own choice is followed.
        """
        low_rank: LowRanks = lambda _block, _matrix: None  # noqa: E731
        if self.adapters is not None:
            mixture = self.adapters.mixture(plan.kept_blocks, plan.shape.width)
            low_rank = partial(self.adapters.low_rank, mixture)
        if not (self.bias if bias is None else bias):
            return Learnt(low_rank)
        return Learnt(low_rank, cache(lambda block: block_biases(self.model, self.selection, block, low_rank)))

    def origin(self) -> dict[str, Any]:
        """What derived models say about where they come from."""
        return {"checkpoint": self.name, "checkpoint_digest": self.digest, "base_digest": self.selection.base_digest}


def open_checkpoint(path: Path | None = None) -> Checkpoint:
    """Open a checkpoint folder, the embedded one where no path is given.

    Raises:
        BadInput: it is missing or damaged, or its base model is not the one that it was made for.
    """
    folder = path or EMBEDDED
    if not folder.is_dir():
        raise BadInput(f"{folder}: is not a folder; give the path of a one-for-all checkpoint")
    if not (folder / "amoeba.json").is_file() and (folder / "config.json").is_file():
        raise BadInput(
            f"{folder}: is a model, not a one-for-all checkpoint; make one with 'amoeba select' and "
            f"'amoeba checkpoint create'"
        )
    head = read_json(folder / "amoeba.json", CHECKPOINT_FORMAT)
    try:
        base, digest = str(head["base"]["path"]), str(head["base"]["digest"])
        multiple, widths = int(head["multiple"]), tuple(parse_width(str(w)) for w in head["widths"])
        name = str(head["name"])
        if multiple < 1 or not widths:
            raise ValueError
    except (KeyError, TypeError, ValueError, BadInput):
        raise BadInput(
            f"{folder / 'amoeba.json'}: base, multiple, widths or name is missing or wrong; create it again"
        ) from None
    policy, bias, kind = head.get("policy"), head.get("bias"), head.get("adapters")
    if policy not in ("uniform", "adaptive") or bias not in ("on", "off") or kind not in (None, *ADAPTER_KINDS):
        raise BadInput(
            f"{folder / 'amoeba.json'}: has policy {policy!r}, bias {bias!r} and adapters {kind!r}; known are the "
            f"policies uniform and adaptive, bias on and off, and adapters null, {' and '.join(ADAPTER_KINDS)}"
        )
    where = folder / base  # an absolute path stays what it is
    if not where.is_dir():
        raise BadInput(
            f"{folder}: its base model should be {where}, which is not there; put it back, or create the checkpoint "
            f"again, with --include-base to keep the model inside"
        )
    model = ModelFolder(where)
    model.check_shapes()
    if model.digest != digest:
        raise BadInput(
            f"{model.path}: has the digest {model.digest[:19]}..., the checkpoint was made for {digest[:19]}...; "
            f"restore that base model or create the checkpoint again"
        )
    selection = read_selection(folder, model.architecture)
    if selection.base_digest != digest:
        raise BadInput(f"{folder}: its selection was made for another base model; create the checkpoint again")
    quality = read_quality(folder, model.architecture, multiple, policy, bias == "on")
    adapters = None if kind is None else read_adapters(folder, model.architecture)
    return Checkpoint(folder, name, model, selection, quality, multiple, widths, policy, bias == "on", adapters)


def create_checkpoint(
    model_name: str,
    selection_folder: Path,
    output: Path,
    *,
    name: str | None = None,
    include_base: bool = False,
    policy: Policy = "uniform",
    bias: bool = False,
) -> Checkpoint:
    """Write a checkpoint without adapters into an existing, empty folder, and open it.

    Args:
        model_name: the base model, a folder or a hub id.
        selection_folder: what ``amoeba select`` wrote for it.
        output: the folder to fill.
        name: what derived models call it; the model's name where left out.
        include_base: copy the base model into the checkpoint instead of referring to it.
        policy: how its subnets' widths are spread over blocks, unless told otherwise.
        bias: whether its subnets carry compensating biases, unless told otherwise.

    Raises:
        BadInput: the selection is not of this model.
    """
    model = ModelFolder(resolve_model(model_name).resolve())
    refuse_ragged(model.config, model.path)
    model.check_shapes()
    if bias:
        families.compensated(model.architecture)
    selection = read_selection(selection_folder, model.architecture)
    if selection.base_digest != model.digest:
        raise BadInput(
            f"{selection_folder}: was made for a model of digest {selection.base_digest[:19]}..., "
            f"{model_name} has {model.digest[:19]}...; select again for this model"
        )
    base = str(model.path)
    if include_base:
        base = "base"
        shutil.copytree(model.path, output / base)
    for part in ("selection.json", "selection.safetensors"):
        shutil.copyfile(selection_folder / part, output / part)
    head = {
        "format": CHECKPOINT_FORMAT,
        "tool": f"amoeba-deploy {__version__}",
        "name": name or Path(model_name).name,
        "base": {"path": base, "digest": model.digest},
        "policy": policy,
        "bias": "on" if bias else "off",
        "multiple": NEURON_MULTIPLE,
        "widths": [width_to_json(width) for width in WIDTHS],
        "adapters": None,
    }
    write_json(output / "amoeba.json", head)
    return open_checkpoint(output)


def verify_checkpoint(checkpoint: Checkpoint) -> int:
    """Read every weight of the base model and check that all are finite; returns how many tensors there are.

    Opening the checkpoint has already compared its digests.

    Raises:
        VerificationFailed: a tensor holds a value that is not finite.
    """
    import numpy as np

    tensors = checkpoint.model.tensors
    for name in tensors.infos:
        if not np.isfinite(tensors.float32(name)).all():
            raise VerificationFailed(f"{checkpoint.model.path}: tensor '{name}' holds values that are not finite")
    return len(tensors.infos)
