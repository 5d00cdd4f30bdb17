"""The ``gguf`` flow: one file for llama.cpp and what builds on it, run here through llama-cpp-python.

An artefact is ``model-PRECISION.gguf``: weights, sizes and the tokenizer. Float precisions are written with the gguf
package alone; quantised ones go through llama.cpp's own quantiser. docs/backend_gguf.md says what is computed how.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Identity,
    Setting,
    Toolchain,
    installed_versions,
    require_legal,
)
from amoeba_deploy.backends.gguf import arches, tokenizer
from amoeba_deploy.backends.gguf.engine import GgufEngine
from amoeba_deploy.backends.gguf.file import FILE_TYPES, FLOAT_TYPES, GgufFile, file_name, write_file
from amoeba_deploy.backends.gguf.quantiser import PLANNED, fallbacks, quantise
from amoeba_deploy.backends.gguf.rotary import FACTORED
from amoeba_deploy.backends.gguf.weights import file_blocks, held_tensors, model_tensor
from amoeba_deploy.backends.takes import ANY_WIDTHS, Takes
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.extraction.native_layouts import gguf_arrays
from amoeba_deploy.extraction.ragged import BlockSizes
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan
from amoeba_deploy.precision import StorageFormat

_WRITER, _RUNNER = "gguf", "llama-cpp-python"
_INSTALL = "pip install 'amoeba-deploy[gguf]'"
_ROWS: Mapping[str, int] = {"fp32": 1, "fp16": 1, "bf16": 1, "q8_0": 32, "q4_0": 32, "": 256}


class GgufBackend(Backend):
    """llama.cpp."""

    flow = "gguf"
    takes = Takes(
        # Quantised rows of another length are stored in wider types without a word; FFN width 0 drops attention too.
        "gguf",
        (*FLOAT_TYPES, *PLANNED),
        aliases={"int8": "q8_0", "int4": "q4_k_m"},
        classes=arches.FAMILIES,
        traits=arches.TRAITS,
        ropes=FACTORED,
        varying=ANY_WIDTHS | {"without_attention"},
        even_heads=True,
        neuron_multiple=_ROWS,
        query_multiple=_ROWS,
        hidden_multiple={"q8_0": 32, "q4_0": 32},
    )
    settings: ClassVar[Mapping[str, Setting]] = {
        "tokenizer": Setting(
            "include", "whether the file holds the tokenizer, for chatting with it", ("include", "none")
        )
    }

    def block_sizes(self, plan: Plan, architecture: Architecture, multiple: int) -> tuple[BlockSizes, ...]:
        """Of what ``deci`` computes each block's own; of other families the widest for every block."""
        if arches.takes_differing(architecture):
            return gguf_arrays(plan, multiple).blocks
        widest = plan.subnet(architecture)
        neurons = -(-widest.neurons // multiple) * multiple
        return (BlockSizes(widest.heads, widest.kv_heads, neurons),) * len(plan.blocks)

    def storage(self, precision: str) -> StorageFormat:
        return _STORAGE[precision]

    def toolchain(self) -> Toolchain:
        """The quantiser is asked for only where a precision needs it: see ``lower``."""
        versions, missing = installed_versions((_WRITER,))
        return Toolchain(versions | installed_versions((_RUNNER,))[0], missing, _INSTALL)

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        if installed_versions((_RUNNER,))[1]:
            return f"{_RUNNER}, which runs it, is not installed; run {_INSTALL}"
        return None

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        """A file runs wherever llama.cpp does: no version and no chip binds it."""
        return Identity(precision, options.batch, options.context, self.toolchain().versions)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        return self.takes.refusal(subnet, precision) or arches.refusal(subnet, precision, options.context)

    def tolerance(self, precision: str) -> float:
        # llama.cpp multiplies in the weights' own type on CPUs: activations are rounded to float16, bfloat16, or 8 bits
        # in blocks. In random models, which amplify noise, logits were off by up to 0.7%, 4.4% and 12.6%. Mistakes are
        # caught far below that, by the same graph on float32 weights. In fp32 the most seen was 4.6e-6.
        return {"fp32": EXACT_TOLERANCE, "fp16": 0.02, "bf16": 0.1}.get(precision, 0.2)

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        if precision in PLANNED:
            _require_runner(f"{precision} needs llama.cpp's quantiser")
        unlike = arches.config_refusal(model.architecture, model.config) or arches.blocks_refusal(
            model.architecture, model.blocks or ()
        )
        if unlike:
            raise BadInput(f"the flow 'gguf' cannot lower {model.path} in {precision}: {unlike}")
        sizes, blocks = model.architecture, file_blocks(model)
        arch = arches.file_arch(sizes, blocks)
        included = tokenizer.vocabulary(model) if options.settings.get("tokenizer") != "none" else None
        entries: dict[str, Any] = {"general.type": "model", "general.file_type": FILE_TYPES[precision]}
        found = arches.metadata(sizes, arch, blocks, model.config, options.context)
        entries |= {f"{arch.name}.{key}": value for key, value in found.items()}
        notes = included.check(model, arch.name, entries) if included else _left_out(options)
        entries |= included.entries if included else tokenizer.NONE
        target = output / file_name(precision)
        tensors = held_tensors(model, *arches.adjustments(sizes))
        write = partial(write_file, arch=arch.name, entries=entries, model=model, tensors=tensors)
        if precision in FLOAT_TYPES:
            write(target, kind=FLOAT_TYPES[precision])
        else:
            with tempfile.TemporaryDirectory(prefix=".amoeba-gguf-", dir=output) as work:
                float_file = Path(work) / "float.gguf"
                write(float_file, kind=_float_type(model))
                quantise(float_file, target, precision)
        written = GgufFile(target)
        facts = {
            "architecture": arch.name,
            "tensor_types": written.types(),
            "bits_per_weight": round(written.bits(), 4),
        }
        return Artefact(output, precision, (), (*notes, *fallbacks(written, precision)), facts)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> GgufEngine:
        path = artefact / file_name(precision)
        if not path.is_file():
            raise BadInput(f"{artefact}: has no {path.name}; it is no {precision} artefact of the flow 'gguf'")
        _require_runner("the flow 'gguf' runs on it")
        return GgufEngine(path, threads, context, batch)

    def open_exact(self, artefact: Path, precision: str) -> GgufEngine | None:
        """The same keys and the dequantised weights in float32: llama.cpp rounds activations to the weights' type."""
        found = GgufFile(artefact / file_name(precision))
        if precision == "fp32" or found.architecture in arches.INEXACT:
            return None
        with tempfile.TemporaryDirectory(prefix="amoeba-gguf-") as work:
            # Once it is loaded the file lives on without its name.
            found.write_float32(Path(work) / file_name("fp32"))
            return self.open(Path(work), "fp32")

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        if precision == "fp32":
            return model.path
        found = GgufFile(artefact / file_name(precision))
        held = held_tensors(model, *arches.adjustments(model.architecture))
        copy_model(model, output, "float32", lambda name, _info: model_tensor(held, name, found.values))
        return output


def _left_out(options: BuildOptions) -> tuple[str, ...]:
    if options.settings.get("tokenizer") == "none":
        return ()
    return ("the model's folder has no tokenizer.json, so the file holds no tokenizer and is fed token ids",)


def _require_runner(why: str) -> None:
    if installed_versions((_RUNNER,))[1]:
        raise ToolchainMissing(f"{why}: {_RUNNER} is not installed; run {_INSTALL}")


def _float_type(model: ModelFolder) -> str:
    """The narrowest type that holds all weights of a model as they are."""
    kinds = {info.dtype for info in model.tensors.infos.values()}
    return kinds.pop() if len(kinds) == 1 and kinds <= {"F16", "BF16"} else "F32"


_STORAGE = {
    "fp32": StorageFormat(32, 32, 32, 4, 4),
    "fp16": StorageFormat(16, 16, 32, 4, 4),
    "bf16": StorageFormat(16, 16, 32, 4, 4),
    "q8_0": StorageFormat(8.5, 8.5, 32, 4, 4),
    "q6_k": StorageFormat(6.5625, 6.5625, 32, 4, 4),
    "q5_k_m": StorageFormat(5.66, 5.5, 32, 4, 4, head_bits=6.5625),
    "q4_k_m": StorageFormat(4.81, 4.5, 32, 4, 4, head_bits=6.5625),
    "q4_0": StorageFormat(4.5, 4.5, 32, 4, 4, head_bits=6.5625),
}
"""Bits of rows in multiples of 256. Mixtures hold half of all v_proj and down_proj in Q6_K: measured in 16 and in 32
blocks, with and without grouped queries, at 5.65 to 5.66 and 4.80 to 4.82. The cache is float32, as opened here.
"""
BACKEND = GgufBackend()
