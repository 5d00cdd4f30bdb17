"""Latencies that MLC-LLM's own benchmark measured: the CSV file that ``python -m mlc_llm.bench ... -o FILE`` writes.

It has one line for each concurrency or rate of requests. Its columns are flattened reports
(mlc_llm/bench/request_record.py, ``convert_reports_to_df``), such as ``time_to_first_token_s.quantiles.p50``, in
seconds over all completed requests. Medians are taken here, as everywhere.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy.errors import BadInput

_FIRST, _EACH = "time_to_first_token_s", "time_per_output_token_s"


@dataclass(frozen=True)
class MlcBench:
    """One line: medians in milliseconds, the spread of TPOT over requests, and what was run."""

    ttft_ms: float
    tpot_ms: float
    tpot_p25: float
    tpot_p90: float
    prompt: int
    """Tokens of a prompt, the mean over the requests."""
    tokens: int
    """Tokens of an answer, the mean over the requests."""
    requests: int
    """How many were completed."""
    concurrent: int | None
    """Requests running at once; None where they came at a rate or at given times."""


def read_mlc_bench(file: Path) -> tuple[MlcBench, ...]:
    """The lines of a benchmark's file, in its order.

    Raises:
        BadInput: it is no such file, no request was completed, or answers were not streamed, without which there is no
            time to first token.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, csv.Error):
        raise BadInput(f"{file}: is no CSV file of mlc_llm.bench") from None
    if not lines:
        raise BadInput(f"{file}: has no line of results; run python -m mlc_llm.bench again")
    return tuple(_line(line, f"{file}: line {number}") for number, line in enumerate(lines, 2))


def _line(line: Mapping[str, str], where: str) -> MlcBench:
    if _number(line, "num_completed_requests", where) < 1:
        raise BadInput(f"{where} has no completed request; see the log of mlc_llm.bench")
    first = _number(line, f"{_FIRST}.quantiles.p50", where)
    if first == 0:
        raise BadInput(f"{where} has no time to first token; run mlc_llm.bench with streamed answers")
    concurrent = line.get("exec_feature.num_concurrent_requests")
    return MlcBench(
        1e3 * first,
        1e3 * _number(line, f"{_EACH}.quantiles.p50", where),
        1e3 * _number(line, f"{_EACH}.quantiles.p25", where),
        1e3 * _number(line, f"{_EACH}.quantiles.p90", where),
        round(_number(line, "input_tokens.mean", where)),
        round(_number(line, "output_tokens.mean", where)),
        round(_number(line, "num_completed_requests", where)),
        round(_number(line, "exec_feature.num_concurrent_requests", where)) if concurrent else None,
    )


def _number(line: Mapping[str, str], column: str, where: str) -> float:
    try:
        value = float(line[column])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{where} has no number in '{column}', which mlc_llm.bench writes; run it again") from None
    if not math.isfinite(value) or value < 0:
        raise BadInput(f"{where} has '{column}' = {value}, where a number of at least 0 belongs")
    return value
