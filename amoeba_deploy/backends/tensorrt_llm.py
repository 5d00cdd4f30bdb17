"""The ``tensorrt-llm`` flow."""

from __future__ import annotations

from amoeba_deploy.backends.planned import Planned
from amoeba_deploy.backends.takes import KNOWN_ROPES, LLAMAS, Takes

BACKEND = Planned(
    Takes(
        "tensorrt-llm",
        ("fp16", "bf16", "fp8", "w8a16", "w4a16"),
        aliases={"int8": "w8a16", "int4": "w4a16"},
        classes=LLAMAS | {"qwen3"},
        ropes=KNOWN_ROPES,
        varying=frozenset({"kv_heads", "neurons", "without_attention", "without_feed_forward"}),
        head_sizes=frozenset({32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256}),
        neuron_multiple={"": 64},
        query_multiple={"": 64},
        hidden_multiple={"": 64},
    )
)
