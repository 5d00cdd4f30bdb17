"""What a library is compiled for: a full target of TVM, or one of MLC's presets.

MLC takes a plain ``cuda``, ``vulkan`` or ``metal`` as "the GPU of this machine", so none of these is ever passed on
for another device: its limits and its processor are spelled out.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.machine import own_chips

CHOICES = ("auto", "llvm", "cuda", "jetson", "vulkan", "metal", "android")
_JETSONS = ("sm_53", "sm_62", "sm_72", "sm_87", "sm_101", "sm_110")
"""CUDA chips that are one with an aarch64 processor."""
_COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
_PROCESSORS = {"x86_64": "x86-64-v3", "aarch64": "generic"}
"""What code is made for, the same wherever it is built: x86-64-v3 has AVX2 and fused multiply-add (Intel since 2013,
AMD since 2015), without which float32 matrices are twice as slow."""
_CUDA = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
"""Limits that every CUDA chip since sm_50 grants without being asked (CUDA C++ Programming Guide, technical
specifications)."""
_SMALL_GPU = {"max_threads_per_block": 256, "max_shared_memory_per_block": 32768}
"""MLC's own limits in its presets for Metal and Vulkan."""
_VULKAN = ("float16", "int64", "int16", "int8", "8bit_buffer", "16bit_buffer", "storage_buffer_storage_class")


@dataclass(frozen=True)
class BuildTarget:
    """One target: what MLC is given, what comes out, and what this machine needs to build it."""

    name: str
    device: str
    """The value of ``mlc_llm compile --device``."""
    library: str
    machine: str
    """The processor that the library's own code is for: x86_64, aarch64 or arm64."""
    chip: str
    """As a device's file spells it; an engine's identity."""
    needs: tuple[tuple[str, ...], ...] = ()
    """Programs to build with: of each group one must be on the PATH."""
    optimise: str = "O0"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """The programs that are not on the PATH, the first of each group."""
        return tuple(group[0] for group in self.needs if not any(map(shutil.which, group)))

    @property
    def runs_here(self) -> bool:
        """Whether this machine's processor runs it; Amoeba runs no other library of MLC."""
        return self.name == "llvm" and self.machine == platform.machine()


def missing_instructions() -> str | None:
    """What this machine's processor lacks of those that libraries for it use, or None."""
    file = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not file.is_file():
        return None
    flags = set(file.read_text().split())
    return next((name for name in ("avx2", "fma", "bmi2", "f16c") if name not in flags), None)


def _host(machine: str, processor: str | None = None) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": _TRIPLES[machine], "mcpu": processor or _PROCESSORS[machine]}


def _linker(machine: str) -> tuple[tuple[tuple[str, ...], ...], dict[str, str]]:
    """Programs that link for a processor, and the environment that makes TVM use them (``tvm.support.cc.get_cc``)."""
    if machine == platform.machine() and sys.platform == "linux":
        return (_COMPILERS,), {}
    cross = f"{machine}-linux-gnu-g++"
    return ((cross,),), {"CXX": cross}


def _llvm(machine: str, chip: str) -> BuildTarget:
    needs, environment = _linker(machine)
    device = json.dumps(_host(machine))
    return BuildTarget("llvm", device, "model.so", machine, chip, needs, environment=environment)


def _cuda(chip: str, name: str) -> BuildTarget:
    machine = "aarch64" if chip in _JETSONS else "x86_64"
    needs, environment = _linker(machine)
    host = _host(machine, "cortex-a78" if chip == "sm_87" else None)
    device = json.dumps({"kind": "cuda", "arch": chip, **_CUDA, "registers_per_block": 65536, "host": host})
    # Without flashinfer, cublas and the like: each is a library of the device that may not be there.
    plain = "flashinfer=0;cublas_gemm=0;faster_transformer=0;cudagraph=1;cutlass=0"
    return BuildTarget(
        name, device, "model.so", machine, chip, (("nvcc",), *needs), optimise=plain, environment=environment
    )


def _vulkan(machine: str, chip: str) -> BuildTarget:
    needs, environment = _linker(machine)
    able = {f"supports_{name}": 1 for name in _VULKAN}
    device = json.dumps({"kind": "vulkan", **_SMALL_GPU, "thread_warp_size": 1, **able, "host": _host(machine)})
    return BuildTarget("vulkan", device, "model.so", machine, chip, needs, environment=environment)


def _metal(chip: str) -> BuildTarget:
    host = {"kind": "llvm", "mtriple": "arm64-apple-macos", "mcpu": "apple-m1"}
    device = json.dumps({"kind": "metal", **_SMALL_GPU, "thread_warp_size": 1, "host": host})
    return BuildTarget("metal", device, "model.dylib", "arm64", chip, (("xcrun",),))


def _processor_of(chip: str | None) -> str | None:
    """The processor beside a chip, or None where it is not known."""
    if chip is None:
        return platform.machine() if platform.machine() in _TRIPLES else None
    if chip in _JETSONS or chip.startswith("armv8") or chip in ("aarch64", "arm64"):
        return "aarch64"
    return "x86_64" if chip == "x86_64" or chip.startswith("sm_") else None


def build_target(chip: str | None, choice: str) -> BuildTarget:
    """The target for a device's chip (None: this machine) by the setting ``target``.

    Raises:
        BadInput: there is none, as half a sentence.
    """
    kind = _kind(chip) if choice == "auto" else choice
    machine = _processor_of(chip)
    if kind == "llvm" and machine and not (chip or "").startswith("sm_"):
        return _llvm(machine, chip or machine)
    if kind == "llvm" and chip in _JETSONS:
        return _llvm("aarch64", "aarch64")
    if kind in ("cuda", "jetson"):
        return _cuda(_cuda_chip(chip, kind), kind)
    if kind == "vulkan" and machine:
        return _vulkan(machine, chip or machine)
    if kind == "metal" and chip in (None, "metal"):
        return _metal("metal")
    if kind == "android" and (chip is None or chip.startswith("adreno")):
        return BuildTarget("android", "android:adreno", "model.tar", "aarch64", chip or "adreno")
    here = "this machine" if chip is None else f"the chip '{chip}'"
    raise BadInput(f"its target '{kind}' does not fit {here}; choose --set target=auto, or a device that it fits")


def _kind(chip: str | None) -> str:
    if chip is None and sys.platform == "darwin":
        return "metal"
    if chip is None or (_processor_of(chip) and not chip.startswith("sm_")):
        return "llvm"
    if chip.startswith("sm_"):
        return "jetson" if chip in _JETSONS else "cuda"
    if chip == "metal":
        return "metal"
    if chip.startswith("adreno"):
        return "android"
    raise BadInput(
        f"its chip '{chip}' has no target of MLC-LLM; choose one of {', '.join(CHOICES[1:])} by --set target"
    )


def _cuda_chip(chip: str | None, kind: str) -> str:
    found = chip
    if chip is None:
        found = "sm_87" if kind == "jetson" else next((c for c in own_chips() if c.startswith("sm_")), None)
    if found is None or not found.startswith("sm_"):
        here = "this machine has no CUDA GPU" if chip is None else f"'{chip}' is no CUDA chip"
        raise BadInput(f"its target '{kind}' needs a chip such as sm_87, and {here}; name a --device that has one")
    if kind == "jetson" and found not in _JETSONS:
        raise BadInput(
            f"its target 'jetson' needs a chip of {', '.join(_JETSONS)}, and '{found}' is none; use --set target=cuda"
        )
    return found
