"""The figures of a built bundle: what summaries show, baselines keep and gates compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import ENGINE, MEASURED, MEASURED_FORMAT, read_manifest
from amoeba_deploy.files import folder_bytes, read_json, sha256_of
from amoeba_deploy.shape import shape_text


def figures_of(bundle: Path, machines: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a bundle.

    ``machines`` are the fingerprints of those whose measurements its predicted latency comes from; an estimated one is
    of none.
    """
    manifest = read_manifest(bundle)
    measured = read_json(bundle / MEASURED, MEASURED_FORMAT)
    timing, verified = measured.get("timing"), measured.get("verified")
    predicted = dict(manifest["predicted"])
    tokens = manifest["workload"]["tokens"]
    on = [] if predicted["source"] == "estimated" else sorted(machines)
    found: dict[str, Any] = {
        "device": manifest["device"],
        "flow": manifest["flow"],
        "precision": manifest["precision"],
        "shape": shape_text(manifest["shape"]),
        "content": sha256_of(bundle / "manifest.json"),
        "bytes": folder_bytes(bundle / ENGINE),
        "budget": manifest["budget"],
        "predicted": {
            "tpot_ms": predicted["tpot_ms"],
            "ttft_ms": predicted["ttft_ms"],
            "e2e_ms": _e2e(predicted["ttft_ms"], predicted["tpot_ms"], tokens),
            "memory_bytes": predicted["memory_bytes"],
            "source": predicted["source"],
            "machines": on,
        },
        "measured": None,
        "quality": manifest["quality"],
        "perplexity": None if not verified or not verified.get("perplexity") else verified["perplexity"]["engine"],
        "verified": verified is not None,
        "steps": len(manifest["steps"]),
    }
    if timing is not None:
        found["measured"] = {
            "tpot_ms": timing["tpot_ms"],
            "ttft_ms": timing["ttft_ms"],
            "e2e_ms": _e2e(timing["ttft_ms"], timing["tpot_ms"], tokens),
            "machines": [measured["machine"]["fingerprint"]],
        }
    return found


def machines_of(tables: Sequence[Path]) -> list[str]:
    """The fingerprints of the machines that some tables were measured on, sorted; an unknown one by its digest."""
    from amoeba_deploy.profiles.table import read_table

    found = set()
    for file in tables:
        machine = read_table(file).facts.get("machine") or {}
        found.add(str(machine.get("fingerprint") or f"table {sha256_of(file)[:16]}"))
    return sorted(found)


def _e2e(ttft_ms: float, tpot_ms: float, tokens: int) -> float:
    """TTFT + (generated - 1) x TPOT, in milliseconds."""
    return round(ttft_ms + (tokens - 1) * tpot_ms, 4)
