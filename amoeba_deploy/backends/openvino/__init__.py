"""The ``openvino`` flow: our own OpenVINO model with its key/value cache inside, run on the CPU.

An artefact is a folder with ``openvino_model.xml`` and ``.bin``, ``openvino_properties.json`` (what it is compiled
with), config and tokenizer, and the tokenizer once more as OpenVINO models. openvino-genai's ``LLMPipeline`` reads the
same folder. docs/backend_openvino.md says how it computes, and what it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Setting,
    Toolchain,
    installed_versions,
    require_legal,
    require_toolchain,
)
from amoeba_deploy.backends.openvino.engine import (
    EXACT,
    MODEL,
    PROPERTIES,
    PROPERTIES_FORMAT,
    OpenvinoEngine,
    properties,
    read_properties,
)
from amoeba_deploy.backends.takes import ANY_BLOCKS, KNOWN_ROPES, Takes
from amoeba_deploy.errors import ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model, copy_other_files
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.precision import StorageFormat

_INSTALL = "pip install 'amoeba-deploy[openvino]'"
_COMPRESSED = ("int8", "int4")
_ONE = dict.fromkeys(("fp32", "bf16", "int8"), 1)
"""Precisions in which rows of any length will do."""
_ROW = 768
"""Inputs of a typical row, over which its 24 bits of scale and zero point are spread in estimates."""


class OpenvinoBackend(Backend):
    """OpenVINO on the CPU."""

    flow = "openvino"
    takes = Takes(
        "openvino",
        ("fp32", "bf16", "int8", "int4"),
        traits=frozenset({"constant scaling"}),
        ropes=KNOWN_ROPES | {"yarn"},
        varying=ANY_BLOCKS,
        even_heads=True,
        # Rows that do not divide into groups of 32 inputs would stay in 8 bits: what is cut is cut so that they do.
        neuron_multiple=_ONE | {"": 32},
        query_multiple=_ONE | {"": 32},
        hidden_multiple={"int4": 32},
    )
    settings: ClassVar[Mapping[str, Setting]] = {
        "group": Setting("64", "inputs that share a scale in int4; fewer where they do not divide", ("32", "64", "128"))
    }

    def storage(self, precision: str) -> StorageFormat:
        # int8 has a float16 scale and a zero point of 8 bits a row, int4 a float16 scale a group; caches are float32
        # but for bf16. The embedding and the head are int8 in both.
        eight = 8 + 24 / _ROW
        matrix = {"fp32": 32.0, "bf16": 16.0, "int8": eight, "int4": 4 + 16 / 64}[precision]
        table = eight if precision in _COMPRESSED else matrix
        cache = 2 if precision == "bf16" else 4
        return StorageFormat(matrix, table, 32, cache, cache, head_bits=table)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(("openvino", "nncf", "openvino-tokenizers"))
        return Toolchain(versions, tuple(name for name in missing if name == "openvino"), _INSTALL)

    def cannot_run(self, precision: str, options: BuildOptions) -> str | None:
        if self.toolchain().missing:
            return "openvino is not installed here"
        if precision != "bf16":
            return None
        from amoeba_deploy.backends.openvino.runtime import core

        able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in able else "the CPU of this machine has no bfloat16 arithmetic"

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        if subnet.sliding_window is not None and subnet.sliding_window < options.context:
            return (
                f"its sliding window of {subnet.sliding_window} positions is shorter than the context of "
                f"{options.context}, and the graph attends to all of them; ask for --context "
                f"{subnet.sliding_window} or less"
            )
        return self.takes.refusal(subnet, precision)

    def tolerance(self, precision: str) -> float:
        # bf16 rounds at every step to 8 bits of mantissa: 1.3% seen on 14 random blocks. int8 and int4 are held to
        # their own dequantised weights, so only the rounding of activations to 8 bits in groups of 32 remains. Mistakes
        # of the graph or the weights are caught far below that, by the same model run in float32.
        return {"fp32": EXACT_TOLERANCE, "bf16": 5e-2}.get(precision, 0.1)

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        if precision in _COMPRESSED:
            _require_nncf()
        from amoeba_deploy.backends.openvino.compression import StoredWeights, compress
        from amoeba_deploy.backends.openvino.graph import GraphBuilder
        from amoeba_deploy.backends.openvino.runtime import load
        from amoeba_deploy.backends.openvino.tokenizer import convert_tokenizer

        copy_other_files(model, output)
        builder = GraphBuilder(model, half=precision == "bf16")
        graph = builder.build()
        if precision in _COMPRESSED:
            graph = compress(graph, precision, options.number("group"))
        chosen = properties(precision)
        load("openvino").save_model(graph, str(output / MODEL), compress_to_fp16=False)
        write_json(output / PROPERTIES, {"format": PROPERTIES_FORMAT, "precision": precision, "properties": chosen})
        refused = convert_tokenizer(model, output)
        notes = (f"openvino-genai cannot read text with this folder: {refused}; ids work",) if refused else ()
        stored = StoredWeights(output / MODEL).matrices()
        kinds = sorted(set(stored.values()))
        facts = {"matrices": {kind: sum(found == kind for found in stored.values()) for kind in kinds}}
        if precision == "int4":
            facts["eight_bit"] = [name for name, kind in stored.items() if kind == "u8"]  # type: ignore[assignment]
        return Artefact(output, precision, notes=notes, facts=facts)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> OpenvinoEngine:
        require_toolchain(self)
        return OpenvinoEngine(artefact, read_properties(artefact, precision), threads)

    def open_exact(self, artefact: Path, precision: str) -> OpenvinoEngine | None:
        return None if precision == "fp32" else OpenvinoEngine(artefact, EXACT, None)

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        if precision == "fp32":
            return model.path
        from amoeba_deploy.backends.openvino.compression import StoredWeights

        copy_model(model, output, "float32", StoredWeights(artefact / MODEL).values())
        return output


def _require_nncf() -> None:
    if installed_versions(("nncf",))[1]:
        raise ToolchainMissing(
            f"the flow 'openvino' needs nncf for int8 and int4, which is not installed; run {_INSTALL}"
        )


BACKEND = OpenvinoBackend()
