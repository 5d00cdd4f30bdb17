"""The ``gguf`` flow."""

from __future__ import annotations

from amoeba_deploy.backends.planned import Planned
from amoeba_deploy.backends.takes import ANY_WIDTHS, KNOWN_ROPES, LLAMAS, Takes

BACKEND = Planned(
    Takes(
        # Quantised rows of another length are stored in wider types without a word; FFN width 0 drops attention too.
        "gguf",
        ("fp32", "fp16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"),
        aliases={"int8": "q8_0", "int4": "q4_k_m"},
        classes=LLAMAS,
        ropes=KNOWN_ROPES,
        varying=ANY_WIDTHS | {"without_attention"},
        even_heads=True,
        neuron_multiple={"fp32": 1, "fp16": 1, "bf16": 1, "q8_0": 32, "q4_0": 32, "": 256},
        query_multiple={"fp32": 1, "fp16": 1, "bf16": 1, "q8_0": 32, "q4_0": 32, "": 256},
        hidden_multiple={"q8_0": 32, "q4_0": 32},
    )
)
