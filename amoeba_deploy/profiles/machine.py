"""This machine: what identifies it, so that measurements made here are used here only, and the state that it is in."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from amoeba_deploy.profiles.gpu import GpuMeter

_DEVICE_TREE = Path("/proc/device-tree/compatible")
"""Names of the board and its processor, each ended by a zero byte; machines without a device tree lack it."""

_CPUS = Path("/sys/devices/system/cpu")
_FREQUENCY = _CPUS / "cpu0" / "cpufreq"


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


def memory_bytes() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@cache
def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory in whole GiB, and system: what latencies depend on."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": threads(),
        "memory_gib": round(memory_bytes() / 2**30),
        "system": platform.system(),
    }


@cache
def own_chips() -> tuple[str, ...]:
    """The architectures that code can be built for and run on here: the processor's, and those of CUDA GPUs."""
    chips = [platform.machine()]
    if Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists():
        chips += _cuda_chips()
    return tuple(dict.fromkeys([*chips, *_board_chips()]))


_CAPABILITY = 75, 76
"""Attributes of a device in CUDA's driver API: the major and minor version of its architecture."""


def _cuda_chips() -> list[str]:
    """The architectures of the CUDA GPUs that this process may use, as the driver tells them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        version = []
        for attribute in _CAPABILITY:
            if driver.cuDeviceGet(ctypes.byref(device), index) == 0:
                driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
                version.append(value.value)
        if len(version) == len(_CAPABILITY):
            found.append("sm_{}{}".format(*version))
    return found


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


def conditions() -> dict[str, Any]:
    """What this machine does just now that latencies depend on; what the system does not tell is left out.

    ``load`` is the number of processes that wanted to run in the last minute, on average; clocks are in MHz;
    temperatures in degrees Celsius, the hottest sensor's.
    """
    found = {
        "load": _load(),
        "clock_mhz": _clock(),
        "governor": _line(_FREQUENCY / "scaling_governor"),
        "power_mode": _power_mode(),
        "temperature_c": _temperature(),
        "gpus": _gpus(),
    }
    return {name: value for name, value in found.items() if value}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _clock() -> int | None:
    """The mean clock of all cores, by the driver or else as the processor states it."""
    kilohertz = [_number(file) for file in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [value / 1e3 for value in kilohertz if value is not None]
    if not known:
        known = [float(line.split(":")[1]) for line in _lines(Path("/proc/cpuinfo")) if line.startswith("cpu MHz")]
    return round(sum(known) / len(known)) if known else None


def _power_mode() -> str | None:
    """The mode that a Jetson or the firmware of a PC runs in."""
    if tool := shutil.which("nvpmodel"):
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
            modes = [line.partition(":")[2].strip() for line in said.splitlines() if "Power Mode" in line]
            if modes:
                return modes[0]
    return _line(Path("/sys/firmware/acpi/platform_profile"))


def _temperature() -> float | None:
    zones = [_number(file) for file in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    known = [value / 1e3 for value in zones if value is not None and 0 < value < 200e3]
    return round(max(known), 1) if known else None


def _gpus() -> list[dict[str, Any]]:
    meter = GpuMeter.of_this_machine()
    return meter.facts() if meter else []


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _line(file: Path) -> str | None:
    return next((line.strip() for line in _lines(file) if line.strip()), None)


def _number(file: Path) -> float | None:
    text = _line(file)
    return float(text) if text and text.lstrip("-").isdigit() else None
