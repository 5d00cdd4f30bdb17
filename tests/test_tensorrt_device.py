"""TensorRT-LLM: what is compiled where its tool is, and the steps that are left for a device where it is not."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from conftest import amoeba, save_random_model
from tensorrt_models import (  # noqa: F401
    SIZES,
    TENSORRT,
    Made,
    dense,
    made,
    options,
)

from amoeba_deploy.backends.tensorrt_llm import engine as engines
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles import machine
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.request import Space

# Form B: compiling

TOOL = """#!/usr/bin/env python3
import os, sys, signal
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.path.isfile(os.path.join(arguments["--checkpoint_dir"], "config.json"))
engines = arguments["--output_dir"]
os.makedirs(engines)
{body}
"""
ALL = """
for name in ("config.json", "rank0.engine", "rank1.engine"):
    open(os.path.join(engines, name), "w").write(name)
"""


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A stand-in for trtllm-build on the PATH: the real one needs a GPU. What is tested is how it is driven."""
    folder.mkdir()
    file = folder / "trtllm-build"
    file.write_text(TOOL.format(body=body))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr("amoeba_deploy.profiles.machine.own_chips", lambda: ("x86_64", "sm_90"))


def test_the_build_command_states_every_limit() -> None:
    line = " ".join(engines.build_command("c", "e", "bf16", options(context=2048, batch=4)))
    assert line == (
        "trtllm-build --checkpoint_dir c --output_dir e --max_batch_size 4 --max_input_len 2048 --max_seq_len 2048 "
        "--max_num_tokens 8192 --max_beam_width 1 --gemm_plugin bfloat16 --gpt_attention_plugin bfloat16 "
        "--remove_input_padding enable --kv_cache_type paged --logits_dtype float32"
    )
    old = engines.build_command("c", "e", "w8a16", options(release="0.12"))
    assert old[old.index("--paged_kv_cache") :][:2] == ("--paged_kv_cache", "enable")
    assert old[old.index("--gemm_plugin") + 1] == "float16"


def test_without_the_tool_compiling_is_a_step_for_the_device(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    artefact = TENSORRT.lower(made("llama"), tmp_path, "fp16", options("sm_90", form="B", tp=2, pp=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    files = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert files == ["config.json", *(f"rank{rank}.safetensors" for rank in range(4))]
    first = artefact.steps[0].to_json()
    assert first["command"].startswith(
        "trtllm-build --checkpoint_dir engine/checkpoint --output_dir engine/engines --max_batch_size 1 "
    )
    assert first["needs"].startswith("4 NVIDIA GPUs of sm_90 and TensorRT-LLM 1.2")
    assert [step.command[0] for step in artefact.steps] == ["trtllm-build"]
    made_requests, measured = artefact.usage
    for command in (made_requests, measured):
        # It reads the headers of the model's safetensors, and the bundle has none of the whole model.
        assert command.command[:5] == ("trtllm-bench", "--model", "DENSE", "--model_path", "DENSE")
        assert "DENSE stands for the folder that 'amoeba extract --layout uniform' writes" in command.needs
    assert "--backend tensorrt --engine_dir engine/engines" in measured.to_json()["command"]
    assert "compiled on the device" in artefact.notes[0]
    old = TENSORRT.lower(made("llama"), Path(shutil.copytree(tmp_path / "checkpoint", tmp_path / "b")), "fp16",
                         options(release="0.12"))  # fmt: skip
    assert [step.command[0] for step in old.steps] == ["trtllm-build"]
    assert [command.command[0] for command in old.usage] == ["gptManagerBenchmark"]


def test_with_the_tool_and_the_devices_gpu_here_engines_are_compiled(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "bin", monkeypatch, ALL)
    output = tmp_path / "out"
    output.mkdir()
    asked = options("sm_90", form="B", tp=2)
    artefact = TENSORRT.lower(made("llama"), output, "fp16", asked)
    assert sorted(path.name for path in (output / "engines").iterdir()) == [
        "config.json",
        "rank0.engine",
        "rank1.engine",
    ]
    assert artefact.steps == ()
    assert [command.command[0] for command in artefact.usage] == ["trtllm-bench", "trtllm-bench"]
    assert engines.builds_here("fp16", options(form="B"))
    assert not engines.builds_here("fp16", options("sm_86", form="B")), "the GPU here is another one"
    assert not engines.builds_here("fp16", options("sm_90"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('out of tactics', file=sys.stderr); sys.exit(3)", r"failed with exit code 3: out of tactics"),
        ("sys.exit(3)", r"failed with exit code 3: it said nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by SIGKILL, often for want of memory"),
        ("open(os.path.join(engines, 'config.json'), 'w').write('x')", r"ended well but left no rank0.engine"),
        (ALL + "open(os.path.join(engines, 'rank1.engine'), 'w')", r"ended well but left no rank1.engine"),
    ],
)
def test_a_build_that_fails_is_one_sentence_and_leaves_no_engine(
    body: str, reason: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "bin", monkeypatch, body)
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(AmoebaError, match=f"trtllm-build {reason}.*; build on the device"):
        TENSORRT.lower(made("llama"), output, "fp16", options(form="B", tp=2))
    assert not (output / "engines").exists()


def test_the_identity_names_release_form_spread_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options("sm_90", context=2048, batch=4, tp=2, pp=2, form="B")
    found = TENSORRT.identity("fp16", asked).to_json()
    assert (found["chip"], found["batch"], found["context"], found["bound"]) == ("sm_90", 4, 2048, [])
    assert found["more"] == {"form": "B", "release": "1.2", "tp": "2", "pp": "2", "max_num_tokens": "8192"}
    tool(tmp_path / "bin", monkeypatch, ALL)
    monkeypatch.setattr(
        "amoeba_deploy.backends.tensorrt_llm.installed_versions",
        lambda _: ({"tensorrt_llm": "1.2.1", "tensorrt": "10"}, ()),
    )
    assert TENSORRT.identity("fp16", asked).bound == ("tensorrt_llm", "tensorrt"), "a compiled engine is of one version"


# Jetson


@pytest.mark.parametrize(
    ("jetpack", "lines"),
    [
        (
            "7.2",
            [
                "tensorrt-edgellm-quantize llm --model_dir engine --output_dir quantized --quantization int4_awq",
                "tensorrt-edgellm-export quantized onnx",
                "llm_build --onnxDir onnx/llm --engineDir engines "
                "--maxBatchSize 1 --maxInputLen 64 --maxKVCacheCapacity 64",
            ],
        ),
        (
            "6.2",
            [
                "tensorrt-edgellm-quantize-llm --model_dir engine --output_dir quantized --quantization int4_awq",
                "tensorrt-edgellm-export-llm --model_dir quantized --output_dir onnx",
                "llm_build --onnxDir onnx --engineDir engines "
                "--maxBatchSize 1 --maxInputLen 64 --maxKVCacheCapacity 64",
            ],
        ),
    ],
)  # fmt: skip
def test_a_jetson_gets_the_folder_and_the_steps_of_edge_llm(jetpack: str, lines: list[str], dense: ModelFolder) -> None:
    asked = options("sm_87", jetpack=jetpack)
    artefact = TENSORRT.lower(dense, dense.path, "w4a16", asked)
    assert [step.to_json()["command"] for step in artefact.steps] == lines
    assert artefact.facts == {"form": "edge", "jetpack": jetpack}
    assert ["x86-64" in step.needs for step in artefact.steps] == [True, True, False]
    assert [step.where for step in artefact.steps] == ["host", "host", "device"]
    assert f"JetPack {jetpack}" in artefact.steps[-1].needs
    assert not (dense.path / "serve.yaml").exists()
    assert [step.command[0] for step in TENSORRT.lower(dense, dense.path, "fp16", asked).steps][-1] == "llm_build"
    assert len(TENSORRT.lower(dense, dense.path, "fp16", asked).steps) == 2
    assert TENSORRT.identity("w4a16", asked).to_json()["more"]["jetpack"] == jetpack


def test_this_machine_gets_the_form_of_a_jetson_where_it_is_one(
    dense: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.profiles.machine.own_chips", lambda: ("aarch64", "sm_87"))
    assert TENSORRT.lower(dense, dense.path, "w4a16", options()).facts["form"] == "edge"
    assert TENSORRT.identity("w4a16", options()).chip == "sm_87", "a host that does its steps is another machine"
    assert "TensorRT Edge-LLM has no bf16 on sm_87" in str(TENSORRT.refusal(dense.architecture, "bf16", options()))
    assert TENSORRT.identity("bf16", options("sm_90")).more["form"] == "A", "the device is not this machine"


def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "compatible"
    monkeypatch.setattr(machine, "_DEVICE_TREE", tree)
    found = machine.own_chips.__wrapped__
    assert "sm_87" not in found()
    tree.write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert "sm_87" not in found()
    tree.write_bytes(b"nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0")
    assert found()[-1] == "sm_87"


def test_a_mistral_on_a_jetson_is_noted(tmp_path: Path) -> None:
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "sliding_window": None}
    model = save_random_model(tmp_path / "plain", "mistral", **sizes)
    (tmp_path / "out").mkdir()
    artefact = TENSORRT.lower(model, tmp_path / "out", "fp16", options("sm_87"))
    assert "does not list Mistral" in artefact.notes[0]


def test_a_default_flow_that_takes_no_shape_of_the_model_is_passed_over(tmp_path: Path) -> None:
    """The model that ships has heads of 32, which no Jetson's engine takes."""
    done = amoeba("export", "--device", "orin-nx", "--latency", "40ms", "-o", tmp_path / "out", "--no-verify", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["flow"], found["precision"]) == ("onnx", "int4")
    assert found["remarks"][0].startswith("passed over tensorrt-llm int4: its head size 32 is neither 64 nor 128")


def test_a_default_flow_that_takes_some_shapes_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}))  # fmt: skip
    done = amoeba("search", "--config", file, "--device", "orin-nx", "--latency", "40ms", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["flow"], found["precision"], found["remarks"]) == ("tensorrt-llm", "w4a16", [])
    space = Space.of_config(file)
    steps = space.steps("tensorrt-llm", "w4a16")
    legal = [
        shape
        for shape in space.shapes(steps)
        if TENSORRT.refusal(space.sized(shape, steps).padded, "w4a16", options("sm_87")) is None
    ]
    assert found["considered"] == len(legal) > 0
    assert len(legal) < len(space.shapes(steps))
    assert all(space.sized(shape, steps).padded.neurons % 128 == 0 for shape in legal)


def test_where_every_preference_refuses_the_model_the_first_reason_is_said(tmp_path: Path) -> None:
    text = (Path(load_device.__code__.co_filename).parent / "devices" / "orin-nx.toml").read_text()
    alone = text[: text.index('[[flows]]\nflow = "onnx"')].replace('"orin-nx"', '"alone"')
    (tmp_path / "alone.toml").write_text(alone)
    done = amoeba("export", "--device", tmp_path / "alone.toml", "--latency", "40ms", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "nothing that 'alone' lists takes this model (tensorrt-llm int4)" in done.stderr
    assert "head size 32" in done.stderr
