"""This machine: what identifies it, so that measurements made here are used here only."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory in whole GiB, and system: what latencies depend on."""
    import psutil

    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
    }


def fingerprint() -> str:
    """Sixteen hex digits that tell machines apart."""
    text = "\n".join(f"{key}={value}" for key, value in sorted(machine_facts().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
