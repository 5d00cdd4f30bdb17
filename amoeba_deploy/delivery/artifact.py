"""A bundle as an OCI artifact: a manifest, a config and one layer a file, by the CNCF ModelPack specification.

All of it follows from the files: the same bundle gives the same bytes and so the same digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import MANIFEST, MAX_MANIFEST, UNLISTED, verify_files
from amoeba_deploy.delivery import media_types
from amoeba_deploy.delivery.paths import check_paths
from amoeba_deploy.delivery.reference import is_digest
from amoeba_deploy.delivery.statement import check_statement
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of

MAX_DOCUMENT = 4 << 20
"""Bytes of a manifest, an index or a config: registries take manifests of 4 MB at most."""
MAX_SIZE = 1 << 44
"""Bytes of one file, 16 TiB: what is said to be larger is not true."""

_FORMATS = {
    "executorch": "pte",
    "gguf": "gguf",
    "mlc-llm": "mlc",
    "onnx": "onnx",
    "openvino": "openvino",
    "tensorrt-llm": "safetensors",
    "torch": "safetensors",
}
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


@dataclass(frozen=True)
class Blob:
    """Some bytes in a registry, by their sha256 (``sha256:`` and hex) and how many they are."""

    digest: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> Blob:
        """The blob of these bytes."""
        return cls(digest_of(data), len(data))

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Layer:
    """A file of a bundle: its path there, relative and with slashes, and its blob."""

    path: str
    blob: Blob


@dataclass(frozen=True)
class Artifact:
    """An OCI manifest and a config, in bytes, and the layers that the manifest lists."""

    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> str:
        """The digest that a registry knows it by."""
        return digest_of(self.manifest)


def digest_of(data: bytes) -> str:
    """``sha256:`` and the hex digits of some bytes' digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def artifact_of(folder: Path) -> Artifact:
    """A bundle's artifact, after checking every file of it.

    Raises:
        BadInput: the folder is no bundle, or a file's name cannot be in one everywhere.
        VerificationFailed: a file is changed, missing or not listed, or not as it was signed.
    """
    facts = verify_files(folder)
    digests = {name: entry["sha256"] for name, entry in facts["files"].items()}
    digests |= {name: sha256_of(folder / name) for name in UNLISTED if (folder / name).is_file()}
    check_statement(folder, digests)
    check_paths(digests, str(folder))
    sizes = {name: (folder / name).stat().st_size for name in digests}
    layers = tuple(Layer(name, Blob(f"sha256:{digests[name]}", sizes[name])) for name in sorted(digests))
    config = _bytes_of(_config(facts, layers))
    manifest = _bytes_of(_manifest(facts, config, layers))
    if len(manifest) > MAX_DOCUMENT:
        raise BadInput(f"{folder}: has too many files for a registry, which takes manifests of 4 MB; use a pack")
    return Artifact(manifest, config, layers)


def _bytes_of(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _manifest(facts: Mapping[str, Any], config: bytes, layers: Sequence[Layer]) -> dict[str, Any]:
    described = [
        {
            "mediaType": media_types.media_type_of(layer.path),
            "digest": layer.blob.digest,
            "size": layer.blob.size,
            "annotations": {media_types.FILEPATH: layer.path, media_types.TITLE: layer.path},
        }
        for layer in layers
    ]
    return {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": media_types.ARTIFACT,
        "config": {"mediaType": media_types.CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": described,
        "annotations": {media_types.TITLE: _title(facts)},
    }


def _title(facts: Mapping[str, Any]) -> str:
    device = f" for {facts['device']}" if isinstance(facts.get("device"), str) else ""
    return f"{_name(facts)}: {facts['flow']} {facts['precision']}{device}"


def _name(facts: Mapping[str, Any]) -> str:
    """What the model is called: its checkpoint's name, and its shape."""
    shape = facts.get("shape")
    size = f"-{shape['depth']}x{shape['width']}" if isinstance(shape, dict) and {"depth", "width"} <= set(shape) else ""
    return f"{facts.get('checkpoint') or 'model'}{size}"


def _config(facts: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """ModelPack's config: what a registry or a runner shows of a model. It holds no date."""
    flow, precision = facts["flow"], facts["precision"]
    technical = {"architecture": "transformer", "format": _FORMATS.get(flow, flow)}
    technical |= {"precision": _PRECISIONS[precision]} if precision in _PRECISIONS else {"quantization": precision}
    text = {"capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]}}
    return {
        "descriptor": {"name": _name(facts), "title": _title(facts)},
        "config": technical | text,
        "modelfs": {"type": "layers", "diffIds": [layer.blob.digest for layer in layers]},
    }


def read_document(body: bytes, where: str) -> dict[str, Any]:
    """An OCI manifest or index; raises BadInput where the bytes are none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: the registry's answer is no JSON, so it is no manifest; check the address") from None
    if not isinstance(value, dict) or value.get("schemaVersion") != 2:
        raise BadInput(f"{where}: the registry's answer is no OCI manifest; check the address")
    return value


def read_layers(manifest: Mapping[str, Any], where: str) -> tuple[Layer, ...]:
    """The files that an OCI manifest lists, each checked: its path stays in its folder, its digest is one.

    Raises:
        BadInput: it is no bundle's manifest, or one that is not to be trusted.
    """
    found = manifest.get("layers")
    if not isinstance(found, list) or not found:
        raise BadInput(f"{where}: lists no layers, so it is no bundle; check the reference")
    layers = tuple(_layer(entry, where) for entry in found)
    check_paths((layer.path for layer in layers), where)
    own = next((layer for layer in layers if layer.path == MANIFEST), None)
    if own is None:
        raise BadInput(f"{where}: has no {MANIFEST}, so it is no bundle; check the reference")
    if own.blob.size > MAX_MANIFEST:
        raise BadInput(f"{where}: its {MANIFEST} is of {own.blob.size} bytes, more than any bundle's; do not trust it")
    return layers


def _layer(entry: Any, where: str) -> Layer:
    """One layer's path, digest and size; raises BadInput where they are not as they must be."""
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: lists a layer that is no JSON object; push the bundle again")
    kind, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
    if not is_digest(digest) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_SIZE:
        raise BadInput(f"{where}: lists a layer without a sha256 digest and a size; push the bundle again")
    notes = entry.get("annotations") or {}
    path = (notes.get(media_types.FILEPATH) or notes.get(media_types.TITLE)) if isinstance(notes, dict) else None
    if not isinstance(path, str):
        raise BadInput(f"{where}: has a layer that names no file, so it is no bundle; check the reference")
    if isinstance(kind, str) and re.search(r"\.tar\b", kind):
        raise BadInput(
            f"{where}: its layer {path[:100]!r} is an archive ({kind[:100]}); push it with 'amoeba bundle push'"
        )
    return Layer(path, Blob(str(digest), size))
