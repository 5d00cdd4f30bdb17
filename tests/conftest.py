"""Models, selections and checkpoints that tests share. All are made here, small and random, from fixed seeds."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before any library reads it: the models are too small for more, and the workers of a test run share the cores."""

import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from amoeba_deploy.adapters import GATE, Mix, matrices, tensor_names, write_adapters
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint, open_checkpoint
from amoeba_deploy.cli import main
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import BlockScores, DepthChoice, Selection, write_selection

SHARED = Path(__file__).parent.parent.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
QUIET = Progress(quiet=True)

BASE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with scales": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}
GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 24, "sliding_window": 16}
"""Tests feed rows of about twenty tokens, so that windows matter."""
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
PHI3_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped-tied": ("llama", {}),
    "llama-grouped-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-multihead": ("llama", {"num_key_value_heads": 6}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-small-heads": ("llama", {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mistral": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3-multihead": ("qwen3", {"num_key_value_heads": 6}),
    "granite": ("granite", GRANITE_SCALES),
    "granite-biases": ("granite", GRANITE_SCALES | {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma2-uncapped": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}),
    "gemma3-capped": ("gemma3_text", GEMMA | {"final_logit_softcapping": 5.0, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}),
    "phi3-partial": ("phi3", {"sliding_window": 16, "partial_rotary_factor": 0.5}),
    "phi3-long": ("phi3", {"rope_parameters": PHI3_LONG_ROPE, "original_max_position_embeddings": 22}),
    "smollm3": ("smollm3", {"rope_parameters": LLAMA3_ROPE}),
    "smollm3-biases": (
        "smollm3",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": False}),
}
"""Random models by name: family, and what differs from ``BASE``."""


# A machine that is busy makes any example slow; how long a test takes says nothing of what it tests.
hypothesis.settings.register_profile("amoeba", deadline=None)
hypothesis.settings.load_profile("amoeba")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test measures for itself and leaves nothing behind."""
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # How well latencies are known matters to few tests; those say how often to measure.
    monkeypatch.setattr("amoeba_deploy.local_latency.FIRST_USE_SECONDS", 1.0)
    monkeypatch.setattr("amoeba_deploy.export.MEASURE_SECONDS", 0.5)


def save_random_model(folder: Path, family: str, **changes: Any) -> ModelFolder:
    """A random float32 model of a family; norms and biases are random too, so that none can be forgotten unseen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(BASE | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return ModelFolder(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """Random models by their name in ``MODELS``, each made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> ModelFolder:
        if name not in made:
            family, changes = MODELS[name]
            made[name] = save_random_model(root / name, family, **changes)
        return made[name]

    return get


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Leave only some blocks in a stock model, each of the kind that it was."""
    layers, kinds = model.model.layers, getattr(model.config, "layer_types", None)
    model.model.layers = type(layers)(layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    if kinds is not None:
        model.config.layer_types = [kinds[index] for index in kept]


def random_selection(model: ModelFolder, seed: int = 0) -> Selection:
    """A selection with random scores that removes blocks from the second one on."""
    sizes, rng = model.architecture, np.random.default_rng(seed)
    blocks = tuple(
        BlockScores(
            rng.standard_normal(sizes.kv_heads).astype(np.float32),
            rng.standard_normal(sizes.neurons).astype(np.float32),
            rng.standard_normal(sizes.heads * sizes.head_dim).astype(np.float32),
            rng.standard_normal(sizes.neurons).astype(np.float32),
        )
        for _ in range(sizes.depth)
    )
    order = list(range(1, sizes.depth))
    depths = {
        sizes.depth - m: DepthChoice(tuple(i for i in range(sizes.depth) if i not in order[:m]), 1.0 + m)
        for m in range(sizes.depth - 1)
    }
    facts = {"metric": "loss", "seconds": 0.0}
    return Selection(model.digest, depths, blocks, facts)


def random_adapters(
    model: ModelFolder,
    folder: Path,
    widths: Sequence[Fraction],
    *,
    experts: int = 5,
    gated: bool = True,
    mix: Mix = "factors",
) -> dict[str, NDArray[np.float32]]:
    """Write ``smol.safetensors`` with random experts of rank 4 and a random gate that mixes two at a time."""
    rng = np.random.default_rng(3)

    def numbers(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {}
    for block in range(model.architecture.depth):
        for matrix, (rows, columns) in matrices(model.architecture).items():
            name_a, name_b = tensor_names(block, matrix)
            tensors |= {name_a: 0.3 * numbers(experts, 4, columns), name_b: 0.05 * numbers(experts, rows, 4)}
    if gated:
        shapes = (16, model.architecture.depth + len(widths)), (16,), (experts, 16), (experts,)
        tensors |= {name: 0.3 * numbers(*shape) for name, shape in zip(GATE, shapes, strict=True)}
    write_adapters(folder, tensors, rank=4, alpha=16, top_k=min(2, experts), widths=widths, mix=mix)
    return tensors


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The checkpoint that ships in the package."""
    return open_checkpoint()


@pytest.fixture
def checkpoint(models: Callable[[str], ModelFolder], tmp_path: Path) -> Checkpoint:
    """A checkpoint of a random grouped-query Llama without quality, with its base inside."""
    model = models("llama-grouped-tied")
    chosen, folder = tmp_path / "selection", tmp_path / "checkpoint"
    chosen.mkdir()
    folder.mkdir()
    write_selection(chosen, random_selection(model))
    return create_checkpoint(str(model.path), chosen, folder, name="random", include_base=True)


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A copy of a trained Llama of 260 thousand parameters, where one is at hand beside the project."""
    if not STORIES.is_dir():
        pytest.skip("../shared/models/stories260K is not here")
    return Path(shutil.copytree(STORIES, tmp_path / "stories260K"))


def amoeba(*arguments: object) -> Result:
    """Run the command line in this process; the result has exit code, standard output and standard error."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def sentence(result: Result, code: int) -> str:
    """The one line of a refusal, after checking that it is one and has the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stderr.endswith("\n")
    assert lines[0].startswith("amoeba: ")
    return lines[0]
