"""Gates and baselines: what is compared with what, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from projects import Project, project
from signers import make_key

from amoeba_deploy.errors import BadInput
from amoeba_deploy.project.gate import Gate

__all__ = ["project"]


def figures(**changes: Any) -> dict[str, Any]:
    """Figures of an estimated target, with some entries changed."""
    predicted = {"tpot_ms": 2.0, "ttft_ms": 10.0, "e2e_ms": 72.0, "memory_bytes": 300_000_000, "source": "estimated"}
    return {
        "bytes": 8_000_000,
        "predicted": {**predicted, "machines": []},
        "measured": None,
        "quality": {"metric": "loss", "value": 0.6, "source": "measured"},
        "perplexity": 1.8,
        **changes,
    }


def measured(tpot: float, machine: str) -> dict[str, Any]:
    return {"tpot_ms": tpot, "ttft_ms": 5.0, "e2e_ms": 5.0 + 31 * tpot, "machines": [machine]}


def predicted(tpot: float, source: str, *machines: str) -> dict[str, Any]:
    return {**figures()["predicted"], "tpot_ms": tpot, "source": source, "machines": list(machines)}


def broken(condition: str, new: dict[str, Any], old: dict[str, Any] | None = None) -> bool | None:
    return Gate(condition).check().judge("kiosk", new, old).broken


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("tpot > 1.9ms", True),
        ("tpot > 2.0ms", False),
        ("tpot >= 2ms", True),
        ("tpot > 0.0019s", True),
        ("ttft < 11000us", True),
        ("e2e > 72ms", False),
        ("size > 7.9MB", True),
        ("size > 8MiB", False),
        ("size > 7999kB", True),
        ("memory > 0.29GB", True),
        ("loss > 0.59", True),
        ("perplexity > 1.8", False),
        ("1ms < tpot < 3ms", True),
        ("not tpot > 3ms", True),
        ("tpot > 3ms or size > 1MB", True),
        ("tpot > 3ms and size > 1MB", False),
        ("tpot + ttft > 11.9ms", True),
        ("size / 1MB > 7.5", True),
        ("-loss < -0.5", True),
    ],
)
def test_conditions_compare_figures_with_numbers_and_units(condition: str, expected: bool) -> None:
    assert broken(condition, figures()) is expected


@pytest.mark.parametrize(
    ("condition", "old", "expected"),
    [
        ("tpot > 1.05 * baseline", figures(predicted=predicted(1.9, "estimated")), True),
        ("tpot > 1.05 * baseline", figures(predicted=predicted(1.95, "estimated")), False),
        ("size > baseline", figures(bytes=7_999_999), True),
        ("size > baseline", figures(), False),
        ("loss > baseline + 0.02", figures(quality={"metric": "loss", "value": 0.57, "source": "measured"}), True),
        ("size > 1.1 * baseline or loss > baseline", figures(bytes=1), True),
    ],
)
def test_conditions_compare_figures_with_the_same_of_the_baseline(
    condition: str, old: dict[str, Any], expected: bool
) -> None:
    assert broken(condition, figures(), old) is expected


def test_measured_latencies_are_compared_on_the_same_machine_only() -> None:
    gate = Gate("tpot > 1.05 * baseline").check()
    new = figures(measured=measured(3.0, "aaaa"))
    same, other = figures(measured=measured(2.0, "aaaa")), figures(measured=measured(2.0, "bbbb"))
    assert gate.judge("kiosk", new, same).broken is True
    verdict = gate.judge("kiosk", new, other)
    assert verdict.broken is False  # the estimates are alike, and only they are compared
    assert "measured tpot of the baseline is of another machine" in verdict.said
    assert gate.judge("kiosk", new, figures()).broken is False


def test_interpolated_latencies_are_compared_with_those_of_the_same_machine_only() -> None:
    gate = Gate("tpot > 1.05 * baseline").check()
    new = figures(predicted=predicted(3.0, "interpolated", "aaaa"))
    assert gate.judge("kiosk", new, figures(predicted=predicted(2.0, "measured", "aaaa"))).broken is True
    for old in (predicted(2.0, "interpolated", "bbbb"), predicted(2.0, "estimated")):
        assert gate.judge("kiosk", new, figures(predicted=old)).broken is None


def test_size_and_quality_are_compared_across_machines() -> None:
    new = figures(predicted=predicted(3.0, "measured", "aaaa"), bytes=9)
    old = figures(predicted=predicted(2.0, "measured", "bbbb"), bytes=8)
    assert broken("size > baseline", new, old) is True
    assert broken("loss > baseline", new, old) is False


def test_what_is_not_known_is_not_compared() -> None:
    assert broken("tpot > 1.05 * baseline", figures()) is None
    kept = figures(quality={"metric": "parameters_kept", "value": 0.7, "source": "counted"})
    assert broken("loss > 0.1", kept) is None
    assert broken("perplexity > 0.1", figures(perplexity=None)) is None
    assert broken("loss > 1 / (loss - loss)", figures()) is None


def test_an_unknown_part_counts_only_where_the_others_do_not_decide() -> None:
    assert broken("size > 1MB or tpot > baseline", figures()) is True
    assert broken("size > 1GB or tpot > baseline", figures()) is None
    assert broken("size > 1GB and tpot > baseline", figures()) is False


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("tpot", "is no comparison"),
        ("tpot >", "cannot be read"),
        ("", "cannot be read"),
        ("speed > 3", "has 'speed' that is no quantity"),
        ("1 > 2", "compares no quantity"),
        ("1.05 * baseline > 2", "compares no quantity"),
        ("tpot + size > baseline", "does not say whose baseline"),
        ("tpot == 3", "compares by something else"),
        ("tpot > 1", "compares a time, such as 40ms with a plain number"),
        ("size > 5ms", "compares bytes, such as 8MB with a time"),
        ("loss > 0.1ms", "compares a plain number with a time"),
        ("size > baseline * baseline", "multiplies or divides bytes"),
        ("tpot + size > 3ms", "adds a time"),
        ("tpot > 1 / ttft", "multiplies or divides a plain number by a time"),
        ("size > baseline + 5", "adds bytes"),
        ("tpot ** 9 > 1", "is no quantity"),
        ("__import__('os').system('true') > 1", "is no quantity"),
        ("tpot > (lambda: 1)()", "is no quantity"),
        ("tpot > 'x'", "is no quantity"),
        ("tpot > True", "is no quantity"),
        ("tpot > " + "1 + " * 400 + "1", "cannot be read"),
        ("(" * 300 + "tpot" + ")" * 300, "cannot be read"),
    ],
)
def test_a_condition_that_is_none_is_refused(condition: str, said: str) -> None:
    with pytest.raises(BadInput, match=said.replace("(", r"\(")):
        Gate(condition).check()


# In a build


def test_a_broken_gate_fails_the_build_and_names_the_values(project: Project) -> None:
    project.build("--save-baseline")
    baseline = json.loads((project.folder / "amoeba-baseline.json").read_text())
    assert baseline["format"] == "amoeba.baseline/1" and set(baseline["targets"]) == {"first", "second"}
    assert project.build("--fail-if", "tpot > 1.05 * baseline")["gates"][0]["broken"] is False
    project.write(project.config.read_text().replace("6x0.5", "12x1"))
    result = project.run("--fail-if", "tpot > 1.05 * baseline")
    assert result.exit_code == 5
    assert "first breaks the gate 'tpot > 1.05 * baseline': tpot " in result.stderr
    assert (project.folder / "dist" / "first" / "manifest.json").is_file()


def test_a_baseline_is_not_stored_by_a_build_that_fails(project: Project) -> None:
    project.build("--save-baseline", "--fail-if", "size > 1MB", code=5)
    assert not (project.folder / "amoeba-baseline.json").exists()


def test_a_baseline_keeps_targets_that_were_not_built(project: Project) -> None:
    project.build("--save-baseline")
    project.build("--target", "first", "--save-baseline")
    assert set(json.loads((project.folder / "amoeba-baseline.json").read_text())["targets"]) == {"first", "second"}


def test_gates_of_the_file_count_too(project: Project) -> None:
    project.write('[build]\nfail-if = ["size > 1MB"]\n' + project.config.read_text())
    assert [each["broken"] for each in project.build(code=5)["gates"]] == [True, True]


def test_a_wrong_gate_or_baseline_is_said_before_anything_is_built(project: Project, tmp_path: Path) -> None:
    assert project.run("--fail-if", "tpott > 3").exit_code == 2
    assert project.run("--baseline", tmp_path / "missing.json").exit_code == 2
    (tmp_path / "damaged.json").write_text('{"format": "amoeba.baseline/1", "targets": [1]}')
    assert "'targets': Input should be" in project.run("--baseline", tmp_path / "damaged.json").stderr
    assert not (project.folder / "dist").exists()


def test_a_target_that_breaks_a_gate_is_not_signed(project: Project) -> None:
    make_key(project.folder, "own")
    project.write('[defaults]\nprivate-key = "own.key"\n' + project.config.read_text())
    first = project.build()["targets"][0]["figures"]["bytes"]
    found = project.build("--sign", "--fail-if", f"size > {first + 1}B", code=5)
    assert [each["broken"] for each in found["gates"]] == [False, True]
    assert [each["signed"] is not None for each in found["targets"]] == [True, False]
    assert not (project.folder / "dist" / "second" / "model.sig").exists()


def test_a_baseline_is_replaced_on_purpose_although_its_gates_are_broken(project: Project) -> None:
    project.write('[build]\nfail-if = ["size > 1.1 * baseline"]\n' + project.config.read_text())
    project.build("--save-baseline")
    project.write(project.config.read_text().replace("6x0.5", "12x1"))
    assert "or store a new baseline with --save-baseline" in project.run().stderr
    again = project.run("--save-baseline")
    assert again.exit_code == 0 and "stored as the baseline" in again.stderr
    assert project.build()["gates"][0]["broken"] is False
    limit = project.run("--save-baseline", "--fail-if", "size > 1MB")
    assert limit.exit_code == 5 and "--save-baseline" not in limit.stderr.split("amoeba: ")[1]


def test_a_missing_baseline_is_said(project: Project) -> None:
    said = project.run("--fail-if", "size > baseline")
    assert said.exit_code == 0 and "so nothing is compared with a baseline" in said.stderr
    assert project.run("--dry-run", "--save-baseline").exit_code == 2


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("bytes", float("nan")),
        ("bytes", "x"),
        ("bytes", -5),
        ("predicted", 3),
        ("perplexity", float("inf")),
        ("byts", 1),
    ],
)
def test_a_damaged_baseline_is_refused_with_its_entry(project: Project, entry: str, value: object) -> None:
    project.build("--save-baseline")
    file = project.folder / "amoeba-baseline.json"
    stored = json.loads(file.read_text())
    stored["targets"]["first"][entry] = value
    file.write_text(json.dumps(stored))
    result = project.run("--fail-if", "size > baseline")
    assert result.exit_code == 2 and f"'targets.first.{entry}'" in result.stderr
