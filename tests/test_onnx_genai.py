"""onnxruntime-genai runs what the ONNX backend writes, and its model builder is the oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, save_random_model
from onnx_engines import ONNX, fed, genai_greedy, lowered, with_tokenizer

from amoeba_deploy.backends.backend import Ids, options_for
from amoeba_deploy.backends.onnx.genai import genai_config, stream
from amoeba_deploy.errors import BadInput
from amoeba_deploy.generation import Timings, prompt_of, stream_text
from amoeba_deploy.model_folder import ModelFolder


@pytest.mark.parametrize("name", ["llama-grouped-tied", "mistral", "qwen2", "qwen3"])
def test_onnxruntime_genai_runs_the_folder_like_its_own_builder(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    """The oracle is onnxruntime-genai's model builder on the same folder: equal logits, and equal text through it."""
    source = Path(shutil.copytree(models(name).path, tmp_path / "model"))
    with_tokenizer(source)
    oracle, ours = tmp_path / "oracle", tmp_path / "ours"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(oracle)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache"), "--extra_options", "hf_token=false"]
    subprocess.run(command, check=True, capture_output=True)
    lowered(ModelFolder(source), ours)
    prompt = [5, 40, 17, 99]
    assert genai_greedy(ours, prompt, 24) == genai_greedy(oracle, prompt, 24)
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    difference = fed(ONNX.open(ours, "fp32"), ids, 20) - oracle_logits(oracle, ids, models(name))
    assert np.abs(difference).max() < 1e-4


def oracle_logits(folder: Path, ids: Ids, model: ModelFolder) -> np.ndarray:
    """Logits of the builder's graph, all ids at once."""
    import onnxruntime

    sizes = model.architecture
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            inputs[value.name] = np.zeros((1, sizes.kv_heads, 0, sizes.head_dim), np.float32)
        elif value.name == "position_ids":
            inputs[value.name] = np.arange(ids.shape[1])[None]
    return np.asarray(session.run(["logits"], inputs)[0])


def test_onnxruntime_genai_streams_the_text_that_the_engine_writes(stories: Path) -> None:
    options = options_for(ONNX, 512)
    lowered(ModelFolder(stories), stories, options=options)
    prompt = "Once upon a time"
    engine = ONNX.open(stories, "fp32")
    wanted = "".join(stream_text(engine, stories, prompt_of(stories, prompt), 64, 512, Timings()))
    pieces = list(stream(stories, prompt, 64))
    assert len(pieces) > 32
    assert "".join(pieces).strip() == wanted.strip()
    assert len(wanted) > 100


def test_a_text_that_cannot_be_is_refused(stories: Path, tmp_path: Path) -> None:
    lowered(ModelFolder(stories), stories)
    with pytest.raises(BadInput, match="exceed the context of 128"):
        list(stream(stories, "Once upon a time", 500))
    with pytest.raises(BadInput, match=r"genai_config\.json"):
        list(stream(tmp_path, "Once upon a time", 5))


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-small-heads"])
def test_onnxruntime_genai_pads_a_batch_and_gives_each_row_its_own_text(name: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    family, settings = MODELS[name]
    model = save_random_model(tmp_path / "model", family, **(settings | {"pad_token_id": 2}))
    with_tokenizer(model.path)
    folder = lowered(model, model.path)
    prompts = [[5, 40, 17, 99], [7, 9], [3]]
    loaded = og.Model(str(folder))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=16, min_length=16, do_sample=False, batch_size=3)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(np.array([prompt + [2] * (4 - len(prompt)) for prompt in prompts], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for row, prompt in enumerate(prompts):
        assert list(generator.get_sequence(row))[4:] == genai_greedy(folder, prompt, 12)


def test_generation_settings_are_those_of_the_model(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama-grouped-tied").path, tmp_path / "model"))
    said = {
        "bos_token_id": 7,
        "eos_token_id": [3, 5],
        "pad_token_id": 9,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
    }
    (folder / "generation_config.json").write_text(json.dumps(said))
    config = genai_config(ModelFolder(folder), 64, "cpu")
    assert {name: config["model"][name] for name in said if name in config["model"]} == {
        "bos_token_id": 7,
        "eos_token_id": [3, 5],
        "pad_token_id": 9,
    }
    sampling = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    assert {name: config["search"][name] for name in sampling} == {name: said[name] for name in sampling}
    assert config["search"]["max_length"] == config["model"]["context_length"] == 64
    (folder / "generation_config.json").unlink()
    plain = genai_config(ModelFolder(folder), 64, "cpu")
    assert (plain["model"]["bos_token_id"], plain["model"]["eos_token_id"], plain["model"]["pad_token_id"]) == (0, 1, 1)
    assert plain["search"]["do_sample"] is False
