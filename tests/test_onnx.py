"""The ONNX backend: every family and precision computes what transformers computes; the rest is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, random_selection, save_random_model
from onnx_engines import CONTEXT, ON_CPU, ONNX, OPTIONS, fed, lowered

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.quality_measurement import measured_precisions
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact

REFUSED = {
    "gemma2": "norm behind each sublayer",
    "gemma2-uncapped": "norm behind each sublayer",
    "gemma3": "norm behind each sublayer",
    "gemma3-capped": "norm behind each sublayer",
    "phi3": "fused query, key and value matrix",
    "phi3-partial": "fused query, key and value matrix",
    "phi3-long": "fused query, key and value matrix",
    "smollm3": "attention without rotary positions",
    "smollm3-biases": "attention without rotary positions",
    "olmo2": "norm behind each sublayer",
    "olmo2-biases": "norm behind each sublayer",
}
"""Models with something that the graph does not compute."""


@pytest.mark.parametrize("precision", ONNX.precisions())
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_compute_is_refused_by_name(
    name: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    context = model.architecture.sliding_window or CONTEXT
    with pytest.raises(BadInput, match=f"its {REFUSED[name]} is not something that onnx computes"):
        ONNX.lower(model, tmp_path, precision, options_for(ONNX, context))
    assert list(tmp_path.iterdir()) == []


def test_every_part_of_a_family_that_is_beyond_the_graph_is_enough_to_refuse(
    models: Callable[[str], ModelFolder],
) -> None:
    for name in REFUSED:
        sizes = replace(models(name).architecture, sliding_window=None)
        for trait in set(sizes.traits) - {"constant scaling"}:
            assert trait in str(ONNX.refusal(replace(sizes, traits=(trait,)), "fp32", OPTIONS))


def test_quality_is_measured_in_the_precisions_that_a_model_can_have(models: Callable[[str], ModelFolder]) -> None:
    said: list[str] = []
    assert measured_precisions(models("gemma2").architecture, said.append) == ("fp32",)
    assert [line.split(":")[0] for line in said] == [
        "no quality is measured in int8",
        "no quality is measured in int4",
    ]
    assert measured_precisions(models("granite").architecture, said.append) == ("fp32", "int8", "int4")


def test_smollm3_without_blocks_that_do_not_rotate_is_a_llama_to_the_graph(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "smollm3", no_rope_layers=[1, 1, 1, 1], mlp_bias=True)
    artefact = lowered(model, tmp_path / "engine")
    assert verify_artefact(ONNX, model, artefact, "fp32", OPTIONS).passed


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_every_family_verifies_in_every_precision(
    name: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    artefact = lowered(model, tmp_path / "engine", precision)
    result = verify_artefact(ONNX, model, artefact, precision, OPTIONS)
    assert result.passed
    assert precision == "fp32" or result.exact_logit_error is not None


def test_blocks_of_different_widths_need_no_padding(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    blocks = (
        block_plan(model.architecture, 0, [0, 2], range(0, 160, 2)),
        block_plan(model.architecture, 1, [1], range(100)),
        block_plan(model.architecture, 3, [1, 2], range(7, 40)),
    )
    plan = Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)
    for layout in ("ragged", "uniform"):
        (tmp_path / layout).mkdir()
        extract(model, plan, tmp_path / layout, layout=layout)
    ragged, padded = ModelFolder(tmp_path / "ragged"), ModelFolder(tmp_path / "uniform")
    size = (tmp_path / "ragged" / "model.safetensors").stat().st_size
    assert size < (tmp_path / "uniform" / "model.safetensors").stat().st_size
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    wanted = fed(load_backend("torch").open(padded.path, "fp32"), ids, 32)
    engine = ONNX.open(lowered(ragged, ragged.path), "fp32")
    assert np.abs(fed(engine, ids, 20) - wanted).max() < 1e-4


def test_an_fp32_engine_copies_no_weights(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama-grouped-tied").path, tmp_path / "model"))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    lowered(ModelFolder(folder), folder)
    new = set(folder.iterdir()) - set(before)
    assert {file.name for file in new} == {"model.onnx", "genai_config.json"}
    assert (folder / "model.onnx").stat().st_size < 64_000
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "junk", "truncated"])
def test_a_damaged_graph_is_one_sentence(
    content: bytes | None, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    folder = lowered(models("llama-grouped-tied"), tmp_path / "engine")
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BadInput, match=r"model\.onnx: onnxruntime .* cannot open it .*; build it again"):
        ONNX.open(folder, "fp32")


def test_a_release_that_lacks_operators_is_refused(
    models: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lowered(models("llama-grouped-tied"), tmp_path / "engine")
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(ToolchainMissing, match=r"needs onnxruntime 1\.23 or newer, and 1\.22\.1 is installed"):
        ONNX.open(folder, "fp32")


def test_weights_of_another_dtype_cannot_be_used_in_place(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("mistral")
    extract(model, random_selection(model).plan(model.architecture, Shape.parse("2x1")), tmp_path, dtype="bfloat16")
    with pytest.raises(BadInput, match="not float32"):
        ONNX.lower(ModelFolder(tmp_path), tmp_path, "fp32", OPTIONS)


@pytest.mark.parametrize(
    ("changes", "precision", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "fp32", "scaling 'dynamic'"),
        ({"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}, "int4", "hidden size 80"),
        ({}, "bf16", "CPU provider has no bfloat16.*--set provider=cuda"),
    ],
)
def test_what_it_would_get_wrong_is_refused(
    changes: dict[str, object], precision: str, reason: str, tmp_path: Path
) -> None:
    model = save_random_model(tmp_path / "model", "llama", **changes)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match=reason):
        ONNX.lower(model, tmp_path / "engine", precision, OPTIONS)
    assert not list((tmp_path / "engine").iterdir())


def test_a_missing_toolchain_says_what_to_install(
    models: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.backends.onnx._PACKAGES", ("onnx", "no-such-package"))
    with pytest.raises(ToolchainMissing, match=r"no-such-package.*pip install 'amoeba-deploy\[onnx\]'"):
        ONNX.lower(models("mistral"), tmp_path, "fp32", OPTIONS)
