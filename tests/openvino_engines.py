"""What all tests of the OpenVINO backend share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, Engine, options_for
from amoeba_deploy.backends.openvino.runtime import core
from amoeba_deploy.model_folder import ModelFolder

OPENVINO = load_backend("openvino")
if OPENVINO.toolchain().missing:
    pytest.skip("openvino is not installed", allow_module_level=True)
CONTEXT = 128
OPTIONS = options_for(OPENVINO, CONTEXT)
HAS_NNCF = "nncf" in OPENVINO.toolchain().versions
RUN = tuple(
    precision
    for precision in OPENVINO.precisions()
    if OPENVINO.cannot_run(precision, OPTIONS) is None and (HAS_NNCF or not precision.startswith("int"))
)
"""What can be built and run here."""
needs_nncf = pytest.mark.skipif(not HAS_NNCF, reason="nncf is not installed")
Models = Callable[[str], ModelFolder]


def lowered(model: ModelFolder, folder: Path, precision: str = "fp32", options: BuildOptions = OPTIONS) -> Path:
    folder.mkdir(exist_ok=True)
    OPENVINO.lower(model, folder, precision, options)
    return folder


def transformers(model: ModelFolder) -> Engine:
    return load_backend("torch").open(model.path, "fp32")


def constants(artefact: Path) -> dict[str, Any]:
    model = core().read_model(str(artefact / "openvino_model.xml"))
    return {node.get_friendly_name(): node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}
