"""The ``onnx`` flow: our own graph, run by ONNX Runtime; onnxruntime-genai reads the same folder.

An artefact is a folder with ``model.onnx`` (some kilobytes), the weights it points into, ``genai_config.json``,
config and tokenizer. In fp32, fp16 and bf16 the weights are the subnet's own, used in place; int8 and int4 store
block-quantised weights: those of the blocks in ``weights.int4.safetensors``, and what every subnet of the model has
alike, embedding and head too, in ``shared.int4.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

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
from amoeba_deploy.backends.onnx import builder, runtime
from amoeba_deploy.backends.onnx.engine import INSTALL_CUDA, PROVIDERS, OnnxEngine, exact_graph
from amoeba_deploy.backends.onnx.genai import CONFIG, genai_config, read_genai_config
from amoeba_deploy.backends.onnx.precisions import BITS, DTYPES, GRAPH, PRECISIONS, shared_file, stored, weights_file
from amoeba_deploy.backends.onnx.weights import stored_weights, write_dequantised
from amoeba_deploy.backends.takes import ANY_BLOCKS, KNOWN_ROPES, Takes
from amoeba_deploy.block_quantisation import BLOCK
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model, copy_other_files
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.tensors import CONFIG_DTYPES, TensorFolder, read_header

_BUILT = f"onnxruntime-genai's model builder wrote the graph, with weights of its own in {builder.DATA}"
_PACKAGES = ("onnx", "onnxruntime")
_INSTALL = "pip install 'amoeba-deploy[onnx]'"

# With accuracy level 4 MatMulNBits rounds activations to 8 bits and multiplies in integers: faster, and about one
# percent off the product with the same weights in float32. Level 1 keeps activations in float32.
_ACCURACY_LEVEL = 4
_NO_BF16 = "ONNX Runtime's CPU provider has no bfloat16 matrix products or attention"


def _setting(options: BuildOptions, name: str) -> str:
    return options.settings.get(name, OnnxBackend.settings[name].default)


class OnnxBackend(Backend):
    """ONNX Runtime."""

    flow = "onnx"
    takes = Takes(
        "onnx",
        PRECISIONS,
        traits=frozenset({"constant scaling"}),
        ropes=KNOWN_ROPES | {"yarn"},
        varying=ANY_BLOCKS,
        even_heads=True,
        hidden_multiple={"int8": BLOCK, "int4": BLOCK},
    )
    settings: ClassVar[Mapping[str, Setting]] = {
        "emitter": Setting("own", "whose graph: our own, or onnxruntime-genai's model builder's", ("own", "oga")),
        "provider": Setting("cpu", "where ONNX Runtime computes: on processors, or on GPUs by CUDA", tuple(PROVIDERS)),
    }

    def storage(self, precision: str) -> StorageFormat:
        return stored(precision)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(_PACKAGES)
        if "onnxruntime" in missing:
            others, _ = installed_versions(("onnxruntime-gpu",))
            versions |= others
            missing = tuple(name for name in missing if name != "onnxruntime" or not others)
        return Toolchain(versions, missing, _INSTALL)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        provider = _setting(options, "provider")
        built = builder.refusal(subnet, precision, options.context, provider)
        if _setting(options, "emitter") == "oga":
            return built
        refused = self.takes.refusal(subnet, precision)
        if refused is not None and built is None:
            refused += "; --set emitter=oga takes it, by onnxruntime-genai's model builder"
        if refused is None and precision == "bf16" and provider == "cpu":
            return f"{_NO_BF16}; choose fp16 or fp32, or --set provider=cuda"
        return refused

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        provider = _setting(options, "provider")
        if precision == "bf16" and provider == "cpu":
            return _NO_BF16
        if provider == "cpu" or self.toolchain().missing:
            return None
        if PROVIDERS[provider] in runtime.load().get_available_providers():
            return None
        return f"onnxruntime as installed here has no {PROVIDERS[provider]}, which {INSTALL_CUDA} brings"

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        # Any release of ONNX Runtime from the engine's LEAST_RELEASE on runs it, on any processor; on CUDA any GPU.
        found = super().identity(precision, options)
        provider = _setting(options, "provider")
        return found if provider == "cpu" else replace(found, more={"provider": provider})

    def folder_dtype(self, precision: str, options: BuildOptions) -> str | None:
        return DTYPES.get(precision)

    def tolerance(self, precision: str) -> float:
        # int8 and int4 are held to their own dequantised weights, so only the rounding of activations to 8 bits
        # remains: up to 2.3% in trained models and 7% in random ones, which amplify noise. Mistakes of the graph or the
        # weights are caught far below that, by the same graph without that rounding.
        return {"fp32": EXACT_TOLERANCE, "fp16": 1e-2, "bf16": 5e-2}.get(precision, 0.1)

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        import onnx

        from amoeba_deploy.backends.onnx.graph import Arithmetic, Emitter
        from amoeba_deploy.backends.onnx.windows import block_windows

        provider, bits = _setting(options, "provider"), BITS.get(precision)
        if _setting(options, "emitter") == "oga":
            builder.build(model, output, precision, options.context, provider)
            copy_other_files(model, output)
            return Artefact(output, precision, notes=(_BUILT,))
        tensors = stored_weights(model, output, precision)
        on_cuda = provider == "cuda"
        dtype = ("F16" if on_cuda else "F32") if bits else CONFIG_DTYPES[DTYPES[precision]]
        arithmetic = Arithmetic(dtype, bits, _ACCURACY_LEVEL if bits and not on_cuda else 0, on_cuda)
        emitter = Emitter(model.architecture, tensors, arithmetic, options.context, block_windows(model))
        onnx.save(emitter.model(), output / GRAPH)
        write_json(output / CONFIG, genai_config(model, options.context, provider))
        return Artefact(output, precision)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> OnnxEngine:
        if "onnxruntime" in self.toolchain().missing:
            raise ToolchainMissing(
                f"{artefact}: is run by onnxruntime, which is not installed; run pip install onnxruntime"
            )
        if not (artefact / GRAPH).is_file():
            raise BadInput(f"{artefact}: has no {GRAPH}; it is no {precision} artefact of the flow 'onnx'")
        if builder.is_built(artefact):
            pass
        elif precision in DTYPES:
            TensorFolder(artefact)
        else:
            for file in (weights_file(precision), shared_file(precision)):
                if not (artefact / file).is_file():
                    raise BadInput(f"{artefact}: has no {file}; it holds no {precision} of the flow 'onnx'")
                read_header(artefact / file)
        return OnnxEngine(artefact, read_genai_config(artefact), threads)

    def open_exact(self, artefact: Path, precision: str) -> OnnxEngine | None:
        if precision == "fp32" or builder.is_built(artefact):
            return None
        return OnnxEngine(artefact, replace(read_genai_config(artefact), provider="cpu"), None, exact_graph(artefact))

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path | None:
        if builder.is_built(artefact):
            return model.path if precision in DTYPES else None
        if precision in DTYPES:
            held = TensorFolder(artefact)
            if all(info.dtype == CONFIG_DTYPES[DTYPES[precision]] for info in model.tensors.infos.values()):
                return model.path
            # The artefact's weights under the model's own config, in which no mistake of the artefact's can hide.
            copy_model(model, output, "float32", lambda name, _info: held.float32(name))
            return output
        write_dequantised(model, artefact, precision, output)
        return output


BACKEND = OnnxBackend()
