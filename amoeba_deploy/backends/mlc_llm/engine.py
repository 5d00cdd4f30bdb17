"""A compiled model run on the CPU by TVM's virtual machine, in a process of the interpreter that has tvm.

Ids go to it and logits come back through pipes; ``driver.serve`` states the protocol. It ends with this object.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Counts, Ids
from amoeba_deploy.backends.mlc_llm.tool import DRIVER, last_line
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.profiles.machine import threads as own_threads


class MlcEngine:
    """The process, and how many positions of each sequence are fed."""

    def __init__(self, python: str, folder: Path, settings: dict[str, Any], threads: int | None) -> None:
        """Start it.

        Args:
            python: the interpreter that has tvm.
            folder: the artefact.
            settings: ``context`` (positions), ``batch`` (sequences), ``chunk`` (new ids at once) and ``vocabulary``.
            threads: how many compute; all cores where left out.

        Raises:
            AmoebaError: it does not start, or cannot load the artefact.
        """
        self._settings = settings
        count = str(threads or own_threads())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(DRIVER), "serve", str(folder), str(settings["context"]), str(settings["batch"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count},
        )
        weakref.finalize(self, _stop, self._process)
        self._fed = np.zeros(0, np.int64)
        self.metadata: dict[str, Any] = self._answer()["metadata"]

    def reset(self) -> None:
        self._fed = np.zeros(0, np.int64)
        self._ask({"reset": True})

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        batch, count = ids.shape
        real = np.full(batch, count) if lengths is None else np.asarray(lengths, np.int64)
        fed = self._fed if self._fed.size else np.zeros(batch, np.int64)
        self._check(ids, fed + real, batch)
        logits = np.zeros((batch, count, self._settings["vocabulary"]), np.float32)
        step = max(self._settings["chunk"] // batch, 1)
        for first in range(0, count, step):
            counts = np.clip(real - first, 0, min(step, count - first))
            if not counts.any():
                break
            rows = [ids[row, first : first + n] for row, n in enumerate(counts)]
            found = self._forward(counts, np.concatenate(rows).astype(np.int32))
            for row, part in enumerate(np.split(found, np.cumsum(counts)[:-1])):
                logits[row, first : first + len(part)] = part
        self._fed = fed + real
        return logits

    def _check(self, ids: Ids, positions: NDArray[np.int64], batch: int) -> None:
        context, most, vocabulary = (self._settings[key] for key in ("context", "batch", "vocabulary"))
        if batch > most or (self._fed.size and self._fed.size != batch):
            raise BadInput(f"the engine was opened for {most} sequences at once, and {batch} are fed; open it for them")
        if positions.max() > context:
            raise BadInput(
                f"the engine has {context} positions, and {positions.max()} tokens are fed; build it with a larger "
                f"--context"
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise BadInput(f"ids go from 0 to {vocabulary - 1}, and {ids.min()} to {ids.max()} are fed")

    def _forward(self, counts: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        data = self._ask({"counts": counts.tolist()}, ids.tobytes())
        return np.frombuffer(data, np.float32).reshape(len(ids), self._settings["vocabulary"])

    def _ask(self, request: dict[str, Any], body: bytes = b"") -> bytes:
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(request).encode() + b"\n" + body)
            stream.flush()
        except OSError:
            raise AmoebaError(f"the MLC-LLM engine ended: {self._last_words()}") from None
        return self._read(int(self._answer()["bytes"]))

    def _answer(self) -> dict[str, Any]:
        line = _output(self._process).readline()
        if not line:
            raise AmoebaError(f"the MLC-LLM engine ended: {self._last_words()}")
        value = json.loads(line)
        if "error" in value:
            raise AmoebaError(f"the MLC-LLM engine failed: {value['error']}")
        assert isinstance(value, dict)
        return value

    def _read(self, size: int) -> bytes:
        data = _output(self._process).read(size)
        if len(data) != size:
            raise AmoebaError(f"the MLC-LLM engine ended: {self._last_words()}")
        return data

    def _last_words(self) -> str:
        self._errors.seek(0)
        return last_line(self._errors.read().decode("utf-8", "replace"))


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process: it ends by itself with its input, unless it hangs."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                continue
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
