"""llama.cpp on the CPU through llama-cpp-python's low-level calls: logits of every position, several sequences."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Counts, Ids
from amoeba_deploy.errors import BadInput, ToolchainMissing

BATCH = 512
"""Positions that are computed at once: llama.cpp's default."""
_said: list[str] = []
_ready: list[Any] = []


def library() -> Any:
    """llama_cpp with its log kept here instead of printed; raises ToolchainMissing where it cannot be loaded."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ToolchainMissing(
            f"llama-cpp-python cannot be loaded ({error!r:.200}); run pip install --force-reinstall llama-cpp-python"
        ) from None
    if not _ready:

        def keep(_level: int, text: bytes, _data: Any) -> None:
            _said.append(text.decode("utf-8", "replace"))
            del _said[:-40]

        # The callback must live as long as the library.
        _ready.append(llama_cpp.llama_log_callback(keep))
        llama_cpp.llama_log_set(_ready[0], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


def default_threads() -> int:
    """All cores, or as many as ``OMP_NUM_THREADS`` says: llama.cpp's threads wait for each other by spinning."""
    asked, cores = os.environ.get("OMP_NUM_THREADS", ""), len(os.sched_getaffinity(0))
    return min(int(asked), cores) if asked.isdigit() and int(asked) else cores


def last_said() -> str:
    """What llama.cpp logged last that names a reason."""
    lines = "".join(_said).splitlines()
    found = [line for word in ("error", "failed") for line in lines if word in line]
    return (found or lines[-1:] or ["no reason given"])[0].strip()[:200]


def load(path: Path, vocab_only: bool = False) -> Any:
    """A model of llama.cpp from a file; the caller frees it.

    Raises:
        BadInput: llama.cpp refuses the file.
    """
    llama = library()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers, parameters.vocab_only = 0, vocab_only
    _said.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise BadInput(f"{path}: llama.cpp does not load it ({last_said()}); build it again")
    return model


class GgufEngine:
    """A model and a context of llama.cpp; keys, values and scores in float32, no flash attention."""

    def __init__(self, path: Path, threads: int | None, context: int | None, batch: int) -> None:
        llama = self._llama = library()
        self._model, self._context = load(path), None
        self._limit, self._batch = context or int(llama.llama_model_n_ctx_train(self._model)), batch
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = self._limit * batch
        parameters.n_seq_max = batch
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads or default_threads()
        parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32; llama.cpp's own default is float16
        parameters.flash_attn_type = 0
        parameters.offload_kqv = parameters.op_offload = False
        parameters.swa_full = True
        _said.clear()
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise BadInput(f"{path}: llama.cpp does not run it ({last_said()}); ask for a shorter --context")
        self._memory = llama.llama_get_memory(self._context)
        self._vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        self._fed: NDArray[np.int64] | None = None

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._llama.llama_free(self._context)
        if getattr(self, "_model", None):
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def reset(self) -> None:
        self._llama.llama_memory_clear(self._memory, True)
        self._fed = None

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        batch, count = ids.shape
        real = np.full(batch, count) if lengths is None else np.asarray(lengths)
        fed = np.zeros(batch, np.int64) if self._fed is None else self._fed
        if batch > self._batch:
            raise BadInput(f"the engine was opened for {self._batch} sequences at once, and {batch} are fed")
        if int((fed + real).max()) > self._limit:
            raise BadInput(f"the engine was opened for {self._limit} positions, and {int((fed + real).max())} are fed")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary:
            raise BadInput(f"the engine knows the ids 0 to {self._vocabulary - 1} only")
        logits = np.zeros((batch, count, self._vocabulary), np.float32)
        places = [(row, column) for row in range(batch) for column in range(int(real[row]))]
        for begin in range(0, len(places), BATCH):
            self._decode(ids, fed, places[begin : begin + BATCH], logits)
        self._fed = fed + real
        return logits

    def _decode(
        self, ids: Ids, fed: NDArray[np.int64], places: list[tuple[int, int]], logits: NDArray[np.float32]
    ) -> None:
        llama = self._llama
        batch = llama.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, (row, column) in enumerate(places):
                batch.token[index] = int(ids[row, column])
                batch.pos[index] = int(fed[row]) + column
                batch.seq_id[index][0], batch.n_seq_id[index] = row, 1
                batch.logits[index] = 1
            _said.clear()
            status = llama.llama_decode(self._context, batch)
            if status:
                raise BadInput(f"llama.cpp computed nothing (status {status}: {last_said()}); ask for a shorter prompt")
        finally:
            llama.llama_batch_free(batch)
        found = llama.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(found, (len(places), self._vocabulary))
        for index, (row, column) in enumerate(places):
            logits[row, column] = rows[index]
