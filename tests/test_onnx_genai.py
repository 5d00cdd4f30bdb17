"""onnxruntime-genai runs what the ONNX backend writes, and its model builder is the oracle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_engines import ONNX, fed, genai_greedy, lowered, with_tokenizer

from amoeba_deploy.backends.backend import Ids
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
