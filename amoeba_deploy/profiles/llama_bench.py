"""llama-bench, llama.cpp's own benchmark: the command to run on a device, and its JSON as latencies.

``llama-bench -o json`` writes a list with one entry a test. A prompt test (``pp``) has ``n_prompt`` tokens and no
``n_gen``, a generation test (``tg``) the other way round; ``samples_ns`` holds the nanoseconds of each repeat as a
whole (tools/llama-bench/llama-bench.cpp). Generation begins ``n_depth`` positions into a text, at none unless ``-d``
says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.measure import Timing
from amoeba_deploy.profiles.workload import Workload

_OF_A_TEST = {
    *("n_prompt", "n_gen", "n_depth", "test_time"),
    *("avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"),
}
"""Entries that differ between the tests of one model under one set of options."""


@dataclass(frozen=True)
class LlamaBench:
    """What llama-bench measured of one file in one set of options."""

    file: str
    """The model's path as it was given on the device."""
    model_type: str
    build: str
    backends: str
    threads: int
    workload: Workload
    depth: int
    """Positions that the text had when generation began."""
    timing: Timing


def llama_bench_command(file: Path | str, workload: Workload) -> tuple[str, ...]:
    """The command to run on the device; its output is what ``read_llama_bench`` reads.

    Generation is measured behind the prompt too, not only into an empty cache.

    Raises:
        BadInput: the workload has several sequences, which llama-bench does not measure.
    """
    if workload.batch != 1:
        raise BadInput(f"llama-bench measures one sequence at a time, and the workload has {workload.batch}")
    prompt = str(workload.prompt)
    return ("llama-bench", "-m", str(file), "-p", prompt, "-n", str(workload.tokens), "-d", f"0,{prompt}", "-o", "json")


def read_llama_bench(path: Path) -> tuple[LlamaBench, ...]:
    """Every pair of a prompt and a generation test of the same model and options.

    TTFT is the median time of a whole prompt; TPOT that of a generation test divided by its tokens, of the test that
    began where the prompt ends if there is one. p10 and p90 are of the repeats' means.

    Raises:
        BadInput: the file is not llama-bench's, or has no such pair.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in _entries(path):
        options = {key: value for key, value in entry.items() if key not in _OF_A_TEST}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(entry)
    found = tuple(result for group in groups.values() for result in _pairs(group))
    if not found:
        raise BadInput(
            f"{path}: has no prompt test and generation test of one model; run llama-bench with both -p and -n"
        )
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not JSON ({error}); run llama-bench with -o json") from None
    if not isinstance(value, list):
        raise BadInput(f"{path}: is not a list of tests; run llama-bench with -o json")
    for index, entry in enumerate(value):
        wrong = _wrong(entry)
        if wrong:
            raise BadInput(f"{path}: test {index} has no usable {wrong}; run llama-bench with -o json again")
    return value


def _wrong(entry: Any) -> str | None:
    """The first entry of a test that is missing or of a wrong kind, or None."""
    if not isinstance(entry, dict):
        return "entries"
    for key in ("n_prompt", "n_gen", "n_threads"):
        if type(entry.get(key)) is not int or entry[key] < 0:
            return key
    if not isinstance(entry.get("model_filename"), str):
        return "model_filename"
    samples = entry.get("samples_ns")
    whole = isinstance(samples, list) and samples and all(type(each) is int and each > 0 for each in samples)
    return None if whole else "samples_ns"


def _pairs(tests: list[Mapping[str, Any]]) -> Iterable[LlamaBench]:
    prompts = {test["n_prompt"]: test for test in tests if not test["n_gen"] and not test.get("n_depth", 0)}
    generated: dict[int, dict[int, Mapping[str, Any]]] = {}
    for test in tests:
        if not test["n_prompt"] and test["n_gen"]:
            generated.setdefault(test["n_gen"], {})[int(test.get("n_depth", 0))] = test
    for prompt, first in prompts.items():
        for tokens, by_depth in generated.items():
            depth = prompt if prompt in by_depth else min(by_depth)
            yield _result(first, by_depth[depth], depth, Workload(1, prompt, tokens))


def _result(first: Mapping[str, Any], later: Mapping[str, Any], depth: int, workload: Workload) -> LlamaBench:
    per_token = np.asarray(later["samples_ns"]) / 1e6 / workload.tokens
    low, middle, high = (float(value) for value in np.percentile(per_token, (10, 50, 90)))
    ttft = float(np.median(np.asarray(first["samples_ns"]) / 1e6))
    return LlamaBench(
        str(first["model_filename"]),
        str(first.get("model_type", "")),
        f"{first.get('build_number', '')} {first.get('build_commit', '')}".strip(),
        str(first.get("backends", "")),
        int(first["n_threads"]),
        workload,
        depth,
        Timing(ttft, middle, low, high, len(per_token)),
    )
