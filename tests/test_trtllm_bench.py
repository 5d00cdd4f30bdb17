"""Reports of TensorRT-LLM's benchmarks, in the layouts of the tools that write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.imported import read_measurements
from amoeba_deploy.profiles.told import Told
from amoeba_deploy.profiles.trtllm_bench import read_trtllm_bench
from amoeba_deploy.shape import Shape


def percentiles(middle: float) -> dict[str, float]:
    """As ``PercentileStats`` is written, in milliseconds."""
    return {
        "p50": middle,
        "p90": middle + 1,
        "p95": middle + 2,
        "p99": middle + 3,
        "minimum": middle - 1,
        "maximum": middle + 4,
        "average": middle + 0.25,
    }


REPORT: dict[str, Any] = {
    "engine": {
        "model": "engine",
        "model_path": "engine",
        "engine_dir": "None",
        "version": "1.2.1",
        "backend": "Pytorch",
        "dtype": "bfloat16",
        "kv_cache_dtype": None,
        "quantization": None,
    },
    "machine": {"name": "NVIDIA H100 80GB HBM3", "memory.total": 79.1, "clocks.mem": 2.619},
    "world_info": {
        "tp_size": 2,
        "pp_size": 1,
        "ep_size": None,
        "world_size": 2,
        "max_batch_size": 4,
        "max_num_tokens": 8192,
        "scheduling_policy": "GUARANTEED_NO_EVICT",
        "kv_cache_percentage": 0.9,
        "issue_rate": 1234.5,
    },
    "request_info": {
        "num_requests": 64,
        "avg_num_concurrent_requests": 3.9,
        "avg_input_length": 128.0,
        "avg_output_length": 32.0,
    },
    "performance": {
        "total_latency_ms": 2000.0,
        "avg_request_latency_ms": 120.0,
        "request_throughput_req_s": 32.0,
        "request_latency_percentiles_ms": percentiles(120.0),
    },
    "streaming_metrics": {
        "token_output_speed_tok_s": 400.0,
        "avg_ttft_ms": 11.25,
        "avg_tpot_ms": 2.75,
        "tpot_percentiles": percentiles(2.5),
        "ttft_percentiles": percentiles(11.0),
        "gen_tps_percentiles": percentiles(400.0),
    },
    "dataset": {"isl": 128},
}
SERVING: dict[str, Any] = {
    "date": "20261124-120000",
    "backend": "openai",
    "model_id": "engine",
    "tokenizer_id": "engine",
    "num_prompts": 10,
    "request_rate": "inf",
    "max_concurrency": 4,
    "duration": 12.5,
    "completed": 10,
    "total_input_tokens": 1280,
    "total_output_tokens": 320,
    "request_throughput": 0.8,
    "mean_ttft_ms": 21.5,
    "median_ttft_ms": 20.0,
    "std_ttft_ms": 0.0,
    "p99_ttft_ms": 40.0,
    "mean_tpot_ms": 5.5,
    "median_tpot_ms": 5.0,
    "std_tpot_ms": 0.0,
    "p99_tpot_ms": 9.0,
    "mean_itl_ms": 5.4,
    "median_itl_ms": 4.9,
    "p99_itl_ms": 30.0,
}
PRINTED = """[TensorRT-LLM][INFO] Engine version 0.12.0 found in the config file
[BENCHMARK] num_samples 8
[BENCHMARK] num_error_samples 0

[BENCHMARK] num_samples 8
[BENCHMARK] total_latency(ms) 8123.45
[BENCHMARK] seq_throughput(seq/sec) 0.98
[BENCHMARK] token_throughput(token/sec) 31.51

[BENCHMARK] avg_sequence_latency(ms) 1465.21
[BENCHMARK] max_sequence_latency(ms) 1525.54

[BENCHMARK] avg_time_to_first_token(ms) 465.21
[BENCHMARK] max_time_to_first_token(ms) 525.54
[BENCHMARK] min_time_to_first_token(ms) 401.00
[BENCHMARK] p99_time_to_first_token(ms) 525.54
[BENCHMARK] p90_time_to_first_token(ms) 520.10
[BENCHMARK] p50_time_to_first_token(ms) 460.00

[BENCHMARK] avg_inter_token_latency(ms) 31.62
[BENCHMARK] max_inter_token_latency(ms) 31.65
[BENCHMARK] min_inter_token_latency(ms) 31.60
[BENCHMARK] p99_inter_token_latency(ms) 31.65
[BENCHMARK] p90_inter_token_latency(ms) 31.64
[BENCHMARK] p50_inter_token_latency(ms) 31.61
"""


def file(folder: Path, value: Any) -> Path:
    path = folder / "report"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_report_of_trtllm_bench_is_read(tmp_path: Path) -> None:
    found = read_trtllm_bench(file(tmp_path, REPORT))
    assert (found.tool, found.ttft_ms, found.tpot_ms) == ("trtllm-bench", 11.0, 2.5)
    assert (found.ttft["average"], found.tpot["average"]) == (11.25, 2.75), "the stated averages win"
    assert (found.tpot["p90"], found.ttft["maximum"]) == (3.5, 15.0)
    assert (found.requests, found.prompt, found.tokens) == (64, 128.0, 32.0)
    assert found.facts == {
        "version": "1.2.1",
        "model": "engine",
        "backend": "Pytorch",
        "dtype": "bfloat16",
        "quantization": None,
        "tp": 2,
        "pp": 1,
        "batch": 4,
    }


@pytest.mark.parametrize(
    ("together", "batch"),
    [(3.9, 4), (0.97, 1), (0.2, 1), (1, 1), (None, 2048), ("many", 2048), (float("nan"), 2048), (0.0, 2048)],
)
def test_the_batch_is_what_ran_at_once_and_not_the_tools_own_limit(tmp_path: Path, together: Any, batch: int) -> None:
    report = REPORT | {
        "world_info": REPORT["world_info"] | {"max_batch_size": 2048},
        "request_info": REPORT["request_info"] | {"avg_num_concurrent_requests": together},
    }
    assert read_trtllm_bench(file(tmp_path, report)).facts["batch"] == batch


def test_the_users_batch_wins_over_the_reports(tmp_path: Path) -> None:
    sizes = Architecture(
        family="llama", depth=4, hidden=256, heads=4, kv_heads=4, head_dim=64, neurons=512, vocabulary=512,
        context=2048, tied=True,
    )  # fmt: skip
    about: dict[str, Any] = {"architecture": sizes, "shape": Shape.parse("4x1"), "precision": "fp16"}
    about |= {"peak_memory_bytes": 10**9, "artifact_bytes": 10**8}
    for batch, wanted in ((None, 4), (3, 3)):
        table, _ = read_measurements(file(tmp_path, REPORT), Told(batch=batch, **about))
        assert [row.batch for row in table.rows] == [wanted]


def test_a_report_without_percentiles_has_its_averages(tmp_path: Path) -> None:
    streaming = {key: value for key, value in REPORT["streaming_metrics"].items() if not key.endswith("percentiles")}
    found = read_trtllm_bench(file(tmp_path, REPORT | {"streaming_metrics": streaming}))
    assert (found.ttft_ms, found.tpot_ms) == (11.25, 2.75)


def test_a_report_without_streaming_says_how_to_get_the_times(tmp_path: Path) -> None:
    silent = {key: value for key, value in REPORT.items() if key != "streaming_metrics"}
    with pytest.raises(BadInput, match=r"has no streaming_metrics; run 'trtllm-bench throughput' with --streaming"):
        read_trtllm_bench(file(tmp_path, silent))


def test_a_result_of_benchmark_serving_is_read(tmp_path: Path) -> None:
    found = read_trtllm_bench(file(tmp_path, SERVING))
    assert (found.tool, found.ttft_ms, found.tpot_ms) == ("benchmark_serving", 20.0, 5.0)
    assert found.ttft == {"average": 21.5, "p50": 20.0, "p99": 40.0}, "a deviation is no time"
    assert (found.requests, found.prompt, found.tokens) == (10, 128.0, 32.0)
    assert found.facts == {"model": "engine", "batch": 4}


def test_what_gpt_manager_benchmark_prints_is_read(tmp_path: Path) -> None:
    found = read_trtllm_bench(file(tmp_path, PRINTED))
    assert (found.tool, found.ttft_ms, found.tpot_ms) == ("gptManagerBenchmark", 460.0, 31.61)
    assert (found.ttft["average"], found.tpot["minimum"], found.requests) == (465.21, 31.6, 8)


def test_printed_averages_alone_are_enough(tmp_path: Path) -> None:
    few = "\n".join(line for line in PRINTED.splitlines() if "] p" not in line)
    assert read_trtllm_bench(file(tmp_path, few)).ttft_ms == 465.21


def test_printed_without_streaming_says_how_to_get_the_times(tmp_path: Path) -> None:
    silent = "\n".join(line for line in PRINTED.splitlines() if "token" not in line)
    with pytest.raises(BadInput, match="run gptManagerBenchmark with --streaming true"):
        read_trtllm_bench(file(tmp_path, silent))


@pytest.mark.parametrize("value", ["0.00", "nan", "-1.5", "fast"])
def test_what_is_no_time_is_refused(value: str, tmp_path: Path) -> None:
    """Without in-flight batching gptManagerBenchmark prints 0 for the times between tokens."""
    with pytest.raises(BadInput, match=r"its p50 tpot is .*, which is no time; more than one output token"):
        read_trtllm_bench(file(tmp_path, PRINTED.replace("31.61", value)))


@pytest.mark.parametrize("value", ["", "[]", "{}", '{"performance": {}}', "nonsense", "[" * 2000])
def test_another_file_is_refused_by_name(value: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is neither a report of trtllm-bench"):
        read_trtllm_bench(file(tmp_path, value))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_trtllm_bench(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read"):
        read_trtllm_bench(tmp_path / "binary")


@pytest.mark.parametrize("part", ["request_info", "world_info", "engine"])
def test_a_report_whose_facts_are_damaged_still_has_its_times(part: str, tmp_path: Path) -> None:
    found = read_trtllm_bench(file(tmp_path, REPORT | {part: None}))
    assert found.tpot_ms == 2.5
