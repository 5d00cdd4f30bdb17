"""What a compiled library really is: which processor its code is for, whether a GPU's code is there, which model.

MLC exits with 0 also where it could not build what was asked for: without nvcc a CUDA library comes out as an archive
of CUDA source. So nothing is believed but the bytes.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amoeba_deploy.backends.mlc_llm.targets import BuildTarget
from amoeba_deploy.errors import VerificationFailed

_ELF = b"\x7fELF"
_MACHINES = {62: "x86_64", 183: "aarch64"}
"""``e_machine`` of the ELF specification."""
_MACH_O_64 = b"\xcf\xfa\xed\xfe"
_ARM64 = 0x0100000C
"""``cputype`` of a Mach-O header."""
_FATBIN = struct.pack("<I", 0xBA55ED50)
"""The magic number that nvcc's fat binaries begin with."""
_CUDA_SOURCE = b"__global__"
_METADATA = b'{"model_type": '


def library_parts(file: Path) -> Iterator[tuple[str, bytes]]:
    """The name and bytes of a library, or of every member of an archive of objects."""
    if file.suffix != ".tar":
        yield file.name, file.read_bytes()
        return
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield f"{file.name}:{member.name}", stream.read()
    except tarfile.TarError:
        raise VerificationFailed(f"{file}: is no archive of objects, though mlc_llm reported success") from None


def _machine(data: bytes) -> str | None:
    """The processor that an object's code is for; None where it is no object."""
    if data[:4] == _ELF and len(data) > 20:
        return _MACHINES.get(struct.unpack_from("<H", data, 18)[0], "another processor")
    if data[:4] == _MACH_O_64 and len(data) > 8:
        return "arm64" if struct.unpack_from("<I", data, 4)[0] == _ARM64 else "another processor"
    return None


def check_library(file: Path, target: BuildTarget) -> dict[str, Any]:
    """The metadata of a compiled library.

    Raises:
        VerificationFailed: it is missing, or is not for the target.
    """
    if not file.is_file():
        raise VerificationFailed(f"{file.name} was not written, though mlc_llm compile reported success")
    parts = list(library_parts(file))
    for name, data in parts:
        found = _machine(data)
        if found is None:
            what = "CUDA source" if _CUDA_SOURCE in data else "no object code"
            raise VerificationFailed(
                f"{name} is {what}, though mlc_llm compile reported success; "
                f"{_advice(target) if what == 'CUDA source' else 'compile it on the device'}"
            )
        if found != target.machine:
            raise VerificationFailed(f"{name} is code for {found}, where {target.chip} has {target.machine}")
    whole = b"".join(data for _, data in parts)
    if target.name in ("cuda", "jetson") and _FATBIN not in whole:
        what = "CUDA source in place of" if _CUDA_SOURCE in whole else "no"
        raise VerificationFailed(f"{file.name} holds {what} code for {target.chip}; {_advice(target)}")
    start = whole.find(_METADATA)
    if start < 0:
        raise VerificationFailed(f"{file.name} holds no compiled model, though mlc_llm compile reported success")
    try:
        value, _ = json.JSONDecoder().raw_decode(whole[start : start + 64 * 2**20].decode("latin-1"))
    except ValueError:
        raise VerificationFailed(f"{file.name} holds damaged metadata; compile it again") from None
    assert isinstance(value, dict)
    return value


def _advice(target: BuildTarget) -> str:
    return f"nvcc must make a fat binary for {target.chip}: install the CUDA toolkit here, or compile on the device"
