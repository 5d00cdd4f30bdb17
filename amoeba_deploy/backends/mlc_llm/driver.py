"""Runs mlc_llm under the Python interpreter that has it: this file is executed there by its path, and imports only
the standard library, numpy, tvm and mlc_llm.

``driver.py versions`` prints the versions of tvm and mlc_llm as JSON. ``driver.py convert_weight|gen_config|compile
...`` runs that command of mlc_llm with the command's own arguments. ``driver.py serve FOLDER CONTEXT BATCH`` runs a
compiled model on the CPU: requests come in on standard input, logits go out on standard output (see ``serve``).

``python -m mlc_llm`` does the same where MLC's own C++ library is built. Its Python parts alone (a checkout of the
sources on the path, and TVM from PyPI) are enough here: what they need of that library is stood in for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import types
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

COMMANDS = ("convert_weight", "gen_config", "compile")
LIBRARY = "model.so"
PAGE = 16
"""Positions in a page of the key/value cache."""


def main(arguments: list[str]) -> int:
    """Run one command; a failure is one line on standard error."""
    command, *rest = arguments
    if command == "versions":
        print(json.dumps(versions()))
        return 0
    if command == "serve":
        folder, context, batch = rest
        serve(Path(folder), int(context), int(batch))
        return 0
    try:
        _prepare()
        importlib.import_module(f"mlc_llm.cli.{command}").main(rest)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {(lines or ['no message'])[0]}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------------------------------------------- what there is


def versions() -> dict[str, str]:
    """Versions of tvm and mlc_llm, of those that are there; nothing of them is imported.

    A checkout of the sources has no version of its own, so it gets a digest of its files: another state compiles to
    another library.
    """
    packages, found = packages_distributions(), {}
    for module in ("tvm", "mlc_llm"):
        if module in packages:
            found[module] = version(packages[module][0])
            continue
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if places:
            found[module] = _sources_version(Path(places[0]))
    return found


def _sources_version(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    information = folder / "libinfo.py"
    stated = re.search(r'__version__ = "([^"]+)"', information.read_text()) if information.is_file() else None
    return f"{stated.group(1) if stated else '0'}+sources.{digest.hexdigest()[:12]}"


def _has_own_library(package: Path) -> bool:
    """Whether MLC's C++ library lies where its ``libinfo.find_lib_path`` looks."""
    build = package.parent.parent / "build"
    places = [package, build, build / "Release", *map(Path, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    if os.environ.get("MLC_LIBRARY_PATH"):
        places.append(Path(os.environ["MLC_LIBRARY_PATH"]))
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return any((place / f"libmlc_llm_module.{suffix}").is_file() for place in places)


# ---------------------------------------------------------------------------------------------- mlc_llm's own commands


def _prepare() -> None:
    spec = find_spec("mlc_llm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("mlc_llm cannot be imported by this interpreter")
    package = Path(spec.submodule_search_locations[0])
    if not _has_own_library(package):
        _stand_in(package)
    _bridge_releases()
    _leave_out_slow_schedule()
    logging = importlib.import_module("mlc_llm.support.logging")
    logging.enable_logging()


def _stand_in(package: Path) -> None:
    """Make the commands work without MLC's C++ library.

    The package's ``__init__`` starts the serving engine, which is that library; an empty one does for the commands.
    It also detects how a tokenizer writes spaces, and a CPU by starting ``mlc_llm`` once more.
    """
    os.environ["SKIP_LOADING_MLCLLM_SO"] = "1"
    own = types.ModuleType("mlc_llm")
    own.__path__ = [str(package)]
    tokenizers = types.ModuleType("mlc_llm.tokenizers")
    tokenizers.Tokenizer = _Tokenizer  # type: ignore[attr-defined]
    sys.modules |= {"mlc_llm": own, "mlc_llm.tokenizers": tokenizers}
    devices = importlib.import_module("mlc_llm.support.auto_device")
    devices._RESULT_CACHE["cpu:0"] = True


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's decoder or normalizer, of which a Sequence has several."""
    if not isinstance(value, dict):
        return []
    return list(value[key]) if value.get("type") == "Sequence" else [value]


@dataclass
class TokenizerInfo:
    """As MLC's own of that name, which ``gen_config`` writes down."""

    token_postproc_method: str
    prepend_space_in_encode: bool
    strip_space_in_decode: bool


class _Tokenizer:
    """Stands in for MLC's tokenizer, of which ``gen_config`` asks one thing."""

    @staticmethod
    def detect_tokenizer_info(path: str) -> TokenizerInfo:
        """How a ``tokenizer.json`` writes bytes and spaces, by the rules of cpp/tokenizers/tokenizers.cc."""
        file = Path(path) / "tokenizer.json"
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        decoders = _parts(value.get("decoder"), "decoders")
        kinds = [decoder["type"] for decoder in decoders if decoder["type"] in ("ByteLevel", "ByteFallback")]
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return TokenizerInfo(
            "byte_level" if kinds and kinds[-1] == "ByteLevel" else "byte_fallback",
            any(
                part["type"] == "Prepend" and part.get("prepend") == "▁"
                for part in _parts(value.get("normalizer"), "normalizers")
            ),
            any(strip.items() <= decoder.items() for decoder in decoders),
        )


def _bridge_releases() -> None:
    """MLC's sources ask a relax variable for ``name_hint``, which TVM 0.26 calls ``name``."""
    relax = importlib.import_module("tvm.relax")
    if not hasattr(relax.Var, "name_hint") and not hasattr(relax.Var, "vid"):
        relax.Var.name_hint = property(lambda variable: variable.name)


def _leave_out_slow_schedule() -> None:
    """Leave TVM's matrix-vector schedule for CPUs out: with it a tiny model compiled in minutes instead of seconds."""
    found = [name for name in ("tvm.s_tir", "tvm") if find_spec(name) and find_spec(f"{name}.dlight")]
    if not found:
        return
    schedules = importlib.import_module(f"{found[0]}.dlight")

    class NoSchedule(schedules.base.ScheduleRule):  # type: ignore[misc, name-defined]
        def apply(self, *_: Any) -> None:
            return None

    schedules.cpu.GEMV = NoSchedule


# ------------------------------------------------------------------------------------------------ running a library


class Server:
    """A compiled model in TVM's virtual machine, with a paged key/value cache for a number of sequences."""

    def __init__(self, folder: Path, context: int, batch: int) -> None:
        import tvm
        from tvm import relax
        from tvm.contrib import tvmjs

        shape = importlib.import_module("tvm_ffi").Shape
        self._tvm, self._shape = tvm, shape
        self._machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / LIBRARY)), tvm.cpu())
        self.metadata = json.loads(self._machine["_metadata"]())
        held, _ = tvmjs.load_tensor_cache(str(folder), tvm.cpu())
        self._parameters = [held[entry["name"]] for entry in self.metadata["params"]]
        positions = -(-context // PAGE) * PAGE * batch
        sizes = (batch, positions, self.metadata["prefill_chunk_size"], PAGE, 0)
        self._cache = self._machine["create_tir_paged_kv_cache"](*(shape([size]) for size in sizes))
        names = ("clear", "add_sequence", "begin_forward", "end_forward")
        self._state = {name: tvm.get_global_func(f"vm.builtin.kv_state_{name}") for name in names}
        self._sequences = 0

    def reset(self) -> None:
        """Forget all sequences."""
        self._state["clear"](self._cache)
        self._sequences = 0

    def feed(self, counts: list[int], ids: Any) -> Any:
        """Logits [sum of counts, vocabulary] in float32 for so many new ids of each sequence, one row after the other.

        A single id of each sequence goes through the decoding kernels, as in MLC's own engine; more through
        ``batch_verify``, which alone gives logits at every position.
        """
        for sequence in range(self._sequences, len(counts)):
            self._state["add_sequence"](self._cache, sequence)
        self._sequences = max(self._sequences, len(counts))
        which = [sequence for sequence, count in enumerate(counts) if count]
        lengths = [counts[sequence] for sequence in which]
        tensor = self._tvm.runtime.tensor
        self._state["begin_forward"](self._cache, self._shape(which), self._shape(lengths))
        hidden = self._machine["embed"](tensor(ids), self._parameters).numpy()
        single = all(length == 1 for length in lengths)
        rows = hidden.reshape((len(ids), 1, -1) if single else (1, len(ids), -1))
        function = self._machine["batch_decode" if single else "batch_verify"]
        logits = function(tensor(rows), self._cache, self._parameters)[0].numpy()
        self._state["end_forward"](self._cache)
        return logits.reshape(len(ids), -1)


def serve(folder: Path, context: int, batch: int) -> None:
    """Answer requests until standard input ends.

    A request is a line of JSON, either ``{"reset": true}`` or ``{"counts": [2, 1]}``, the new ids of each sequence,
    followed by all the ids as int32. An answer is a line of JSON, ``{"bytes": N}`` with so many bytes of float32
    behind it, or ``{"error": "..."}``. The first answer, without a request, is the library's metadata.
    """
    import numpy as np

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    try:
        server = Server(folder, context, batch)
    except Exception as error:
        _answer(answers, {"error": _first_line(error)})
        return
    _answer(answers, {"metadata": {k: v for k, v in server.metadata.items() if k != "params"}})
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        try:
            if request.get("reset"):
                server.reset()
                _answer(answers, {"bytes": 0})
                continue
            counts = [int(count) for count in request["counts"]]
            ids = np.frombuffer(sys.stdin.buffer.read(4 * sum(counts)), np.int32)
            logits = np.ascontiguousarray(server.feed(counts, ids), np.float32)
            _answer(answers, {"bytes": logits.nbytes}, logits.tobytes())
        except Exception as error:
            _answer(answers, {"error": _first_line(error)})


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0]}"


def _answer(stream: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    stream.write(json.dumps(head).encode() + b"\n" + body)
    stream.flush()


if __name__ == "__main__":
    # Python puts the folder of this file first, whose modules are not meant here.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main(sys.argv[1:]))
