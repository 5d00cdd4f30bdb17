"""The ``onnx`` flow: our own graph, run by ONNX Runtime; onnxruntime-genai reads the same folder.

An artefact is a folder with ``model.onnx`` (some kilobytes), the weights it points into, ``genai_config.json``,
config and tokenizer. In fp32 the weights are the subnet's own ``model.safetensors``, used in place; int8 and int4
store block-quantised weights in ``weights.int8.safetensors`` or ``weights.int4.safetensors``, embedding and head too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import (
    EXACT_TOLERANCE,
    Artefact,
    Backend,
    BuildOptions,
    Counts,
    Ids,
    Toolchain,
    installed_versions,
    refuse_lengths,
    require_legal,
    require_toolchain,
)
from amoeba_deploy.backends.takes import ANY_BLOCKS, KNOWN_ROPES, Takes
from amoeba_deploy.block_quantisation import BLOCK, dequantise, quantise
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import copy_model, copy_other_files
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.tensors import Array, TensorInfo, TensorSource, as_float32, made_source, read_header, write_tensors

GRAPH = "model.onnx"
_BITS: dict[str, int | None] = {"fp32": None, "int8": 8, "int4": 4}
_PACKAGES = ("onnx", "onnxruntime")
_INSTALL = "pip install 'amoeba-deploy[onnx]'"

# With accuracy level 4 MatMulNBits rounds activations to 8 bits and multiplies in integers: faster, and about one
# percent off the product with the same weights in float32. Level 1 keeps activations in float32.
_ACCURACY_LEVEL = {"int8": 4, "int4": 4}


def weights_file(precision: str) -> str:
    """The file that holds an artefact's weights."""
    return "model.safetensors" if precision == "fp32" else f"weights.{precision}.safetensors"


class OnnxEngine:
    """An ONNX Runtime session on the CPU, and the key/value cache that it returned last."""

    def __init__(self, folder: Path, threads: int | None, exact: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        graph = _exact_graph(folder) if exact else str(folder / GRAPH)
        self._session = onnxruntime.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
        wanted = [value for value in self._session.get_inputs() if value.name.startswith("past")]
        self._shapes = {value.name: (value.shape[1], value.shape[3]) for value in wanted}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._cache: dict[str, Any] = {}
        self._fed = 0

    def reset(self) -> None:
        self._cache, self._fed = {}, 0

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        import onnxruntime

        refuse_lengths(lengths, ids, "onnx")
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        batch, count = ids.shape
        if not self._cache:
            self._cache = {
                name: value(np.zeros((batch, heads, 0, size), np.float32))
                for name, (heads, size) in self._shapes.items()
            }
        self._fed += count
        mask = np.ones((batch, self._fed), np.int64)
        inputs = {"input_ids": value(np.ascontiguousarray(ids)), "attention_mask": value(mask), **self._cache}
        logits, *cache = self._session.run_with_ort_values(self._outputs, inputs)
        self._cache = dict(zip(self._shapes, cache, strict=True))
        return np.asarray(logits.numpy())


class OnnxBackend(Backend):
    """ONNX Runtime on the CPU."""

    flow = "onnx"
    takes = Takes(
        "onnx",
        tuple(_BITS),
        traits=frozenset({"constant scaling"}),
        ropes=KNOWN_ROPES,
        varying=ANY_BLOCKS,
        even_heads=True,
        hidden_multiple={"int8": BLOCK, "int4": BLOCK},
    )

    def storage(self, precision: str) -> StorageFormat:
        bits = _BITS[precision]
        stored = 32.0 if bits is None else bits + 32 / BLOCK
        return StorageFormat(stored, stored, 32, 4, 4)

    def toolchain(self) -> Toolchain:
        versions, missing = installed_versions(_PACKAGES)
        return Toolchain(versions, missing, _INSTALL)

    def refusal(self, subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
        if subnet.sliding_window is not None and subnet.sliding_window < options.context:
            return (
                f"its sliding window of {subnet.sliding_window} positions is shorter than the context of "
                f"{options.context}, which this graph would get wrong without a word; ask for --context "
                f"{subnet.sliding_window} or less"
            )
        return self.takes.refusal(subnet, precision)

    def weight_dtype(self, precision: str) -> str | None:
        return "float32" if precision == "fp32" else None

    def tolerance(self, precision: str) -> float:
        # int8 and int4 are held to their own dequantised weights, so only the rounding of activations to 8 bits
        # remains: up to 2.3% in trained models and 7% in random ones, which amplify noise. Mistakes of the graph or the
        # weights are caught far below that, by the same graph without that rounding.
        return EXACT_TOLERANCE if precision == "fp32" else 0.1

    def lower(self, model: ModelFolder, output: Path, precision: str, options: BuildOptions) -> Artefact:
        require_legal(self, model, precision, options)
        import onnx

        from amoeba_deploy.backends.onnx.graph import Emitter

        tensors = _weights(model, output, precision)
        accuracy = _ACCURACY_LEVEL.get(precision, 0)
        emitter = Emitter(model.architecture, tensors, _BITS[precision], options.context, accuracy)
        onnx.save(emitter.model(), output / GRAPH)
        write_json(output / "genai_config.json", genai_config(model, options.context))
        return Artefact(output, precision)

    def open(
        self, artefact: Path, precision: str, threads: int | None = None, *, context: int | None = None, batch: int = 1
    ) -> OnnxEngine:
        require_toolchain(self)
        for name in (GRAPH, weights_file(precision)):
            if not (artefact / name).is_file():
                raise BadInput(f"{artefact}: has no {name}; it is no {precision} artefact of the flow 'onnx'")
        read_header(artefact / weights_file(precision))
        return OnnxEngine(artefact, threads)

    def open_exact(self, artefact: Path, precision: str) -> OnnxEngine | None:
        return None if _BITS[precision] is None else OnnxEngine(artefact, None, exact=True)

    def reference_folder(self, model: ModelFolder, artefact: Path, precision: str, output: Path) -> Path:
        bits = _BITS[precision]
        if bits is None:
            return model.path
        copy_model(model, output, "float32", _dequantiser(artefact / weights_file(precision), bits))
        return output


def _exact_graph(folder: Path) -> bytes:
    """The graph with every quantised product computed on float32 activations (accuracy level 1)."""
    import onnx

    model = onnx.load(folder / GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return bytes(model.SerializeToString())


def _weights(model: ModelFolder, output: Path, precision: str) -> dict[str, TensorInfo]:
    """Where the graph's weights lie in ``output``; writes them there unless they can be used in place."""
    bits = _BITS[precision]
    if bits is not None:
        copy_other_files(model, output)
        write_tensors(output / weights_file(precision), _quantised(model, bits))
    elif output != model.path:
        copy_model(model, output, "float32")
    elif any(info.dtype != "F32" for info in model.tensors.infos.values()):
        raise BadInput(f"{output}: its weights are not float32, which fp32 engines use in place; extract in float32")
    elif len(model.tensors.files) == 1:
        return model.tensors.infos
    tensors: dict[str, TensorInfo] = {}
    for file in [output / weights_file(precision)] if bits or output != model.path else model.tensors.files:
        tensors |= read_header(file)[0]
    return tensors


def _quantised(model: ModelFolder, bits: int) -> dict[str, TensorSource]:
    """All tensors of a quantised artefact: values and scales of each matrix, everything else in float32.

    Matrices that the graph multiplies as one stand together: first the values of all, then the scales of all.
    """
    sizes = model.architecture
    sources: dict[str, TensorSource] = {}
    for name in model.family.other_tensors(sizes):
        sources |= _matrices(model, [name], bits) if "norm" not in name else {name: _float32(model, name)}
    for index in range(sizes.depth):
        prefix = f"model.layers.{index}."
        names = list(model.block_shapes(index))
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            matrices = [prefix + n for n in names if n.endswith(tuple(f".{part}_proj.weight" for part in group))]
            sources |= _matrices(model, matrices, bits)
        sources |= {prefix + n: _float32(model, prefix + n) for n in names if not n.endswith("_proj.weight")}
    return sources


def _float32(model: ModelFolder, name: str) -> TensorSource:
    return made_source("F32", model.tensors.info(name).shape, lambda: model.tensors.float32(name))


def _matrices(model: ModelFolder, names: list[str], bits: int) -> dict[str, TensorSource]:
    halves: dict[str, tuple[Array, Array]] = {}

    def part(name: str, which: int) -> Callable[[], Array]:
        def values() -> Array:
            if name not in halves:
                halves[name] = quantise(model.tensors.float32(name), bits)
            return halves[name][which] if which == 0 else halves.pop(name)[which]

        return values

    packed, scales = {}, {}
    for name in names:
        rows, columns = model.tensors.info(name).shape
        count = -(-columns // BLOCK)
        packed[f"{name}.packed"] = made_source("U8", (rows, count, BLOCK * bits // 8), part(name, 0))
        scales[f"{name}.scales"] = made_source("F32", (rows, count), part(name, 1))
    return packed | scales


def _dequantiser(file: Path, bits: int) -> Callable[[str, TensorInfo], Array]:
    """The values of each tensor as the artefact's weights stand for it."""
    infos, _ = read_header(file)
    data = np.memmap(file, mode="r")

    def array(name: str, dtype: Any) -> Array:
        info = infos[name]
        return np.frombuffer(data[info.offset : info.offset + info.length], dtype).reshape(info.shape)

    def values(name: str, info: TensorInfo) -> Array:
        if f"{name}.packed" not in infos:
            return as_float32(array(name, np.float32), "F32")
        packed, scales = array(f"{name}.packed", np.uint8), array(f"{name}.scales", np.float32)
        return dequantise(packed, scales, bits, info.shape[1])

    return values


def genai_config(model: ModelFolder, context: int) -> dict[str, Any]:
    """``genai_config.json`` as onnxruntime-genai reads it (its model builder's ``make_genai_config``).

    Where blocks differ it states the most heads of any; onnxruntime-genai 0.18 takes each layer's from the graph.
    """
    sizes, config = model.architecture, model.config
    attending = [block for block in model.blocks or () if block.heads]
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": max((block.heads for block in attending), default=sizes.heads),
        "num_hidden_layers": len(attending) or sizes.depth,
        "num_key_value_heads": max((block.kv_heads for block in attending), default=sizes.kv_heads),
    }
    search = {
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": context,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    start = config.get("bos_token_id")
    return {
        "model": {
            "bos_token_id": 0 if start is None else start,
            "context_length": context,
            "decoder": decoder,
            "eos_token_id": ends if ends is not None else 0,
            "pad_token_id": config.get("pad_token_id") if config.get("pad_token_id") is not None else (end or 0),
            "type": sizes.family,
            "vocab_size": sizes.vocabulary,
        },
        "search": search,
    }


BACKEND = OnnxBackend()
