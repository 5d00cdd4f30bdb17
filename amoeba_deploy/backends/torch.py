"""The ``torch`` flow: the dense folder as it is, run eagerly by transformers with its key/value cache.

It is the plain baseline that every other engine is measured against. An engine for another device than the CPU says so
in ``amoeba_engine.json`` beside its weights; ``torch_reference`` computes on the CPU whatever that file says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Counts,
    Identity,
    Ids,
    Setting,
    Toolchain,
    installed_versions,
    require_legal,
)
from amoeba_deploy.backends.takes import ANY_BLOCKS, Takes
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.files import read_json_object, write_json
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.precision import StorageFormat

if TYPE_CHECKING:
    import torch
    from transformers import Cache

ENGINE_FILE = "amoeba_engine.json"
"""Written only where an engine is not for the CPU."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
DEVICE = Setting("cpu", "where it computes; cuda is the first GPU", ("cpu", "cuda"))


class TorchEngine:
    """A transformers model and its cache."""

    def __init__(self, folder: Path, dtype: str, threads: int | None, device: str = "cpu") -> None:
        self._device, self._threads = device, threads
        self._model: Any = load_torch_model(folder, dtype).to(device)
        self._cache: Cache | None = None
        self._seen: torch.Tensor | None = None
        """Which positions of the cache hold real tokens [batch, cached]; None while all do."""

    def reset(self) -> None:
        self._cache, self._seen = None, None

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        import torch

        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
        if lengths is not None or self._seen is not None:
            inputs |= self._padded(ids, lengths)
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        with torch_threads(self._threads), torch.inference_mode():
            output = self._model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return np.asarray(output.logits.float().cpu().numpy())

    def _padded(self, ids: Ids, lengths: Counts | None) -> dict[str, Any]:
        """The mask over cache and new ids, and the position of each new id: fillings are masked, and not counted."""
        import torch

        batch, count = ids.shape
        cached = 0 if self._cache is None else self._cache.get_seq_length()
        seen = torch.ones(batch, cached, dtype=torch.int64) if self._seen is None else self._seen
        real = np.full(batch, count) if lengths is None else lengths
        new = torch.from_numpy(np.arange(count)[None] < real[:, None]).long()
        self._seen = torch.cat([seen, new], dim=1)
        positions = seen.sum(1, keepdim=True) + torch.arange(count)[None]
        return {"attention_mask": self._seen, "position_ids": positions}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads (None: as many as it does now) here, and afterwards what it used before.

    The number belongs to the whole process, whose other work may not round otherwise because of an open engine.
    """
    import torch

    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DenseFolderBackend(Backend):
    """An engine that runs the dense folder as it is, on the CPU or a GPU."""

    def storage(self, precision: str) -> StorageFormat:
        size = _BYTES[precision]
        return StorageFormat(8 * size, 8 * size, 8 * size, size, size)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(("torch", "transformers"))
        return Toolchain(versions, missing, "pip install 'amoeba-deploy[build]'")

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        if options.settings.get("device") == "cuda":
            return no_cuda()
        return _only_on_cuda(precision)

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        identity = super().identity(precision, options)
        device = options.settings.get("device", "cpu")
        return identity if device == "cpu" else replace(identity, more={"device": device})

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        if options.settings.get("device", "cpu") == "cpu" and _only_on_cuda(precision):
            return _only_on_cuda(precision)
        return longrope_refusal(subnet, options.context)

    def folder_dtype(self, precision: str, options: BuildOptions) -> str | None:
        return DTYPES[precision]

    def tolerance(self, precision: str) -> float:
        # bf16 keeps 8 bits of mantissa; its rounding adds up over the blocks to about a percent. fp16 keeps 11, and
        # rounds 8 times finer, but sums of many products lose more of it.
        return {"fp32": EXACT_TOLERANCE, "fp16": 1e-2, "bf16": 3e-2}[precision]

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        if output == model.path:
            found = str(model.config.get("dtype"))
            if found != DTYPES[precision]:
                raise BadInput(f"{output}: holds {found} weights, which the precision {precision} cannot use in place")
        else:
            copy_model(model, output, DTYPES[precision])
        if options.settings.get("device", "cpu") != "cpu":
            write_json(output / ENGINE_FILE, {"device": options.settings["device"]})
        return Artefact(output, precision)


class TorchBackend(DenseFolderBackend):
    """Eager PyTorch."""

    flow = "torch"
    takes = Takes("torch", tuple(DTYPES), any_trait=True, varying=ANY_BLOCKS)
    settings: ClassVar = {"device": DEVICE}

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> TorchEngine:
        return TorchEngine(artefact, DTYPES[precision], threads, engine_device(artefact))


def longrope_refusal(subnet: Architecture, context: int) -> str | None:
    """Why a model's rotary angles do not go with a cache of so many positions, as half a sentence, or None."""
    if subnet.rope.kind != "longrope":
        return None
    limit = int(subnet.rope.setting("original_max_position_embeddings"))
    if context <= limit:
        return None
    return (
        f"its rotary positions change for all tokens where a text outgrows {limit}, and keys in the cache do not; "
        f"ask for --context {limit} or less"
    )


def torch_reference(folder: Path) -> TorchEngine:
    """A dense folder in float32 on the CPU, for which device ever its engine is: what verification compares with."""
    return TorchEngine(folder, "float32", None)


def engine_device(artefact: Path) -> str:
    """The device that an artefact is for.

    Raises:
        BadInput: its ``amoeba_engine.json`` is damaged.
        ToolchainMissing: the device is not here.
    """
    if not (artefact / ENGINE_FILE).is_file():
        return DEVICE.default
    device = str(read_json_object(artefact / ENGINE_FILE).get("device"))
    if device not in DEVICE.choices:
        raise BadInput(f"{artefact / ENGINE_FILE}: has no device of {', '.join(DEVICE.choices)}; build it again")
    reason = no_cuda() if device == "cuda" else None
    if reason:
        raise ToolchainMissing(f"{artefact}: cannot run here: {reason}")
    return device


def no_cuda() -> str | None:
    """Why nothing can run on a GPU here, as half a sentence, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build of it with CUDA"
    return f"torch {torch.__version__} finds no GPU that it can use"


def _only_on_cuda(precision: str) -> str | None:
    return "fp16 is computed on a GPU only; add --set device=cuda, or ask for bf16" if precision == "fp16" else None


BACKEND = TorchBackend()
