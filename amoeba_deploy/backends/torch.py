"""The ``torch`` flow: the dense folder as it is, run eagerly by transformers with its key/value cache.

It is the plain baseline that every other engine is measured against.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import EXACT_TOLERANCE, Ids, Toolchain, installed_versions
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.extraction.ragged import Layout
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

    def reset(self) -> None:
        self._cache = None

    def feed(self, ids: Ids) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(ids), past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return np.asarray(output.logits.float().numpy())


class TorchBackend:
    """Eager PyTorch on the CPU."""

    flow = "torch"

    def precisions(self) -> tuple[str, ...]:
        return tuple(_DTYPES)

    def layouts(self) -> tuple[Layout, ...]:
        return ("uniform", "ragged")

    def storage(self, precision: str) -> StorageFormat:
        size = _BYTES[precision]
        return StorageFormat(8 * size, 8 * size, 8 * size, size, size)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(("torch", "transformers"))
        return Toolchain(versions, missing, "pip install amoeba-deploy")

    def refusal(self, subnet: Architecture, precision: str, context: int) -> str | None:
        if subnet.rope.kind != "longrope":
            return None
        limit = int(subnet.rope.setting("original_max_position_embeddings"))
        if context <= limit:
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

    def lower(self, model: ModelFolder, output: Path, precision: str, context: int) -> None:
        if output == model.path:
            found = str(model.config.get("dtype"))
            if found != _DTYPES[precision]:
                raise BadInput(f"{output}: holds {found} weights, which the precision {precision} cannot use in place")
            return
        copy_model(model, output, _DTYPES[precision])

    def open(self, artefact: Path, precision: str, threads: int | None = None) -> TorchEngine:
        return TorchEngine(artefact, _DTYPES[precision], threads)

    def open_exact(self, artefact: Path, precision: str) -> TorchEngine | None:
        return None

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        return model.path


BACKEND = TorchBackend()
