"""An OpenVINO model on the CPU, with the properties that make it compute what its precision says.

OpenVINO chooses for itself what to round: on CPUs with bfloat16 it computes float32 models in bfloat16, keeps the
key/value cache in 8 bits, and rounds the inputs of compressed matrices to 8 bits in groups of 32 (measured defaults of
2026.4: ``INFERENCE_PRECISION_HINT`` bf16, ``KV_CACHE_PRECISION`` u8, ``DYNAMIC_QUANTIZATION_GROUP_SIZE`` 32). So all
three are always set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Counts, Ids
from amoeba_deploy.backends.openvino.compression import read_model
from amoeba_deploy.backends.openvino.graph import INPUTS, LOGITS
from amoeba_deploy.backends.openvino.runtime import core
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json

MODEL = "openvino_model.xml"
"""As openvino-genai looks for it; weights lie beside it in ``openvino_model.bin``."""
PROPERTIES = "openvino_properties.json"
PROPERTIES_FORMAT = "amoeba.openvino/1"
HINT, CACHE, ROUNDING = "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE"
EXACT = {HINT: "f32", CACHE: "f32", ROUNDING: "0"}
"""Everything in float32."""


def properties(precision: str) -> dict[str, str]:
    """What the engine of a precision is compiled with: arithmetic, key/value cache, and rounding of activations."""
    if precision == "bf16":
        return {HINT: "bf16", CACHE: "bf16", ROUNDING: "0"}
    return EXACT if precision == "fp32" else EXACT | {ROUNDING: "32"}


def read_properties(folder: Path, precision: str) -> dict[str, str]:
    """What an artefact's engine is compiled with.

    Raises:
        BadInput: the folder holds no artefact of this precision, or a damaged one.
    """
    if not (folder / PROPERTIES).is_file():
        raise BadInput(f"{folder}: has no {PROPERTIES}; it is no {precision} artefact of the flow 'openvino'")
    value = read_json(folder / PROPERTIES, PROPERTIES_FORMAT)
    if value.get("precision") != precision:
        raise BadInput(f"{folder}: holds an artefact in {value.get('precision')}, not in {precision}")
    found = value.get("properties")
    if not isinstance(found, dict) or set(found) != set(EXACT) or not all(isinstance(v, str) for v in found.values()):
        wanted = ", ".join(EXACT)
        raise BadInput(f"{folder / PROPERTIES}: its properties are not {wanted}, each as text; lower the subnet again")
    return found


class OpenvinoEngine:
    """A compiled model; its key/value cache is state inside it."""

    def __init__(self, folder: Path, chosen: Mapping[str, str], threads: int | None) -> None:
        model = read_model(folder / MODEL)
        if {port.get_any_name() for port in model.inputs} != set(INPUTS):
            raise BadInput(f"{folder / MODEL}: its inputs are not {', '.join(INPUTS)}; lower the subnet again")
        compiled = {
            **chosen,
            "INFERENCE_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
            # Pinned threads would stay on cores that others use, too.
            "ENABLE_CPU_PINNING": "NO",
            "CACHE_DIR": "",
        }
        try:
            self._compiled = core().compile_model(model, "CPU", compiled)
        except Exception as error:  # OpenVINO raises bare RuntimeError
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
            raise BadInput(f"{folder / MODEL}: OpenVINO does not compile it ({reason:.120})") from None
        self._request = self._compiled.create_infer_request()
        self._seen: NDArray[np.int64] | None = None

    def property(self, name: str) -> str:
        """A property that the compiled model really has, as text."""
        return str(self._compiled.get_property(name))

    def reset(self) -> None:
        self._request.reset_state()
        self._seen = None

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        batch, count = ids.shape
        past = np.zeros((batch, 0), np.int64) if self._seen is None else self._seen
        real = np.full(batch, count) if lengths is None else np.asarray(lengths)
        new = (np.arange(count)[None] < real[:, None]).astype(np.int64)
        self._seen = np.concatenate([past, new], axis=1)
        # Fillings stay in the cache, masked for good, and are not counted as positions.
        positions = past.sum(1, keepdims=True) + np.arange(count)[None]
        values = (np.ascontiguousarray(ids), self._seen, positions, np.arange(batch, dtype=np.int32))
        self._request.infer(dict(zip(INPUTS, values, strict=True)))
        return np.array(self._request.get_tensor(LOGITS).data, dtype=np.float32)
