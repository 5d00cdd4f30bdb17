"""This machine: what identifies it, so that measurements made here are used here only."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

_DEVICE_TREE = Path("/proc/device-tree/compatible")
"""Names of the board and its processor, each ended by a zero byte; machines without a device tree lack it."""


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


@cache
def own_chips() -> tuple[str, ...]:
    """The architectures that code can be built for and run on here: the processor's, and those of CUDA GPUs."""
    chips = [platform.machine()]
    if Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists():
        import torch

        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            chips.append("sm_{}{}".format(*torch.cuda.get_device_capability(index)))
    return tuple(dict.fromkeys([*chips, *_board_chips()]))


def _board_chips() -> tuple[str, ...]:
    """The GPU of a Jetson Orin by its device tree, which it has whatever torch knows of CUDA."""
    try:
        return ("sm_87",) if b"nvidia,tegra234" in _DEVICE_TREE.read_bytes() else ()
    except OSError:
        return ()


def fingerprint() -> str:
    """Sixteen hex digits that tell machines apart."""
    text = "\n".join(f"{key}={value}" for key, value in sorted(machine_facts().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
