"""The device test: what it runs and reports, and the table that its report becomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba
from fake_backends import Fake, finishing, offer_fake
from jsonschema import Draft202012Validator

from amoeba_deploy import device_test
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.device_test import Item, checkpoint_of, examine_item, failure, whole_and_half
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles.measure import Peak
from amoeba_deploy.profiles.profiler import empty_table
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.table import Table, write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

ROOT = Path(__file__).parent.parent
WORK = Workload(1, 16, 8)
SHORT = ("--prompt", 16, "--tokens", 8, "--context", 96, "--repeats", 3)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own."""
    command = [sys.executable, ROOT / "tools" / "test_device.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=environment)


def item(checkpoint: Checkpoint, flow: str, precision: str = "fp32", shape: str = "2x0.5") -> Item:
    """One item of the small random checkpoint."""
    parsed = Shape.parse(shape)
    return Item(str(checkpoint.path), flow, precision, parsed.depth, str(parsed.width), WORK, 96, 3, {})


def made(folder: Path) -> Path:
    """A new folder."""
    folder.mkdir()
    return folder


# The script


@pytest.mark.parametrize(("flow", "precision"), [("onnx", "int8"), ("torch", "fp32")])
def test_the_script_writes_a_report_that_search_can_use_once_imported(
    checkpoint: Checkpoint, tmp_path: Path, flow: str, precision: str
) -> None:
    report, table = tmp_path / "report.json", tmp_path / "orin-nx.json"
    asked = ("--flow", flow, "--precision", precision, "--model", checkpoint.path, *SHORT, "-o", report)
    done = script(*asked)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:5] for line in done.stdout.splitlines()[1:3]] == [
        [flow, precision, "4x1", "passed", "verified"],
        [flow, precision, "2x0.5", "passed", "verified"],
    ]
    value = json.loads(report.read_text())
    assert value["format"] == "amoeba.latency-table/1"
    assert value["architecture"] == checkpoint.architecture.digest
    assert {row["width"] for row in value["rows"]} == {1.0, 0.5}
    for one in value["items"]:
        assert (one["outcome"], one["stage"], one["error"]) == ("passed", "done", None)
        assert one["verified"]["greedy_tokens_equal"] is True
        assert one["selftest_tokens"] > 0
        assert one["identity"]["precision"] == precision
    again = script(*asked)
    assert again.returncode == 2
    assert "--force" in again.stderr.splitlines()[-1]
    result = amoeba("profile", "import", report, "--device", "orin-nx", "-o", table)
    assert result.exit_code == 0, result.output
    target = ("--device", "orin-nx", "--flow", flow, "--precision", precision, "--latency", "10s")
    workload = ("--prompt", 16, "--tokens", 8, "--context", 96)
    found = amoeba("search", checkpoint.path, *target, *workload, "--table", table, "--json", "--quiet")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["predicted"]["source"] == "measured"


def test_make_hands_its_variables_to_the_script() -> None:
    asked = {
        "FLOW": "onnx",
        "PRECISION": "int4",
        "MODEL": "my model",
        "DEVICE": "orin-nx",
        "OUT": "r.json",
        "ARGS": "--prompt 64",
    }
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "-o",
        ".venv/installed",
        "test-device",
        *(f"{name}={value}" for name, value in asked.items()),
    ]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = told.replace("\\\n", " ").split()
    wanted = "--flow 'onnx' -o 'r.json' --precision 'int4' --model 'my model' --device 'orin-nx' --prompt 64"
    assert " ".join(said).endswith(wanted)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--flow", "onx"), 2, "did you mean 'onnx'"),
        (("--flow", "onnx", "--precision", "int3"), 2, "int3"),
        (("--flow", "onnx", "--prompt", 4000), 2, "--prompt 4000"),
        (("--flow", "onnx", "--model", "gone"), 2, "gone"),
        (("--flow", "onnx", "--set", "tp=2"), 2, "no setting 'tp'"),
        (("--flow", "tensorrt-llm", "--model", "gone"), 6, "commands under 'usage' in its manifest, and read their"),
    ],
    ids=["flow", "precision", "prompt", "model", "setting", "engine"],
)
def test_wrong_usage_is_one_sentence_and_no_report(
    tmp_path: Path, options: tuple[object, ...], code: int, said: str
) -> None:
    done = script(*options, "-o", tmp_path / "report.json")
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# One item


def test_an_item_goes_from_building_to_a_row(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = examine_item(item(checkpoint, "onnx"), tmp_path)
    assert found["outcome"] == "passed", found
    assert found["row"]["tpot_ms"] > 0
    assert found["row"]["peak_memory_bytes"] > 10**6
    assert set(found["seconds"]) >= {"build", "verify", "selftest", "measure", "memory"}


def test_steps_run_in_the_bundles_folder_before_the_engine_is_opened(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, steps=(finishing("compiled here"),))
    monkeypatch.setattr(device_test, "peak_memory", lambda *_: Peak(1, None))
    found = examine_item(item(checkpoint, "fake"), tmp_path)
    assert found["outcome"] == "passed", found
    assert [(step["does"], step["done"]) for step in found["steps"]] == [("compile the engine", "yes")]
    assert (tmp_path / "bundle" / "engine" / "finished.bin").read_text() == "compiled here"
    assert found["verified"]["greedy_tokens_equal"] is True
    assert found["selftest_tokens"] > 0


def _fails(fake: Fake) -> None:
    fake.steps = (finishing("x", program="/bin/false"),)


def _not_there(fake: Fake) -> None:
    fake.steps = (finishing("x", program="a-compiler-that-is-not-here"),)


def _raises(fake: Fake) -> None:
    fake.broken = RuntimeError("segments overlap")


def _is_wrong(fake: Fake) -> None:
    fake.limit = -1.0


def _is_wrong_when_finished(fake: Fake) -> None:
    fake.limit, fake.steps = -1.0, (finishing(),)


def _cannot_run(fake: Fake) -> None:
    fake.reason = "it has no accelerator"


FAILURES: dict[str, tuple[Callable[[Fake], None], str, int, str]] = {
    "a step that fails": (_fails, "finish", 1, "failed with status 1"),
    "a step without its command": (_not_there, "finish", 6, "install a compiler"),
    "an engine that raises": (_raises, "build", 1, "unexpected RuntimeError: segments overlap"),
    "an engine that is wrong": (_is_wrong, "build", 5, "is wrong"),
    "an engine that is wrong once finished": (_is_wrong_when_finished, "verify", 5, "is wrong"),
    "an engine that cannot run": (_cannot_run, "selftest", 6, "it has no accelerator"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_recorded_with_its_stage_its_code_and_one_sentence(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    spoil, stage, code, said = FAILURES[what]
    spoil(offer_fake(monkeypatch))
    found = examine_item(item(checkpoint, "fake"), tmp_path)
    assert (found["outcome"], found["stage"], found["error_code"]) == ("failed", stage, code)
    assert said in found["error"]
    assert found["row"] is None
    assert str(tmp_path) not in found["error"]


def test_a_refused_shape_is_no_failure_of_the_engine(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, takes={"hidden_multiple": {"fp32": 256}})
    found = examine_item(item(checkpoint, "fake"), tmp_path)
    assert (found["outcome"], found["error_code"]) == ("refused", 2)
    assert "256" in found["error"]


def test_an_item_whose_process_hangs_is_ended(checkpoint: Checkpoint) -> None:
    found = device_test.in_own_process(item(checkpoint, "onnx"), 0.2)
    assert (found["outcome"], found["error"]) == ("failed", "took longer than 0.2 s and was ended")


def test_an_item_whose_process_dies_fails_alone(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho loading >&2\necho the driver is gone >&2\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(device_test.sys, "executable", str(crashing))
    found = device_test.in_own_process(item(checkpoint, "onnx"), 600)
    assert found["error"] == "its process ended with signal 11: the driver is gone"
    assert (found["outcome"], found["row"]) == ("failed", None)


def outcome(name: str, code: int | None) -> dict[str, Any]:
    """An item that ended so."""
    error = None if code is None else "it broke"
    return {
        "flow": "x",
        "precision": "y",
        "depth": 2,
        "width": "1",
        "outcome": name,
        "error_code": code,
        "error": error,
    }


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ([("passed", None)], None),
        ([("passed", None), ("refused", 2)], None),
        ([("refused", 2), ("refused", 2)], BadInput),
        ([("passed", None), ("failed", 5), ("failed", 1)], VerificationFailed),
        ([("failed", 6), ("failed", 6)], ToolchainMissing),
        ([("failed", 6), ("failed", 1)], AmoebaError),
    ],
)
def test_the_exit_code_follows_from_all_items(
    items: list[tuple[str, int | None]], kind: type[AmoebaError] | None
) -> None:
    found = failure([outcome(*one) for one in items])
    assert found is None if kind is None else type(found) is kind


def test_a_plain_model_is_tested_whole_and_at_half(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    opened = checkpoint_of(models("llama-grouped-untied").path, tmp_path)
    assert [str(shape) for shape in whole_and_half(opened)] == ["4x1", "2x0.5"]
    assert opened.architecture.digest == models("llama-grouped-untied").architecture.digest


# Formats

SCHEMA = json.loads((ROOT / "docs" / "schemas" / "latency-table.schema.json").read_text())


def test_reports_and_tables_made_of_them_are_what_the_schema_says(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, steps=(finishing(),))
    monkeypatch.setattr(device_test, "peak_memory", lambda *_: Peak(1, None))
    passed = examine_item(item(checkpoint, "fake"), made(tmp_path / "one"))
    failed = examine_item(item(checkpoint, "no-such-flow"), made(tmp_path / "two"))
    row = Row(**passed.pop("row"))
    failed.pop("row")
    empty = empty_table(checkpoint, 96)
    facts = empty.facts | {"test": {}, "device_facts": device_test.device_facts(), "items": [passed, failed]}
    write_table(tmp_path / "report.json", Table("local", empty.architecture_digest, facts, (row,)))
    command = ("profile", "import", tmp_path / "report.json", "--device", "orin-nx", "-o", tmp_path / "table.json")
    assert amoeba(*command, "--quiet").exit_code == 0
    for name in ("report.json", "table.json"):
        Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / name).read_text()))
