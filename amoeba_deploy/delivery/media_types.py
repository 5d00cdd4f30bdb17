"""Media types of a bundle in a registry: those of the CNCF ModelPack specification.

Files are single layers, neither archived nor compressed (``raw``): equal files of two bundles are then one blob, and a
broken transfer goes on where it broke. The specification has no types for one format of weights; its config says which.
"""

from __future__ import annotations

from pathlib import PurePosixPath

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
CODE = "application/vnd.cncf.model.code.v1.raw"
DATASET = "application/vnd.cncf.model.dataset.v1.raw"
RAW = frozenset({WEIGHT, WEIGHT_CONFIG, DOC, CODE, DATASET})
"""Layers that are one file as it is; all others are archives."""

FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"

_WEIGHTS = frozenset(
    {".safetensors", ".gguf", ".onnx", ".onnx_data", ".data", ".bin", ".pte", ".ptd", ".engine", ".plan", ".pt"}
)
_CODE = frozenset({".py", ".sh", ".so", ".dll", ".dylib", ".js", ".wasm"})
_DOCS = frozenset({"readme", "license", "notice", "copying", "changelog"})


def media_type_of(path: str) -> str:
    """The media type of a bundle's file, by its name."""
    name = PurePosixPath(path)
    if name.suffix in _WEIGHTS:
        return WEIGHT
    if name.suffix in _CODE:
        return CODE
    if name.suffix == ".md" or name.name.split(".")[0].lower() in _DOCS:
        return DOC
    return WEIGHT_CONFIG
