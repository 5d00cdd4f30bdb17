"""The adapter of the authors' released checkpoint: a PEFT folder of LoRA experts, turned into ``smol.safetensors``.

``adapter_config.json`` has PEFT's usual fields and ``use_moe_lora``, ``num_experts``, ``top_k`` and ``width_choice``;
``adapter_model.safetensors`` (or ``.bin``) the factors of every expert and the gate. Experts are read one matrix at a
time while the new file is written. A setting that would change what an adapter computes, and a tensor that is missing,
of another shape or unknown, is refused by its name. Without ``use_moe_lora`` it is a plain LoRA: one expert, no gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.adapters import GATE, NOISE, Numbers, matrices, tensor_names, write_adapters
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object
from amoeba_deploy.shape import format_width, parse_width
from amoeba_deploy.tensors import NUMPY_OF, Array, OpenFile, TensorSource, as_float32, made_source, read_header

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model.model.layers"
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_ROUTER = "base_model.lora_sparsemoe.router"
_GATE = tuple(f"{_ROUTER}.topkroute_linear.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias"))
_NOISE = tuple(f"{_ROUTER}.noise_linear.{part}" for part in ("weight", "bias"))
_FLOATS = ("F32", "F16", "BF16")
_CHANGING = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "layers_to_transform", "fan_in_fan_out",
    "lora_bias", "trainable_token_indices", "target_parameters", "megatron_config", "corda_config",
)  # fmt: skip
"""Settings of PEFT that change what an adapter computes or where it stands."""
_WIDTH = re.compile(r"\d{1,6}(/\d{1,6})?|\d{0,6}\.\d{1,9}")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the adapter's file: its dtype as safetensors spells it, its shape, and its values when asked for."""

    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Array]


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says; ``widths`` in its own order, which is that of the gate's inputs."""

    rank: int
    alpha: float
    experts: int
    top_k: int
    widths: tuple[Fraction, ...]
    gated: bool


def _read_widths(file: Path, text: object) -> tuple[Fraction, ...]:
    """``width_choice``, the text of a list such as ``[1,7/8,3/4,5/8]``."""
    parts = [part.strip() for part in text.strip().strip("[]()").split(",")] if isinstance(text, str) else []
    if not parts or len(parts) > 1000 or not all(_WIDTH.fullmatch(part) for part in parts):
        raise BadInput(f"{file}: its width_choice is not a text such as '[1,7/8,3/4,5/8]'; it is not read")
    try:
        widths = tuple(parse_width(part) for part in parts)
    except BadInput as error:
        raise BadInput(f"{file}: its width_choice cannot be read: {error}") from None
    if len(set(widths)) < len(widths):
        raise BadInput(f"{file}: its width_choice names a width twice; it is not read")
    return widths


def _read_settings(file: Path, widths: Sequence[Fraction]) -> _Settings:
    """The settings; a plain LoRA has no widths of its own, so it is given the checkpoint's."""
    config = read_json_object(file)
    changing = [key for key in config if key in _CHANGING or (key.startswith("use_") and key != "use_moe_lora")]
    for key in changing:
        if config[key]:
            raise BadInput(
                f"{file}: has {key} = {_shown(config[key])}, which this import does not know; it is not read"
            )
    known = {"peft_type": ("LORA", None), "bias": ("none", None), "init_lora_weights": (True, False, "gaussian", None)}
    for key, values in known.items():
        if config.get(key) not in values:
            raise BadInput(
                f"{file}: has {key} = {_shown(config[key])}, which this import does not know; it is not read"
            )

    def whole(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise BadInput(f"{file}: has {key} = {_shown(value)}, where a whole number of at least 1 belongs")
        return value

    alpha: Any = config.get("lora_alpha")
    gated = config.get("use_moe_lora", False)
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or not 0 < alpha < 1e9:
        raise BadInput(f"{file}: has lora_alpha = {_shown(alpha)}, where a positive number belongs")
    if type(gated) is not bool:
        raise BadInput(f"{file}: has use_moe_lora = {_shown(gated)}, where true or false belongs")
    if not gated:
        return _Settings(whole("r"), float(alpha), 1, 1, tuple(widths), False)
    experts, top_k = whole("num_experts"), whole("top_k")
    if top_k > experts:
        raise BadInput(f"{file}: has top_k = {top_k} of {experts} experts; it is not read")
    return _Settings(whole("r"), float(alpha), experts, top_k, _read_widths(file, config.get("width_choice")), True)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _safetensors(file: Path) -> dict[str, _Stored]:
    infos, _ = read_header(file)
    opened = OpenFile(file)

    def stored(name: str) -> _Stored:
        info = infos[name]

        def values() -> Array:
            found: Array = np.empty(info.shape, NUMPY_OF[info.dtype])
            opened.read_into(found, info.offset)
            return found

        return _Stored(info.dtype, info.shape, values)

    return {name: stored(name) for name in infos}


def _torch_file(file: Path) -> dict[str, _Stored]:
    """A torch pickle, read by torch's own restricted reader: tensors and nothing else."""
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written in torch's older form, which cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises on damaged files is not documented
        reason = type(error).__name__
        raise BadInput(f"{file}: torch does not read it as tensors alone ({reason}); get the file again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file}: holds no dict of tensors; get the file again")

    def stored(name: object, tensor: object) -> _Stored:
        if (
            not isinstance(name, str)
            or not isinstance(tensor, torch.Tensor)
            or tensor.layout != torch.strided
            or tensor.is_meta
        ):
            raise BadInput(f"{file}: holds {_shown(name)}, which is no dense tensor; get the file again")
        numbers = tensor.detach()

        def values() -> Array:
            plain = numbers.contiguous()
            return (plain.view(torch.int16) if numbers.dtype == torch.bfloat16 else plain).numpy()

        return _Stored(names.get(numbers.dtype, str(numbers.dtype)), tuple(numbers.shape), values)

    return {str(name): stored(name, tensor) for name, tensor in found.items()}


class _Adapter:
    """The tensors of the adapter's file, taken by name; what is left over is unknown."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stored = _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)
        self.left = set(self.stored)

    def take(self, name: str, shape: tuple[int, ...]) -> _Stored:
        """A tensor of floats; raises BadInput where it is missing or of another shape."""
        found = self.stored.get(name)
        if found is None or found.shape != shape or found.dtype not in _FLOATS:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise BadInput(
                f"{self.file}: '{name}' should be floats {list(shape)} and is {what}; it is not of this model"
            )
        self.left.discard(name)
        return found

    def numbers(self, name: str, stored: _Stored) -> Array:
        """The values as they are stored, found to be finite."""
        found = stored.values()
        if stored.dtype == "BF16":
            found = found.view(np.uint16)
        if not np.isfinite(as_float32(found, stored.dtype)).all():
            raise BadInput(f"{self.file}: '{name}' holds numbers that are not finite; get the file again")
        return found

    def whole(self, name: str, shape: tuple[int, ...]) -> Numbers:
        """A small tensor as float32."""
        stored = self.take(name, shape)
        return as_float32(self.numbers(name, stored), stored.dtype)

    def stacked(self, names: Sequence[str], shape: tuple[int, ...]) -> TensorSource:
        """The experts' tensors [E, ...], read when they are written."""
        stored = [self.take(name, shape) for name in names]
        kinds = {each.dtype for each in stored}
        if len(kinds) > 1:
            raise BadInput(f"{self.file}: '{names[0]}' and its other experts differ in dtype; get the file again")

        def values() -> Array:
            return np.stack([self.numbers(name, each) for name, each in zip(names, stored, strict=True)])

        return made_source(kinds.pop(), (len(names), *shape), values)


def _gate(adapter: _Adapter, settings: _Settings, depth: int) -> Mapping[str, Numbers]:
    """The gate and its noise, the inputs of widths put into descending order."""
    experts, seen = settings.experts, depth + len(settings.widths)
    first = adapter.stored.get(_GATE[0])
    inner = first.shape[0] if first is not None and first.shape else 0
    shapes = ((inner, seen), (inner,), (experts, inner), (experts,), (experts, seen), (experts,))
    found = {
        ours: adapter.whole(theirs, shape)
        for ours, theirs, shape in zip((*GATE, *NOISE), (*_GATE, *_NOISE), shapes, strict=True)
    }
    order = sorted(range(len(settings.widths)), key=lambda place: -settings.widths[place])
    inputs = [*range(depth), *(depth + place for place in order)]
    for name in (GATE[0], NOISE[0]):
        found[name] = np.ascontiguousarray(found[name][:, inputs])
    return found


def _adapter_folder(folder: Path) -> Path | None:
    """Where the adapter lies; None where there is none."""
    for where in (folder / "adapter_model", folder):
        if any((where / name).is_file() for name in (CONFIG, *WEIGHTS)):
            return where
    return None


def import_adapters(
    folder: Path, sizes: Architecture, output: Path, widths: Sequence[Fraction]
) -> tuple[str | None, list[str]]:
    """Write ``smol.safetensors`` into a folder, where the released one holds an adapter.

    Args:
        folder: the released folder.
        sizes: of the base model.
        output: the folder to write into.
        widths: that the checkpoint can derive.

    Returns:
        what ``amoeba.json`` calls the adapters, and what a user should know.

    Raises:
        BadInput: the adapter is damaged, not of this model, or not one that this import knows.
    """
    where = _adapter_folder(folder)
    if where is None:
        return None, [f"{folder} holds no adapter: subnets are cut from the base model's own weights, untuned"]
    settings = _read_settings(where / CONFIG, widths)
    file = next((where / name for name in WEIGHTS if (where / name).is_file()), None)
    if file is None:
        raise BadInput(f"{where}: has {CONFIG} and neither {' nor '.join(WEIGHTS)}; get the folder again")
    adapter = _Adapter(file)
    if settings.experts > len(adapter.stored):
        raise BadInput(f"{where / CONFIG}: has num_experts = {settings.experts}, and {file.name} holds fewer tensors")
    suffixes = [f".{expert}" for expert in range(settings.experts)] if settings.gated else [""]
    tensors: dict[str, Numbers | TensorSource] = {}
    for block in range(sizes.depth):
        for matrix, (rows, columns) in matrices(sizes).items():
            shapes = (settings.rank, columns), (rows, settings.rank)
            for ours, factor, shape in zip(tensor_names(block, matrix), "AB", shapes, strict=True):
                stem = f"{PREFIX}.{block}.{matrix}.lora_{factor}"
                tensors[ours] = adapter.stacked([f"{stem}{suffix}.weight" for suffix in suffixes], shape)
    notes = []
    if settings.gated:
        tensors |= _gate(adapter, settings, sizes.depth)
        unknown = [format_width(width) for width in widths if width not in settings.widths]
        if unknown:
            notes.append(f"widths {', '.join(unknown)} were not tuned: the gate interpolates between those that were")
        unmasked = [format_width(width) for width in settings.widths if width not in widths]
        if unmasked:
            notes.append(f"widths {', '.join(unmasked)} were tuned and have no masks: they cannot be derived")
    if adapter.left:
        raise BadInput(f"{file}: holds {_shown(min(adapter.left))}, which this import does not know; it is not read")
    write_adapters(
        output, tensors, rank=settings.rank, alpha=settings.alpha, top_k=settings.top_k, widths=settings.widths
    )
    return ("smol" if settings.gated else "lora"), notes
