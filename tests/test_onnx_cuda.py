"""What the ONNX backend writes for CUDA: its graphs are run on the CPU, whose kernels know fp16 too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import save_random_model
from onnx import TensorProto
from onnx_engines import CONTEXT, ONNX, fed, fed_in_rows, lowered

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.backends.onnx.engine import OnnxEngine
from amoeba_deploy.backends.onnx.genai import BuiltFor
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.model_folder import ModelFolder

CUDA = options_for(ONNX, CONTEXT, settings={"provider": "cuda"})
NO_CUDA = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def on_cpu(folder: Path, head_size: int = 16) -> OnnxEngine:
    return OnnxEngine(folder, BuiltFor("cpu", CONTEXT, head_size), 1)


@pytest.mark.parametrize(
    ("precision", "rounded"), [("fp32", 1e-5), ("fp16", 1e-2), ("bf16", 0.0), ("int8", 2e-2), ("int4", 2e-2)]
)
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-small-heads", "qwen3", "granite-biases"])
def test_the_graph_for_cuda_computes_what_transformers_computes(
    name: str, precision: str, rounded: float, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    folder = lowered(model, tmp_path / "engine", precision, CUDA)
    (tmp_path / "reference").mkdir()
    reference = ONNX.reference_folder(model, folder, precision, tmp_path / "reference")
    assert reference is not None
    rng = np.random.default_rng(5)
    pieces = [(rng.integers(0, 128, (3, max(n))), n) for n in ([20, 9, 1], [1] * 3, [2, 7, 3], [1] * 3)]
    wanted = fed_in_rows(load_backend("torch").open(reference, "fp32"), pieces)
    scale = max(np.abs(row).max() for row in wanted)
    if precision != "bf16":
        found = fed_in_rows(on_cpu(folder, model.architecture.head_dim), pieces)
        for one, other in zip(found, wanted, strict=True):
            assert np.abs(one - other).max() < rounded * scale
    if precision != "fp32":
        ids = rng.integers(0, 128, (1, 30))
        exact, plain = ONNX.open_exact(folder, precision), load_backend("torch").open(reference, "fp32")
        assert exact is not None
        assert np.abs(fed(exact, ids, 20) - fed(plain, ids, 30)).max() < 1e-5 * scale


@pytest.mark.parametrize(
    ("precision", "element", "fused"),
    [
        ("fp32", TensorProto.FLOAT, False),
        ("fp16", TensorProto.FLOAT16, True),
        ("bf16", TensorProto.BFLOAT16, True),
        ("int4", TensorProto.FLOAT16, True),
    ],
)
def test_the_graph_for_cuda_has_the_types_that_its_kernels_know(
    precision: str, element: int, fused: bool, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    folder = lowered(models("llama-grouped-tied"), tmp_path / "engine", precision, CUDA)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    # The CUDA kernel of the fused operator knows 16-bit numbers alone, and takes no bias.
    assert ("GroupQueryAttention" in kinds) is fused
    assert all(len(node.input) == 9 for node in graph.node if node.op_type == "GroupQueryAttention")
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["logits"] == TensorProto.FLOAT
    assert {types[name] for name in types if name.startswith(("past", "present"))} == {element}
    if precision == "bf16":
        # Types fit together, and then the CPU has no kernel.
        with pytest.raises(BadInput, match="Could not find an implementation"):
            on_cpu(folder)


def test_a_window_on_cuda_is_written_out(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "mistral", sliding_window=16)
    folder = lowered(model, tmp_path / "engine", "fp16", CUDA)
    kinds = {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    assert "GroupQueryAttention" not in kinds
    ids = np.random.default_rng(3).integers(0, 128, (1, 60))
    wanted = fed(load_backend("torch").open(model.path, "fp32"), ids, 60)
    assert np.abs(fed(on_cpu(folder), ids, 20) - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_weights_are_used_in_place(precision: str, models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    dtype = str(ONNX.folder_dtype(precision, CUDA))
    copy_model(models("qwen2"), tmp_path, dtype)
    before = {file.name for file in tmp_path.iterdir()}
    lowered(ModelFolder(tmp_path), tmp_path, precision, CUDA)
    assert {file.name for file in tmp_path.iterdir()} - before == {"model.onnx", "genai_config.json"}
    assert (tmp_path / "model.onnx").stat().st_size < 64_000


def test_onnxruntime_genai_is_told_of_the_provider(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    folder = lowered(models("mistral"), tmp_path / "engine", "fp16", CUDA)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    identity = ONNX.identity("fp16", CUDA).to_json()
    assert (identity["bound"], identity["chip"], identity["more"]) == ([], None, {"provider": "cuda"})
    assert "more" not in ONNX.identity("fp16", options_for(ONNX, CONTEXT)).to_json()


@pytest.mark.skipif(not NO_CUDA, reason="onnxruntime has CUDA here")
def test_without_cuda_it_says_what_to_install(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    assert "pip install onnxruntime-gpu" in str(ONNX.cannot_run("fp16", CUDA))
    folder = lowered(models("mistral"), tmp_path / "engine", "fp16", CUDA)
    with pytest.raises(ToolchainMissing, match=r"built for cuda.*pip install onnxruntime-gpu"):
        ONNX.open(folder, "fp16")


def test_a_provider_that_is_none_is_refused(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no provider=tpu; it takes cpu, cuda"):
        options_for(ONNX, CONTEXT, settings={"provider": "tpu"})
    folder = lowered(models("mistral"), tmp_path / "engine")
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"tpu": {}}]
    file.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="was built for 'tpu'"):
        ONNX.open(folder, "fp32")
