"""TensorRT-LLM: what it takes, its folders and precisions, and the way from a checkpoint to a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from conftest import amoeba, random_selection, save_random_model
from tensorrt_models import (  # noqa: F401
    SIZES,
    TENSORRT,
    Made,
    config_of,
    deci,
    dense,
    made,
    options,
    written,
)

from amoeba_deploy.architecture import Architecture, Rope
from amoeba_deploy.backends.conformance import Conformance
from amoeba_deploy.backends.tensorrt_llm.fp8 import e4m3
from amoeba_deploy.backends.tensorrt_llm.reader import RankFiles, require_same
from amoeba_deploy.backends.tensorrt_llm.reference import RankEngine
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.selection import write_selection
from amoeba_deploy.tensors import as_float32, from_float32


class TestTensorrtLlm(Conformance):
    flow = "tensorrt-llm"


# What is refused

LEGAL = Architecture(
    family="llama", depth=4, hidden=256, heads=4, kv_heads=4, head_dim=64, neurons=512, vocabulary=512, context=2048,
    tied=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "precision", "asked", "reason"),
    [
        ({"head_dim": 40}, "fp16", {}, "head size 40 is none of 32, 48, 64"),
        ({"family": "granite"}, "fp16", {}, "it is a granite, which tensorrt-llm does not run"),
        ({"rope": Rope(1e4, "yarn")}, "fp16", {}, "rotary scaling 'yarn'"),
        ({"sliding_window": 32}, "fp16", {}, "sliding window of 32 positions is shorter than the context of 64"),
        ({"family": "qwen3", "qk_norm": True, "output_bias": True}, "fp16", {}, "qwen3 with biases on o_proj"),
        ({}, "fp16", {"chip": "adreno-750"}, "TensorRT-LLM runs on NVIDIA GPUs only"),
        ({}, "fp16", {"chip": "sm_orin"}, "architecture 'sm_orin' is no CUDA generation; name it as NVIDIA does"),
        ({}, "fp16", {"chip": "sm_"}, "architecture 'sm_' is no CUDA generation"),
        ({}, "bf16", {"chip": "sm_75"}, "bf16 needs an NVIDIA GPU of sm_80 or newer, and the device is sm_75"),
        ({}, "fp8", {"chip": "sm_86"}, "fp8 needs an NVIDIA GPU of sm_89 or newer, and the device is sm_86"),
        ({}, "fp8", {"form": "B"}, "needs scales of activations, from calibration; choose form A"),
        ({}, "w4a16", {"form": "A"}, "form A does not quantise weights to w4a16"),
        ({}, "w4a16", {"release": "1.3"}, "release 1.3 has no trtllm-build.*fp16, bf16 or fp8"),
        ({}, "fp16", {"form": "B", "release": "1.3"}, "release 1.3 has no trtllm-build.*--set form=A"),
        ({}, "fp16", {"form": "A", "release": "0.12"}, "release 0.12 loads no Hugging Face folder"),
        ({"family": "qwen3", "qk_norm": True}, "fp16", {"release": "0.12"}, "release 0.12 has no Qwen3"),
        ({}, "fp16", {"pp": 5}, "4 blocks do not fill pp=5 stages"),
        ({"heads": 6, "kv_heads": 6, "hidden": 384}, "fp16", {"tp": 4}, "6 query heads.*tp=4; the nearest.*4 and 8"),
        ({"neurons": 510}, "fp16", {"tp": 4}, "510 neurons do not spread over tp=4; the nearest.* 508 and 512"),
        ({"heads": 6, "kv_heads": 3, "hidden": 384}, "fp16", {"tp": 2}, "3 key/value heads neither divide tp=2"),
        ({"neurons": 576}, "w4a16", {"tp": 2}, "576 neurons are no multiple of 128.*nearest that it takes are 512 and"),
        ({"hidden": 320, "heads": 5, "kv_heads": 5}, "w8a16", {"tp": 5}, "rows of|hidden|neurons"),
        ({"neurons": 520}, "fp8", {"tp": 1}, "520 neurons are no multiple of 16.*takes are 512 and 528"),
        ({}, "bf16", {"chip": "sm_87"}, "TensorRT Edge-LLM has no bf16 on sm_87"),
        ({}, "w8a16", {"chip": "sm_87"}, "TensorRT Edge-LLM has no w8a16"),
        ({}, "fp8", {"chip": "sm_87"}, "TensorRT Edge-LLM has no fp8"),
        ({}, "fp16", {"chip": "sm_87", "form": "B"}, "a Jetson takes neither form A nor B"),
        ({}, "fp16", {"chip": "sm_87", "tp": 2}, "a Jetson has one GPU"),
        ({"head_dim": 32}, "w4a16", {"chip": "sm_87"}, "head size 32 is neither 64 nor 128"),
        ({"neurons": 448}, "w4a16", {"chip": "sm_87"}, "448 neurons are no multiple of 128.*384 and 512"),
        ({"kv_heads": 1}, "w4a16", {"chip": "sm_87"}, "64 channels of key heads.*the nearest that it takes is 128"),
        ({"hidden": 192, "heads": 6, "kv_heads": 6}, "fp16", {"chip": "sm_87"}, "192 hidden channels.*128 and 256"),
        ({"rope": Rope(1e4, "linear", (("factor", 2.0),))}, "fp16", {"chip": "sm_87"}, "linear rotary scaling"),
        ({"mlp_bias": True, "qkv_bias": True, "output_bias": True}, "fp16", {"chip": "sm_87"}, "--bias off"),
        ({"heads": 6, "kv_heads": 6}, "fp16", {"chip": "sm_87", "jetpack": "6.2"}, "0.6 does not know; .*jetpack=7.2"),
    ],
)  # fmt: skip
def test_what_it_would_get_wrong_is_refused_with_the_way(
    change: dict[str, Any], precision: str, asked: dict[str, Any], reason: str
) -> None:
    import re

    refused = TENSORRT.refusal(replace(LEGAL, **change), precision, options(**asked))
    assert refused is not None
    assert re.search(reason, refused), refused


@pytest.mark.parametrize(
    ("change", "precision", "asked"),
    [
        ({}, "fp16", {"tp": 4, "pp": 4}),
        ({}, "fp8", {"chip": "sm_89"}),
        ({}, "fp8", {"chip": "sm_90a"}),
        ({}, "fp8", {"chip": "sm_120"}),
        ({}, "bf16", {"chip": "sm_90", "release": "1.3"}),
        ({"kv_heads": 1}, "fp16", {"tp": 4, "form": "B"}),
        ({}, "w4a16", {"tp": 2}),
        ({"sliding_window": 64}, "fp16", {}),
        ({}, "w4a16", {"chip": "sm_87"}),
        ({"heads": 6, "kv_heads": 6}, "w4a16", {"chip": "sm_87"}),
    ],
)
def test_what_it_takes_is_not_refused(change: dict[str, Any], precision: str, asked: dict[str, Any]) -> None:
    assert TENSORRT.refusal(replace(LEGAL, **change), precision, options(**asked)) is None


@pytest.mark.parametrize("name", ["orin-nx", "agx-orin-64", "orin-nano-super"])
def test_every_orin_of_the_catalogue_is_a_jetson(name: str) -> None:
    chip = load_device(name).architecture
    refused = TENSORRT.refusal(LEGAL, "fp8", options(chip=chip))
    assert refused is not None
    assert "TensorRT Edge-LLM" in refused


def test_a_release_or_form_that_there_is_not_is_refused() -> None:
    for name, value in (("release", "2.0"), ("form", "C"), ("tp", "0"), ("jetpack", "5")):
        with pytest.raises(BadInput, match=f"no {name}={value}"):
            options(**{name: value})


# Form A


def test_form_a_is_the_dense_folder_itself_with_both_rotary_spellings(dense: ModelFolder) -> None:
    before = {file.name: file.read_bytes() for file in dense.path.iterdir()}
    artefact = TENSORRT.lower(dense, dense.path, "fp16", options(tp=2))
    assert artefact.facts["form"] == "A"
    after = {file.name: file.read_bytes() for file in dense.path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"serve.yaml", "bench.yaml"}
    config = config_of(dense.path)
    # transformers 4.57, which TensorRT-LLM 1.2 pins, reads the older keys only, and says nothing where they lack.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "float16"


def test_the_yaml_has_the_arguments_of_the_llm_interface(dense: ModelFolder) -> None:
    TENSORRT.lower(dense, dense.path, "fp16", options(tp=2, pp=2, batch=8, context=2048))
    served, measured = (yaml.safe_load((dense.path / f"{name}.yaml").read_text()) for name in ("serve", "bench"))
    assert served == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "max_seq_len": 2048,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": True},
        "cuda_graph_config": {"max_batch_size": 8, "enable_padding": True},
    }
    assert measured["kv_cache_config"]["enable_block_reuse"] is False, "a cached prompt has no time to its first token"


@pytest.mark.parametrize(("release", "flag"), [("1.3", "--config"), ("1.2", "--extra_llm_api_options")])
def test_form_a_is_complete_and_is_used_by_the_releases_commands(release: str, flag: str, dense: ModelFolder) -> None:
    artefact = TENSORRT.lower(dense, dense.path, "fp16", options("sm_90", tp=2, release=release, batch=4))
    assert artefact.steps == ()
    lines = [command.to_json()["command"] for command in artefact.usage]
    assert lines == [
        "trtllm-bench --model engine --model_path engine prepare-dataset --output ../requests.json token-norm-dist "
        "--num-requests 64 --input-mean 32 --input-stdev 0 --output-mean 32 --output-stdev 0",
        "trtllm-bench --model engine --model_path engine throughput --dataset ../requests.json --backend pytorch "
        f"{flag} engine/bench.yaml --max_seq_len 64 --max_batch_size 4 --max_num_tokens 256 --tp 2 --pp 1 "
        "--streaming --concurrency 4 "
        "--report_json ../report.json",
        f"trtllm-serve engine --port 8000 {flag} engine/serve.yaml",
    ]
    needs = f"2 NVIDIA GPUs of sm_90 and TensorRT-LLM {release}"
    assert all(command.needs.startswith(needs) for command in artefact.usage)


def test_a_folder_in_another_dtype_is_not_used_in_place(dense: ModelFolder) -> None:
    with pytest.raises(BadInput, match="its weights are F16, where bf16 takes BF16; extract in bfloat16"):
        TENSORRT.lower(dense, dense.path, "bf16", options())


def test_form_a_elsewhere_is_a_copy_in_its_dtype(dense: ModelFolder, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    TENSORRT.lower(dense, output, "bf16", options())
    copied = ModelFolder(output)
    assert {info.dtype for info in copied.tensors.infos.values()} == {"BF16"}
    assert copied.architecture == dense.architecture


def test_form_a_refuses_blocks_of_different_sizes(deci: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="its blocks differ, which only form B without quantisation holds"):
        TENSORRT.lower(deci, tmp_path, "fp16", options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spread", [{"tp": 1, "pp": 1}, {"tp": 2, "pp": 2}])
def test_a_block_without_attention_or_neurons_is_lowered_in_form_b(
    deci: ModelFolder, tmp_path: Path, spread: dict[str, int]
) -> None:
    artefact = TENSORRT.lower(deci, tmp_path, "fp16", options(form="B", **spread))
    assert artefact.facts["tensors_compared"] > 0
    layers = config_of(tmp_path / "checkpoint")["layer_configs"]
    assert [layer["attention"]["impl"] == "attention" for layer in layers] == [True, True, False, True]
    assert layers[3]["ffn"]["impl"] != "mlp"


def test_a_stage_without_attention_is_refused(deci: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stage 2 of pp=4 has no block with attention"):
        TENSORRT.lower(deci, tmp_path, "fp16", options(form="B", pp=4))


# FP8


def test_e4m3_rounds_as_torch_does() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].numpy()
    between = np.sort(finite)
    numbers = np.concatenate(
        [finite, (between[1:] + between[:-1]) / 2, np.random.default_rng(0).uniform(-448, 448, 999)]
    )
    wanted = torch.from_numpy(numbers.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(e4m3(numbers.astype(np.float32)), wanted)


def test_fp8_is_a_folder_whose_activations_are_scaled_as_it_runs(dense: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch

    output = tmp_path / "out"
    output.mkdir()
    artefact = TENSORRT.lower(dense, output, "fp8", options("sm_90", tp=2))
    assert artefact.facts["form"] == "A"
    assert json.loads((output / "hf_quant_config.json").read_text())["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    assert config_of(output)["torch_dtype"] == "bfloat16"
    found = load_torch(output / "model.safetensors")
    assert not any("input_scale" in name for name in found), "a scale that no data gave would be invented"
    assert {str(values.dtype) for name, values in found.items() if "norm" in name or "embed" in name} == {
        "torch.bfloat16"
    }
    for name in (name for name in found if name.endswith("_proj.weight")):
        assert found[name].dtype == torch.float8_e4m3fn
        scale = found[f"{name}_scale"]
        assert scale.dtype == torch.float32
        own = torch.from_numpy(dense.tensors.float32(name))
        # Half a step of 3 bits of fraction, relative; of the smallest numbers half of a step of 2^-9.
        assert ((found[name].float() * scale - own).abs() <= own.abs() / 16 + scale * 2**-10).all()
    together = [found[f"model.layers.0.self_attn.{part}_proj.weight_scale"] for part in "qkv"]
    assert len({float(scale) for scale in together}) == 1, "TensorRT-LLM rescales parts of one matrix to one scale"


# Identity, storage, running


def test_neither_the_head_nor_the_embedding_is_quantised() -> None:
    storage = TENSORRT.storage("w4a16")
    assert storage.head_bytes(LEGAL) == LEGAL.vocabulary * LEGAL.hidden * 2 + LEGAL.hidden * 2
    assert storage.embedding_bytes(replace(LEGAL, tied=False)) == LEGAL.vocabulary * LEGAL.hidden * 2
    assert storage.block_bytes(LEGAL) < TENSORRT.storage("fp16").block_bytes(LEGAL) / 3


def test_an_engine_is_not_opened_here_and_it_is_said_where(tmp_path: Path) -> None:
    assert "run on NVIDIA GPUs" in str(TENSORRT.cannot_run("fp16", options()))
    with pytest.raises(ToolchainMissing, match="run the commands of the bundle's manifest on the device"):
        TENSORRT.open(tmp_path, "fp16")


def test_the_dense_weights_are_used_in_place_in_form_a_only() -> None:
    assert TENSORRT.folder_dtype("fp16", options()) == "float16"
    assert TENSORRT.folder_dtype("bf16", options()) == "bfloat16"
    assert TENSORRT.folder_dtype("fp16", options(form="B")) is None
    assert TENSORRT.folder_dtype("fp8", options()) is None
    assert TENSORRT.folder_dtype("w4a16", options()) is None
    assert TENSORRT.folder_dtype("w4a16", options("sm_87")) == "float16"


def test_weights_are_compared_with_the_subnets_only_where_they_are_those(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    assert TENSORRT.reference_folder(model, tmp_path, "bf16", tmp_path) == model.path
    assert TENSORRT.reference_folder(model, tmp_path, "w4a16", tmp_path) is None


def test_the_same_subnet_gives_the_same_bytes(made: Made, dense: ModelFolder, tmp_path: Path) -> None:
    for precision, model, asked in (
        ("bf16", made("qwen2"), options(form="B", tp=2, pp=2)),
        ("fp8", dense, options()),
        ("w4a16", dense, options("sm_87")),
    ):
        folders = [tmp_path / f"{precision}-{i}" for i in range(2)]
        for folder in folders:
            folder.mkdir()
            TENSORRT.lower(model, folder, precision, asked)
        files = [{f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in folders]
        assert files[0] == files[1]
        assert files[0]


def test_a_bfloat16_checkpoint_rounds_once(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    folder = written(model, tmp_path / "a", 2, 1, "bf16")
    name = "model.layers.3.mlp.down_proj.weight"
    wanted = from_float32(as_float32(np.ascontiguousarray(model.tensors.raw(name)), "F16"), "BF16")
    assert np.array_equal(RankFiles(folder).assembled()[name], wanted)
    assert require_same(model, folder) > 0


# From a checkpoint to a bundle


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of a random Llama of legal sizes, whose subnets may have blocks of different widths."""
    root = tmp_path_factory.mktemp("source")
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    model = save_random_model(root / "model", "llama", **sizes)
    for name in ("selection", "checkpoint"):
        (root / name).mkdir()
    write_selection(root / "selection", random_selection(model))
    return create_checkpoint(str(model.path), root / "selection", root / "checkpoint", policy="adaptive")


def exported(source: Checkpoint, output: Path, *asked: object) -> dict[str, Any]:
    command = ("export", source.path, "--flow", "tensorrt-llm", "--context", 64, "--prompt", 16, "--tokens", 8)
    done = amoeba(*command, "-o", output, "--json", *asked)
    assert done.exit_code == 0, done.stderr
    return {"printed": json.loads(done.stdout), "manifest": json.loads((output / "manifest.json").read_text())}


def test_form_b_is_exported_to_a_bundle_with_steps_and_a_self_test(source: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    spread = ("--set", "form=B", "--set", "tp=2", "--set", "pp=2")
    found = exported(source, output, "--device", "h100-sxm", "--precision", "fp16", "--shape", "4x0.75", *spread)
    manifest = found["manifest"]
    assert found["printed"]["verified"] is manifest["verified"] is None
    assert "NVIDIA GPUs" in found["printed"]["cannot_run"]
    assert manifest["steps"][0]["command"].startswith("trtllm-build --checkpoint_dir engine/checkpoint")
    assert manifest["identity"]["chip"] == "sm_90"
    assert manifest["identity"]["more"]["tp"] == "2"
    assert manifest["engine"]["form"] == "B"
    schema = json.loads((Path(__file__).parent.parent / "docs/schemas/manifest.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert manifest["settings"] == {"form": "B", "tp": "2", "pp": "2", "release": "1.2", "jetpack": "7.2"}
    files = set(manifest["files"])
    assert {f"engine/checkpoint/rank{rank}.safetensors" for rank in range(4)} | {
        "config.json",
        "selftest.json",
    } <= files
    assert not any(name.endswith("model.safetensors") for name in files), "the weights are in it once"
    # An adaptive shape's blocks differ, and so it is a DeciLM; what it computes is what the self-test records.
    config = config_of(output / "engine" / "checkpoint")
    assert config["architecture"] == "DeciLMForCausalLM"
    test = json.loads((output / "selftest.json").read_text())
    ids, engine = np.array([test["prompt"]]), RankEngine(output / "engine" / "checkpoint")
    for token, margin in zip(test["tokens"], test["margins"], strict=True):
        chosen = int(engine.feed(ids)[0, -1].argmax())
        if margin < 0.05:  # random weights in float16 may choose otherwise here
            break
        assert chosen == token
        ids = np.array([[token]])
    verified = amoeba("bundle", "verify", output, "--quiet")
    assert verified.exit_code == 0
    assert "self-test not run: its engine is not finished" in verified.stdout
    assert "compile the checkpoint to engines" in verified.stdout


def test_form_a_pads_blocks_of_different_widths(source: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    found = exported(source, output, "--device", "h100-sxm", "--precision", "bf16", "--shape", "4x0.5")
    config = config_of(output / "engine")
    assert config["model_type"] in ("llama", "mistral")
    assert {info.dtype for info in ModelFolder(output / "engine").tensors.infos.values()} == {"BF16"}
    assert found["manifest"]["steps"] == []
    assert found["manifest"]["usage"] == found["printed"]["usage"]
    assert found["manifest"]["usage"][-1]["command"].startswith("trtllm-serve engine")
    before = (output / "manifest.json").read_bytes()
    done = amoeba("bundle", "finish", output)
    assert done.exit_code == 0, done.stderr
    assert "nothing left to do" in done.stdout
    assert (output / "manifest.json").read_bytes() == before


def test_the_best_shape_for_a_jetson_is_one_that_edge_llm_takes(source: Checkpoint, tmp_path: Path) -> None:
    found = exported(source, tmp_path / "bundle", "--device", "orin-nx", "--precision", "int4", "--latency", "40ms")
    sizes = ModelFolder(tmp_path / "bundle" / "engine").architecture
    assert (sizes.neurons % 128, sizes.heads * 64 % 128, sizes.kv_heads * 64 % 128) == (0, 0, 0)
    assert found["printed"]["precision"] == "w4a16"
    assert [step["command"].split()[0] for step in found["manifest"]["steps"]][-1] == "llm_build"


def test_a_profile_of_it_is_refused_here(source: Checkpoint, tmp_path: Path) -> None:
    done = amoeba(
        "profile", source.path, "--flow", "tensorrt-llm", "--prompt", 16, "--tokens", 8, "-o", tmp_path / "t.json"
    )
    assert done.exit_code != 0
    assert "NVIDIA GPUs" in done.stderr
