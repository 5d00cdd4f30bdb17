"""Mistakes planted in graphs and weights of the ONNX backend, which verification must catch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_engines import ONNX, OPTIONS, lowered

from amoeba_deploy.errors import VerificationFailed
from amoeba_deploy.extraction.folder import copy_model
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.verification import verify_artefact


def _swap(folder: Path, first: str, second: str) -> None:
    """Exchange two weights of the graph, as a writer with two names confused would."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = [(entry.key, entry.value) for entry in tensors[first].external_data]
    for one, entries in ((first, [(e.key, e.value) for e in tensors[second].external_data]), (second, kept)):
        del tensors[one].external_data[:]
        for key, value in entries:
            tensors[one].external_data.add(key=key, value=value)
    onnx.save(model, path)


def _change_attribute(folder: Path, kind: str, name: str, change: Callable[[onnx.AttributeProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == kind:
            change(next(attribute for attribute in node.attribute if attribute.name == name))
    onnx.save(model, folder / "model.onnx")


def _wrong_rotary_base(folder: Path, theta: float = 20000.0) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "rotary.frequencies")
    wrong = (1 / theta ** (np.arange(0, 16, 2) / 16)).astype(np.float32)[None]
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    onnx.save(model, folder / "model.onnx")


PLANTED: dict[str, Callable[[Path], None]] = {
    "wrong rotary base": _wrong_rotary_base,
    "norms of two blocks exchanged": lambda folder: _swap(
        folder, "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    ),
    "interleaved rotary pairs": lambda folder: _change_attribute(
        folder, "GroupQueryAttention", "rotary_interleaved", lambda a: setattr(a, "i", 1)
    ),
    "attention scale off": lambda folder: _change_attribute(
        folder, "GroupQueryAttention", "scale", lambda a: setattr(a, "f", a.f * 1.02)
    ),
    "epsilon of another model": lambda folder: _change_attribute(
        folder, "SkipSimplifiedLayerNormalization", "epsilon", lambda a: setattr(a, "f", 1e-2)
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(
    mistake: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models("llama-grouped-tied")
    artefact = lowered(model, tmp_path / "engine", precision)
    PLANTED[mistake](artefact)
    with pytest.raises(VerificationFailed, match="differ from the reference"):
        verify_artefact(ONNX, model, artefact, precision, OPTIONS)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize(
    ("first", "second"), [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.k_proj", "self_attn.v_proj")]
)
def test_exchanged_matrices_are_caught(
    first: str, second: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    """The engine is built from a folder in which two matrices of a block changed places.

    A quantised engine is held to its own weights, so there the matrices' values change places after lowering, in the
    file that the graph reads but not in the one that the reference is made from.
    """
    model = models("llama-multihead")
    names = {f"model.layers.1.{a}.weight": f"model.layers.1.{b}.weight" for a, b in ((first, second), (second, first))}
    (tmp_path / "wrong").mkdir()
    copy_model(model, tmp_path / "wrong", "float32", lambda name, _: model.tensors.float32(names.get(name, name)))
    wrong = lowered(ModelFolder(tmp_path / "wrong"), tmp_path / "engine", precision)
    if precision != "fp32":
        right = lowered(model, tmp_path / "right", precision)
        shutil.copy(wrong / "model.onnx", right / "model.onnx")
        _read_other_weights(right / "model.onnx", wrong / "weights.int4.safetensors")
        wrong = right
    with pytest.raises(VerificationFailed):
        verify_artefact(ONNX, model, wrong, precision, OPTIONS)


def _read_other_weights(graph: Path, file: Path) -> None:
    """Point a graph at another weights file of the same layout, copied beside it."""
    shutil.copy(file, graph.parent / "other.safetensors")
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "other.safetensors" if entry.value == file.name else entry.value
    onnx.save(model, graph)
