"""The ``torch`` flow: the dense folder as it is, run eagerly by transformers with its key/value cache.

It is the plain baseline that every other engine is measured against.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Counts,
    Ids,
    Toolchain,
    installed_versions,
    require_legal,
)
from amoeba_deploy.backends.takes import ANY_BLOCKS, Takes
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.precision import StorageFormat

if TYPE_CHECKING:
    from transformers import Cache

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "bf16": 2}


class TorchEngine:
    """A transformers model and its cache."""

    def __init__(self, folder: Path, dtype: str, threads: int | None) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._model: Any = load_torch_model(folder, dtype)
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
        with torch.inference_mode():
            output = self._model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return np.asarray(output.logits.float().numpy())

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


class TorchBackend(Backend):
    """Eager PyTorch on the CPU."""

    flow = "torch"
    takes = Takes("torch", tuple(_DTYPES), any_trait=True, varying=ANY_BLOCKS)

    def storage(self, precision: str) -> StorageFormat:
        size = _BYTES[precision]
        return StorageFormat(8 * size, 8 * size, 8 * size, size, size)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(("torch", "transformers"))
        return Toolchain(versions, missing, "pip install amoeba-deploy")

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        if subnet.rope.kind != "longrope":
            return None
        limit = int(subnet.rope.setting("original_max_position_embeddings"))
        if options.context <= limit:
            return None
        return (
            f"its rotary positions change for all tokens where a text outgrows {limit}, and keys in the cache do not; "
            f"ask for --context {limit} or less"
        )

    def weight_dtype(self, precision: str) -> str | None:
        return _DTYPES[precision]

    def tolerance(self, precision: str) -> float:
        # bf16 keeps 8 bits of mantissa; its rounding adds up over the blocks to about a percent.
        return EXACT_TOLERANCE if precision == "fp32" else 3e-2

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        if output == model.path:
            found = str(model.config.get("dtype"))
            if found != _DTYPES[precision]:
                raise BadInput(f"{output}: holds {found} weights, which the precision {precision} cannot use in place")
        else:
            copy_model(model, output, _DTYPES[precision])
        return Artefact(output, precision)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> TorchEngine:
        return TorchEngine(artefact, _DTYPES[precision], threads)


BACKEND = TorchBackend()
