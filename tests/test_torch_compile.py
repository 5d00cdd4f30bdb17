"""The ``torch-compile`` flow passes the suite, compiles once, and ``torch`` knows of other devices than the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, options_for
from amoeba_deploy.backends.conformance import Conformance, fed, random_llama
from amoeba_deploy.backends.torch import ENGINE_FILE, torch_reference
from amoeba_deploy.backends.torch_compile import CompiledEngine, no_compiler
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.verification import verify_artefact

Models = Callable[[str], ModelFolder]
BACKEND = load_backend("torch-compile")
needs_compiler = pytest.mark.skipif(no_compiler() is not None, reason=str(no_compiler()))


@pytest.fixture(autouse=True, scope="module")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same graphs are compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("torchinductor")))
        yield


class TestTorchCompile(Conformance):
    flow = "torch-compile"
    run_precisions = ("fp32",)
    architecture_changes = {"num_hidden_layers": 1}  # noqa: RUF012

    def precisions(self) -> Any:
        torch.compiler.reset()
        return super().precisions()


def graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A Llama of one block with grouped heads."""
    return random_llama(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1, num_key_value_heads=1)


@pytest.fixture(scope="module")
def engine(small: ModelFolder) -> CompiledEngine:
    """Opened for three rows of 80 positions: two and a half spans of the cache."""
    if no_compiler():
        pytest.skip(str(no_compiler()))
    torch.compiler.reset()
    before = graphs()
    engine = CompiledEngine(small.path, "float32", 1, "cpu", 80, 3)
    assert torch.get_num_threads() == 1
    assert graphs() == before + 1
    return engine


def test_a_step_is_compiled_when_the_engine_is_opened_and_never_again(
    small: ModelFolder, engine: CompiledEngine
) -> None:
    made = graphs()
    ids = np.random.default_rng(0).integers(0, 128, (3, 80))
    wanted = fed(torch_reference(small.path), ids, 80)
    for first in (10, 80, 1):
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert graphs() == made


def test_rows_of_different_lengths_and_fewer_rows_use_the_same_graph(
    small: ModelFolder, engine: CompiledEngine
) -> None:
    made, reference = graphs(), torch_reference(small.path)
    ids, lengths = np.random.default_rng(0).integers(0, 128, (3, 9)), np.array([9, 4, 6])
    following = np.random.default_rng(1).integers(0, 128, (3, 2))
    engine.reset()
    found = [engine.feed(ids, lengths), *(engine.feed(following[:, i : i + 1]) for i in range(2))]
    wanted = [reference.feed(ids, lengths), *(reference.feed(following[:, i : i + 1]) for i in range(2))]
    limit = 1e-5 * np.abs(wanted[0]).max()
    for row, length in enumerate(lengths):
        assert np.abs(found[0][row, :length] - wanted[0][row, :length]).max() < limit
    for step in (1, 2):
        assert np.abs(found[step] - wanted[step]).max() < limit
    assert np.abs(fed(engine, ids[:2], 5) - fed(reference, ids[:2], 5)).max() < limit
    assert graphs() == made


@needs_compiler
@torch._dynamo.config.patch(recompile_limit=2)
def test_a_process_may_open_as_many_engines_as_it_likes(small: ModelFolder) -> None:
    ids = np.arange(6)[None]
    wanted = fed(torch_reference(small.path), ids, 1)
    for batch in (1, 2, 3, 4):
        opened = CompiledEngine(small.path, "float32", 1, "cpu", 16, batch)
        assert np.abs(fed(opened, ids, 1) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_more_positions_or_rows_than_it_was_opened_for_are_refused(engine: CompiledEngine) -> None:
    engine.reset()
    engine.feed(np.zeros((1, 79), np.int64))
    engine.feed(np.zeros((1, 1), np.int64))
    with pytest.raises(BadInput, match="holds 80 positions, and 81 were fed"):
        engine.feed(np.zeros((1, 1), np.int64))
    engine.reset()
    with pytest.raises(BadInput, match="opened for 3 sequences at once, and 4 were fed"):
        engine.feed(np.zeros((4, 1), np.int64))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS])
def test_every_family_compiles_to_what_transformers_computes(name: str, models: Models) -> None:
    torch.compiler.reset()
    model = models(name)
    options = options_for(BACKEND, 22 if name == "phi3-long" else 64)
    assert verify_artefact(BACKEND, model, model.path, "fp32", options).passed


@needs_compiler
@pytest.mark.slow
def test_bfloat16_computes_what_transformers_computes(models: Models, tmp_path: Path) -> None:
    torch.compiler.reset()
    options = options_for(BACKEND, 64)
    BACKEND.lower(models("llama-grouped-tied"), tmp_path, "bf16", options)
    assert verify_artefact(BACKEND, ModelFolder(tmp_path), tmp_path, "bf16", options).passed


@needs_compiler
def test_compiled_code_is_kept_in_amoebas_cache_folder(
    small: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    BACKEND.open(small.path, "fp32", context=8)
    assert any((tmp_path / "cache" / "torchinductor").rglob("*.cpp"))


def test_a_missing_compiler_is_said_before_anything_is_loaded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    reason = "it needs the C\\+\\+ compiler no-such-compiler, which is not on the path"
    assert "no-such-compiler" in str(BACKEND.cannot_run("fp32", options_for(BACKEND, 64)))
    with pytest.raises(ToolchainMissing, match=reason):
        BACKEND.open(models("llama-grouped-tied").path, "fp32", context=8)


@needs_compiler
def test_a_compiler_that_compiles_nothing_is_one_sentence(small: ModelFolder, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import AmoebaError
try:
    load_backend("torch-compile").open(Path(sys.argv[1]), "fp32", context=8)
except AmoebaError as error:
    print(error)
"""
    # In a process of its own: TorchInductor finds its compiler once.
    where = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, small.path], env=where, capture_output=True, text=True)
    assert done.stdout.startswith("the C++ compiler did not compile the model's graph: "), done.stderr
    assert done.stdout.count("\n") == 1


def test_an_empty_name_of_a_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = no_compiler()
    monkeypatch.setenv("CXX", "")
    assert no_compiler() == usual


@pytest.mark.parametrize("flow", ["torch", "torch-compile"])
def test_a_gpu_is_recorded_in_the_artefact_and_the_cpu_is_not(flow: str, models: Models, tmp_path: Path) -> None:
    backend, model = load_backend(flow), models("llama-grouped-tied")
    for device, precision in (("cpu", "bf16"), ("cuda", "fp16")):
        folder = tmp_path / device
        folder.mkdir()
        options = options_for(backend, 64, settings={"device": device})
        backend.lower(model, folder, precision, options)
        assert (folder / ENGINE_FILE).is_file() == (device == "cuda")
        assert backend.identity(precision, options).to_json().get("more") == (
            {"device": "cuda"} if device == "cuda" else None
        )
    assert json.loads((tmp_path / "cuda" / ENGINE_FILE).read_text()) == {"device": "cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flow", ["torch", "torch-compile"])
def test_without_a_gpu_an_engine_for_one_says_why_it_does_not_run(flow: str, models: Models, tmp_path: Path) -> None:
    backend, options = load_backend(flow), BuildOptions(64, settings={"device": "cuda"})
    backend.lower(models("llama-grouped-tied"), tmp_path, "fp32", options)
    assert "CUDA" in str(backend.cannot_run("fp32", options)) or "GPU" in str(backend.cannot_run("fp32", options))
    with pytest.raises(ToolchainMissing, match="cannot run here: torch"):
        backend.open(tmp_path, "fp32", context=64)


def test_the_reference_stays_on_the_cpu_in_float32_where_an_engine_is_for_a_gpu(models: Models, tmp_path: Path) -> None:
    backend, model = load_backend("torch"), models("llama-grouped-tied")
    backend.lower(model, tmp_path, "fp32", BuildOptions(64, settings={"device": "cuda"}))
    ids = np.arange(9)[None]
    assert np.array_equal(torch_reference(tmp_path).feed(ids), torch_reference(model.path).feed(ids))


def test_float16_on_the_cpu_is_refused_with_the_way_out(models: Models, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="add --set device=cuda, or ask for bf16"):
        load_backend("torch").lower(models("llama-grouped-tied"), tmp_path, "fp16", BuildOptions(64))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_file_of_an_unknown_device_is_refused(models: Models, tmp_path: Path) -> None:
    backend = load_backend("torch")
    backend.lower(models("llama-grouped-tied"), tmp_path, "fp32", BuildOptions(64))
    (tmp_path / ENGINE_FILE).write_text('{"device": "abacus"}')
    with pytest.raises(BadInput, match="has no device of cpu, cuda"):
        backend.open(tmp_path, "fp32")
