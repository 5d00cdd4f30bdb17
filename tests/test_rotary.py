"""Rotary frequencies of every scaling are those that transformers computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, YARN_ROPES
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from amoeba_deploy.architecture import rope_from_config
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families import read_architecture
from amoeba_deploy.rotary import inverse_frequencies, turning

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3_ROPE | {"rope_theta": 5000.0},
    **YARN_ROPES,
    "yarn without a trained length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with its own edges": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
    "yarn with a factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32},
    "longrope with a factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
}
TRAINED = 128


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_frequencies_are_those_of_transformers(name: str, head_dim: int, dtype: Any) -> None:
    entry = {"rope_theta": 5000.0, **ROPES[name]}
    if entry["rope_type"] == "longrope":
        entry |= {
            key: [first + i / 8 for i in range(head_dim // 2)]
            for key, first in (("short_factor", 1.0), ("long_factor", 2.0))
        }
    config = AutoConfig.for_model(
        "llama", head_dim=head_dim, max_position_embeddings=TRAINED, rope_parameters=dict(entry)
    )
    config.standardize_rope_params()
    wanted, factor = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, None, 1)
    found, own_factor = inverse_frequencies(rope_from_config({"rope_parameters": entry}), head_dim, TRAINED, dtype)
    assert found.dtype == dtype
    assert np.abs(found / wanted.numpy() - 1).max() < 1e-6
    assert own_factor == pytest.approx(factor)


def test_only_the_channels_that_turn_have_frequencies() -> None:
    entry = {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 5000.0}
    entry |= {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [2.0] * 6}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    sizes |= {"max_position_embeddings": TRAINED, "vocab_size": 64}
    config = AutoConfig.for_model(
        "phi3", rope_parameters=entry | {"partial_rotary_factor": 0.75}, **sizes, pad_token_id=0
    )
    architecture = read_architecture(config.to_dict() | {"architectures": ["Phi3ForCausalLM"]})
    wanted, factor = ROPE_INIT_FUNCTIONS["longrope"](config, None, 1)
    found, own_factor = inverse_frequencies(architecture.rope, 16, TRAINED, np.float32)
    assert turning(architecture.rope, 16) == 12
    assert found.shape == (6,)
    assert np.abs(found / wanted.numpy() - 1).max() < 1e-6
    assert own_factor == pytest.approx(factor)


def test_a_scaling_that_is_not_computed_is_refused_by_name() -> None:
    rope = rope_from_config({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    with pytest.raises(BadInput, match="'dynamic' is not computed here; known are default, linear"):
        inverse_frequencies(rope, 16, TRAINED, np.float32)
