"""What NVIDIA's management library (NVML) says of the GPUs that this process computes on: memory and energy.

The package nvidia-ml-py (extra ``nvidia``) speaks to it. Without package, driver or GPU nothing is known, and nothing
is guessed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class GpuMeter:
    """The GPUs of this machine, as NVML counts them."""

    def __init__(self, library: Any, handles: list[Any]) -> None:
        self._library = library
        self._handles = handles

    @classmethod
    def of_this_machine(cls) -> GpuMeter | None:
        """The meter, or None where there is no GPU, driver or package."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            return None
        return cls(pynvml, handles) if handles else None

    def memory_bytes(self) -> int:
        """Bytes of GPU memory that this process holds now; 0 where it computes on no GPU."""
        return sum(self._memory_on(handle) for handle in self._handles)

    def energy_j(self) -> float | None:
        """Joules that the GPUs on which this process holds memory took since their drivers were loaded.

        None where it holds none, or where a GPU does not count (before Volta, and on Jetson).
        """
        used = [handle for handle in self._handles if self._memory_on(handle)]
        found = [self._asked(self._library.nvmlDeviceGetTotalEnergyConsumption, handle) for handle in used]
        if not found or None in found:
            return None
        return float(sum(found)) / 1e3

    def facts(self) -> list[dict[str, Any]]:
        """Name, clocks in MHz, temperature in degrees Celsius and power limit in watts of every GPU, where known."""
        return [self._facts_of(handle) for handle in self._handles]

    def _facts_of(self, handle: Any) -> dict[str, Any]:
        library = self._library
        limit = self._asked(library.nvmlDeviceGetEnforcedPowerLimit, handle)
        found = {
            "name": self._asked(library.nvmlDeviceGetName, handle),
            "clock_mhz": self._asked(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_SM),
            "temperature_c": self._asked(library.nvmlDeviceGetTemperature, handle, library.NVML_TEMPERATURE_GPU),
            "power_limit_w": None if limit is None else limit / 1e3,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _memory_on(self, handle: Any) -> int:
        running = self._asked(self._library.nvmlDeviceGetComputeRunningProcesses, handle) or []
        return sum(process.usedGpuMemory or 0 for process in running if process.pid == os.getpid())

    def _asked(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._library.NVMLError:
            return None
