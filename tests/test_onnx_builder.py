"""The ONNX backend with onnxruntime-genai's model builder: what it takes verifies, what it gets wrong is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS, save_random_model
from onnx_engines import ONNX, fed_in_rows, genai_greedy, lowered, with_tokenizer

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact

OGA = options_for(ONNX, 128, settings={"emitter": "oga"})
BUILT: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 128},
    "gemma2-uncapped": {"sliding_window": 128},
    "phi3": {"original_max_position_embeddings": 128},
    "phi3-partial": {
        "sliding_window": None,
        "original_max_position_embeddings": 128,
        "head_dim": 32,
        "num_attention_heads": 3,
    },
    "llama-3-rope": {},
    "qwen3": {},
}
"""Models that the builder takes, and what differs from those of the other tests."""


@pytest.fixture(scope="module")
def built_from(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    root, made = tmp_path_factory.mktemp("built"), {}

    def get(name: str) -> ModelFolder:
        if name not in made:
            family, settings = MODELS[name]
            made[name] = save_random_model(root / name, family, **(settings | BUILT[name]))
            with_tokenizer(made[name].path)
        return made[name]

    return get


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", BUILT)
def test_what_the_builder_takes_verifies(
    name: str, precision: str, built_from: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = built_from(name)
    artefact = lowered(model, tmp_path / "engine", precision, OGA)
    result = verify_artefact(ONNX, model, artefact, precision, OGA)
    assert result.passed
    assert result.held_to_logits is (precision == "fp32")
    names = {file.name for file in artefact.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} == names - {
        "tokenizer_config.json",
        "generation_config.json",
    }


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_its_engine_takes_rows_of_different_lengths(
    name: str, built_from: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = built_from(name)
    rng = np.random.default_rng(5)
    pieces = [(rng.integers(0, 128, (3, max(n))), n) for n in ([20, 9, 1], [1] * 3, [2, 7, 3], [1] * 3)]
    wanted = fed_in_rows(load_backend("torch").open(model.path, "fp32"), pieces)
    found = fed_in_rows(ONNX.open(lowered(model, tmp_path / "engine", "fp32", OGA), "fp32"), pieces)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() < 1e-4


def test_its_folder_runs_in_onnxruntime_genai(built_from: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = built_from("phi3")
    folder, prompt = lowered(model, tmp_path / "engine", "fp32", OGA), [5, 40, 17, 99]
    reference, ids = load_backend("torch").open(model.path, "fp32"), np.array([[5, 40, 17, 99]])
    wanted = []
    for _ in range(16):
        wanted.append(int(reference.feed(ids)[0, -1].argmax()))
        ids = np.array([wanted[-1:]])
    assert genai_greedy(folder, prompt, 16) == wanted


def test_the_builder_gives_the_same_bytes_again(built_from: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    for precision in ("fp32", "int4"):
        one, other = (lowered(built_from("gemma2"), tmp_path / f"{precision}-{i}", precision, OGA) for i in range(2))
        for file in one.iterdir():
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_the_rounded_scale_of_a_gemmas_embeddings_would_be_caught(
    built_from: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.backends.onnx.builder._mend_embedding_scale", lambda *_: None)
    model = built_from("gemma2-uncapped")
    artefact = lowered(model, tmp_path / "engine", "fp32", OGA)
    with pytest.raises(VerificationFailed, match="its logits differ"):
        verify_artefact(ONNX, model, artefact, "fp32", OGA)


@pytest.mark.parametrize(("name", "kv_heads"), [("phi3", 3), ("gemma2", 2)])
def test_a_subnet_of_a_family_that_only_the_builder_takes(
    name: str, kv_heads: int, built_from: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = built_from(name)
    blocks = tuple(block_plan(model.architecture, index, range(kv_heads), range(96)) for index in (0, 2, 3))
    extract(model, Plan(Shape.parse("3x0.7"), blocks), tmp_path)
    subnet = ModelFolder(tmp_path)
    artefact = lowered(subnet, tmp_path, "fp32", OGA)
    assert verify_artefact(ONNX, subnet, artefact, "fp32", OGA).passed
    assert len(onnx.load(artefact / "model.onnx", load_external_data=False).graph.output) == 1 + 2 * 3


def test_a_phi3_without_some_heads_is_refused(built_from: Callable[[str], ModelFolder]) -> None:
    sizes = built_from("phi3").architecture
    assert ONNX.refusal(sizes, "fp32", OGA) is None
    assert "do not make up the hidden size 96" in str(ONNX.refusal(sizes.subnet(4, 2, 160), "fp32", OGA))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma2", {}, "sliding window of 16 positions.*wrong without a word"),
        ("mistral", {"sliding_window": 64}, "sliding window of 64 positions.*wrong without a word"),
        ("gemma3", {"sliding_window": 128}, "does not take a gemma3_text: it reads one rotary base"),
        ("olmo2", {}, "does not take a olmo2: it does not know OLMo 2"),
        ("smollm3", {}, "does not take a smollm3: it stops at blocks without rotary positions"),
        ("phi3-partial", {"sliding_window": None}, "turns 8 channels of a head"),
        ("phi3-long", {}, "scaling 'longrope'"),
        ("llama-biases", {}, "biases on o_proj"),
        ("llama-small-heads", {}, "head size 8 is no multiple of 16"),
    ],
)
def test_what_the_builder_gets_wrong_is_refused_by_name(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    family, settings = MODELS[name]
    model = save_random_model(tmp_path / "model", family, **(settings | changes))
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match=reason):
        ONNX.lower(model, tmp_path / "engine", "fp32", OGA)
    assert not list((tmp_path / "engine").iterdir())


def test_a_model_without_a_tokenizer_or_that_the_builder_fails_on_leaves_nothing(tmp_path: Path) -> None:
    family, settings = MODELS["phi3"]
    model = save_random_model(tmp_path / "model", family, **settings)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match="has no tokenizer"):
        ONNX.lower(model, tmp_path / "engine", "fp32", OGA)
    with_tokenizer(model.path)
    with pytest.raises(BadInput, match="model builder fails on it"):
        # Its context differs from the one it was trained for, so the builder wants two lists of rotary factors.
        ONNX.lower(ModelFolder(model.path), tmp_path / "engine", "fp32", OGA)
    assert not list((tmp_path / "engine").iterdir())


def test_a_refusal_names_the_builder_where_it_takes_the_model(built_from: Callable[[str], ModelFolder]) -> None:
    own = options_for(ONNX, 128)
    assert str(ONNX.refusal(built_from("phi3").architecture, "fp32", own)).endswith(
        "--set emitter=oga takes it, by onnxruntime-genai's model builder"
    )
    assert "emitter" not in str(ONNX.refusal(built_from("phi3").architecture, "fp16", own))
