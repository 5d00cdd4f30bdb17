"""A build for people and for CI: lines on a terminal, a Markdown summary, and JUnit's XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import system_refusal, whole_file
from amoeba_deploy.project.gate import Verdict
from amoeba_deploy.project.result import Result

HEAD = ("target", "device", "engine", "shape", "size", "TPOT predicted", "TPOT measured", "quality", "change", "state")


def cells(result: Result) -> list[str]:
    """A target's row under ``HEAD``."""
    figures = result.figures
    if figures is None:
        return [result.name, result.device, *["-"] * 7, result.state]
    measured = figures["measured"]
    return [
        result.name,
        str(figures["device"]),
        f"{figures['flow']} {figures['precision']}",
        str(figures["shape"]),
        _megabytes(figures["bytes"]),
        f"{figures['predicted']['tpot_ms']:.3f} ms ({figures['predicted']['source']})",
        "-" if measured is None else f"{measured['tpot_ms']:.3f} ms",
        f"{figures['quality']['metric']} {figures['quality']['value']:.4f}",
        change(result),
        result.state,
    ]


def change(result: Result) -> str:
    """What differs from the last build of the target: the same content, or another shape, size, latency and quality."""
    new, old = result.figures, result.before
    if new is None or old is None:
        return "first build"
    if new.get("content") == old.get("content"):
        return "none"
    found = []
    engines = [f"{each.get('flow')} {each.get('precision')}" for each in (old, new)]
    shapes = [str(old.get("shape")), str(new["shape"])]
    found += [f"{pair[0]} -> {pair[1]}" for pair in (engines, shapes) if pair[0] != pair[1]]
    for name, before, now in (
        ("size", old.get("bytes"), new["bytes"]),
        ("TPOT", _tpot(old), _tpot(new)),
        ("quality", (old.get("quality") or {}).get("value"), new["quality"]["value"]),
    ):
        if before and now != before:
            found.append(f"{name} {100 * (now / before - 1):+.1f}%")
    return ", ".join(found) or "other bytes, same figures"


def _tpot(figures: Mapping[str, Any]) -> Any:
    return (figures.get("predicted") or {}).get("tpot_ms")


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def markdown(results: Sequence[Result], verdicts: Sequence[Verdict]) -> str:
    """A summary in Markdown: a table of the targets, what failed, and the gates."""
    good = sum(result.good for result in results)
    lines = [f"### amoeba build: {good} of {len(results)} targets", "", _row(HEAD), _row(["---"] * len(HEAD))]
    lines += [_row(cells(result)) for result in results]
    failed = [f"- **{result.name}** {result.state}: {_inline(result.reason)}" for result in results if not result.good]
    if failed:
        lines += ["", *failed]
    if verdicts:
        words = {True: "broken", False: "holds", None: "not compared"}
        lines += ["", _row(("gate", "target", "verdict", "values")), _row(["---"] * 4)]
        lines += [_row((f"`{v.condition}`", v.target, words[v.broken], v.said)) for v in verdicts]
    return "\n".join(lines) + "\n\n"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(_inline(value) for value in values) + " |"


def _inline(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def append_summary(file: Path, text: str) -> None:
    """Add a summary to a file, as CI services ask for; raises BadInput where it cannot be written."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise BadInput(f"{file}: was not written: {system_refusal(error)}") from None


def write_junit(file: Path, results: Sequence[Result], verdicts: Sequence[Verdict]) -> None:
    """Write JUnit's XML: a case for each target and for each gate on it."""
    cases = [_target_case(result) for result in results] + [_gate_case(verdict) for verdict in verdicts]
    count = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
    suite = ElementTree.Element(
        "testsuite",
        name="amoeba build",
        tests=str(len(cases)),
        failures=str(count["failure"]),
        errors=str(count["error"]),
        skipped=str(count["skipped"]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    with whole_file(file, force=True) as work:
        work.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _target_case(result: Result) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="build", name=result.name, time=f"{result.seconds:.3f}")
    if result.state == "failed":
        kind = "error" if result.exit_code == 1 else "failure"
        ElementTree.SubElement(case, kind, message=_plain(result.reason), type=f"exit code {result.exit_code}")
    elif result.state == "skipped":
        ElementTree.SubElement(case, "skipped", message=_plain(result.reason))
    return case


def _gate_case(verdict: Verdict) -> ElementTree.Element:
    name = f"{verdict.target}: {verdict.condition}"
    case = ElementTree.Element("testcase", classname="gate", name=_plain(name), time="0")
    if verdict.broken:
        ElementTree.SubElement(case, "failure", message=_plain(verdict.said), type="gate")
    elif verdict.broken is None:
        ElementTree.SubElement(case, "skipped", message=_plain(verdict.said))
    return case


def _plain(text: str) -> str:
    """Text without the control characters that XML has no place for."""
    return "".join(each if each >= " " else " " for each in text)
