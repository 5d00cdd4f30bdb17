"""The ``mlc-llm`` flow."""

from __future__ import annotations

from amoeba_deploy.backends.planned import Planned
from amoeba_deploy.backends.takes import LLAMAS, Takes

BACKEND = Planned(
    Takes(
        "mlc-llm",
        ("q0f32", "q0f16", "q4f32_1", "q4f16_1", "q3f16_1"),
        aliases={"fp32": "q0f32", "fp16": "q0f16", "int4": "q4f16_1"},
        classes=LLAMAS | {"qwen3"},
        ropes=frozenset({"default", "llama3"}),
        biases=False,
        heads_divide=LLAMAS,
        even_heads=True,
    )
)
