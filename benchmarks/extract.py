"""Extraction against ``cp`` and against transformers' load, slice and save, on generated bf16 Llamas in shards.

Prints, for each size: the time of ``cp`` of the output bytes, which is the physical limit of writing them, the time of
extraction and its ratio to it, with a tuned checkpoint's merge and without; CPU seconds beside those of load-slice-save
through transformers; and the most anonymous memory that the extracting process held. Every run is a process of its own;
runs are interleaved and the minimum of each is taken, after all files were read once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.files import write_json
from amoeba_deploy.tensors import TensorSource, write_model_tensors

WIDTH = "0.75"
SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden": 2048, "depth": 9, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
    "1.1B": {"hidden": 2048, "depth": 22, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
    "2.2B": {"hidden": 2048, "depth": 47, "heads": 32, "kv_heads": 4, "neurons": 5632, "vocabulary": 32000},
}
"""TinyLlama's sizes, and its blocks less and more often."""
RANK, EXPERTS = 64, 5


def config_of(size: dict[str, int]) -> dict[str, Any]:
    """The Llama of one of ``SIZES``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["depth"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["hidden"] // size["heads"],
        "intermediate_size": size["neurons"],
        "vocab_size": size["vocabulary"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model of that config in three shards; its values repeat one random block, which changes no time."""
    folder.mkdir(parents=True)
    sizes, family = read_architecture(config), family_of(config)
    values = (np.random.default_rng(0).integers(0, 1 << 15, 1 << 20) % 0x3F00).astype(np.uint16)

    def source(shape: tuple[int, ...]) -> TensorSource:
        count = int(np.prod(shape))

        def parts() -> Any:
            for begin in range(0, count, len(values)):
                yield values[: min(len(values), count - begin)]

        return TensorSource("BF16", shape, parts)

    sources = {
        name: source((sizes.hidden,) if "norm" in name else (sizes.vocabulary, sizes.hidden))
        for name in family.other_tensors(sizes)
    }
    for index in range(sizes.depth):
        for name, axes in family.block_tensors(sizes).items():
            sources[f"model.layers.{index}.{name}"] = source(tuple(sizes.extent(axis) for axis in axes))
    total = sum(each.length for each in sources.values())
    write_json(folder / "config.json", config)
    write_model_tensors(folder, sources, total // 3 + (100 << 20), {"format": "pt"})
