"""ONNX Runtime, imported so that it keeps to itself."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any


def load(package: str = "onnxruntime") -> Any:
    """ONNX Runtime or a package on top of it; it sends and writes nothing about its use unless the user asks it to.

    ``ORT_DISABLE_TELEMETRY=0`` in the environment lets it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module(package)
