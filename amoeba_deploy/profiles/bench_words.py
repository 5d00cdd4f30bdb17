"""A table's rows in the words of llama-bench, llama.cpp's benchmark, which people know how to read and to plot.

``pp128`` is a prompt of 128 tokens, ``tg32 @ d128`` the generation of 32 tokens behind 128 others; ``t/s`` is tokens a
second, the mean over repeats with its standard deviation (tools/llama-bench/README.md). Its JSON has more entries a
test than ours, of options that our engines do not have; those that both have carry the same names.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.table import Table

Form = Literal["md", "csv", "json", "jsonl"]


def bench_text(table: Table, rows: Sequence[Row], sizes: dict[tuple[Any, ...], Architecture], form: Form) -> str:
    """The rows in one of the forms that llama-bench prints; ``sizes`` are the subnets' by the rows' keys.

    Rows that do not say how fast tokens went (imported ones) are given by their medians, without a deviation.
    """
    tests = [test for row in rows for test in _tests(table, row, sizes[row.key])]
    if form == "jsonl":
        return "".join(json.dumps(test) + "\n" for test in tests)
    if form == "json":
        return json.dumps(tests, indent=2) + "\n"
    if form == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(tests[0]) if tests else [], quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in test.items()} for test in tests)
        return stream.getvalue()
    return _markdown(tests)


def _tests(table: Table, row: Row, sizes: Architecture) -> Iterator[dict[str, Any]]:
    machine, run = table.facts.get("machine", {}), (table.facts.get("runs") or [{}])[-1]
    head = {
        "build_commit": str(table.facts.get("tool", "")),
        "cpu_info": machine.get("processor", ""),
        "gpu_info": ", ".join(gpu.get("name", "") for gpu in run.get("before", {}).get("gpus", [])),
        "backends": row.flow,
        "model_filename": str(row.shape),
        "model_type": f"{row.shape} {row.precision}",
        "model_size": row.artifact_bytes,
        "model_n_params": sizes.parameters,
        "n_batch": row.batch,
        "n_threads": machine.get("threads", 0),
        "test_time": run.get("date", table.facts.get("date", "")),
        "noisy": row.noisy,
    }
    steps = max(row.tokens - 1, 1)
    rates = (row.prompt_rate, row.prompt_rate_sd), (row.token_rate, row.token_rate_sd)
    medians = 1e3 * row.batch * row.prompt / row.ttft_ms, 1e3 * row.batch / row.tpot_ms
    counts = ((row.prompt, 0, 0), row.batch * row.prompt), ((0, row.tokens, row.prompt), row.batch * steps)
    for ((prompt, tokens, depth), done), (rate, spread), middle in zip(counts, rates, medians, strict=True):
        speed, deviation = rate or middle, spread or 0.0
        test = {"n_prompt": prompt, "n_gen": tokens, "n_depth": depth}
        times = {"avg_ns": round(1e9 * done / speed), "stddev_ns": round(1e9 * done * deviation / speed**2)}
        yield head | test | times | {"avg_ts": round(speed, 4), "stddev_ts": round(deviation, 4)}


def _markdown(tests: Sequence[dict[str, Any]]) -> str:
    names = ("model", "size", "params", "backend", "threads", "test", "t/s")
    cells = [names, *(_cells(test) for test in tests)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _cells(test: dict[str, Any]) -> tuple[str, ...]:
    words = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']} @ d{test['n_depth']}"
    speed = f"{test['avg_ts']:.2f} ± {test['stddev_ts']:.2f}" + (" (noisy)" if test["noisy"] else "")
    size, parameters = f"{test['model_size'] / 2**20:.2f} MiB", f"{test['model_n_params'] / 1e6:.2f} M"
    return test["model_type"], size, parameters, test["backends"], str(test["n_threads"]), words, speed
