"""An ONNX Runtime session with the key/value cache that it returned last, for rows of any lengths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.backends.backend import Counts, Ids
from amoeba_deploy.backends.onnx import runtime
from amoeba_deploy.backends.onnx.genai import BuiltFor
from amoeba_deploy.backends.onnx.precisions import GRAPH, PACKED
from amoeba_deploy.errors import BadInput, ToolchainMissing

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INSTALL_CUDA = "pip install onnxruntime-gpu"
LEAST_RELEASE = (1, 23)
"""Of ONNX Runtime. 1.20 has another GroupQueryAttention, 1.22 lacks what GatherBlockQuantized is asked for."""
_ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that a cache may have."""


class OnnxEngine:
    """A session, the cache, and how many real tokens each row has in it."""

    def __init__(self, folder: Path, built_for: BuiltFor, threads: int | None, graph: bytes | None = None) -> None:
        """Open a session.

        Args:
            folder: where the graph lies, and the weights that it refers to.
            built_for: the provider, and the most positions of a row.
            threads: how many compute on the CPU; all cores where None.
            graph: another graph over the same weights, if not the folder's own.
        """
        onnxruntime = runtime.load()

        release = onnxruntime.__version__
        if tuple(map(int, release.split(".")[:2])) < LEAST_RELEASE:
            least = ".".join(map(str, LEAST_RELEASE))
            raise ToolchainMissing(
                f"{folder}: needs onnxruntime {least} or newer, and {release} is installed; run pip install -U "
                f"onnxruntime"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        provider = built_for.provider
        if provider not in PROVIDERS:
            raise BadInput(f"{folder}: was built for {provider!r:.40}; known are {', '.join(PROVIDERS)}")
        wanted = PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise ToolchainMissing(f"{folder}: was built for {provider}, which onnxruntime lacks; run {INSTALL_CUDA}")
        source = graph or str(folder / GRAPH)
        try:
            self._session = onnxruntime.InferenceSession(source, sess_options=options, providers=[wanted])
        except Exception as error:  # ONNX Runtime's have no common base
            reason = str(error).strip().partition("\n")[0]
            raise BadInput(
                f"{folder / GRAPH}: onnxruntime {release} cannot open it ({reason:.200}); build it again"
            ) from None
        if self._session.get_providers()[0] != wanted:
            raise ToolchainMissing(f"{folder}: was built for {provider}, and onnxruntime finds no such device here")
        self._device, self._context, self._head_size = provider, built_for.context, built_for.head_size
        # Whether a row's cache holds its real tokens alone, or a column for each that was fed (attention.py).
        self._packed = self._session.get_modelmeta().custom_metadata_map.get(PACKED, "1") == "1"
        inputs = self._session.get_inputs()
        self._past = {value.name: value for value in inputs if value.name.startswith("past_key_values")}
        self._positions = any(value.name == "position_ids" for value in inputs)
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forget everything fed so far."""
        self._cache: dict[str, Any] = {}
        self._held: Counts = np.zeros(0, np.int64)
        self._seen: NDArray[np.bool_] = np.zeros((0, 0), np.bool_)

    def feed(self, ids: Ids, lengths: Counts | None = None) -> NDArray[np.float32]:
        """Logits of new ids, as ``Engine.feed`` says.

        Raises:
            BadInput: a row outgrows the context that the engine was built for.
        """
        batch, count = ids.shape
        if not self._cache:
            self._begin(batch)
        real = np.full(batch, count, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        longest = int((self._held + real).max())
        if longest > self._context:
            raise BadInput(f"a row of {longest} tokens exceeds the context of {self._context} that was built for")
        widest = int(real.max())
        # The fused operator takes one row, or one new token a row, where anything was fed before.
        if self._packed and batch > 1 and widest > 1 and self._held.any():
            steps = [self._run(ids[:, i : i + 1], np.clip(real - i, 0, 1)) for i in range(widest)]
            logits = np.concatenate(steps, axis=1)
        else:
            logits = self._run(ids[:, :widest], real)
        return np.pad(logits, ((0, 0), (0, count - widest), (0, 0))) if widest < count else logits

    def _begin(self, batch: int) -> None:
        onnxruntime = runtime.load()

        self._held, self._seen = np.zeros(batch, np.int64), np.zeros((batch, 0), np.bool_)
        empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._cache = {
            name: empty([batch, value.shape[1], 0, self._head_size], _ELEMENTS[value.type], self._device)
            for name, value in self._past.items()
        }

    def _mask(self, count: int, real: Counts) -> NDArray[np.int64]:
        """The mask over cache and new ids [batch, total]."""
        if not self._packed:
            new = np.arange(count)[None] < real[:, None]
            self._seen = np.concatenate([self._seen, new], axis=1)
            return self._seen.astype(np.int64)
        # Fillings count while they are fed; the next ids are written over them.
        occupied = self._held + count
        width = max(int(occupied.max()), self._seen.shape[1])
        self._seen = np.arange(width)[None] < occupied[:, None]
        return self._seen.astype(np.int64)

    def _run(self, ids: Ids, real: Counts) -> NDArray[np.float32]:
        count = ids.shape[1]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", self._mask(count, real))
        if self._positions:
            binding.bind_cpu_input("position_ids", self._held[:, None] + np.arange(count)[None])
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = found.pop("logits")
        self._cache = {name: found[name.replace("past_key_values", "present")] for name in self._past}
        self._held = self._held + real
        return np.asarray(logits.numpy(), np.float32)


def exact_graph(folder: Path) -> bytes:
    """The folder's graph with everything computed in float32.

    Products with quantised weights keep float32 activations (accuracy level 1), and 16-bit weights, cache and
    constants become float32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(folder / GRAPH, load_external_data=False)
    graph, single, short = model.graph, TensorProto.FLOAT, (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in short:
            value.type.tensor_type.elem_type = single
    widened = []
    for tensor in graph.initializer:
        if tensor.data_type not in short:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            name = tensor.name
            tensor.name = f"{name}.stored"
            widened.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.single", to=single))
        else:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
            if node.op_type == "Cast" and attribute.i in short:
                attribute.i = single
    nodes = [*widened, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())
