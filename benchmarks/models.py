"""Models with random weights in real sizes: latency does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import CONFIG_DTYPES, from_float32, made_source, write_tensors


def llama_config(
    depth: int = 14, hidden: int = 768, heads: int = 12, kv_heads: int = 12, neurons: int = 2048, vocabulary: int = 8192
) -> dict[str, Any]:
    """A Llama of about 105 million parameters unless told otherwise."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": neurons,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _random(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def random_model(folder: Path, config: dict[str, Any], seed: int = 0) -> ModelFolder:
    """Write a model of that config, in its dtype, with weights drawn from N(0, 0.02) and norms of one."""
    dtype = CONFIG_DTYPES[config["dtype"]]
    folder.mkdir(parents=True, exist_ok=True)
    sizes: Architecture = read_architecture(config)
    rng = np.random.default_rng(seed)
    family = family_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(sizes.depth):
        for name, axes in family.block_tensors(sizes).items():
            shapes[f"model.layers.{index}.{name}"] = tuple(sizes.extent(axis) for axis in axes)
    for name in family.other_tensors(sizes):
        shapes[name] = (sizes.hidden,) if "norm" in name else (sizes.vocabulary, sizes.hidden)
    sources = {
        name: made_source(dtype, shape, lambda shape=shape: from_float32(_random(shape, rng), dtype))
        for name, shape in shapes.items()
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", sources, {"format": "pt"})
    return ModelFolder(folder)


def add_empty_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows no token, for tools that insist on one."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
