"""Mistral: grouped-query, no biases, in some releases a sliding window over the last positions.

A config without ``sliding_window`` means 4096 positions, not none: the class's default. A window that is at least as
long as the context changes nothing and is treated as none.
"""

from __future__ import annotations

from typing import Any

from amoeba_deploy.families.family import Family


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"]
    return {"sliding_window": window if window is not None and window < config["max_position_embeddings"] else None}


_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
FAMILY = Family("mistral", _flags, _DEFAULTS, compensated="llama")
