"""The ``torch-compile`` flow: the dense folder as it is, its decoding step compiled by TorchInductor.

The cache is a static one of the whole context, read only as far as it is filled. One token a sequence is one compiled
graph, the same for every position; prompts run eagerly into the same cache. Compiling is paid when the engine is
opened, never at a token.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import BuildOptions, Counts, Ids
from amoeba_deploy.backends.takes import ANY_BLOCKS, Takes
from amoeba_deploy.backends.torch import DEVICE, DTYPES, DenseFolderBackend, engine_device, torch_threads
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.files import cache_folder
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.static_cache import fix_rotary, rotary_refusal, static_cache

if TYPE_CHECKING:
    import torch

SPAN = 32
"""On the CPU, the cache is read up to the next multiple of it."""
WARM_UP = 3
"""Steps run when an engine is opened: the first compiles, and CUDA graphs are recorded after the second."""


class CompiledEngine:
    """A transformers model with a static cache whose decoding step is compiled."""

    def __init__(
        self, folder: Path, dtype: str, threads: int | None, device: str, context: int, batch: int = 1
    ) -> None:
        quiet_imports()
        import torch

        from amoeba_deploy.backends.torch_compile.layer import LiveLayer

        self._device, self._context, self._batch = device, context, batch
        self._threads = threads
        self._model: Any = load_torch_model(folder, dtype).requires_grad_(False).to(device)
        fix_rotary(self._model)
        held = _spans(context) + SPAN
        self._cache = static_cache(self._model, held, batch, LiveLayer)
        self._seen = torch.zeros(batch, held, dtype=torch.int64, device=device)
        """Which positions of the cache hold real tokens [batch, held]."""
        self._fed = 0
        mode = "reduce-overhead" if device == "cuda" else "default"
        # Compiled code, and how often it may be made, is kept with a function's code: every engine has its own.
        own = FunctionType(CompiledEngine._run.__code__.replace(), CompiledEngine._run.__globals__)
        self._step = torch.compile(MethodType(own, self), fullgraph=True, dynamic=False, mode=mode)
        self._warm_up()

    def reset(self) -> None:
        self._cache.reset()
        self._seen.zero_()
        self._fed = 0

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        import torch

        rows, count = ids.shape
        if rows > self._batch:
            raise BadInput(f"the engine was opened for {self._batch} sequences at once, and {rows} were fed")
        if self._fed + count > self._context:
            raise BadInput(
                f"the engine's cache holds {self._context} positions, and {self._fed + count} were fed; open it with a "
                f"larger context"
            )
        # The graph is for so many rows and no fewer; what fills up is cut off again.
        filled = np.zeros((self._batch, count), np.int64)
        filled[:rows] = ids
        real = np.full(self._batch, count)
        if lengths is not None:
            real[:rows] = lengths
        new = torch.from_numpy(np.arange(count)[None] < real[:, None]).long().to(self._device)
        positions = self._seen.sum(1, keepdim=True) + torch.arange(count, device=self._device)[None]
        self._seen[:, self._fed : self._fed + count] = new
        self._fed += count
        run = self._step if count == 1 else self._run
        with torch_threads(self._threads), torch.no_grad():
            if self._device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            logits = run(torch.from_numpy(filled).to(self._device), positions, self._live())
        return np.asarray(logits[:rows].float().cpu().numpy())

    def _live(self) -> torch.Tensor:
        """The part of the mask up to what was fed, in whole spans; on a GPU, whose graphs have one size, all of it."""
        import torch

        if self._device == "cuda":
            return self._seen
        live = self._seen[:, : _spans(self._fed)]
        torch._dynamo.mark_dynamic(live, 1)
        return live

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits [batch, n, vocabulary] of new ids [batch, n] at positions [batch, n]; ``seen`` counts them already."""
        for layer in self._cache.layers:
            layer.end = seen.shape[1]
        output = self._model(
            input_ids=ids, position_ids=positions, attention_mask=seen, past_key_values=self._cache, use_cache=True
        )
        logits: torch.Tensor = output.logits
        return logits

    def _warm_up(self) -> None:
        from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

        try:
            with _compiled_code_in_our_cache():
                for _ in range(min(WARM_UP, self._context)):
                    self.feed(np.zeros((self._batch, 1), np.int64))
        except (CppCompileError, InductorError, InvalidCxxCompiler) as error:
            cause = error.inner_exception if isinstance(error, InductorError) else error
            if not isinstance(cause, (CppCompileError, InvalidCxxCompiler)):
                raise
            reason = next((line for line in str(cause).splitlines() if "error" in line.lower()), str(cause)[:200])
            raise AmoebaError(f"the C++ compiler did not compile the model's graph: {reason.strip()}") from None
        self.reset()


def _spans(positions: int) -> int:
    """The next multiple of a span."""
    return -(-positions // SPAN) * SPAN


@contextmanager
def _compiled_code_in_our_cache() -> Iterator[None]:
    """Keep TorchInductor's files in Amoeba's cache folder, not in a temporary one, unless the user chose a place."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    chosen = os.environ.get(name)
    # Importing TorchInductor names its temporary folder here itself.
    if chosen is not None and chosen != default_cache_dir():
        yield
        return
    os.environ[name] = str(cache_folder() / "torchinductor")
    try:
        yield
    finally:
        os.environ.pop(name, None)


class TorchCompileBackend(DenseFolderBackend):
    """PyTorch compiled by TorchInductor."""

    flow = "torch-compile"
    takes = Takes("torch-compile", tuple(DTYPES), any_trait=True, varying=ANY_BLOCKS)
    own_threads: ClassVar = False
    settings: ClassVar = {"device": DEVICE}

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        reason = super().cannot_run(precision, options)
        return reason or (no_compiler() if options.settings.get("device", "cpu") == "cpu" else None)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        return super().refusal(subnet, precision, options) or rotary_refusal(subnet)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> CompiledEngine:
        model, device = ModelFolder(artefact), engine_device(artefact)
        reason = no_compiler() if device == "cpu" else None
        if reason:
            raise ToolchainMissing(f"the flow '{self.flow}' cannot run here: {reason}")
        positions = context or min(model.architecture.context, 2048)
        return CompiledEngine(artefact, DTYPES[precision], threads, device, positions, batch)


def no_compiler() -> str | None:
    """Why TorchInductor cannot compile for this machine's CPU, as half a sentence, or None."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        return f"it needs the C++ compiler {compiler}, which is not on the path; install it (Debian: apt install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "it needs the header Python.h; install Python's development files (Debian: apt install python3-dev)"
    return None


BACKEND = TorchCompileBackend()
