"""Models for TensorRT-LLM's tests, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, save_random_model
from safetensors.numpy import load_file

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, options_for
from amoeba_deploy.backends.tensorrt_llm.checkpoint import write_checkpoint
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping
from amoeba_deploy.backends.tensorrt_llm.reference import RankEngine
from amoeba_deploy.extraction.folder import copy_model, extract
from amoeba_deploy.extraction.native_layouts import deci_blocks
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape

TENSORRT = load_backend("tensorrt-llm")
CONTEXT = 64
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "mistral-wide-heads": ("mistral", {"sliding_window": None, "head_dim": 48}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}
SPREADS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2)]
Made = Callable[[str], ModelFolder]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Random models in float16, each made once."""
    root, found = tmp_path_factory.mktemp("tensorrt"), {}

    def get(name: str) -> ModelFolder:
        if name not in found:
            family, changes = MODELS[name]
            plain = save_random_model(root / f"{name}-float32", family, **(SIZES | changes))
            found[name] = in_float16(plain, root / name)
        return found[name]

    return get


def in_float16(model: ModelFolder, folder: Path) -> ModelFolder:
    folder.mkdir()
    copy_model(model, folder, "float16")
    return ModelFolder(folder)


@pytest.fixture(scope="module")
def deci(made: Made, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A ragged subnet as DeciLM takes it: other widths in each block, one without attention, one without neurons."""
    model = made("llama")
    sizes = model.architecture
    blocks = (
        block_plan(sizes, 0, [0, 1], range(192)),
        block_plan(sizes, 1, [1], range(0, 192, 2)),
        block_plan(sizes, 2, [], range(64)),
        block_plan(sizes, 3, [0], []),
    )
    plan = Plan(Shape(4, Fraction(1, 2), "adaptive"), blocks)
    folder = tmp_path_factory.mktemp("deci")
    extract(model, plan, folder, layout="ragged", blocks=deci_blocks(plan, sizes, 64).blocks)
    return ModelFolder(folder)


def options(chip: str | None = None, context: int = CONTEXT, batch: int = 1, **settings: object) -> BuildOptions:
    return options_for(TENSORRT, context, batch, chip, {name: str(value) for name, value in settings.items()})


def written(model: ModelFolder, folder: Path, tp: int = 1, pp: int = 1, precision: str = "fp16") -> Path:
    folder.mkdir(exist_ok=True)
    write_checkpoint(model, folder, precision, Mapping(tp, pp))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def rank_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(load_file(folder / f"rank{rank}.safetensors"))


def error_of(folder: Path, model: ModelFolder) -> float:
    """The largest difference of a checkpoint's logits from transformers', as a share of the largest logit."""
    ids = np.random.default_rng(3).integers(0, model.architecture.vocabulary, (2, 24))
    wanted = load_backend("torch").open(model.path, "fp32").feed(ids)
    return float(np.abs(RankEngine(folder).feed(ids) - wanted).max() / np.abs(wanted).max())


@pytest.fixture
def dense(tmp_path: Path) -> ModelFolder:
    """A dense subnet of legal sizes, as extraction writes it."""
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "rope_parameters": LLAMA3_ROPE}
    model = save_random_model(tmp_path / "plain", "llama", **sizes)
    folder = tmp_path / "dense"
    folder.mkdir()
    blocks = tuple(block_plan(model.architecture, i, [0, 1], range(512)) for i in range(4))
    extract(model, Plan(Shape(4, Fraction(1)), blocks), folder, dtype="float16")
    return ModelFolder(folder)
