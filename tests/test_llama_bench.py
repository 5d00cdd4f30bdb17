"""llama-bench's JSON, in the layout that tools/llama-bench writes, becomes TTFT and TPOT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.llama_bench import llama_bench_command, read_llama_bench
from amoeba_deploy.profiles.workload import Workload


def entry(prompt: int, generated: int, samples: list[int], depth: int = 0, **changes: Any) -> dict[str, Any]:
    """One test with every entry that llama-bench writes."""
    tokens = prompt + generated
    speeds = [1e9 * tokens / max(sample, 1) for sample in samples]
    return {
        "build_commit": "6c2ad3a",
        "build_number": 9999,
        "cpu_info": "Cortex-A76",
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": "engine/model-q4_k_m.gguf",
        "model_type": "llama ?B Q4_K - Medium",
        "model_size": 4712960,
        "model_n_params": 7343872,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": 4,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": 99,
        "n_cpu_moe": 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": 0,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "mmap",
        "lazy_mode": "off",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": True,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": prompt,
        "n_gen": generated,
        "n_depth": depth,
        "test_time": "2026-11-24T18:00:00Z",
        "avg_ns": sum(samples) // max(len(samples), 1),
        "stddev_ns": 1000,
        "avg_ts": sum(speeds) / max(len(speeds), 1),
        "stddev_ts": 0.5,
        "samples_ns": samples,
        "samples_ts": speeds,
    } | changes


def written(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps(list(entries), indent=2))
    return path


def test_a_prompt_and_a_generation_test_become_ttft_and_tpot(tmp_path: Path) -> None:
    file = written(
        tmp_path / "bench.json",
        entry(128, 0, [250_000_000, 240_000_000, 400_000_000]),
        entry(0, 32, [64_000_000, 67_200_000, 60_800_000]),
    )
    (found,) = read_llama_bench(file)
    assert found.workload == Workload(1, 128, 32)
    assert found.timing.ttft_ms == pytest.approx(250)
    assert found.timing.tpot_ms == pytest.approx(2.0)
    assert found.timing.p10 == pytest.approx(1.92)
    assert found.timing.p90 == pytest.approx(2.08)
    assert found.timing.repeats == 3
    assert (found.file, found.threads, found.depth) == ("engine/model-q4_k_m.gguf", 4, 0)
    assert found.build == "9999 6c2ad3a"


def test_models_and_options_are_kept_apart_and_a_test_at_the_prompts_end_is_preferred(tmp_path: Path) -> None:
    file = written(
        tmp_path / "bench.json",
        entry(64, 0, [100_000_000]),
        entry(0, 16, [16_000_000]),
        entry(64, 0, [190_000_000], depth=64),
        entry(0, 16, [32_000_000], depth=64),
        entry(64, 16, [123_000_000]),
        entry(64, 0, [50_000_000], n_threads=8),
        entry(0, 16, [8_000_000], n_threads=8),
        entry(64, 0, [70_000_000], model_filename="other.gguf"),
    )
    four, eight = read_llama_bench(file)
    assert (four.threads, four.depth, four.timing.ttft_ms, four.timing.tpot_ms) == (4, 64, 100.0, 2.0)
    assert (eight.threads, eight.depth, eight.timing.ttft_ms, eight.timing.tpot_ms) == (8, 0, 50.0, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("| model | size |", "is not JSON"),
        ("{}", "is not a list of tests"),
        ("[]", "run llama-bench with both -p and -n"),
        ("[3]", "test 0 has no usable entries"),
        (json.dumps([entry(128, 0, [5])]), "run llama-bench with both -p and -n"),
        (json.dumps([entry(128, 0, [5]), entry(0, 8, [0])]), "test 1 has no usable samples_ns"),
        (json.dumps([entry(128, 0, [])]), "test 0 has no usable samples_ns"),
        (json.dumps([entry(-1, 0, [5])]), "test 0 has no usable n_prompt"),
        (json.dumps([entry(128, 0, [5], model_filename=None)]), "test 0 has no usable model_filename"),
    ],
)
def test_what_llama_bench_did_not_write_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=said) as caught:
        read_llama_bench(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_llama_bench(tmp_path / "none.json")


def test_the_command_measures_the_workload_and_writes_what_is_read() -> None:
    command = llama_bench_command("engine/model-q8_0.gguf", Workload(1, 128, 32))
    assert command[:3] == ("llama-bench", "-m", "engine/model-q8_0.gguf")
    assert command[3:] == ("-p", "128", "-n", "32", "-d", "0,128", "-o", "json")
    with pytest.raises(BadInput, match="one sequence at a time, and the workload has 2"):
        llama_bench_command("model.gguf", Workload(2, 128, 32))
