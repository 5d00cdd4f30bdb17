"""The ``tensorrt-llm`` flow: folders and checkpoints for NVIDIA's TensorRT-LLM, and for TensorRT Edge-LLM on Jetson.

Nothing of NVIDIA's is needed to write them, and nothing here runs them: what can be proven without a GPU is proven
before ``lower`` returns, the rest are commands for the device. docs/backend_tensorrt_llm.md explains the forms.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    Artefact,
    Backend,
    BuildOptions,
    Command,
    Engine,
    Identity,
    Toolchain,
    installed_versions,
    require_legal,
)
from amoeba_deploy.backends.takes import KNOWN_ROPES, LLAMAS, Takes
from amoeba_deploy.backends.tensorrt_llm import checkpoint, edge, engine, fp8, reader, serving
from amoeba_deploy.backends.tensorrt_llm.forms import (
    SETTINGS,
    WEIGHT_ONLY,
    chip_of,
    form_of,
    mapping_of,
    refusal,
    takes_ragged,
)
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.extraction.native_layouts import deci_blocks
from amoeba_deploy.extraction.ragged import BlockSizes, Layout
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan
from amoeba_deploy.precision import StorageFormat

_PACKAGES = ("tensorrt_llm", "tensorrt")
_INSTALL = "pip install tensorrt-llm (on a machine with an NVIDIA GPU)"
_BITS = {"fp16": 16.0, "bf16": 16.0, "fp8": 8.0, "w8a16": 8.125, "w4a16": 4.125}
"""Scales included: at most one float16 for 128 weights."""
_TOLERANCES = {"fp16": 0.02, "bf16": 0.05, "fp8": 0.3, "w8a16": 0.06, "w4a16": 0.7}
"""Of the unquantised subnet's largest logit, since its tokens are the self-test's. Seen with weights rounded as
TensorRT-LLM does, the most of three models: 0.004 computing in float16, 0.027 in bfloat16; 0.13 fp8, where activations
are rounded too, 0.036 with 8 bits, 0.60 with 4 bits, one scale an output."""
_CANNOT_RUN = "TensorRT-LLM engines run on NVIDIA GPUs, by TensorRT-LLM's own tools"


class TensorrtLlmBackend(Backend):
    """TensorRT-LLM, and TensorRT Edge-LLM on Jetson."""

    flow = "tensorrt-llm"
    takes = Takes(
        "tensorrt-llm",
        tuple(_BITS),
        aliases={"int8": "w8a16", "int4": "w4a16"},
        classes=LLAMAS | {"qwen3"},
        ropes=KNOWN_ROPES,
        varying=frozenset({"kv_heads", "neurons", "without_attention", "without_feed_forward"}),
        head_sizes=frozenset({32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256}),
        neuron_multiple={"": 64},
        query_multiple={"": 64},
        hidden_multiple={"": 64},
    )
    settings = SETTINGS
    opens = False

    def layouts(self, subnet: Architecture, precision: str, options: BuildOptions) -> tuple[Layout, ...]:
        return ("uniform", "ragged") if takes_ragged(subnet, precision, options) else ("uniform",)

    def block_sizes(self, plan: Plan, architecture: Architecture, multiple: int) -> tuple[BlockSizes, ...] | None:
        return deci_blocks(plan, architecture, multiple).blocks

    def storage(self, precision: str) -> StorageFormat:
        # TensorRT-LLM quantises neither embedding nor head.
        return StorageFormat(_BITS[precision], 16, 16, 2, 2, head_bits=16)

    def toolchain(self) -> Toolchain:
        versions, _ = installed_versions(_PACKAGES)
        return Toolchain(versions, (), _INSTALL)

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        return _CANNOT_RUN

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        versions, form = self.toolchain().versions, form_of(precision, options)
        built = engine.builds_here(precision, options)
        if form == "edge":
            jetpack = options.settings["jetpack"]
            more = {"form": form, "edge_llm": edge.EDGE_RELEASES[jetpack], "jetpack": jetpack}
        else:
            mapping = mapping_of(options)
            more = {"form": form, "release": options.settings["release"], "tp": str(mapping.tp), "pp": str(mapping.pp)}
        more |= {"max_num_tokens": str(serving.max_num_tokens(options))} if form != "edge" else {}
        bound = tuple(name for name in _PACKAGES if name in versions) if built else ()
        return Identity(precision, options.batch, options.context, versions, bound, chip_of(options), more)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        return self.takes.refusal(subnet, precision) or refusal(subnet, precision, options)

    def folder_dtype(self, precision: str, options: BuildOptions) -> str | None:
        form = form_of(precision, options)
        if form == "edge":
            return "float16"
        return {"fp16": "float16", "bf16": "bfloat16"}.get(precision) if form == "A" else None

    def tolerance(self, precision: str) -> float:
        return _TOLERANCES[precision]

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        form = form_of(precision, options)
        if form == "B":
            return self._checkpoint(model, output, precision, options)
        if model.blocks is not None:
            raise BadInput(
                f"{model.path}: its blocks differ, which only form B without quantisation holds; choose --set form=B, "
                f"or extract it with --layout uniform"
            )
        if precision == "fp8":
            fp8.write_fp8(model, output)
        else:
            self._dense(model, output, precision, options)
        if form == "edge":
            facts = {"form": form, "jetpack": options.settings["jetpack"]}
            notes = edge.edge_notes(model.architecture.family)
            return Artefact(output, precision, edge.edge_steps(precision, options), notes, facts)
        serving.write_serving(output, options)
        facts = self._facts(precision, options)
        return Artefact(output, precision, facts=facts, usage=serving.serving_commands(options))

    def _dense(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> None:
        """The folder itself, used in place where it is the model's own."""
        dtype = self.folder_dtype(precision, options)
        assert dtype is not None
        if output != model.path:
            copy_model(model, output, dtype)
            return
        wanted = {"float16": "F16", "bfloat16": "BF16"}[dtype]
        other = {info.dtype for info in model.tensors.infos.values()} - {wanted}
        if other:
            raise BadInput(
                f"{output}: its weights are {min(other)}, where {precision} takes {wanted}; extract in {dtype}"
            )

    def _checkpoint(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        mapping = mapping_of(options)
        _check_stages(model, options)
        folder = output / engine.CHECKPOINT
        folder.mkdir()
        try:
            checkpoint.write_checkpoint(model, folder, precision, mapping)
            compared = reader.require_same(model, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        built = engine.builds_here(precision, options)
        if built:
            engine.build(output, precision, options)
        notes = () if built else ("the checkpoint is compiled on the device: trtllm-build and that GPU are not here",)
        facts = self._facts(precision, options) | {"tensors_compared": compared}
        steps, usage = engine.engine_steps(precision, options, built), engine.engine_commands(options)
        return Artefact(output, precision, steps, notes, facts, usage)

    def _facts(self, precision: str, options: BuildOptions) -> dict[str, Any]:
        return {"form": form_of(precision, options), **mapping_of(options).to_json()}

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> Engine:
        raise ToolchainMissing(f"{artefact}: {_CANNOT_RUN}; run the commands of the bundle's manifest on the device")

    def bench(self, precision: str, options: BuildOptions, prompt: int, tokens: int) -> tuple[Command, ...]:
        """Of form A alone: in form B ``trtllm-bench`` wants the dense folder too, and Edge-LLM has no such report."""
        return serving.folder_bench(options, prompt, tokens) if form_of(precision, options) == "A" else ()

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path | None:
        return None if precision in WEIGHT_ONLY or precision == "fp8" else model.path


def _check_stages(model: ModelFolder, options: BuildOptions) -> None:
    """Raise BadInput where blocks of different sizes do not spread over the GPUs, though the widest does."""
    if model.blocks is None:
        return
    mapping = mapping_of(options)
    for stage in range(mapping.pp):
        if not any(model.blocks[index].heads for index in mapping.layers(model.architecture.depth, stage)):
            raise BadInput(f"{model.path}: stage {stage} of pp={mapping.pp} has no block with attention; choose fewer")
    for index, block in enumerate(model.blocks):
        sizes = replace(model.architecture, neurons=block.neurons)
        if block.heads:
            sizes = replace(sizes, heads=block.heads, kv_heads=block.kv_heads)
        refused = refusal(sizes, "fp16", options)
        if refused:
            raise BadInput(f"{model.path}: block {index} cannot be lowered: {refused}")


BACKEND = TensorrtLlmBackend()
