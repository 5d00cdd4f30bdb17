"""FP8 weights without calibration, for form A: a Hugging Face folder whose matrices are 8-bit floats.

Each matrix is stored in float8 E4M3 with one scale a tensor, its largest magnitude / 448. No scale of activations is
written: TensorRT-LLM's PyTorch backend then finds them while it runs, for each product
(``_torch/modules/linear.py``, ``FP8QDQLinearMethod``), so no data is needed and none is invented. It multiplies
queries, keys and values as one matrix, gate and up as another, and rescales parts of one matrix to a common scale; they
get a common scale here, so that this rounds nothing a second time. Embedding, head, norms and biases stay in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.extraction.cutting import cut_source
from amoeba_deploy.extraction.folder import copy_other_files
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import Part, TensorSource, array_source, as_float32, write_tensors

LARGEST = 448.0
_NUMBERS = 1 << 18
"""Numbers that are encoded at once."""
_TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def e4m3(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numbers of at most 448 in float8 E4M3 (4 bits of exponent, 3 of fraction), rounded to nearest even."""
    size = np.minimum(np.abs(numbers), np.float32(LARGEST))
    # Below 2^-6 the steps stay 2^-9: subnormal numbers.
    exponent = np.where(size < 2.0**-6, -6, np.frexp(size)[1] - 1)
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)  # 8 to 16 of them, fewer below 2^-6
    # 16 steps are 8 of the next exponent, which the sum carries by itself.
    code = ((exponent + 6) << 3) + steps
    return np.asarray(code | np.where(np.signbit(numbers), 0x80, 0), np.uint8)


def write_fp8(model: ModelFolder, output: Path) -> None:
    """Write the folder of a dense subnet with FP8 matrices: config, tokenizer, weights and ``hf_quant_config.json``."""
    copy_other_files(model, output)
    write_json(output / "config.json", model.config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    write_json(
        output / "hf_quant_config.json",
        {
            "producer": {"name": "amoeba-deploy"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        },
    )
    sources: dict[str, TensorSource] = {}
    for index in range(model.architecture.depth):
        sources |= _block(model, index)
    others = {name: _plain(model, name) for name in model.family.other_tensors(model.architecture)}
    write_tensors(output / "model.safetensors", sources | others, {"format": "pt"})


def _block(model: ModelFolder, index: int) -> dict[str, TensorSource]:
    prefix, names = f"model.layers.{index}.", list(model.block_shapes(index))
    found = {prefix + name: _plain(model, prefix + name) for name in names}
    for group in _TOGETHER:
        largest = max(_largest(model, f"{prefix}{name}.weight") for name in group)
        scale = np.float32(largest / LARGEST) if largest else np.float32(1)
        for name in group:
            found[f"{prefix}{name}.weight"] = _encoded(model, f"{prefix}{name}.weight", scale)
            found[f"{prefix}{name}.weight_scale"] = array_source(np.array([scale], np.float32), "F32")
    return found


def _plain(model: ModelFolder, name: str) -> TensorSource:
    return cut_source(model.tensors, name, (None,) * len(model.tensors.info(name).shape), "BF16")


def _rows(model: ModelFolder, name: str) -> Iterator[NDArray[np.float32]]:
    """A matrix in float32, some rows at a time."""
    whole, info = model.tensors.raw(name), model.tensors.info(name)
    at_once = max(_NUMBERS // info.shape[1], 1)
    for begin in range(0, info.shape[0], at_once):
        yield as_float32(whole[begin : begin + at_once], info.dtype)


def _largest(model: ModelFolder, name: str) -> float:
    return max(float(np.abs(rows).max()) for rows in _rows(model, name))


def _encoded(model: ModelFolder, name: str, scale: np.float32) -> TensorSource:
    def parts() -> Iterator[Part]:
        for rows in _rows(model, name):
            yield e4m3(rows / scale)

    return TensorSource("F8_E4M3", model.tensors.info(name).shape, parts)
