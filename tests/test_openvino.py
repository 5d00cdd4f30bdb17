"""The OpenVINO backend: every family and precision computes what transformers computes, and nothing rounds unasked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, amoeba, save_random_model
from openvino_engines import (
    CONTEXT,
    HAS_NNCF,
    OPENVINO,
    OPTIONS,
    RUN,
    Models,
    constants,
    lowered,
    needs_nncf,
    transformers,
)

from amoeba_deploy.backends.backend import Ids, options_for
from amoeba_deploy.backends.conformance import Conformance, fed
from amoeba_deploy.backends.openvino.runtime import core
from amoeba_deploy.errors import BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.extraction.folder import Learnt, extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact


class TestOpenvino(Conformance):
    flow = "openvino"
    run_precisions = RUN


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


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_does_not_compute_is_refused_by_name(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    context = model.architecture.sliding_window or CONTEXT
    for precision in OPENVINO.precisions():
        with pytest.raises(BadInput, match=f"its {REFUSED[name]} is not something that openvino computes"):
            OPENVINO.lower(model, tmp_path, precision, options_for(OPENVINO, context))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", [p for p in ("fp32", "int8") if p in RUN])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_every_family_verifies(name: str, precision: str, models: Models, tmp_path: Path) -> None:
    artefact = lowered(models(name), tmp_path / "engine", precision)
    result = verify_artefact(OPENVINO, models(name), artefact, precision, OPTIONS)
    assert result.passed
    assert precision == "fp32" or result.exact_logit_error is not None


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-small-heads", "qwen3"])
def test_batches_and_chunked_prefill_agree_with_transformers(name: str, models: Models, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 128, (3, 40))
    wanted = fed(transformers(models(name)), ids, 40)
    engine = OPENVINO.open(lowered(models(name), tmp_path / "engine"), "fp32")
    for first in (40, 17, 1):
        # Float32 on both sides; logits here are of size 10.
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-4


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-3-rope"])
def test_rows_of_different_lengths_agree_with_transformers(name: str, models: Models, tmp_path: Path) -> None:
    engine = OPENVINO.open(lowered(models(name), tmp_path / "engine"), "fp32")
    reference, rng = transformers(models(name)), np.random.default_rng(3)
    for count, lengths in ((20, [20, 7, 1]), (4, [1, 4, 2]), (1, [1, 1, 1]), (5, [5, 1, 4])):
        ids = rng.integers(0, 128, (3, count))
        found, wanted = (each.feed(ids, np.array(lengths)) for each in (engine, reference))
        for row, length in enumerate(lengths):
            assert np.abs(found[row, :length] - wanted[row, :length]).max() < 1e-4
    # After a reset nothing of the fillings is left, and the batch may be another.
    ids = rng.integers(0, 128, (1, 9))
    assert np.abs(fed(engine, ids, 9) - fed(reference, ids, 9)).max() < 1e-4


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_positions_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 32} if kind == "yarn" else {}
    model = save_random_model(tmp_path / "model", "llama", rope_parameters=rope)
    ids = np.random.default_rng(3).integers(0, 128, (1, 100))
    engine = OPENVINO.open(lowered(model, tmp_path / "engine"), "fp32")
    assert np.abs(fed(engine, ids, 80) - fed(transformers(model), ids, 80)).max() < 1e-4


# What OpenVINO rounds unless told otherwise


def test_fp32_computes_and_caches_in_float32_on_every_cpu(models: Models, tmp_path: Path) -> None:
    engine: Any = OPENVINO.open(lowered(models("llama-grouped-tied"), tmp_path / "engine"), "fp32")
    assert "float" in engine.property("INFERENCE_PRECISION_HINT")
    assert "b" not in engine.property("INFERENCE_PRECISION_HINT").split("'")[1]
    assert engine.property("KV_CACHE_PRECISION") == engine.property("INFERENCE_PRECISION_HINT")
    assert engine.property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == "0"


def test_without_the_hints_openvino_would_not_compute_in_float32(models: Models, tmp_path: Path) -> None:
    """The trap itself: the day this fails, the defaults changed, and the module's words about them with it."""
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the CPU of this machine has no bfloat16 arithmetic")
    from amoeba_deploy.backends.openvino.engine import OpenvinoEngine

    model = models("llama-grouped-tied")
    artefact = lowered(model, tmp_path / "engine")
    ids = np.random.default_rng(3).integers(0, 128, (1, 40))
    wanted = fed(transformers(model), ids, 20)
    scale = float(np.abs(wanted).max())
    assert np.abs(fed(OpenvinoEngine(artefact, {}, None), ids, 20) - wanted).max() > 1e-3 * scale
    assert np.abs(fed(OPENVINO.open(artefact, "fp32"), ids, 20) - wanted).max() < 1e-5 * scale


@needs_nncf
def test_quantised_engines_round_activations_and_exact_ones_do_not(models: Models, tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", "int8")
    engine: Any = OPENVINO.open(artefact, "int8")
    exact: Any = OPENVINO.open_exact(artefact, "int8")
    assert [each.property("DYNAMIC_QUANTIZATION_GROUP_SIZE") for each in (engine, exact)] == ["32", "0"]
    for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"):
        assert engine.property(name) == exact.property(name) == "<Type: 'float32'>"


@pytest.mark.skipif("bf16" not in RUN, reason="the CPU of this machine has no bfloat16 arithmetic")
def test_bf16_keeps_positions_exact_however_long_the_text(tmp_path: Path) -> None:
    """Angles rounded to 8 bits would be wrong by whole turns at position 500, and right at position 5."""
    model = save_random_model(tmp_path / "model", "llama", max_position_embeddings=512)
    artefact = lowered(model, tmp_path / "engine", "bf16", options_for(OPENVINO, 512))
    exact = OPENVINO.open_exact(artefact, "bf16")
    assert exact is not None
    ids = np.random.default_rng(3).integers(0, 128, (1, 512))
    found, wanted = OPENVINO.open(artefact, "bf16").feed(ids)[0], exact.feed(ids)[0]
    errors = np.sqrt(np.mean((found - wanted) ** 2, axis=-1) / np.mean(wanted**2))
    assert errors[-64:].mean() < 2 * errors[:64].mean() < 0.1
    stored = constants(artefact)
    assert all(
        str(node.get_element_type().get_type_name()) == ("f32" if "norm" in name else "bf16")
        for name, node in stored.items()
        if name.endswith(".weight")
    )


def test_bf16_is_built_and_not_run_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    monkeypatch.setattr("amoeba_deploy.backends.openvino.runtime.core", Old)
    assert "no bfloat16" in str(OPENVINO.cannot_run("bf16", OPTIONS))
    assert OPENVINO.cannot_run("fp32", OPTIONS) is None


# Blocks that differ


def test_blocks_of_different_widths_need_no_padding(models: Models, tmp_path: Path) -> None:
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
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    wanted = fed(transformers(padded), ids, 32)
    artefact = lowered(ragged, tmp_path / "engine")
    assert np.abs(fed(OPENVINO.open(artefact, "fp32"), ids, 20) - wanted).max() < 1e-4
    widths = [constants(artefact)[f"model.layers.{i}.mlp.up_proj.weight"].get_output_shape(0)[0] for i in range(3)]
    assert widths == [80, 100, 33]


@pytest.mark.parametrize(("name", "compensated"), [("llama-grouped-tied", True), ("granite", True), ("qwen3", False)])
def test_a_sublayer_that_is_gone_leaves_its_bias_and_no_cache(
    name: str, compensated: bool, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    blocks = (
        block_plan(model.architecture, 0, [0, 2], range(0, 160, 2)),
        block_plan(model.architecture, 1, [], range(100)),
        block_plan(model.architecture, 2, [1], []),
        block_plan(model.architecture, 3, [1, 2], range(7, 40)),
    )
    rng = np.random.default_rng(0)

    def biases(_block: BlockPlan) -> tuple[Any, Any]:
        return rng.standard_normal((2, 96), dtype=np.float32)[0], rng.standard_normal(96, dtype=np.float32)

    (tmp_path / "model").mkdir()
    plan = Plan(Shape(4, Fraction(1, 2), "adaptive"), blocks)
    learnt = Learnt(biases=biases) if compensated else Learnt()
    extract(model, plan, tmp_path / "model", layout="ragged", learnt=learnt)
    subnet = ModelFolder(tmp_path / "model")
    assert ("model.layers.1.self_attn.o_proj.bias" in subnet.tensors.infos) is compensated
    for precision in ("fp32", "int8") if HAS_NNCF else ("fp32",):
        artefact = lowered(subnet, tmp_path / precision, precision)
        assert verify_artefact(OPENVINO, subnet, artefact, precision, OPTIONS).passed
        text = (artefact / "openvino_model.xml").read_text()
        assert [f'"past_key_values.{index}.key"' in text for index in range(4)] == [True, False, True, True]


# Compressed weights


@needs_nncf
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-grouped-untied"])
def test_no_matrix_stays_in_float_and_a_tied_head_is_stored_once(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    names = (
        ["model.embed_tokens.weight"] if model.architecture.tied else ["lm_head.weight", "model.embed_tokens.weight"]
    )
    for precision in ("int8", "int4"):
        (tmp_path / precision).mkdir()
        artefact = OPENVINO.lower(model, tmp_path / precision, precision, OPTIONS)
        tables = 1 if model.architecture.tied else 2
        blocks = 7 * model.architecture.depth
        wanted = {"u8": blocks + tables} if precision == "int8" else {"i4": blocks, "u8": tables}
        assert artefact.facts["matrices"] == wanted
        assert artefact.facts.get("eight_bit", names) == names
        stored = constants(artefact.folder)
        assert ("lm_head.weight" in stored) is not model.architecture.tied
        size = (artefact.folder / "openvino_model.bin").stat().st_size
        promised = OPENVINO.storage(precision).weight_bytes(model.architecture)
        # Rows here are an eighth as long as those that the estimate reckons with, so scales weigh more.
        assert 0.95 * promised < size < 1.12 * promised


@needs_nncf
@pytest.mark.parametrize(("group", "columns"), [("32", 32), ("128", 32)])
def test_int4_groups_are_those_asked_for_or_divide_the_rows(
    group: str, columns: int, models: Models, tmp_path: Path
) -> None:
    options = options_for(OPENVINO, CONTEXT, settings={"group": group})
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", "int4", options)
    shape = constants(artefact)["model.layers.0.mlp.up_proj.weight"].get_output_shape(0)
    assert list(shape) == [160, 96 // columns, columns]
    assert verify_artefact(OPENVINO, models("llama-grouped-tied"), artefact, "int4", options).passed


@needs_nncf
def test_rows_that_do_not_divide_stay_in_eight_bits_and_are_named(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "llama", intermediate_size=172, num_hidden_layers=2)
    (tmp_path / "engine").mkdir()
    artefact = OPENVINO.lower(model, tmp_path / "engine", "int4", OPTIONS)
    named = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)]
    assert artefact.facts["eight_bit"] == ["model.embed_tokens.weight", *named]
    assert verify_artefact(OPENVINO, model, artefact.folder, "int4", OPTIONS).passed


@needs_nncf
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_dequantised_weights_lie_within_half_a_step(precision: str, models: Models, tmp_path: Path) -> None:
    model = models("qwen2")
    artefact = lowered(model, tmp_path / "engine", precision)
    (tmp_path / "reference").mkdir()
    folder = OPENVINO.reference_folder(model, artefact, precision, tmp_path / "reference")
    assert folder is not None
    dequantised, stored = ModelFolder(folder), constants(artefact)
    for name in model.tensors.infos:
        own, found = model.tensors.float32(name), dequantised.tensors.float32(name)
        if f"{name}/scale" not in stored:
            assert (own == found).all()
            continue
        scale = np.abs(np.asarray(stored[f"{name}/scale"].data, np.float32))
        step = np.repeat(scale.reshape(len(own), -1), own.shape[1] // scale.reshape(len(own), -1).shape[1], axis=1)
        # Symmetric 4 bits reach from -8 to 7: what is at +8 loses a whole step. Scales are rounded to float16.
        allowed = 1.0 if str(stored[name].get_element_type().get_type_name()) == "i4" else 0.5
        assert (np.abs(own - found) <= allowed * step + 2e-3 * np.abs(own) + 1e-6).all()


@needs_nncf
@pytest.mark.parametrize("part", ["scale", "zero_point"])
def test_a_wrong_scale_or_zero_point_is_caught(part: str, models: Models, tmp_path: Path) -> None:
    """The artefact's own weights are the reference: what is wrong in them is caught by the subnet's."""
    model = models("llama-multihead")
    artefact = lowered(model, tmp_path / "engine", "int8")
    layer = (artefact / "openvino_model.xml").read_text().split(f'name="model.layers.1.mlp.up_proj.weight/{part}"')[1]
    offset, size = (int(layer.split(f'{word}="')[1].split('"')[0]) for word in ("offset", "size"))
    data = bytearray((artefact / "openvino_model.bin").read_bytes())
    kind = np.float16 if part == "scale" else np.uint8
    values = np.frombuffer(bytes(data[offset : offset + size]), kind)
    wrong = values * kind(1.05) if part == "scale" else values + kind(2)
    data[offset : offset + size] = wrong.astype(kind).tobytes()
    (artefact / "openvino_model.bin").write_bytes(data)
    with pytest.raises(VerificationFailed, match="dequantised weights"):
        verify_artefact(OPENVINO, model, artefact, "int8", OPTIONS)


# Refusals


@pytest.mark.parametrize(
    ("changes", "precision", "reason"),
    [
        ({"family": "mistral", "sliding_window": 64}, "fp32", "sliding window of 64"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "fp32", "scaling 'dynamic'"),
        ({"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}, "int4", "hidden size 80"),
    ],
)
def test_what_it_would_get_wrong_is_refused(
    changes: dict[str, object], precision: str, reason: str, tmp_path: Path
) -> None:
    settings = dict(changes)
    model = save_random_model(tmp_path / "model", str(settings.pop("family", "llama")), **settings)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match=reason):
        lowered(model, tmp_path / "engine", precision)
    assert not list((tmp_path / "engine").iterdir())


def test_an_odd_head_size_is_refused(models: Models) -> None:
    odd = replace(models("llama-grouped-tied").architecture, head_dim=15)
    assert "head size 15 is odd" in str(OPENVINO.refusal(odd, "fp32", OPTIONS))


def test_int4_keeps_only_numbers_of_units_whose_rows_divide_into_groups(models: Models) -> None:
    sizes = replace(models("llama-small-heads").architecture, neurons=160)
    assert OPENVINO.takes.steps(sizes, 1, "int4").multiple == 32
    assert OPENVINO.takes.steps(sizes, 1, "int4").groups == (2, 3)
    assert OPENVINO.takes.steps(sizes, 1, "int8").groups == (1, 2, 3)


def test_what_is_missing_or_damaged_is_one_sentence(models: Models, tmp_path: Path) -> None:
    whole = lowered(models("llama-grouped-tied"), tmp_path / "whole")
    xml, weights, settings = "openvino_model.xml", "openvino_model.bin", "openvino_properties.json"

    def spoil(file: str, content: bytes | None) -> Path:
        folder = Path(shutil.copytree(whole, tmp_path / "spoilt", dirs_exist_ok=True))
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        return folder

    for file, content, said in (
        (xml, None, "has no openvino_model.xml"),
        (weights, None, "has no openvino_model.bin"),
        (settings, None, "has no openvino_properties.json"),
        (xml, b"<net", "not an OpenVINO model, or a damaged one"),
        (xml, (whole / xml).read_bytes()[:-2000], "not an OpenVINO model, or a damaged one"),
        (weights, (whole / weights).read_bytes()[:-2000], "not an OpenVINO model, or a damaged one"),
        (settings, b"{}", "has format None"),
        (settings, (whole / settings).read_bytes().replace(b'"f32"', b'"f31"'), "does not compile"),
        (settings, (whole / settings).read_bytes().replace(b"INFERENCE", b"INFERIOR"), "its properties are not"),
    ):
        with pytest.raises(BadInput, match=said) as raised:
            OPENVINO.open(spoil(file, content), "fp32")
        assert "\n" not in str(raised.value)
    with pytest.raises(BadInput, match="holds an artefact in fp32, not in int8"):
        OPENVINO.open(whole, "int8")


def test_a_missing_nncf_says_what_to_install_and_only_where_it_is_needed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amoeba_deploy.backends.openvino as module

    known = module.installed_versions
    monkeypatch.setattr(
        module, "installed_versions", lambda names: ({}, names) if "nncf" in names[:1] else known(names)
    )
    with pytest.raises(ToolchainMissing, match=r"nncf for int8 and int4.*pip install 'amoeba-deploy\[openvino\]'"):
        OPENVINO.lower(models("mistral"), tmp_path, "int8", OPTIONS)
    assert not list(tmp_path.iterdir())
    OPENVINO.lower(models("mistral"), tmp_path, "fp32", OPTIONS)


@needs_nncf
def test_nothing_is_printed_and_no_telemetry_is_sent_or_kept(models: Models, tmp_path: Path) -> None:
    """In a process of its own, since NNCF sends nothing under pytest anyway."""
    script = (
        "import sys; from pathlib import Path\n"
        "from amoeba_deploy.backends import load_backend\n"
        "from amoeba_deploy.backends.backend import options_for\n"
        "from amoeba_deploy.model_folder import ModelFolder\n"
        "backend = load_backend('openvino')\n"
        "assert 'openvino' not in sys.modules\n"
        "backend.lower(ModelFolder(Path(sys.argv[1])), Path(sys.argv[2]), 'int8', options_for(backend, 128))\n"
        "backend.open(Path(sys.argv[2]), 'int8')\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
    )
    home = tmp_path / "home"
    for folder in (home, tmp_path / "engine"):
        folder.mkdir()
    command = [sys.executable, "-c", script, str(models("llama-grouped-tied").path), str(tmp_path / "engine")]
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ""
    assert "nncf" not in done.stderr.lower()
    assert not (home / "intel").exists()


# The commands


@pytest.mark.slow  # a device's first export measures the whole machine
@pytest.mark.parametrize("precision", [p for p in RUN if p != "bf16"][-1:])
def test_a_ragged_subnet_of_the_shipped_checkpoint_is_exported_checked_and_run(precision: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = amoeba("extract", "--shape", "6x0.5", "--policy", "adaptive", "--for", "openvino", "--plan-only").stdout
    (tmp_path / "plan.json").write_text(plan)
    shape = ["--shape", tmp_path / "plan.json", "--context", "128", "--prompt", "16", "--tokens", "4"]
    common = ["--device", "local", "--flow", "openvino", "--precision", precision, "-o", out, "--json", "--quiet"]
    done = amoeba("export", *common, *shape)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verified"]["greedy_tokens_equal"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["engine"]["matrices"]
    assert manifest["identity"]["bound"] == []
    assert manifest["identity"]["chip"] is None
    assert amoeba("bundle", "verify", out).exit_code == 0
    said = amoeba("run", out, "-p", "Once upon a time", "--tokens", "8")
    assert said.exit_code == 0
    assert said.stdout.strip()
    damaged: Ids = np.fromfile(out / "engine" / "openvino_model.bin", np.uint8)
    damaged[1000] ^= 255
    damaged.tofile(out / "engine" / "openvino_model.bin")
    assert amoeba("bundle", "verify", out).exit_code == 5
