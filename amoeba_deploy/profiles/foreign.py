"""Files of engines' own benchmarks as latency tables: llama-bench, TensorRT-LLM's, MLC-LLM's.

They say how fast something ran, and hardly what: shape, precision and sizes are told by the user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import check_precision
from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.llama_bench import read_llama_bench
from amoeba_deploy.profiles.mlc_bench import read_mlc_bench
from amoeba_deploy.profiles.row import Row, make_row
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.told import Told
from amoeba_deploy.profiles.trtllm_bench import read_trtllm_bench
from amoeba_deploy.profiles.workload import Workload


def _row(
    file: Path, told: Told, flow: str, workload: Workload, ttft: float, tpot: float, spread: tuple[float, float], n: int
) -> Row:
    sizes = told.needed(file, "peak_memory_bytes"), told.needed(file, "artifact_bytes")
    shape, depth = told.needed(file, "shape"), told.needed(file, "architecture").depth
    if shape.depth > depth:
        raise BadInput(f"{file}: the shape {shape} is deeper than the model, which has {depth} blocks")
    backend = load_backend(told.flow or flow)
    precision = backend.takes.own_name(told.needed(file, "precision"))
    check_precision(backend, precision)
    return make_row(backend.flow, precision, shape, workload, (ttft, tpot, *spread, n), sizes)


def _table(file: Path, told: Told, rows: list[Row], facts: dict[str, Any]) -> Table:
    return Table("", told.needed(file, "architecture").digest, facts, tuple(rows))


class LlamaBenchReader:
    """``llama-bench -o json``."""

    name = "JSON of llama-bench"

    def recognises(self, start: str) -> bool:
        return '"samples_ns"' in start and '"n_gen"' in start

    def read(self, file: Path, told: Told) -> Table:
        found = read_llama_bench(file)
        rows = [
            _row(file, told, "gguf", r.workload, r.timing.ttft_ms, r.timing.tpot_ms, (r.timing.p10, r.timing.p90),
                 r.timing.repeats)
            for r in found
        ]  # fmt: skip
        test = {"threads": found[0].threads, "generation_begins_at": sorted({r.depth for r in found})}
        return _table(file, told, rows, {"engines": {"llama.cpp": found[0].build}, "test": test})


class TrtllmBenchReader:
    """``trtllm-bench --report_json``, ``benchmark_serving --save-result``, and what ``gptManagerBenchmark`` prints."""

    name = "report of TensorRT-LLM's benchmarks"

    def recognises(self, start: str) -> bool:
        return "[BENCHMARK]" in start or '"mean_ttft_ms"' in start or '"world_info"' in start

    def read(self, file: Path, told: Told) -> Table:
        found = read_trtllm_bench(file)
        prompt = told.prompt or (round(found.prompt) if found.prompt else told.needed(file, "prompt"))
        tokens = told.tokens or (round(found.tokens) if found.tokens else told.needed(file, "tokens"))
        low, high = (found.tpot.get(name, found.tpot_ms) for name in ("p10", "p90"))
        workload = Workload(told.batch or int(found.facts.get("batch") or 1), prompt, tokens)
        row = _row(
            file, told, "tensorrt-llm", workload, found.ttft_ms, found.tpot_ms,
            (min(low, found.tpot_ms), max(high, found.tpot_ms)), found.requests or 1,
        )  # fmt: skip
        version = found.facts.get("version")
        return _table(file, told, [row], {"engines": {"tensorrt-llm": str(version)}} if version else {})


class MlcBenchReader:
    """The CSV of ``python -m mlc_llm.bench``."""

    name = "CSV of mlc_llm.bench"

    def recognises(self, start: str) -> bool:
        return "time_to_first_token_s.quantiles.p50" in start.partition("\n")[0]

    def read(self, file: Path, told: Told) -> Table:
        rows = [
            _row(file, told, "mlc-llm", Workload(told.batch or r.concurrent or 1, r.prompt, r.tokens), r.ttft_ms,
                 r.tpot_ms, (r.tpot_p25, r.tpot_p90), r.requests)
            for r in read_mlc_bench(file)
        ]  # fmt: skip
        return _table(file, told, rows, {})


READERS = (LlamaBenchReader(), TrtllmBenchReader(), MlcBenchReader())
