"""The one-for-all checkpoint: a base model with what stage 1 and stage 2 learnt about it.

A folder with ``amoeba.json``, the selection, ``quality.json`` where quality was measured, and the base model, inside
or referred to by its digest. From it a subnet of any shape is derived by extraction alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from amoeba_deploy import __version__, families
from amoeba_deploy.adapters import ADAPTERS, Adapters, check_finite, read_adapters
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction.compensation import Biases, LowRanks, block_biases, with_own_biases
from amoeba_deploy.extraction.folder import Learnt
from amoeba_deploy.extraction.ragged import refuse_ragged
from amoeba_deploy.files import read_json, read_json_object, require_inside, sha256_of, write_json
from amoeba_deploy.model_folder import ModelFolder, resolve_model
from amoeba_deploy.plan import NEURON_MULTIPLE, Plan, Steps, read_plan, sized, subnet_widths
from amoeba_deploy.quality import WIDTHS, Quality, read_quality
from amoeba_deploy.quality_pairs import PAIRS
from amoeba_deploy.selection import Selection, read_selection
from amoeba_deploy.shape import Policy, Shape, parse_width, width_to_json

CHECKPOINT_FORMAT = "amoeba.checkpoint/1"
ADAPTER_KINDS = ("smol", "lora")
EMBEDDED = Path(__file__).parent / "demo" / "checkpoint"
_PARTS = ("amoeba.json", "selection.json", "selection.safetensors", "smol.safetensors", "quality.json", PAIRS)


@dataclass(frozen=True, repr=False)
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
    base_name: str | None = None
    """The hub's name of the base model, where it came from there."""
    tuning: dict[str, Any] = field(default_factory=dict)
    """With what settings and data its adapters were tuned; empty where they were not, or where it is not known."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} at {self.path}>"

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
        return own_digest(self.path)

    @property
    def minimum_width(self) -> Fraction:
        """The narrowest width that search considers: the narrowest measured or tuned."""
        return self.quality.minimum_width if self.quality else min(self.widths)

    @property
    def minimum_depth(self) -> int:
        """The smallest depth that the selection covers."""
        return self.selection.minimum_depth

    @property
    def full_shape(self) -> Shape:
        """The whole model."""
        return Shape(self.architecture.depth, Fraction(1), self.policy)

    def owns(self, plan: Plan) -> bool:
        """Whether a plan is what the checkpoint itself makes of its shape, so that its quality is that shape's."""
        shape = plan.shape
        return shape.policy == self.policy and shape.depth in self.selection.depths and self.plan(shape) == plan

    def shapes(self, steps: Steps | None = None) -> list[Shape]:
        """Every distinct subnet, by its shortest name: all depths and all legal widths.

        ``steps``: the numbers of heads and neurons that an engine takes, where one is asked for.
        """
        masks, chosen = self.selection.masks, steps or self.steps
        widths = list(masks.widths) if masks else subnet_widths(self.architecture, self.minimum_width, chosen)
        depths = sorted(self.selection.depths, reverse=True)
        return [Shape(depth, width, self.policy) for depth in depths for width in widths]

    def parts(self, shape: Shape, steps: Steps | None = None) -> tuple[Architecture, ...]:
        """What each block of a shape's subnet keeps, in the order of the blocks, without compensating biases."""
        return self.selection.parts(self.architecture, shape, steps or self.steps)

    def sized(self, shape: Shape, steps: Steps | None = None) -> Architecture:
        """The sizes of a shape's subnet, every block as wide as the widest, without compensating biases."""
        if shape.policy == "uniform":
            return sized(self.architecture, shape, steps or self.steps)
        parts = self.parts(shape, steps)
        widest = max(part.kv_heads for part in parts), max(part.neurons for part in parts)
        return self.architecture.subnet(len(parts), *widest)

    def compensates(self, shape: Shape, bias: bool | None = None) -> bool:
        """Whether a shape's subnet carries compensating biases, where ``bias`` asks for them or forbids them."""
        wanted = self.bias if bias is None else bias
        # With masks, at the full width nothing is removed and nothing was stored for it.
        return wanted and not (self.selection.masks is not None and shape.width == 1)

    def require_whole_blocks(self) -> None:
        """Raise BadInput where depths remove attention and feed-forward apart: no latency is known of such blocks."""
        if not self.selection.whole_blocks:
            raise BadInput(
                f"{self.path}: its selection removes attention and feed-forward apart, and latencies are known of "
                f"whole blocks only; extract and evaluate its shapes, or select again with --units block"
            )

    def require_scores(self) -> None:
        """Raise BadInput where masks say what is kept: latency tables hold shapes whose blocks are all alike."""
        if self.selection.masks is not None:
            raise BadInput(
                f"{self.path}: holds imported masks, under which blocks differ in width, and latency tables hold "
                f"uniform shapes; give --table or another --device, or profile another checkpoint of its base model"
            )

    def plan(self, shape: Shape, steps: Steps | None = None) -> Plan:
        """The exact units of a shape, which masks say where there are some; raises BadInput where they do not cover it.

        ``steps``: the numbers of heads and neurons that may be kept, where scores choose among them.
        """
        if shape.depth > self.architecture.depth:
            raise BadInput(f"the shape {shape} asks for {shape.depth} blocks; the model has {self.architecture.depth}")
        return self.selection.plan(self.architecture, shape, steps or self.steps)

    def plan_of(self, text: str, steps: Steps | None = None, policy: Policy | None = None) -> Plan:
        """The plan of ``--shape``: a shape such as 24x0.75, under the checkpoint's policy unless told otherwise, or
        the path of a plan file."""
        if text.endswith(".json"):
            plan = read_plan(Path(text), self.architecture)
            base = read_json_object(Path(text)).get("base_digest", self.selection.base_digest)
            if base != self.selection.base_digest:
                raise BadInput(f"{text}: is the plan of a subnet of another base model; use that model's checkpoint")
            if self.selection.masks is not None and plan != self.plan(plan.shape):
                raise BadInput(f"{text}: keeps other units than the checkpoint's masks at {plan.shape}; name a shape")
            return plan
        return self.plan(Shape.parse(text, policy or self.policy), steps)

    def learnt(self, plan: Plan, bias: bool | None = None) -> Learnt:
        """What the checkpoint adds to its base model's weights in one plan.

        ``bias`` asks for compensating biases or forbids them; left out, the checkpoint's own choice is followed.
        """
        wanted = self.compensates(plan.shape, bias)
        return Learnt(self._low_rank(plan), self.biases(plan) if wanted else None)

    def _low_rank(self, plan: Plan) -> LowRanks:
        if self.adapters is None:
            return lambda _block, _matrix: None
        return partial(self.adapters.low_rank, self.adapters.mixture(plan.kept_blocks, plan.shape.width))

    def biases(self, plan: Plan) -> Biases:
        """What compensates for the units that a plan removes from its blocks, of the tuned weights where tuned.

        Raises:
            BadInput: the checkpoint was imported without biases.
        """
        masks, width = self.selection.masks, plan.shape.width
        if masks is None:
            return cache(partial(block_biases, self.model, self.selection, low_rank=self._low_rank(plan)))
        if not self.owns(plan):
            raise BadInput(
                "compensating biases are known of this checkpoint's own plans only; derive it with --bias off"
            )
        if width == 1:
            raise BadInput("nothing is removed at the full width, so there is nothing to compensate for")
        masks.biases(plan.blocks[0], width)  # refused now, not while weights are written
        return lambda block: with_own_biases(self.model, block, *masks.biases(block, width))

    def origin(self) -> dict[str, Any]:
        """What derived models say about where they come from."""
        known = {"base_model": self.base_name} if self.base_name else {}
        return {
            "checkpoint": self.name,
            "checkpoint_digest": self.digest,
            **known,
            "base_digest": self.selection.base_digest,
        }


def own_digest(folder: Path, sha256: Callable[[Path], str] = sha256_of) -> str:
    """The digest of a checkpoint's folder, which need not be opened for it; ``sha256`` is of one file, in hex."""
    files = [folder / part for part in _PARTS if (folder / part).is_file()]
    lines = [f"{file.name} {sha256(file)}\n" for file in files]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


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
    require_inside(folder, (folder / part for part in _PARTS))
    head = read_json(folder / "amoeba.json", CHECKPOINT_FORMAT)
    try:
        base, digest, base_name = str(head["base"]["path"]), str(head["base"]["digest"]), head["base"].get("name")
        multiple, widths = int(head["multiple"]), tuple(parse_width(str(w)) for w in head["widths"])
        name = str(head["name"])
        if multiple < 1 or not widths or not isinstance(base_name, str | None):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, BadInput):
        raise BadInput(
            f"{folder / 'amoeba.json'}: base, multiple, widths or name is missing or wrong; create it again"
        ) from None
    tuning = head.get("tuning", {})
    if not isinstance(tuning, dict):
        raise BadInput(f"{folder / 'amoeba.json'}: its entry tuning is not a JSON object; create it again")
    policy, bias, kind = head.get("policy"), head.get("bias"), head.get("adapters")
    if policy not in ("uniform", "adaptive") or bias not in ("on", "off") or kind not in (None, *ADAPTER_KINDS):
        raise BadInput(
            f"{folder / 'amoeba.json'}: has policy {policy!r}, bias {bias!r} and adapters {kind!r}; known are the "
            f"policies uniform and adaptive, bias on and off, and adapters null, {' and '.join(ADAPTER_KINDS)}"
        )
    where = folder / base  # an absolute path stays what it is
    if not os.path.isdir(where):  # noqa: PTH112 - Path.is_dir raises for names that no system takes
        raise BadInput(
            f"{folder}: its base model should be {str(where)[:300]}, which is not there; put it back, or create the "
            f"checkpoint again, with --include-base to keep the model inside"
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
    masks = selection.masks
    if masks is not None and (policy != "adaptive" or widths != masks.widths or (bias == "on" and not masks.biased)):
        raise BadInput(f"{folder / 'amoeba.json'}: contradicts the masks in its selection; import it again")
    quality = read_quality(folder, model.architecture, multiple, policy, bias == "on")
    if kind is None and (folder / ADAPTERS).exists():
        raise BadInput(f"{folder}: holds {ADAPTERS}, and amoeba.json says that there are no adapters; create it again")
    adapters = None if kind is None else read_adapters(folder, model.architecture)
    return Checkpoint(
        folder, name, model, selection, quality, multiple, widths, policy, bias == "on", adapters, base_name, tuning
    )


def open_selected(model_name: str, selection_folder: Path) -> tuple[ModelFolder, Selection]:
    """A base model, a folder or a hub id, and what ``amoeba select`` wrote for it.

    Raises:
        BadInput: one is missing or damaged, or the selection is of another model.
    """
    model = ModelFolder(resolve_model(model_name).resolve())
    refuse_ragged(model.config, model.path)
    model.check_shapes()
    selection = read_selection(selection_folder, model.architecture)
    if selection.base_digest != model.digest:
        raise BadInput(
            f"{selection_folder}: was made for a model of digest {selection.base_digest[:19]}..., "
            f"{model_name} has {model.digest[:19]}...; select again for this model"
        )
    return model, selection


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
    model, _ = open_selected(model_name, selection_folder)
    if bias:
        families.compensated(model.architecture)
    for part in ("selection.json", "selection.safetensors"):
        shutil.copyfile(selection_folder / part, output / part)
    return finish_checkpoint(
        output,
        model,
        name or Path(model_name).name,
        include_base=include_base,
        hub_name=None if Path(model_name).is_dir() else model_name,
        policy=policy,
        bias=bias,
    )


def finish_checkpoint(
    output: Path,
    model: ModelFolder,
    name: str,
    *,
    include_base: bool,
    hub_name: str | None = None,
    policy: Policy,
    bias: bool,
    multiple: int = NEURON_MULTIPLE,
    widths: Sequence[Fraction] = WIDTHS,
    adapters: str | None = None,
    tuning: dict[str, Any] | None = None,
) -> Checkpoint:
    """Write ``amoeba.json``, and the base model if it belongs inside, beside the parts of a checkpoint; and open it.

    ``tuning``: the settings and data of stage 2, as JSON values that the same command gives again: no times.
    """
    base = str(model.path)
    if model.path.parent == output:
        base = model.path.name
    elif include_base:
        base = "base"
        shutil.copytree(model.path, output / base)
    head = {
        "format": CHECKPOINT_FORMAT,
        "tool": f"amoeba-deploy {__version__}",
        "name": name,
        "base": {"path": base, "digest": model.digest} | ({} if hub_name is None else {"name": hub_name}),
        "policy": policy,
        "bias": "on" if bias else "off",
        "multiple": multiple,
        "widths": [width_to_json(width) for width in widths],
        "adapters": adapters,
    } | ({} if tuning is None else {"tuning": tuning})
    write_json(output / "amoeba.json", head)
    return open_checkpoint(output)


def verify_checkpoint(checkpoint: Checkpoint) -> int:
    """Read every weight of the base model and the adapters and check that all are finite; returns how many tensors.

    Opening the checkpoint has already compared its digests.

    Raises:
        VerificationFailed: a tensor holds a value that is not finite.
    """
    import numpy as np

    tensors = checkpoint.model.tensors
    for name in tensors.infos:
        if not np.isfinite(tensors.float32(name)).all():
            raise VerificationFailed(f"{checkpoint.model.path}: tensor '{name}' holds values that are not finite")
    return len(tensors.infos) + (check_finite(checkpoint.adapters) if checkpoint.adapters else 0)
