"""Provenance of a bundle: an in-toto statement that says what was built, from which digests and by which versions.

The statement is in-toto's (https://in-toto.io/Statement/v1) with SLSA's predicate
(https://slsa.dev/spec/v1.1/provenance). It follows from the manifest alone and holds no date, so that the same inputs
give the same bytes; its subject is the manifest, which lists every other file by its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

PROVENANCE = "provenance.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:amoeba-deploy:build:bundle:1"
BUILDER = "urn:amoeba-deploy:builder"

_ASKED = ("device", "budget", "flow", "precision", "shape", "workload", "context", "settings")
"""Entries of a manifest that users choose, or that follow from what they ask for."""
_DERIVED = ("identity", "predicted", "quality", "finished")


def provenance_of(manifest: Mapping[str, Any], manifest_file: bytes) -> dict[str, Any]:
    """The statement of a bundle: ``manifest`` is what the bytes ``manifest_file`` hold."""
    tool, _, version = str(manifest.get("tool", "")).partition(" ")
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "manifest.json", "digest": {"sha256": hashlib.sha256(manifest_file).hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {key: manifest[key] for key in _ASKED if manifest.get(key) is not None},
                "internalParameters": {key: manifest[key] for key in _DERIVED if manifest.get(key) is not None},
                "resolvedDependencies": _dependencies(manifest),
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {tool or "amoeba-deploy": version}}},
        },
    }


def _dependencies(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the bundle was built from: files by their digests, packages by their versions (as package URLs)."""
    named = {
        "checkpoint": manifest.get("checkpoint_digest"),
        "base model": manifest.get("base_digest"),
        "latency table": manifest.get("table"),
    }
    files = [
        {"name": name, "digest": {"sha256": str(digest).removeprefix("sha256:")}}
        for name, digest in named.items()
        if digest
    ]
    versions = manifest.get("engine_versions") or {}
    packages = [
        {"name": package, "uri": f"pkg:pypi/{package.lower().replace('_', '-')}@{version}"}
        for package, version in sorted(versions.items())
    ]
    return [*files, *packages]
