"""The ``executorch`` flow: one ``.pte`` file for XNNPACK, run by ExecuTorch's runtime.

An artefact is a folder with ``model.pte`` (the graph and all weights), config and tokenizer. Any model that
transformers holds is traced (program.py), ragged subnets too; int8 and int4 are those of quantisation.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Counts,
    Identity,
    Ids,
    Setting,
    Toolchain,
    installed_versions,
    refuse_lengths,
    require_legal,
    require_toolchain,
)
from amoeba_deploy.backends.takes import ANY_BLOCKS, Takes
from amoeba_deploy.backends.torch import longrope_refusal
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import copy_model, copy_other_files
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.quiet import quiet_imports
from amoeba_deploy.static_cache import fix_rotary, rotary_refusal
from amoeba_deploy.tensors import Array, TensorInfo

PROGRAM = "model.pte"
_BITS: dict[str, int | None] = {"fp32": None, "int8": 8, "int4": 4}
_PACKAGES = ("executorch", "torchao", "torch", "transformers")
_MOST, _CONTEXT = "get_max_seq_len", "get_max_context_len"
"""Constants of a program, as ExecuTorch's text runner asks for them: ids that a call takes, positions of the cache."""


class ExecutorchEngine:
    """A loaded program. Its caches are its own; positions beyond those fed are never read."""

    def __init__(self, folder: Path, threads: int | None, context: int | None) -> None:
        quiet_imports()
        with _quiet_stderr():
            from executorch.runtime import Runtime

            _use_threads(threads)
            try:
                self._program = Runtime.get().load_program(folder / PROGRAM)
                self._most, self._context = self._constant(_MOST), self._constant(_CONTEXT)
                self._forward: Any = self._program.load_method("forward")
            except (RuntimeError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise BadInput(f"{folder / PROGRAM}: is no program of this flow ({reason}); build it again") from None
        if context is not None and context > self._context:
            raise BadInput(f"{folder}: was built for a context of {self._context}, and {context} is asked for")
        self._fed = 0

    def _constant(self, name: str) -> int:
        return int(self._program.load_method(name).execute([])[0])

    def reset(self) -> None:
        self._fed = 0

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        refuse_lengths(lengths, ids, "executorch")
        rows, count = ids.shape
        if rows != 1:
            raise BadInput(f"the flow 'executorch' runs one sequence at a time, and {rows} were fed")
        if self._fed + count > self._context:
            raise BadInput(
                f"the engine's cache holds {self._context} positions, and {self._fed + count} were fed; build it with "
                f"a larger --context"
            )
        parts = [self._call(ids[:, first : first + self._most]) for first in range(0, count, self._most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _call(self, ids: Ids) -> NDArray[np.float32]:
        import torch

        count = ids.shape[1]
        positions = torch.arange(self._fed, self._fed + count)
        (logits,) = self._forward.execute((torch.from_numpy(np.ascontiguousarray(ids)), positions))
        self._fed += count
        # A copy: the next call writes over what this one gave.
        return np.array(logits.numpy(), dtype=np.float32)


class ExecutorchBackend(Backend):
    """ExecuTorch with XNNPACK on the CPU."""

    flow = "executorch"
    takes = Takes("executorch", tuple(_BITS), any_trait=True, varying=ANY_BLOCKS)
    own_threads: ClassVar = False
    settings: ClassVar = {
        "prefill": Setting(
            "128", "ids computed at once at most, for which memory is planned; longer prompts go in pieces"
        )
    }

    def storage(self, precision: str) -> StorageFormat:
        if precision == "fp32":
            return StorageFormat(32, 32, 32, 4, 4)
        # One float32 scale a row of int8 is next to nothing; int4 has one bfloat16 scale in 32 inputs.
        return StorageFormat(8 if precision == "int8" else 4.5, 8, 32, 4, 4)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(_PACKAGES)
        return Toolchain(versions, missing, "pip install 'amoeba-deploy[executorch]'")

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        return replace(super().identity(precision, options), bound=("executorch",))

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        if options.batch > 1:
            return (
                f"its programs run one sequence at a time, and a batch of {options.batch} is asked for; use --batch 1"
            )
        return (
            longrope_refusal(subnet, options.context) or rotary_refusal(subnet) or self.takes.refusal(subnet, precision)
        )

    def tolerance(self, precision: str) -> float:
        # int8 and int4 are held to their own dequantised weights, so only the rounding of the products' inputs to 8
        # bits a token remains: 1.4% in a trained model of 5 blocks, 2% to 14% in random ones, which amplify noise.
        return EXACT_TOLERANCE if precision == "fp32" else 0.15

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        loaded: Any = load_torch_model(model.path, "float32")
        with _quiet_stderr():
            from amoeba_deploy.backends.executorch.program import write_program
            from amoeba_deploy.backends.executorch.quantisation import quantise_model

            fix_rotary(loaded)
            bits = _BITS[precision]
            if bits is not None:
                quantise_model(loaded, bits)
            most = min(options.number("prefill") if options.settings else 128, options.context)
            write_program(loaded, output / PROGRAM, options.context, most, _constants(model, options.context, most))
        copy_other_files(model, output)
        return Artefact(output, precision)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> ExecutorchEngine:
        require_toolchain(self)
        if not (artefact / PROGRAM).is_file():
            raise BadInput(f"{artefact}: has no {PROGRAM}; it is no artefact of the flow 'executorch'")
        return ExecutorchEngine(artefact, threads, context)

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        """The weights are quantised anew, by the same rule: a program's own are packed for its kernels."""
        bits = _BITS[precision]
        if bits is None:
            return model.path
        quiet_imports()
        import torch

        from amoeba_deploy.backends.executorch.quantisation import dequantised

        tied = model.architecture.tied

        def values(name: str, _info: TensorInfo) -> Array:
            return dequantised(name, torch.tensor(model.tensors.float32(name)), bits, tied).numpy()

        copy_model(model, output, "float32", values)
        return output


def _constants(model: ModelFolder, context: int, most: int) -> dict[str, Any]:
    """What ExecuTorch's text runner asks a program beside its logits."""
    ends = model.config.get("eos_token_id")
    start = model.config.get("bos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return {
        _MOST: most,
        _CONTEXT: context,
        "get_vocab_size": model.architecture.vocabulary,
        "get_bos_id": 0 if start is None else int(start),
        **({"get_eos_ids": [int(end) for end in known]} if known else {}),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": most > 1,
    }


def _use_threads(threads: int | None) -> None:
    """Size ExecuTorch's one pool of threads, before any program is loaded: a loaded one would wait for ever.

    Raises:
        BadInput: another engine of this process has the pool, in another size.
    """
    from executorch.extension.pybindings import portable_lib

    found = portable_lib._threadpool_get_thread_count()
    wanted = threads or (found if _pool_in_use else len(os.sched_getaffinity(0)))
    if wanted != found:
        if _pool_in_use:
            raise BadInput(
                f"ExecuTorch has one pool of threads a process, which an engine uses already with {found}; open this "
                f"one with as many, or in another process"
            )
        portable_lib._unsafe_reset_threadpool(wanted)
    _pool_in_use.add(wanted)


_pool_in_use: set[int] = set()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep what ExecuTorch's libraries log of themselves off standard error; a failure raises an exception anyway."""
    with tempfile.TemporaryFile() as nowhere:
        kept = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


BACKEND = ExecutorchBackend()
