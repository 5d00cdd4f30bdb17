"""What is said of the machine, and of GPUs by a stand-in for NVIDIA's library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from amoeba_deploy.profiles import machine
from amoeba_deploy.profiles.gpu import GpuMeter


class NVMLError(Exception):
    """As NVML's."""


def library(pids: list[int | None], energy: int | None = 5000) -> Any:
    """A library with one GPU for each pid (None: nobody computes on it) of 2 GB each."""

    def processes(handle: int) -> list[Any]:
        pid = pids[handle]
        return [] if pid is None else [SimpleNamespace(pid=pid, usedGpuMemory=2 * 10**9)]

    def consumed(handle: int) -> int:
        if energy is None:
            raise NVMLError
        return energy * (handle + 1)

    found = ModuleType("pynvml")
    found.__dict__.update(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(pids),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=processes,
        nvmlDeviceGetTotalEnergyConsumption=consumed,
        nvmlDeviceGetName=lambda _: "H200",
        nvmlDeviceGetClockInfo=lambda _, kind: 1980 * kind,
        nvmlDeviceGetTemperature=lambda _, kind: 40 + kind,
        nvmlDeviceGetEnforcedPowerLimit=lambda _: 700_000,
    )
    return found


def meter(monkeypatch: pytest.MonkeyPatch, pids: list[int | None], energy: int | None = 5000) -> GpuMeter | None:
    monkeypatch.setitem(sys.modules, "pynvml", library(pids, energy))
    return GpuMeter.of_this_machine()


def test_memory_and_energy_are_those_of_the_gpus_that_this_process_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = meter(monkeypatch, [None, os.getpid(), 1])
    assert found is not None
    assert found.memory_bytes() == 2 * 10**9
    assert found.energy_j() == 10.0  # of the second GPU alone, in joules
    assert found.facts()[0] == {"name": "H200", "clock_mhz": 1980, "temperature_c": 40, "power_limit_w": 700.0}


def test_nothing_is_said_of_gpus_that_this_process_does_not_use_or_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle, silent = meter(monkeypatch, [1]), meter(monkeypatch, [os.getpid()], energy=None)
    assert idle is not None
    assert (idle.memory_bytes(), idle.energy_j()) == (0, None)
    assert silent is not None
    assert silent.energy_j() is None


def test_without_gpus_driver_or_package_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meter(monkeypatch, []) is None
    broken = library([1])

    def fail() -> None:
        raise NVMLError

    broken.nvmlInit = fail
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert GpuMeter.of_this_machine() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter.of_this_machine() is None


def test_the_memory_of_this_machine_is_what_the_system_says() -> None:
    assert machine.memory_bytes() == psutil.virtual_memory().total


def test_conditions_are_read_where_the_system_tells_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, kilohertz in enumerate((1_500_000, 2_500_000)):
        folder = tmp_path / f"cpu{number}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{kilohertz}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_FREQUENCY", tmp_path / "cpu0" / "cpufreq")
    monkeypatch.setitem(sys.modules, "pynvml", library([None]))
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = machine.conditions()
    assert found["clock_mhz"] == 2000
    assert found["governor"] == "powersave"
    assert found["power_mode"] == "MAXN"
    assert found["gpus"][0]["name"] == "H200"
    assert found["load"] >= 0


def test_what_the_system_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_FREQUENCY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = machine.conditions()
    assert not {"governor", "gpus"} & found.keys()
    assert None not in found.values()
