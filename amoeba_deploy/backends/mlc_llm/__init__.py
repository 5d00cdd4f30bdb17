"""The ``mlc-llm`` flow: MLC-LLM converts the weights, writes its config and compiles the model for a device.

An artefact is a folder with ``params_shard_N.bin`` and ``tensor-cache.json`` (weights), ``mlc-chat-config.json``,
tokenizer files, and the compiled library. MLC runs under an interpreter of its own (``tool``); what it wrote is
checked, never its exit status (``checks``, ``library``). A library for this machine's processor is run (``engine``);
one that cannot be compiled here is left as a step for the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Identity,
    Setting,
    Toolchain,
    require_legal,
)
from amoeba_deploy.backends.mlc_llm.build import CONFIG, PLAIN, Build
from amoeba_deploy.backends.mlc_llm.cache import TensorCache, source_places
from amoeba_deploy.backends.mlc_llm.engine import MlcEngine
from amoeba_deploy.backends.mlc_llm.formats import FORMATS
from amoeba_deploy.backends.mlc_llm.layout import class_of, stored_tensors
from amoeba_deploy.backends.mlc_llm.targets import CHOICES, build_target, missing_instructions
from amoeba_deploy.backends.mlc_llm.tool import PYTHON, find_tool, toolchain
from amoeba_deploy.backends.takes import LLAMAS, Takes
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.tensors import Array, TensorInfo

LIBRARY = "model.so"
TEMPLATES = (PLAIN, "llama-2", "llama-3", "llama-3_1", "mistral_default", "chatml", "qwen2", "qwen3")


@dataclass(frozen=True)
class MlcTakes(Takes):
    """The rules that one model type alone has."""

    def refusal(self, subnet: Architecture, precision: str, compensated: bool = False) -> str | None:
        refused = super().refusal(subnet, precision, compensated)
        if refused:
            return refused
        held_by = families.held_by(subnet)
        if held_by == "qwen2" and subnet.heads * subnet.head_dim != subnet.hidden:
            return (
                f"its {subnet.heads} heads of {subnet.head_dim} do not make up the hidden size {subnet.hidden}, which "
                f"{self.flow} demands of a qwen2"
            )
        if class_of(subnet) != "llama" and subnet.rope.kind != "default":
            return f"its rotary scaling '{subnet.rope.kind}' is dropped by {self.flow} in a {held_by}"
        return None


class MlcBackend(Backend):
    """MLC-LLM, compiled for a processor or a GPU."""

    flow = "mlc-llm"
    takes = MlcTakes(
        "mlc-llm",
        tuple(FORMATS),
        aliases={"fp32": "q0f32", "fp16": "q0f16", "int4": "q4f16_1"},
        classes=LLAMAS | {"qwen3"},
        ropes=frozenset({"default", "llama3"}),
        # It hard-codes that there are none on o_proj and down_proj, and ignores those of a file without a word.
        biases=False,
        # Asserted by its classes, whatever head_dim says; a Mistral is converted as a Llama, which asserts it too.
        heads_divide=LLAMAS,
        even_heads=True,
    )
    settings: ClassVar[Mapping[str, Setting]] = {
        "target": Setting("auto", "what the library is compiled for; auto follows the device's chip", CHOICES),
        "conv_template": Setting(PLAIN, "how MLC's own chat wraps a prompt; LM is plain text", TEMPLATES),
        "prefill_chunk": Setting("1024", "the most new tokens that go through the model at once"),
    }

    def storage(self, precision: str) -> StorageFormat:
        form = FORMATS[precision]
        size = 2 if form.half else 4
        # Scales are stored in 16 bits by either kind; the embedding is packed like every matrix.
        bits = 8.0 * size if form.group is None else form.bits + 16 / form.group
        return StorageFormat(bits, bits, 8 * size, size, size)

    def toolchain(self) -> Toolchain:
        return toolchain()

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        target = build_target(options.chip, options.settings["target"])
        if not target.runs_here:
            return f"its library is for {target.chip} ({target.name}), and only one for this processor is run here"
        if target.missing:
            return f"its library cannot be linked here without {', '.join(target.missing)}"
        lacks = missing_instructions()
        if lacks:
            return f"its library uses {lacks}, which this machine's processor lacks"
        return None if _python() else f"no Python with tvm is known that runs its library; name one in {PYTHON}"

    def identity(self, precision: str, options: BuildOptions) -> Identity:
        versions = self.toolchain().versions
        target = build_target(options.chip, options.settings["target"])
        more = {"target": target.device}
        return Identity(precision, options.batch, options.context, versions, tuple(versions), target.chip, more)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        window = subnet.sliding_window
        if window is not None and window < options.context:
            return (
                f"its sliding window of {window} positions is shorter than the context of {options.context}, and "
                f"{self.flow} windows otherwise: it keeps the first positions; ask for --context {window} or less"
            )
        if options.batch > options.number("prefill_chunk"):
            return f"its batch of {options.batch} is more than prefill_chunk={options.settings['prefill_chunk']}"
        try:
            build_target(options.chip, options.settings["target"])
        except BadInput as error:
            return str(error)
        return self.takes.refusal(subnet, precision)

    def tolerance(self, precision: str) -> float:
        # Quantised weights are held to themselves dequantised, so only the order of sums and, in the f16 formats, the
        # rounding of weights, activations and cache to 11 bits differ: up to 0.4% of the largest logit was seen in
        # trained models, and 1.6% in random ones, which amplify noise.
        return 3e-2 if FORMATS[precision].half else EXACT_TOLERANCE

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        tool = find_tool()
        assert tool is not None  # the toolchain is there
        target = build_target(options.chip, options.settings["target"])
        facts: dict[str, Any] = {"target": target.name, "device": target.device, "library": target.library}
        # Beside the output, so that what is complete is moved there and not copied.
        with tempfile.TemporaryDirectory(prefix=".mlc-", dir=output) as work:
            build = Build(tool, model, Path(work), precision, options, target)
            build.convert()
            build.configure()
            if not target.missing:
                facts |= build.compile()
            for path in sorted(build.built.iterdir()):
                path.replace(output / path.name)
        if not target.missing:
            return Artefact(output, precision, facts=facts)
        note = f"the library is still to be compiled on the device: there is no {', '.join(target.missing)} here"
        return Artefact(output, precision, (build.step(output.name),), (note,), facts)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> MlcEngine:
        config = _artefact_config(artefact, precision)
        library = artefact / LIBRARY
        if not library.is_file():
            raise BadInput(f"{artefact}: has no {LIBRARY} for this machine's processor; build it for this machine")
        TensorCache(artefact)
        python = _python()
        if python is None:
            raise ToolchainMissing(f"{artefact}: no Python with tvm is known that runs it; name one in {PYTHON}")
        limits = config["model_config"]
        wanted = {"context": context or limits["context_window_size"], "batch": batch}
        for name, most in (("context", limits["context_window_size"]), ("batch", limits["max_batch_size"])):
            if wanted[name] > most:
                raise BadInput(f"{artefact}: is built for a {name} of {most}, not {wanted[name]}; build it for that")
        settings = {"chunk": limits["prefill_chunk_size"], "vocabulary": limits["vocab_size"], **wanted}
        return MlcEngine(python, artefact, settings, threads)

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        form = FORMATS[precision]
        if form.group is None:
            return model.path
        cache = TensorCache(artefact)
        places = source_places(stored_tensors(model.architecture))

        def values(name: str, _info: TensorInfo) -> Array:
            stored, rows = places[name]
            return cache.values(stored, form)[rows]

        copy_model(model, output, "float32", values)
        return output


def _python() -> str | None:
    """The interpreter that runs libraries: the tool's, where it has tvm."""
    tool = find_tool()
    return tool.python if tool is not None and "tvm" in toolchain().versions else None


def _artefact_config(artefact: Path, precision: str) -> dict[str, Any]:
    """The ``mlc-chat-config.json`` of an artefact; raises BadInput where it is none of the precision."""
    if not (artefact / CONFIG).is_file():
        raise BadInput(f"{artefact}: has no {CONFIG}; it is no artefact of the flow 'mlc-llm'")
    config = read_json_object(artefact / CONFIG)
    inner = config.get("model_config")
    names = ("context_window_size", "max_batch_size", "prefill_chunk_size", "vocab_size")
    whole = isinstance(inner, dict) and all(isinstance(inner.get(name), int) for name in names)
    if config.get("quantization") != precision or not whole:
        raise BadInput(f"{artefact / CONFIG}: is not of {precision}, or lacks its limits; build it again")
    return config


BACKEND = MlcBackend()
