"""How the ONNX backend stores weights: quantised blocks, nothing twice, nothing left in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_engines import ONNX, lowered

from amoeba_deploy.block_quantisation import block_scales, dequantise, quantise
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import TensorInfo, read_header


def held(artefact: Path) -> dict[str, TensorInfo]:
    """All tensors in the files of an artefact."""
    return {name: info for file in artefact.glob("*.safetensors") for name, info in read_header(file)[0].items()}


@pytest.mark.parametrize(("precision", "bits"), [("int8", 9.0), ("int4", 5.0)])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-grouped-untied", "qwen2"])
def test_no_matrix_stays_in_float(
    name: str, precision: str, bits: float, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    artefact = lowered(model, tmp_path / "engine", precision)
    graph = onnx.load(artefact / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"MatMul", "FusedMatMul", "Gemm"} & set(kinds)
    assert kinds.count("GatherBlockQuantized") == 1
    assert kinds.count("MatMulNBits") == 4 * model.architecture.depth + 1
    stored = sum(info.length for info in held(artefact).values())
    promised = ONNX.storage(precision).weight_bytes(model.architecture)
    assert stored == promised
    tables = model.architecture.embedding_parameters * (1 if model.architecture.tied else 2)
    matrices = model.architecture.depth * model.architecture.block_matrix_parameters + tables
    assert stored < matrices * bits / 8 * 1.05


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("fp16", 16), ("int8", 9), ("int4", 5)])
def test_a_tied_head_is_stored_once(
    precision: str, bits: int, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    sizes = models("llama-grouped-tied").architecture
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", precision)
    infos = held(artefact)
    assert sum("embed_tokens" in name for name in infos) == (2 if precision in ("int8", "int4") else 1)
    assert not any("lm_head" in name for name in infos)
    other = 16 if precision == "fp16" else 32
    matrices = sizes.depth * sizes.block_matrix_parameters + sizes.embedding_parameters
    expected = matrices * bits // 8 + (sizes.parameters - matrices) * other // 8
    assert sum(info.length for info in infos.values()) == expected
    # Nothing else in the folder holds weights.
    total = sum(file.stat().st_size for file in artefact.iterdir())
    assert total - sum(file.stat().st_size for file in artefact.glob("*.safetensors")) < 80_000
    untied = lowered(models("llama-grouped-untied"), tmp_path / "untied", precision)
    more = sum(info.length for info in held(untied).values()) - expected
    assert more == sizes.embedding_parameters * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [75, 96, 2048])
def test_a_matrix_in_parts_is_quantised_as_a_whole(bits: int, columns: int) -> None:
    """More rows than are quantised at once, of which some are zero."""
    matrix = np.random.default_rng(0).standard_normal((1500, columns)).astype(np.float32)
    matrix[700:720] = 0
    values, scales = quantise(matrix, bits)
    for begin in (0, 333, 700, 1499):
        part = quantise(matrix[begin : begin + 1], bits)
        assert (part[0] == values[begin]).all()
        assert (part[1] == scales[begin]).all()
    assert (block_scales(matrix, bits) == scales).all()
    assert values.shape == (1500, -(-columns // 32), 4 * bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_is_undone_within_half_a_step(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 75)).astype(np.float32)
    values, scales = quantise(matrix, bits)
    back = dequantise(values, scales, bits, 75)
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :75]
    # One value of a 4-bit block may be clipped: the range is -8..7, so a positive maximum next to a larger negative
    # one loses up to a whole step.
    assert (np.abs(back - matrix) <= steps * (1.0 if bits == 4 else 0.5) + 1e-6).all()
    assert (quantise(np.zeros((2, 64), np.float32), bits)[1] == 0).all()
