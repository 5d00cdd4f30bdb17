"""llama.cpp's own quantiser, in a process of its own: what kills it does not kill the export.

A row whose length is no multiple of a type's block is stored in a wider type, and the quantiser exits with success. So
the types that tensors really got are read from the file that it wrote, and what is wider than asked for is said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from amoeba_deploy.backends.gguf.engine import default_threads
from amoeba_deploy.backends.gguf.file import FILE_TYPES, GgufFile
from amoeba_deploy.errors import AmoebaError

BLOCKS = {"Q8_0": 32, "Q4_0": 32, "Q6_K": 256, "Q5_K": 256, "Q4_K": 256}
"""Weights that a type stores together, by which rows must divide."""
PLANNED = {
    "q8_0": ("Q8_0",),
    "q6_k": ("Q6_K",),
    "q5_k_m": ("Q5_K", "Q6_K"),
    "q4_k_m": ("Q4_K", "Q6_K"),
    "q4_0": ("Q4_0", "Q6_K"),
}
"""The types of each precision: of most matrices, and of the output head and some of a mixture's matrices."""
_SCRIPT = """
import ctypes, os, sys, llama_cpp
said = []
@llama_cpp.llama_log_callback
def keep(_level, text, _data):
    said.append(text.decode("utf-8", "replace"))
llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
source, target, kind, threads = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(kind), int(threads)
done = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters)
if done:
    lines = [line for line in "".join(said).splitlines() if "fail" in line or "error" in line] or ["no reason given"]
    sys.exit("quantiser: " + lines[-1])
"""


def quantise(source: Path, target: Path, precision: str, threads: int | None = None) -> None:
    """Quantise a float file into another; nothing is left of the other where that fails.

    Raises:
        AmoebaError: the quantiser failed or was killed; the message has its last words.
    """
    count = threads or default_threads()
    # -P: the working folder is not where modules come from.
    command = [sys.executable, "-P", "-c", _SCRIPT, str(source), str(target), str(FILE_TYPES[precision]), str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode == 0 and target.is_file():
        return
    target.unlink(missing_ok=True)
    words = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    if done.returncode < 0:
        how = f"was killed by signal {-done.returncode}; see whether memory was short"
    else:
        how = f"failed ({words[-1].removeprefix('quantiser: ')[:200]}); see whether {target.parent} has room"
    raise AmoebaError(f"{target}: llama.cpp's quantiser {how}")


def fallbacks(found: GgufFile, precision: str) -> tuple[str, ...]:
    """A sentence for each type that matrices are in although the precision does not name it, with the reason."""
    wanted = PLANNED.get(precision, ())
    matrices = [tensor for tensor in found.tensors.values() if len(tensor.shape) > 1]
    others = [tensor for tensor in matrices if wanted and tensor.kind not in wanted]
    largest = max((BLOCKS[kind] for kind in wanted), default=1)
    said = []
    for kind in sorted({tensor.kind for tensor in others}):
        found_in = [tensor for tensor in others if tensor.kind == kind]
        lengths = " or ".join(str(length) for length in sorted({tensor.shape[-1] for tensor in found_in}))
        stems = ", ".join(sorted({tensor.name.split(".")[-2] for tensor in found_in}))
        said.append(
            f"{len(found_in)} of {len(matrices)} matrices are in {kind} instead of {' or '.join(wanted)}, because "
            f"their rows of {lengths} are no multiple of {32 if kind == 'F16' else largest}: {stems}"
        )
    return tuple(said)
