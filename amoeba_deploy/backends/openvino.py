"""The ``openvino`` flow."""

from __future__ import annotations

from amoeba_deploy.backends.planned import Planned
from amoeba_deploy.backends.takes import ANY_WIDTHS, KNOWN_ROPES, Takes

BACKEND = Planned(
    Takes(
        "openvino",
        ("fp32", "bf16", "int8", "int4"),
        traits=frozenset({"constant scaling"}),
        ropes=KNOWN_ROPES,
        varying=ANY_WIDTHS,
        even_heads=True,
    )
)
