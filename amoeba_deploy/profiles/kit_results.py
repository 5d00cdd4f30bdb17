"""The results of a kit (profiles/kit) as a latency table: what ``run.py`` measured on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import sha256_of
from amoeba_deploy.profiles.kit.form import KIT, Item, kit_digest
from amoeba_deploy.profiles.kit.results import RESULTS, RESULTS_FORMAT, Results, State, read_results
from amoeba_deploy.profiles.llama_bench import read_llama_bench
from amoeba_deploy.profiles.measure import Peak, Stopped, summary
from amoeba_deploy.profiles.row import Row, make_row, measured_row
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.told import Told
from amoeba_deploy.profiles.trtllm_bench import read_trtllm_bench
from amoeba_deploy.shape import Shape, parse_width


class KitReader:
    """``results.jsonl`` of a kit, up to its last whole line; engines' own reports lie beside it."""

    name = "results of a profile kit"

    def recognises(self, start: str) -> bool:
        return RESULTS_FORMAT.partition("/")[0] in start.partition("\n")[0]

    def read(self, file: Path, told: Told) -> Table:
        results = read_results(file)
        head = results.head
        _check_kit(file, str(head.get("kit")))
        digest = str(head.get("architecture"))
        if told.architecture is not None and told.architecture.digest != digest:
            raise BadInput(f"{file}: was measured for another model architecture")
        found = [_row(file, results, item, results.states[item.id]) for item in results.items]
        facts = {
            "tool": head.get("tool"),
            "context": results.context,
            "items": [_said(item, results.states[item.id]) for item in results.items],
            "kit": {"device": head.get("device"), "digest": head.get("kit"), "weights": head.get("weights")},
        }
        rows = tuple(row for row in found if row is not None)
        return Table(str(head.get("device")), digest, facts | _machine(results), rows)


def failed_items(facts: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every item in a table's facts that gave no row."""
    for item in facts.get("items", ()):
        if item.get("outcome") in ("failed", "unfinished"):
            why = item.get("error") or "not finished; run the kit again"
            width = item["width"] if isinstance(item["width"], str) else f"{item['width']:g}"
            yield f"{item['flow']} {item['precision']} {item['depth']}x{width} gave no row: {why}"


def _check_kit(file: Path, digest: str) -> None:
    """Raise BadInput where results lie in another kit than the one that they are of."""
    kit = file.parent.parent
    if file.parent.name == RESULTS and (kit / KIT).is_file() and kit_digest(kit) != digest:
        raise BadInput(f"{file}: holds the results of another kit than {kit}; import them from a folder of their own")


def _machine(results: Results) -> dict[str, Any]:
    """What the last start of the runner found, and the state of the machine at each."""
    if not results.sessions:
        return {}
    last = results.sessions[-1]
    facts = {name: last[name] for name in ("machine", "engines", "date") if name in last}
    states = [{"date": each.get("date"), "conditions": each.get("conditions")} for each in results.sessions]
    return {**facts, "device_facts": {"python": last.get("python"), "sessions": states}}


def _said(item: Item, state: State) -> dict[str, Any]:
    outcome = "failed" if state.error is not None else "passed" if state.measured else "unfinished"
    head = {"flow": item.flow, "precision": item.precision, "depth": item.depth, "width": item.width}
    return {**head, "outcome": outcome, "error": state.error, "runs": len(state.runs)}


def _row(file: Path, results: Results, item: Item, state: State) -> Row | None:
    if state.error is not None or not state.measured:
        return None
    shape = Shape(item.depth, parse_width(str(item.width)))
    if state.report is not None:
        return _reported_row(file, results, item, shape, state.report)
    assert state.memory is not None
    assert state.stopped is not None
    try:
        peak = Peak(int(state.memory["memory_bytes"]), state.memory.get("gpu_memory_bytes"))
        timing = summary(state.runs, results.workload, cast(Stopped, state.stopped))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise BadInput(f"{file}: holds no usable measurement of {item}; copy the file again") from None
    names = item.flow, item.precision, shape, results.workload
    return measured_row(*names, timing, peak, item.bytes, context=results.context, settings=item.settings)


def _reported_row(file: Path, results: Results, item: Item, shape: Shape, line: Mapping[str, Any]) -> Row:
    """The row of an item that its engine's own tool measured, from the report that was kept."""
    report, workload = file.parent / str(line.get("file")), results.workload
    if not report.resolve().is_relative_to(file.parent.resolve()) or not report.is_file():
        raise BadInput(f"{file}: its report {line.get('file')} is not beside it; copy the whole folder of results")
    if sha256_of(report) != line.get("sha256"):
        raise BadInput(f"{report}: is not the report that the kit kept; copy the folder of results again")
    if item.flow == "gguf":
        found = [each for each in read_llama_bench(report) if each.workload == workload]
        if not found:
            raise BadInput(
                f"{report}: has no test of {workload.prompt} and {workload.tokens} tokens; run the kit again"
            )
        timing = found[0].timing
        times = (timing.ttft_ms, timing.tpot_ms, timing.p10, timing.p90, timing.repeats)
    else:
        bench = read_trtllm_bench(report)
        low, high = (bench.tpot.get(name, bench.tpot_ms) for name in ("p10", "p90"))
        spread = min(low, bench.tpot_ms), max(high, bench.tpot_ms)
        times = (bench.ttft_ms, bench.tpot_ms, *spread, bench.requests or 1)
    sizes = int(line.get("memory_bytes", 0)), item.bytes
    more = {"context": results.context, "settings": dict(item.settings)}
    return make_row(item.flow, item.precision, shape, workload, times, sizes, **more)
