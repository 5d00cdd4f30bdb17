"""The ONNX backend: every family and precision computes what transformers computes, and mistakes are caught."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS, random_selection, save_random_model

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine, Ids, options_for
from amoeba_deploy.block_quantisation import dequantise, quantise
from amoeba_deploy.errors import BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.quality_measurement import measured_precisions
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import read_header
from amoeba_deploy.verification import verify_artefact

ONNX = load_backend("onnx")
CONTEXT = 128
OPTIONS = options_for(ONNX, CONTEXT)


def lowered(model: ModelFolder, folder: Path, precision: str = "fp32") -> Path:
    folder.mkdir(exist_ok=True)
    ONNX.lower(model, folder, precision, OPTIONS)
    return folder


def fed(engine: Engine, ids: Ids, first: int) -> np.ndarray:
    """Logits of ids [batch, n]: ``first`` of them at once, the others one by one."""
    engine.reset()
    parts = [engine.feed(ids[:, :first])] + [engine.feed(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
    return np.concatenate(parts, axis=1)


REFUSED = {
    "gemma2": "norm behind each sublayer",
    "gemma2-uncapped": "norm behind each sublayer",
    "gemma3": "norm behind each sublayer",
    "gemma3-capped": "norm behind each sublayer",
    "phi3": "fused query, key and value matrix",
    "phi3-partial": "fused query, key and value matrix",
    "phi3-long": "fused query, key and value matrix",
    "smollm3": "attention without rotary positions",
    "smollm3-biases": "attention without rotary positions",
    "olmo2": "norm behind each sublayer",
    "olmo2-biases": "norm behind each sublayer",
}
"""Models with something that the graph does not compute."""


@pytest.mark.parametrize("precision", ONNX.precisions())
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_compute_is_refused_by_name(
    name: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    context = model.architecture.sliding_window or CONTEXT
    with pytest.raises(BadInput, match=f"its {REFUSED[name]} is not something that onnx computes"):
        ONNX.lower(model, tmp_path, precision, options_for(ONNX, context))
    assert list(tmp_path.iterdir()) == []


def test_every_part_of_a_family_that_is_beyond_the_graph_is_enough_to_refuse(
    models: Callable[[str], ModelFolder],
) -> None:
    for name in REFUSED:
        sizes = replace(models(name).architecture, sliding_window=None)
        for trait in set(sizes.traits) - {"constant scaling"}:
            assert trait in str(ONNX.refusal(replace(sizes, traits=(trait,)), "fp32", OPTIONS))


def test_quality_is_measured_in_the_precisions_that_a_model_can_have(models: Callable[[str], ModelFolder]) -> None:
    said: list[str] = []
    assert measured_precisions(models("gemma2").architecture, said.append) == ("fp32",)
    assert [line.split(":")[0] for line in said] == [
        "no quality is measured in int8",
        "no quality is measured in int4",
    ]
    assert measured_precisions(models("granite").architecture, said.append) == ("fp32", "int8", "int4")


def test_smollm3_without_blocks_that_do_not_rotate_is_a_llama_to_the_graph(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "smollm3", no_rope_layers=[1, 1, 1, 1], mlp_bias=True)
    artefact = lowered(model, tmp_path / "engine")
    assert verify_artefact(ONNX, model, artefact, "fp32", OPTIONS).passed


@pytest.mark.parametrize("precision", ONNX.precisions())
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_every_family_verifies_in_every_precision(
    name: str, precision: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    artefact = lowered(models(name), tmp_path / "engine", precision)
    result = verify_artefact(ONNX, models(name), artefact, precision, OPTIONS)
    assert result.passed
    assert precision == "fp32" or result.exact_logit_error is not None


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-small-heads", "qwen3"])
def test_batches_and_chunked_prefill_agree_with_transformers(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    ids = np.random.default_rng(3).integers(0, 128, (3, 40))
    reference = load_backend("torch").open(model.path, "fp32")
    wanted = fed(reference, ids, 40)
    engine = ONNX.open(lowered(model, tmp_path / "engine"), "fp32")
    for first in (40, 17, 1):
        # Float32 on both sides; logits here are of size 10.
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-4


def test_blocks_of_different_widths_need_no_padding(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    blocks = (
        block_plan(model.architecture, 0, [0, 2], range(0, 160, 2)),
        block_plan(model.architecture, 1, [1], range(100)),
        block_plan(model.architecture, 3, [1, 2], range(7, 40)),
    )
    plan = Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)
    for layout in ("ragged", "uniform"):
        (tmp_path / layout).mkdir()
        extract(model, plan, tmp_path / layout, layout=layout)
    ragged, padded = ModelFolder(tmp_path / "ragged"), ModelFolder(tmp_path / "uniform")
    size = (tmp_path / "ragged" / "model.safetensors").stat().st_size
    assert size < (tmp_path / "uniform" / "model.safetensors").stat().st_size
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    wanted = fed(load_backend("torch").open(padded.path, "fp32"), ids, 32)
    engine = ONNX.open(lowered(ragged, ragged.path), "fp32")
    assert np.abs(fed(engine, ids, 20) - wanted).max() < 1e-4


def test_an_fp32_engine_copies_no_weights(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("llama-grouped-tied").path, tmp_path / "model"))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    lowered(ModelFolder(folder), folder)
    new = set(folder.iterdir()) - set(before)
    assert {file.name for file in new} == {"model.onnx", "genai_config.json"}
    assert (folder / "model.onnx").stat().st_size < 64_000
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_weights_of_another_dtype_cannot_be_used_in_place(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("mistral")
    extract(model, random_selection(model).plan(model.architecture, Shape.parse("2x1")), tmp_path, dtype="bfloat16")
    with pytest.raises(BadInput, match="not float32"):
        ONNX.lower(ModelFolder(tmp_path), tmp_path, "fp32", OPTIONS)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 9.0), ("int4", 5.0)])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-grouped-untied", "qwen2"])
def test_no_matrix_stays_in_float(
    name: str, precision: str, bits: float, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    artefact = lowered(model, tmp_path / "engine", precision)
    graph = onnx.load(artefact / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"MatMul", "FusedMatMul", "Gemm"} & set(kinds)
    assert kinds.count("GatherBlockQuantized") == 1
    assert kinds.count("MatMulNBits") == 4 * model.architecture.depth + 1
    stored = sum(info.length for info in read_header(artefact / f"weights.{precision}.safetensors")[0].values())
    promised = ONNX.storage(precision).weight_bytes(model.architecture)
    assert stored == promised
    tables = model.architecture.embedding_parameters * (1 if model.architecture.tied else 2)
    matrices = model.architecture.depth * model.architecture.block_matrix_parameters + tables
    assert stored < matrices * bits / 8 * 1.05


def test_a_tied_head_is_stored_once(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", "int4")
    names = [name for name in read_header(artefact / "weights.int4.safetensors")[0] if "norm" not in name]
    assert sum("embed_tokens" in name for name in names) == 2
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_is_undone_within_half_a_step(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 75)).astype(np.float32)
    values, scales = quantise(matrix, bits)
    back = dequantise(values, scales, bits, 75)
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :75]
    # One value of a 4-bit block may be clipped: the range is -8..7, so a positive maximum next to a larger negative
    # one loses up to a whole step.
    assert (np.abs(back - matrix) <= steps * (1.0 if bits == 4 else 0.5) + 1e-6).all()
    assert (quantise(np.zeros((2, 64), np.float32), bits)[1] == 0).all()


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
    from amoeba_deploy.extraction.folder import copy_model

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
            entry.value = "other.safetensors" if entry.key == "location" else entry.value
    onnx.save(model, graph)


@pytest.mark.parametrize(
    ("changes", "precision", "context", "reason"),
    [
        ({"family": "mistral", "sliding_window": 64}, "fp32", 128, "sliding window of 64"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "fp32", 128, "scaling 'yarn'"),
        ({"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}, "int4", 128, "hidden size 80"),
    ],
)
def test_what_it_would_get_wrong_is_refused(
    changes: dict[str, object], precision: str, context: int, reason: str, tmp_path: Path
) -> None:
    settings = dict(changes)
    model = save_random_model(tmp_path / "model", str(settings.pop("family", "llama")), **settings)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match=reason):
        ONNX.lower(model, tmp_path / "engine", precision, options_for(ONNX, context))
    assert not list((tmp_path / "engine").iterdir())


def test_a_context_within_the_sliding_window_is_exact(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "mistral", sliding_window=64)
    assert ONNX.refusal(model.architecture, "fp32", options_for(ONNX, 64)) is None
    (tmp_path / "engine").mkdir()
    ONNX.lower(model, tmp_path / "engine", "fp32", options_for(ONNX, 64))
    ids = np.random.default_rng(3).integers(0, 128, (1, 64))
    wanted = fed(load_backend("torch").open(model.path, "fp32"), ids, 64)
    assert np.abs(fed(ONNX.open(tmp_path / "engine", "fp32"), ids, 30) - wanted).max() < 1e-4


def test_a_missing_toolchain_says_what_to_install(
    models: Callable[[str], ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.backends.onnx._PACKAGES", ("onnx", "no-such-package"))
    with pytest.raises(ToolchainMissing, match=r"no-such-package.*pip install 'amoeba-deploy\[onnx\]'"):
        ONNX.lower(models("mistral"), tmp_path, "fp32", OPTIONS)


def with_tokenizer(folder: Path) -> None:
    """A small byte-level tokenizer in a model's folder, which onnxruntime-genai insists on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["a little story"], trainers.BpeTrainer(vocab_size=128, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "eos_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def genai_greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens by onnxruntime-genai from any folder that it can load."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False, min_length=len(prompt) + tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(prompt) :]


@pytest.mark.parametrize("name", ["llama-grouped-tied", "mistral", "qwen2", "qwen3"])
def test_onnxruntime_genai_runs_the_folder_like_its_own_builder(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    """The oracle is onnxruntime-genai's model builder on the same folder: equal logits, and equal text through it."""
    source = Path(shutil.copytree(models(name).path, tmp_path / "model"))
    with_tokenizer(source)
    oracle, ours = tmp_path / "oracle", tmp_path / "ours"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(oracle)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache"), "--extra_options", "hf_token=false"]
    subprocess.run(command, check=True, capture_output=True)
    lowered(ModelFolder(source), ours)
    prompt = [5, 40, 17, 99]
    assert genai_greedy(ours, prompt, 24) == genai_greedy(oracle, prompt, 24)
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    difference = fed(ONNX.open(ours, "fp32"), ids, 20) - oracle_logits(oracle, ids, models(name))
    assert np.abs(difference).max() < 1e-4


def oracle_logits(folder: Path, ids: Ids, model: ModelFolder) -> np.ndarray:
    """Logits of the builder's graph, all ids at once."""
    import onnxruntime

    sizes = model.architecture
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            inputs[value.name] = np.zeros((1, sizes.kv_heads, 0, sizes.head_dim), np.float32)
        elif value.name == "position_ids":
            inputs[value.name] = np.arange(ids.shape[1])[None]
    return np.asarray(session.run(["logits"], inputs)[0])
