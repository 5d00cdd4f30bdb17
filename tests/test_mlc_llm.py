"""The MLC-LLM backend: what it is given, what of its output is believed, and that what it compiles computes the model.

Most tests run a stand-in for the command ``mlc_llm`` (``fake_mlc_llm.py``), which goes wrong as the real one does.
Those that compile and run models need the real one: set ``AMOEBA_MLC_PYTHON`` (docs/backend_mlc_llm.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import LLAMA3_ROPE, amoeba, random_selection, save_random_model

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, Toolchain, options_for
from amoeba_deploy.backends.conformance import Conformance, fed
from amoeba_deploy.backends.mlc_llm.cache import TensorCache
from amoeba_deploy.backends.mlc_llm.formats import FORMATS, dequantise
from amoeba_deploy.backends.mlc_llm.layout import source_config, stored_tensors
from amoeba_deploy.backends.mlc_llm.library import check_library
from amoeba_deploy.backends.mlc_llm.targets import CHOICES, build_target
from amoeba_deploy.backends.mlc_llm.tool import COMMAND, PYTHON
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.extraction.folder import copy_model, extract
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.profiles.measure import own_peak
from amoeba_deploy.profiles.mlc_bench import read_mlc_bench
from amoeba_deploy.selection import write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact

MLC = load_backend("mlc-llm")
CONTEXT = 64
REAL = os.environ.get(PYTHON)
needs_mlc = pytest.mark.skipif(not REAL, reason=f"{PYTHON} is not set: mlc_llm itself is not tested")
Models = Callable[[str], ModelFolder]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled libraries are kept between tests: one of a config, format and target is compiled once."""
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(autouse=True)
def kept_libraries(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(libraries))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that alone is on the PATH: the stand-in for ``mlc_llm``, and a compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = Path(__file__).with_name("fake_mlc_llm.py").read_text()
    add_program(folder, COMMAND, f"#!{sys.executable}\n{stand_in}")
    add_program(folder, "g++")
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def add_program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def options(chip: str | None = None, **settings: str) -> BuildOptions:
    return options_for(MLC, CONTEXT, chip=chip, settings=settings)


def lowered(model: ModelFolder, folder: Path, precision: str = "q0f16", wanted: BuildOptions | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    MLC.lower(model, folder, precision, wanted or options())
    return folder


def refuses_to_lower(model: ModelFolder, folder: Path, says: str, wanted: BuildOptions | None = None) -> None:
    """Lowering must end with an error that says so, and leave nothing behind."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(AmoebaError, match=says) as raised:
        MLC.lower(model, folder, "q0f16", wanted or options())
    assert "\n" not in str(raised.value)
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the stand-in


@pytest.mark.usefixtures("programs")
def test_weights_config_and_library_are_written_and_nothing_else(models: Models, tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-untied"), tmp_path / "engine")
    names = sorted(path.name for path in artefact.iterdir())
    assert names == ["mlc-chat-config.json", "model.so", "params_shard_0.bin", "tensor-cache.json"]


@pytest.mark.usefixtures("programs")
def test_the_same_model_gives_the_same_bytes_with_the_stand_in(models: Models, tmp_path: Path) -> None:
    first, second = (lowered(models("llama-grouped-tied"), tmp_path / name, "q0f32") for name in ("a", "b"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.usefixtures("programs")
def test_plain_text_begins_and_ends_with_the_models_own_tokens(models: Models, tmp_path: Path) -> None:
    config = json.loads((lowered(models("llama-multihead"), tmp_path / "engine") / "mlc-chat-config.json").read_text())
    assert config["conv_template"] == {"system_prefix_token_ids": [0], "stop_token_ids": [1]}


@pytest.mark.usefixtures("programs")
def test_trap_1_rope_parameters_alone_reach_mlc_in_the_older_spelling(models: Models, tmp_path: Path) -> None:
    model = models("llama-3-rope")
    assert "rope_theta" not in model.config
    assert not model.config.get("rope_scaling")
    config = json.loads((lowered(model, tmp_path / "engine") / "mlc-chat-config.json").read_text())["model_config"]
    assert config["position_embedding_base"] == LLAMA3_ROPE["rope_theta"]
    for name in ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert config["rope_scaling"][name] == LLAMA3_ROPE[name]


@pytest.mark.usefixtures("programs")
def test_trap_1_rotary_settings_that_mlc_lost_are_caught(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MLC", "rotary settings lost")
    says = "position_embedding_base = 10000 where the subnet has 50000.0"
    refuses_to_lower(models("llama-3-rope"), tmp_path / "engine", says)


def test_trap_1_rotary_scaling_is_refused_where_mlc_drops_it(models: Models) -> None:
    scaled = models("llama-3-rope").architecture
    assert MLC.refusal(scaled, "q0f16", options()) is None
    # A Mistral is converted as a Llama, which keeps the scaling.
    assert MLC.refusal(replace(scaled, family="mistral"), "q0f16", options()) is None
    qwen = replace(models("qwen3").architecture, rope=scaled.rope)
    assert "rotary scaling 'llama3' is dropped" in str(MLC.refusal(qwen, "q0f16", options()))


def test_trap_2_heads_must_divide_the_hidden_size_but_in_qwen3(models: Models) -> None:
    llama = models("llama-multihead").architecture  # 96 hidden channels
    for family in ("llama", "mistral", "qwen2"):
        odd = replace(llama, family=family, heads=5, kv_heads=5)
        assert "do not divide the hidden size 96" in str(MLC.refusal(odd, "q0f16", options())), family
    qwen = replace(models("qwen3-multihead").architecture, heads=5, kv_heads=5)
    assert MLC.refusal(qwen, "q0f16", options()) is None


def test_trap_2_the_heads_of_a_qwen2_must_make_up_the_hidden_size(models: Models) -> None:
    qwen = replace(models("qwen2").architecture, heads=6, kv_heads=3)
    assert MLC.refusal(qwen, "q0f16", options()) is None
    fewer = replace(qwen, heads=2, kv_heads=1)
    assert "do not make up the hidden size 96" in str(MLC.refusal(fewer, "q0f16", options()))
    assert MLC.takes.steps(qwen, 32, "q0f16").groups == (3,)


def test_trap_2_subnets_for_mlc_keep_only_heads_that_divide(models: Models) -> None:
    full = replace(models("llama-multihead").architecture, heads=6, kv_heads=6)
    assert MLC.takes.steps(full, 32, "q0f16").groups == (1, 2, 3, 4, 6)


@pytest.mark.usefixtures("programs")
def test_trap_3_blocks_of_different_widths_are_padded_to_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = checkpoint.architecture
    blocks = (block_plan(sizes, 0, [0, 2], range(96)), block_plan(sizes, 2, [1, 2], range(20, 52)))
    plan = Plan(Shape.parse("2x0.5"), blocks)
    assert plan.is_ragged
    assert MLC.layouts(sizes, "q0f32", options_for(MLC, 128)) == ("uniform",)
    dense, engine = tmp_path / "dense", tmp_path / "engine"
    dense.mkdir()
    engine.mkdir()
    subnet, _ = lower_plan(checkpoint, plan, MLC, "q0f16", options(), engine, dense)
    records = TensorCache(engine).records
    for index in range(2):
        assert records[f"model.layers.{index}.mlp.gate_up_proj.weight"].shape == (2 * 96, sizes.hidden)
    assert subnet.architecture.neurons == 96


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("fewer blocks", "wrote 3 blocks where the subnet has 4, though mlc_llm reported success"),
        ("library of fewer blocks", "built a library of num_hidden_layers = 3 where 4 belongs"),
    ],
)
@pytest.mark.usefixtures("programs")
def test_trap_4_fewer_blocks_with_exit_status_0_are_caught(
    fault: str, says: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MLC", fault)
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says)


@pytest.mark.usefixtures("programs")
def test_trap_5_q0f32_holds_float32_and_not_bfloat16(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-untied")
    cache = TensorCache(lowered(model, tmp_path / "engine", "q0f32"))
    for stored in stored_tensors(model.architecture):
        own = np.concatenate([model.tensors.float32(name) for name in stored.sources])
        record = cache.records[stored.name]
        assert (record.dtype, record.form) == ("float32", "raw")
        assert np.array_equal(cache.array(stored.name), own)
    assert MLC.takes.own_name("fp32") == "q0f32"


def test_trap_6_biases_are_refused(models: Models) -> None:
    for name in ("llama-biases", "granite-biases"):
        assert MLC.refusal(models(name).architecture, "q0f16", options()) is not None, name
    said = MLC.refusal(models("llama-biases").architecture, "q0f16", options())
    assert "does not run with biases on o_proj and down_proj" in str(said)


@pytest.mark.parametrize("chip", [None, "sm_87", "sm_90", "adreno-750", "metal", "armv8.2", "x86_64"])
@pytest.mark.parametrize("choice", CHOICES)
def test_trap_7_no_target_means_the_gpu_of_this_machine(chip: str | None, choice: str) -> None:
    try:
        target = build_target(chip, choice)
    except BadInput as error:
        assert choice != "auto"
        assert "--set target" in str(error) or "--device" in str(error)
        return
    if target.device == "android:adreno":  # a preset of MLC, host included
        return
    value = json.loads(target.device)
    host = value if value["kind"] == "llvm" else value["host"]
    assert host["mtriple"].startswith(target.machine)
    if value["kind"] == "cuda":
        assert value["arch"] == target.chip
        assert value["max_shared_memory_per_block"] == 49152
    elif value["kind"] != "llvm":
        assert value["max_threads_per_block"] == 256


def test_auto_follows_the_chip_of_the_device() -> None:
    found = {chip: build_target(chip, "auto") for chip in (None, "sm_87", "sm_90", "adreno-750", "metal", "armv8.2")}
    assert [target.name for target in found.values()] == ["llvm", "jetson", "cuda", "android", "metal", "llvm"]
    assert [found[chip].machine for chip in ("sm_87", "sm_90", "armv8.2")] == ["aarch64", "x86_64", "aarch64"]
    with pytest.raises(BadInput, match="its chip 'ethos-u55' has no target of MLC-LLM"):
        build_target("ethos-u55", "auto")


@pytest.mark.usefixtures("programs")
def test_a_target_that_does_not_fit_the_device_is_refused_before_any_work(models: Models, tmp_path: Path) -> None:
    says = "its target 'metal' does not fit the chip 'sm_87'"
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says, options("sm_87", target="metal"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("CUDA source", "is no object code|is CUDA source"),
        ("no fat binary", "holds CUDA source in place of code for sm_87; nvcc must make a fat binary"),
        ("another processor", "is code for x86_64, where sm_87 has aarch64"),
        ("nothing written", "model.so was not written, though mlc_llm compile reported success"),
    ],
)
def test_trap_8_a_library_that_is_none_of_the_device_is_caught(
    fault: str, says: str, programs: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_program(programs, "nvcc")
    add_program(programs, "aarch64-linux-gnu-g++")
    monkeypatch.setenv("FAKE_MLC", fault)
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says, options("sm_87"))


@pytest.mark.usefixtures("programs")
def test_trap_8_an_archive_of_cuda_source_is_caught(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MLC", "CUDA source")
    says = "model.tar:lib0.cu is CUDA source, though mlc_llm compile reported success"
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says, options("adreno-750"))


@pytest.mark.usefixtures("programs")
def test_trap_8_without_nvcc_the_library_is_a_step_for_the_device(models: Models, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    artefact = MLC.lower(models("llama-grouped-tied"), tmp_path / "engine", "q0f16", options("sm_87"))
    assert not list(artefact.folder.glob("model.*"))
    (step,) = artefact.steps
    assert step.command[:3] == (COMMAND, "compile", "engine/mlc-chat-config.json")
    assert step.command[-2:] == ("--output", "engine/model.so")
    assert json.loads(step.command[step.command.index("--device") + 1])["arch"] == "sm_87"
    assert artefact.notes == (
        "the library is still to be compiled on the device: there is no nvcc, aarch64-linux-gnu-g++ here",
    )
    assert "is for sm_87 (jetson)" in str(MLC.cannot_run("q0f16", options("sm_87")))


def test_with_nvcc_a_jetsons_library_is_compiled_and_checked(programs: Path, models: Models, tmp_path: Path) -> None:
    add_program(programs, "nvcc")
    add_program(programs, "aarch64-linux-gnu-g++")
    (tmp_path / "engine").mkdir()
    artefact = MLC.lower(models("llama-grouped-tied"), tmp_path / "engine", "q0f16", options("sm_87"))
    assert artefact.steps == ()
    facts = check_library(artefact.folder / "model.so", build_target("sm_87", "auto"))
    assert facts["quantization"] == "q0f16"


@pytest.mark.usefixtures("programs")
def test_an_android_library_is_an_archive_of_aarch64_objects(models: Models, tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", wanted=options("adreno-750"))
    assert (artefact / "model.tar").is_file()
    with pytest.raises(BadInput, match=r"has no model\.so for this machine"):
        MLC.open(artefact, "q0f16")


@pytest.mark.parametrize("command", ["convert_weight", "gen_config", "compile"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("fails", "mlc_llm {} failed on .* in q0f16: ValueError: something odd"),
        ("killed", "mlc_llm {} was killed by SIGKILL on .* after '{} begins'; nothing was written"),
        ("disk full", r"mlc_llm {} failed on .*: OSError: \[Errno 28\] No space left on device"),
    ],
)
@pytest.mark.usefixtures("programs")
def test_a_command_that_fails_is_one_sentence_with_its_last_line_and_leaves_nothing(
    fault: str,
    says: str,
    command: str,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_MLC", f"{fault} in {command}")
    says = says.format(command, command)
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("gate and up swapped", r"'model.layers.0.mlp.gate_up_proj.weight' .* is 1\d\d\.\d+% off the subnet's"),
        ("short shard", "params_shard_0.bin: is .* bytes long where its index has"),
    ],
)
@pytest.mark.usefixtures("programs")
def test_weights_that_are_not_the_subnets_are_caught(
    fault: str, says: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MLC", fault)
    refuses_to_lower(models("llama-grouped-tied"), tmp_path / "engine", says)


@pytest.mark.usefixtures("programs")
def test_weights_too_large_for_float16_are_refused(models: Models, tmp_path: Path) -> None:
    model = shutil.copytree(models("llama-grouped-tied").path, tmp_path / "model")
    torch_model = load_torch_model(model)
    torch_model.model.layers[1].mlp.down_proj.weight.data[3, 4] = 1e6
    torch_model.save_pretrained(model)
    says = "'model.layers.1.mlp.down_proj.weight' does not fit float16"
    refuses_to_lower(ModelFolder(model), tmp_path / "engine", says)


@pytest.mark.usefixtures("programs")
def test_a_full_disk_on_our_side_is_refused_and_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("amoeba_deploy.backends.mlc_llm.build.write_float32", full)
    (tmp_path / "engine").mkdir()
    with pytest.raises(OSError, match="No space left"):
        MLC.lower(models("llama-grouped-tied"), tmp_path / "engine", "q0f32", options())
    assert list((tmp_path / "engine").iterdir()) == []


@pytest.mark.usefixtures("programs")
def test_a_library_is_compiled_once_for_all_weights_of_a_shape(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    # Only what tells its versions is kept, so the stand-in gets some.
    versions = {COMMAND: "1", "tvm": "2"}
    monkeypatch.setattr("amoeba_deploy.backends.mlc_llm.build.toolchain", lambda: Toolchain(versions, (), ""))
    model = models("llama-grouped-untied")
    first = lowered(model, tmp_path / "a")
    (tmp_path / "other").mkdir()
    copy_model(model, tmp_path / "other", "float32", lambda name, _: -model.tensors.float32(name))
    monkeypatch.setenv("FAKE_MLC", "fails in compile")
    second = lowered(ModelFolder(tmp_path / "other"), tmp_path / "b")
    assert (first / "model.so").read_bytes() == (second / "model.so").read_bytes()
    assert TensorCache(first).array("model.norm.weight")[0] == -TensorCache(second).array("model.norm.weight")[0]
    # Another version compiles again, and a kept library that is damaged is refused once and then compiled again.
    versions["tvm"] = "3"
    refuses_to_lower(model, tmp_path / "c", "mlc_llm compile failed")
    versions["tvm"] = "2"
    (kept,) = (tmp_path / "cache").rglob("model.so")
    kept.write_bytes(kept.read_bytes()[:64])
    refuses_to_lower(model, tmp_path / "d", "holds no compiled model")
    monkeypatch.delenv("FAKE_MLC")
    assert (lowered(model, tmp_path / "e") / "model.so").read_bytes() == (first / "model.so").read_bytes()


def test_a_sliding_window_shorter_than_the_context_is_refused(models: Models) -> None:
    windowed = replace(models("mistral").architecture, sliding_window=32)
    assert "its sliding window of 32 positions is shorter" in str(MLC.refusal(windowed, "q0f16", options()))
    assert MLC.refusal(windowed, "q0f16", options_for(MLC, 32)) is None


def test_a_mistral_is_given_to_mlc_as_the_llama_that_it_is(models: Models) -> None:
    config = source_config(models("mistral"))
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])


# ------------------------------------------------------------------------------------------------ numbers and tools


@pytest.mark.parametrize("precision", [name for name, form in FORMATS.items() if form.group])
def test_packed_weights_are_read_number_by_number_as_mlc_defines_them(precision: str) -> None:
    form, rng, columns = FORMATS[precision], np.random.default_rng(0), 90
    assert form.group is not None
    numbers = rng.integers(0, 2**form.bits, (3, columns))
    groups = -(-columns // form.group)
    scales = rng.random((3, groups)).astype(form.dtype)
    per_word = 32 // form.bits
    words = np.zeros((3, groups * form.words), np.uint32)
    for row in range(3):
        for column in range(columns):
            words[row, column // per_word] |= np.uint32(int(numbers[row, column]) << column % per_word * form.bits)
    middle = {4: 7, 3: 3}[form.bits]
    wanted = [
        [float(np.dtype(form.dtype).type(numbers[r, c] - middle) * scales[r, c // form.group]) for c in range(columns)]
        for r in range(3)
    ]
    assert np.array_equal(dequantise(words, scales, form, columns), np.array(wanted, np.float32))


def test_without_mlc_it_says_how_to_get_it(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainMissing, match=rf"mlc\.ai/wheels mlc-llm-nightly-cpu .* set {PYTHON}"):
        MLC.lower(models("llama-grouped-tied"), tmp_path, "q0f16", options())
    assert MLC.toolchain().versions == {}
    assert MLC.identity("q0f16", options()).bound == ()


def test_a_named_interpreter_that_has_no_mlc_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for python in (sys.executable, "/nowhere/python"):
        monkeypatch.setenv(PYTHON, python)
        missing = MLC.toolchain().missing
        assert any(python in name for name in missing)


@pytest.mark.usefixtures("programs")
def test_an_engine_is_bound_to_chip_target_and_versions() -> None:
    identity = MLC.identity("q4f16_1", options_for(MLC, 64, 2, "sm_87")).to_json()
    assert (identity["chip"], identity["batch"], identity["context"]) == ("sm_87", 2, 64)
    assert json.loads(identity["more"]["target"])["host"]["mtriple"] == "aarch64-linux-gnu"


def test_a_subnet_for_mlc_is_cut_by_its_rules_from_the_command_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = amoeba("extract", checkpoint.path, "--shape", "2x0.5", "--for", "mlc-llm", "-o", tmp_path / "subnet")
    assert done.exit_code == 0, done.stderr
    assert MLC.refusal(ModelFolder(tmp_path / "subnet").architecture, "q4f16_1", options()) is None


def test_the_memory_of_an_engine_in_a_process_of_its_own_counts() -> None:
    before = own_peak()
    code = "data = bytearray(200 * 2**20); print(len(data), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert own_peak() > before + 200 * 2**20
        process.communicate(b"\n")
    assert own_peak() < before + 200 * 2**20


# --------------------------------------------------------------------------------------------------- MLC's benchmark

BENCH = """\
exec_feature.num_concurrent_requests,input_tokens.quantiles.p50,input_tokens.mean,output_tokens.mean,\
time_per_output_token_s.quantiles.p25,time_per_output_token_s.quantiles.p50,time_per_output_token_s.quantiles.p90,\
time_per_output_token_s.mean,time_to_first_token_s.quantiles.p50,time_to_first_token_s.mean,num_gpus,\
num_completed_requests
1,128.0,128.2,31.9,0.010,0.011,0.015,0.0123,0.25,0.3,1,20
4,128.0,128.2,31.9,0.020,0.021,0.025,0.0223,0.45,0.5,1,40
"""
"""Some of the columns that MLC's ``convert_reports_to_df`` gives, in its order."""


def test_mlcs_own_benchmark_is_read_in_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "bench.csv").write_text(BENCH)
    one, four = read_mlc_bench(tmp_path / "bench.csv")
    assert (one.ttft_ms, one.tpot_ms, one.tpot_p90) == (250.0, 11.0, 15.0)
    assert (one.prompt, one.tokens, one.requests, one.concurrent) == (128, 32, 20, 1)
    assert (four.concurrent, four.tpot_ms) == (4, 21.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace(",0.25,", ",0,"), "line 2 has no time to first token; run .* streamed"),
        (lambda text: text.replace(",0.021,", ",nan,"), "line 3 has 'time_per_output_token_s.quantiles.p50' = nan"),
        (lambda text: text.replace("1,20\n", "1,0\n"), "line 2 has no completed request"),
        (lambda text: text.replace("time_to_first_token_s.quantiles.p50", "ttft"), "line 2 has no number in"),
        (lambda text: text.splitlines()[0], "has no line of results"),
        (lambda _: "", "has no line of results"),
    ],
)
def test_a_benchmark_that_does_not_say_enough_is_refused(
    change: Callable[[str], str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "bench.csv").write_text(change(BENCH))
    with pytest.raises(BadInput, match=says):
        read_mlc_bench(tmp_path / "bench.csv")


# ------------------------------------------------------------------------------------------------------ MLC-LLM itself


class TestMlcLlm(Conformance):
    """What is compiled for real is compiled in one format here; the others are below."""

    flow = "mlc-llm"
    run_precisions: ClassVar[tuple[str, ...] | None] = ("q0f32",)

    def precisions(self) -> Iterator[str]:
        if not REAL:
            pytest.skip(f"{PYTHON} is not set: mlc_llm itself is not tested")
        yield from super().precisions()


REAL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped and tied, with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    "a mistral with tied embeddings": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
}


@needs_mlc
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_MODELS)
def test_every_class_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    family, changes = REAL_MODELS[name]
    model = save_random_model(tmp_path / "model", family, **changes)
    artefact = lowered(model, tmp_path / "engine", "q0f32")
    assert verify_artefact(MLC, model, artefact, "q0f32", options()).passed


@needs_mlc
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["q0f16", "q4f32_1", "q4f16_1", "q3f16_1"])
def test_every_format_computes_with_its_own_dequantised_weights(
    precision: str, demo: Checkpoint, tmp_path: Path
) -> None:
    # A trained model: three bits take a random one too far from itself.
    plan = demo.plan(Shape.parse("6x0.5"), MLC.takes.steps(demo.architecture, 32, precision))
    dense, engine = tmp_path / "dense", tmp_path / "engine"
    dense.mkdir()
    engine.mkdir()
    subnet, _ = lower_plan(demo, plan, MLC, precision, options(), engine, dense)
    result = verify_artefact(MLC, subnet, engine, precision, options())
    assert result.passed
    assert result.held_to_logits


@needs_mlc
@pytest.mark.slow
def test_a_batch_of_rows_of_different_lengths_gives_each_its_own(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-untied")
    wanted = options_for(MLC, CONTEXT, 3, settings={"prefill_chunk": "16"})
    artefact = lowered(model, tmp_path / "engine", "q0f32", wanted)
    reference = load_backend("torch").open(model.path, "fp32")
    engine = MLC.open(artefact, "q0f32", batch=3)
    ids = np.random.default_rng(3).integers(0, 128, (3, 40))
    for first in (40, 17, 1):  # 40 goes through in several chunks
        assert np.abs(fed(engine, ids, first) - fed(reference, ids, 40)).max() < 1e-4
    engine.reset()
    lengths = np.array([5, 12, 1])
    found = engine.feed(ids[:, :12], lengths)
    then = engine.feed(ids[:, 12:13])
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row, :length], ids[row, 12:13]])[None]
        reference.reset()
        right = reference.feed(alone)[0]
        assert np.abs(found[row, :length] - right[:length]).max() < 1e-4
        assert np.abs(then[row, 0] - right[length]).max() < 1e-4


@needs_mlc
@pytest.mark.slow
def test_an_engine_refuses_what_it_was_not_built_for(models: Models, tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-untied"), tmp_path / "engine", "q0f32")
    with pytest.raises(BadInput, match="built for a batch of 1, not 2"):
        MLC.open(artefact, "q0f32", batch=2)
    with pytest.raises(BadInput, match=f"built for a context of {CONTEXT}, not 65"):
        MLC.open(artefact, "q0f32", context=65)
    with pytest.raises(BadInput, match="is not of q4f16_1"):
        MLC.open(artefact, "q4f16_1")
    engine = MLC.open(artefact, "q0f32")
    with pytest.raises(BadInput, match="the engine has 64 positions, and 65 tokens are fed"):
        engine.feed(np.zeros((1, 65), np.int64))
    with pytest.raises(BadInput, match="ids go from 0 to 127"):
        engine.feed(np.array([[128]]))
    engine.reset()
    assert engine.feed(np.zeros((1, 64), np.int64)).shape == (1, 64, 128)
    (artefact / "model.so").write_bytes(b"no library")
    with pytest.raises(AmoebaError, match="the MLC-LLM engine failed"):
        MLC.open(artefact, "q0f32")


@needs_mlc
@pytest.mark.slow
def test_two_compilations_give_the_same_library(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("a", "b"):
        monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / f"cache-{name}"))
        found.append(lowered(models("llama-grouped-tied"), tmp_path / name, "q0f32"))
    assert (found[0] / "model.so").read_bytes() == (found[1] / "model.so").read_bytes()


@needs_mlc
@pytest.mark.slow
def test_a_trained_model_and_its_subnet_write_the_same_text(stories: Path, tmp_path: Path) -> None:
    model = ModelFolder(stories)
    sizes = model.architecture
    chosen = tmp_path / "selection"
    chosen.mkdir()
    write_selection(chosen, random_selection(model))
    (tmp_path / "checkpoint").mkdir()
    found = create_checkpoint(str(stories), chosen, tmp_path / "checkpoint", name="stories")
    dense = tmp_path / "dense"
    dense.mkdir()
    plan = found.plan(Shape.parse("4x0.5"), MLC.takes.steps(sizes, 32, "q0f32"))
    extract(found.model, plan, dense)
    for index, subnet in enumerate((model, ModelFolder(dense))):
        artefact = lowered(subnet, tmp_path / f"engine{index}", "q0f32")
        result = verify_artefact(MLC, subnet, artefact, "q0f32", options())
        assert result.greedy_tokens_equal
        assert result.greedy_tokens == 32


@needs_mlc
@pytest.mark.usefixtures("programs")
def test_what_the_stand_in_writes_is_what_mlc_writes(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("llama-grouped-untied")
    fake = lowered(model, tmp_path / "fake")
    assert REAL
    monkeypatch.setenv(PYTHON, REAL)
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    real = lowered(model, tmp_path / "real")
    assert TensorCache(fake).records.keys() == TensorCache(real).records.keys()
    for name in TensorCache(real).records:
        assert np.array_equal(TensorCache(fake).array(name), TensorCache(real).array(name))
    configs = [json.loads((folder / "mlc-chat-config.json").read_text()) for folder in (fake, real)]
    for name, value in configs[0]["model_config"].items():
        assert configs[1]["model_config"][name] == value, name
