"""Latencies as TensorRT-LLM's own benchmarks report them.

Three tools, three forms: the JSON of ``trtllm-bench throughput --streaming`` or ``latency`` (``--report_json``), the
JSON of ``benchmark_serving --save-result``, and what ``gptManagerBenchmark --streaming true`` prints. Each knows times
over requests: the time to the first token, and the mean time of a request's further tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput

_LINE = re.compile(r"^\[BENCHMARK\] (?P<name>[a-z0-9_]+)(?:\([^)]*\))? (?P<value>\S+)$")
_PERCENTILE = re.compile(r"^p\d+(\.\d+)?$")
_STATISTICS = {"mean": "average", "avg": "average", "median": "p50", "min": "minimum", "max": "maximum"}
"""What tools call a statistic, and the name of it here; pNN is itself."""


@dataclass(frozen=True)
class TrtllmBench:
    """One report. Times are in milliseconds, each statistic over requests: average, p50, p90, ..., minimum, maximum."""

    tool: str
    ttft: Mapping[str, float]
    tpot: Mapping[str, float]
    requests: int | None = None
    prompt: float | None = None
    """Tokens of a prompt, on average."""
    tokens: float | None = None
    """Tokens of an answer, on average, the first one included."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What ran, as far as the report says: version, model, dtype, quantization, tp, pp, batch."""

    @property
    def ttft_ms(self) -> float:
        """The time to the first token: the median where the report has it, else the average."""
        return _middle(self.ttft)

    @property
    def tpot_ms(self) -> float:
        """The time per output token after the first: the median where the report has it, else the average."""
        return _middle(self.tpot)


def _middle(statistics: Mapping[str, float]) -> float:
    return statistics["p50"] if "p50" in statistics else statistics["average"]


def read_trtllm_bench(path: Path) -> TrtllmBench:
    """Read a report of any of the three tools.

    Raises:
        BadInput: the file is none of them, or was measured without streaming, so that it has no such times.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if "[BENCHMARK]" in text:
        return _printed(path, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and "performance" in value and "world_info" in value:
        return _report(path, value)
    if isinstance(value, dict) and "mean_ttft_ms" in value:
        return _serving(path, value)
    raise BadInput(
        f"{path}: is neither a report of trtllm-bench (--report_json), a result of benchmark_serving (--save-result), "
        f"nor what gptManagerBenchmark prints"
    )


def _report(path: Path, value: dict[str, Any]) -> TrtllmBench:
    streaming = value.get("streaming_metrics")
    if not isinstance(streaming, dict):
        raise BadInput(f"{path}: has no streaming_metrics; run 'trtllm-bench throughput' with --streaming")
    requests, world, engine = (_object(value.get(key)) for key in ("request_info", "world_info", "engine"))
    found = {}
    for name in ("ttft", "tpot"):
        given = _object(streaming.get(f"{name}_percentiles"))
        known = {key: number for key, number in given.items() if key in _STATISTICS.values() or _PERCENTILE.match(key)}
        found[name] = _times(path, name, known | {"average": streaming.get(f"avg_{name}_ms")})
    facts: dict[str, Any] = {
        key: engine[key] for key in ("version", "model", "backend", "dtype", "quantization") if key in engine
    }
    facts |= {key.removesuffix("_size"): world[key] for key in ("tp_size", "pp_size") if key in world}
    # The limit may be the tool's own guess; what ran at once is the batch that the times are of.
    together = requests.get("avg_num_concurrent_requests")
    if isinstance(together, int | float) and math.isfinite(together) and together > 0:
        facts["batch"] = max(1, round(together))
    elif "max_batch_size" in world:
        facts["batch"] = world["max_batch_size"]
    return TrtllmBench(
        "trtllm-bench",
        found["ttft"],
        found["tpot"],
        requests.get("num_requests"),
        requests.get("avg_input_length"),
        requests.get("avg_output_length"),
        facts,
    )


def _serving(path: Path, value: dict[str, Any]) -> TrtllmBench:
    found = {}
    for name in ("ttft", "tpot"):
        ending = f"_{name}_ms"
        given = {key.removesuffix(ending): number for key, number in value.items() if key.endswith(ending)}
        found[name] = _times(path, name, _named(given))
    done = value.get("completed")
    prompt, tokens = (
        value[key] / done if done and isinstance(value.get(key), int) else None
        for key in ("total_input_tokens", "total_output_tokens")
    )
    facts: dict[str, Any] = {"model": value["model_id"]} if "model_id" in value else {}
    facts |= {"batch": value["max_concurrency"]} if value.get("max_concurrency") else {}
    return TrtllmBench("benchmark_serving", found["ttft"], found["tpot"], done, prompt, tokens, facts)


def _printed(path: Path, text: str) -> TrtllmBench:
    matches = (_LINE.match(line.strip()) for line in text.splitlines())
    lines = {match["name"]: match["value"] for match in matches if match}
    found = {}
    for name, called in (("ttft", "time_to_first_token"), ("tpot", "inter_token_latency")):
        given = {key.removesuffix(f"_{called}"): number for key, number in lines.items() if key.endswith(called)}
        if not given:
            raise BadInput(f"{path}: has no {called}; run gptManagerBenchmark with --streaming true")
        found[name] = _times(path, name, _named(given))
    count = lines.get("num_samples", "")
    return TrtllmBench("gptManagerBenchmark", found["ttft"], found["tpot"], int(count) if count.isdigit() else None)


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics by their names here; others, such as deviations, are left out."""
    named = {_STATISTICS.get(key, key): number for key, number in given.items()}
    return {key: number for key, number in named.items() if key in _STATISTICS.values() or _PERCENTILE.match(key)}


def _times(path: Path, name: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Statistics as numbers; raises BadInput where one is no time, or neither average nor median is there."""
    found = {}
    for key, number in given.items():
        if number is None and key == "average":
            continue
        try:
            found[key] = float(number)
        except (TypeError, ValueError):
            found[key] = math.nan
        if not math.isfinite(found[key]) or found[key] <= 0:
            what = "more than one output token a request, and in-flight batching, give times"
            raise BadInput(f"{path}: its {key} {name} is {number!r:.40}, which is no time; {what}")
    if not found.keys() & {"p50", "average"}:
        raise BadInput(f"{path}: has neither an average nor a median {name}")
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
