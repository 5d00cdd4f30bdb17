"""Random weights of a config: the folder is what extraction writes of a real model, and engines take it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, MODELS

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model, resolve_config
from amoeba_deploy.plan import Steps
from amoeba_deploy.profiles.random_model import DEVIATION, RandomModel, first_units, random_subnet
from amoeba_deploy.profiles.source import CheckpointSource, ConfigSource
from amoeba_deploy.shape import Shape

HALF = Shape(2, Fraction(2, 3))


def made(folder: Path) -> Path:
    """A new folder."""
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_what_extraction_writes_of_the_real_model(
    models: Callable[[str], ModelFolder], tmp_path: Path, name: str
) -> None:
    model = models(name)
    steps = Steps.of(model.architecture)
    shape = HALF if len(steps.groups) > 1 else Shape(2, Fraction(1))
    extract(model, first_units(model.architecture, shape, steps), made(tmp_path / "real"))
    random = random_subnet(model.path, shape, steps, made(tmp_path / "random"))
    real = ModelFolder(tmp_path / "real")
    assert random.config == real.config
    assert list(random.tensors.infos) == list(real.tensors.infos)
    for tensor, info in real.tensors.infos.items():
        found = random.tensors.info(tensor)
        assert (found.shape, found.dtype, found.offset) == (info.shape, info.dtype, info.offset)
    assert {file.name for file in random.path.iterdir()} == {file.name for file in real.path.iterdir()}


def test_weights_are_normal_norms_are_ones_and_logits_are_finite(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    import torch

    model = models("qwen3")
    found = random_subnet(model.path, HALF, Steps.of(model.architecture), made(tmp_path / "out"))
    for name in found.tensors.infos:
        values = found.tensors.float32(name)
        if "norm" in name:
            assert (values == 1).all()
        else:
            # Of n normal values the deviation is known to 1 / sqrt(2 n); five of these errors.
            assert values.std() == pytest.approx(DEVIATION, rel=5 / np.sqrt(2 * values.size))
            assert abs(values.mean()) < 5 * DEVIATION / np.sqrt(values.size)
    rows = found.tensors.float32("model.layers.0.mlp.up_proj.weight")
    assert len(np.unique(rows, axis=0)) == len(rows)
    with torch.inference_mode():
        assert torch.isfinite(load_torch_model(found.path)(torch.arange(12)[None]).logits).all()


def test_a_seed_gives_the_same_bytes_and_another_seed_others(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    config, steps = models("mistral").path / "config.json", Steps.of(models("mistral").architecture)
    bytes_of = [
        (random_subnet(config, HALF, steps, made(tmp_path / str(i)), seed).path / "model.safetensors").read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_a_model_larger_than_the_memory_that_is_used_is_written(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 65536, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = """
import sys
from fractions import Fraction
from pathlib import Path
from amoeba_deploy.plan import Steps
from amoeba_deploy.profiles.measure import own_peak
from amoeba_deploy.profiles.random_model import RandomModel, random_subnet
from amoeba_deploy.shape import Shape
root = Path(sys.argv[1])
steps = Steps.of(RandomModel(root).architecture)
random_subnet(root, Shape(1, Fraction(1, 4)), steps, root / "small")
before = own_peak()
random_subnet(root, Shape(4, Fraction(7, 8)), steps, root / "out")
print(own_peak() - before, (root / "out/model.safetensors").stat().st_size)
"""
    for name in ("small", "out"):
        made(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 400e6
    assert grown < 0.1 * size


@pytest.mark.parametrize(
    ("flow", "precision"), [("torch", "fp32"), ("onnx", "int4"), ("gguf", "q8_0"), ("openvino", "int8")]
)
def test_engines_are_built_from_a_config_alone_without_a_tokenizer(
    demo: Checkpoint, tmp_path: Path, flow: str, precision: str
) -> None:
    source, backend = ConfigSource.of(demo.model.path / "config.json"), load_backend(flow)
    output, work = made(tmp_path / "out"), made(tmp_path / "work")
    shape = Shape(2, Fraction(1, 2))
    source.lower(shape, backend, precision, options_for(backend, 64), output, work)
    logits = backend.open(output, precision, context=64).feed(np.arange(8)[None])
    assert logits.shape == (1, 8, demo.architecture.vocabulary)
    assert np.isfinite(logits).all()
    assert not (output / "tokenizer.json").exists()


def test_a_config_offers_what_a_checkpoint_of_its_model_does(demo: Checkpoint) -> None:
    config, checkpoint = ConfigSource.of(demo.model.path), CheckpointSource(demo)
    assert config.architecture == checkpoint.architecture
    for flow, precision in (("onnx", "fp32"), ("gguf", "q4_k_m"), ("tensorrt-llm", "fp16")):
        backend = load_backend(flow)
        steps = config.steps(backend, precision)
        assert steps == checkpoint.steps(backend, precision)
        shapes = config.shapes(steps)
        assert {shape.depth for shape in shapes} == set(range(6, 13))
        assert min(shape.width for shape in shapes) >= Fraction(1, 2)
        for shape in shapes[:3]:
            assert config.sized(shape, steps) == checkpoint.sized(shape, steps)


def test_a_checkpoint_of_half_blocks_is_no_source(demo: Checkpoint) -> None:
    halves = replace(demo.selection.depths[6], without_attention=demo.selection.depths[6].kept[1:2])
    selection = replace(demo.selection, depths={**demo.selection.depths, 6: halves})
    with pytest.raises(BadInput, match="attention and feed-forward apart"):
        CheckpointSource(replace(demo, selection=selection))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bloom"}, "families known"),
        ({"dtype": "float8_e4m3fn"}, "none of float32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_measured_is_refused(
    models: Callable[[str], ModelFolder], tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    config = models("llama-3-rope").config | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=said):
        RandomModel(tmp_path)


def test_a_shape_deeper_than_the_model_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(BadInput, match="the model has 12"):
        ConfigSource.of(demo.model.path).check(Shape(13, Fraction(1)))


def test_a_config_is_a_file_a_folder_or_a_hub_id(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    file = demo.model.path / "config.json"
    assert resolve_config(str(file)) == file
    assert resolve_config(str(demo.model.path)) == file
    asked: list[tuple[str, str]] = []

    def download(name: str, wanted: str) -> str:
        asked.append((name, wanted))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert resolve_config("org/model") == file
    assert asked == [("org/model", "config.json")]


def test_a_hub_id_that_is_not_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment is read when the library is imported; without this it would look for a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="org/nothing: is no folder here, and the hub did not give it"):
        resolve_config("org/nothing")


def test_both_spellings_of_rotary_settings_survive(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-3-rope")
    found = random_subnet(model.path, HALF, Steps.of(model.architecture), made(tmp_path / "out"))
    assert found.config["rope_theta"] == found.config["rope_parameters"]["rope_theta"] == LLAMA3_ROPE["rope_theta"]
