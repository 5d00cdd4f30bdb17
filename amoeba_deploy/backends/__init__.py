"""Backends: one module an engine, all behind the small interface of ``backends.backend``.

To add one, write a module that defines ``BACKEND`` and name it in ``_MODULES``; docs/backends.md is the recipe.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import cast

from amoeba_deploy.backends.backend import Backend
from amoeba_deploy.errors import BadInput, ToolchainMissing

_MODULES = {"torch": "torch", "onnx": "onnx"}
PLANNED_FLOWS = ("openvino", "executorch", "gguf", "mlc-llm", "tensorrt-llm")
"""Flows that device files may name and that this version has no backend for."""


def flow_names() -> tuple[str, ...]:
    """The flows that this version can lower to."""
    return tuple(_MODULES)


def load_backend(flow: str) -> Backend:
    """The backend of a flow; its engine's libraries are not imported yet.

    Raises:
        BadInput: no such flow is known.
        ToolchainMissing: the flow is known, but this version has no backend for it.
    """
    if flow in PLANNED_FLOWS:
        raise ToolchainMissing(
            f"this version of Amoeba has no backend for the flow '{flow}'; it lowers to {', '.join(_MODULES)}"
        )
    if flow not in _MODULES:
        close = difflib.get_close_matches(flow, _MODULES, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise BadInput(f"'{flow}' is not a flow; known are {', '.join(_MODULES)}{hint}")
    return cast(Backend, import_module(f"{__name__}.{_MODULES[flow]}").BACKEND)
