"""The device test from its command to a latency table: what it runs and reports, and what importing makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import Result
from conftest import amoeba
from fake_backends import Fake, finishing, offer_fake
from jsonschema import Draft202012Validator

from amoeba_deploy import device_test
from amoeba_deploy.backends import onnx as onnx_flow
from amoeba_deploy.backends.backend import Step, Where
from amoeba_deploy.bundle import finish_bundle, read_manifest, verify_files
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.device_test import Item, checkpoint_of, examine_item, failure, whole_and_half
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles.imported import import_measurements
from amoeba_deploy.profiles.profiler import empty_table
from amoeba_deploy.profiles.table import Row, Table, make_row, read_table, write_table
from amoeba_deploy.profiles.told import Told
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
    monkeypatch.setattr(device_test, "peak_memory", lambda *_: 1)
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


# Finishing a bundle


@pytest.fixture
def unfinished(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose engine is compiled on its device."""
    offer_fake(monkeypatch, "tensorrt-llm", steps=(finishing(),))
    target = ("--device", "orin-nx", "--prompt", 64, "--flow", "tensorrt-llm", "--precision", "fp32", "--shape", "2x1")
    done = amoeba("export", checkpoint.path, *target, "-o", tmp_path / "bundle", "--quiet")
    assert done.exit_code == 0, done.output
    return tmp_path / "bundle"


def refusal(result: Result, code: int) -> str:
    """The one sentence of a refusal."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_running_a_bundle_with_steps_left_names_them_and_what_to_do(unfinished: Path) -> None:
    for command in (("run", unfinished, "-p", "x"), ("bundle", "verify", unfinished)):
        said = refusal(amoeba(*command, "--quiet"), 6)
        assert f"amoeba bundle finish {unfinished}" in said
        assert "compile the engine: " in said


def test_finishing_runs_the_steps_and_lists_what_they_made(unfinished: Path) -> None:
    result = amoeba("bundle", "finish", unfinished)
    assert result.exit_code == 0, result.output
    assert "1 steps run" in result.stdout
    assert "compile the engine: " in result.stderr
    manifest = read_manifest(unfinished)
    assert manifest["steps"] == []
    assert [step["does"] for step in manifest["finished"]] == ["compile the engine"]
    assert "engine/finished.bin" in manifest["files"]
    assert amoeba("bundle", "verify", unfinished, "--quiet").exit_code == 0
    assert "nothing left to do" in amoeba("bundle", "finish", unfinished).stdout


def test_a_step_that_fails_leaves_the_bundle_as_it_was(unfinished: Path) -> None:
    before = (unfinished / "manifest.json").read_bytes()

    def fail(_step: object) -> None:
        (unfinished / "engine" / "half.bin").write_text("half")
        raise AmoebaError("out of memory")

    with pytest.raises(AmoebaError, match="out of memory"):
        finish_bundle(unfinished, fail)
    assert (unfinished / "manifest.json").read_bytes() == before
    verify_files(unfinished)


def test_what_a_failed_step_made_is_removed_whatever_it_is(unfinished: Path) -> None:
    before = set(unfinished.rglob("*"))

    def fail(_step: object) -> None:
        (unfinished / "engine" / "deep" / "empty").mkdir(parents=True)
        (unfinished / "deep" / "full").mkdir(parents=True)
        (unfinished / "deep" / "full" / "half.bin").write_text("half")
        (unfinished / "link").symlink_to("manifest.json")
        (unfinished / "deep" / "folder").symlink_to(unfinished / "engine")
        raise AmoebaError("out of memory")

    with pytest.raises(AmoebaError, match="out of memory"):
        finish_bundle(unfinished, fail)
    assert set(unfinished.rglob("*")) == before
    verify_files(unfinished)


def test_a_step_that_makes_a_link_has_failed(unfinished: Path) -> None:
    with pytest.raises(VerificationFailed, match="link: is a link, which a bundle does not hold"):
        finish_bundle(unfinished, lambda _: (unfinished / "link").symlink_to("manifest.json"))
    assert len(read_manifest(unfinished)["steps"]) == 1
    verify_files(unfinished)


# Finishing a bundle on two machines


def writing(name: str, where: Where) -> Step:
    """A step that writes a file into a bundle's folder."""
    return Step(f"make {name}", ("a-maker", name), f"the maker of {name}", where)


@pytest.fixture
def parted(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for sm_87 of which a host does two steps, and the device the last; the tool of all is on the PATH."""
    (tool := tmp_path / "bin" / "a-maker").parent.mkdir()
    tool.write_text('#!/bin/sh\ntest "$1" != "$SPOILED" && mkdir made-$1 && echo $1 > made-$1/file\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    steps = (writing("quantised", "host"), writing("onnx", "host"), writing("engines", "device"))
    offer_fake(monkeypatch, "tensorrt-llm", steps=steps)
    target = ("--device", "orin-nx", "--prompt", 64, "--flow", "tensorrt-llm", "--precision", "fp32", "--shape", "2x1")
    done = amoeba("export", checkpoint.path, *target, "-o", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert "step 2 on a host (needs the maker of onnx), make onnx:" in done.stdout
    assert "step 3 on the device (needs the maker of engines)" in done.stdout
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["identity"]["chip"] = "sm_87"
    file.write_text(json.dumps(manifest))
    jsonschema.validate(manifest, json.loads((ROOT / "docs/schemas/manifest.schema.json").read_text()))
    return tmp_path / "bundle"


def left(bundle: Path) -> tuple[list[str], list[str]]:
    """What steps of a bundle do: of those that were run, and of those that are left."""
    manifest = read_manifest(bundle)
    done, still = ([step["does"] for step in manifest.get(key, [])] for key in ("finished", "steps"))
    return done, still


def test_a_host_runs_its_steps_and_the_device_the_rest(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on a host and then on the device" in refusal(amoeba("run", parted, "-p", "x", "--quiet"), 6)
    done = amoeba("bundle", "finish", parted)
    assert done.exit_code == 0, done.output
    assert "2 steps run, 1 left for the device: copy the bundle there" in done.stdout
    assert left(parted) == (["make quantised", "make onnx"], ["make engines"])
    assert "made-onnx/file" in verify_files(parted)["files"]
    assert "was built for sm_87, and this machine is" in refusal(amoeba("bundle", "finish", parted, "--quiet"), 2)
    monkeypatch.setattr("amoeba_deploy.bundle.own_chips", lambda: ("aarch64", "sm_87"))
    done = amoeba("bundle", "finish", parted, "--json")
    assert json.loads(done.stdout) == {"path": str(parted), "steps": 1, "left": 0}
    assert left(parted) == (["make quantised", "make onnx", "make engines"], [])
    jsonschema.validate(read_manifest(parted), json.loads((ROOT / "docs/schemas/manifest.schema.json").read_text()))
    verify_files(parted)


def test_a_device_does_not_begin_with_a_hosts_steps(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amoeba_deploy.bundle.own_chips", lambda: ("aarch64", "sm_87"))
    said = refusal(amoeba("bundle", "finish", parted, "--quiet"), 6)
    assert "the step to make quantised is not for the device" in said
    assert "on the maker of quantised first, and copy the bundle here" in said
    assert left(parted)[0] == []


def test_a_step_that_is_done_stays_done_where_a_later_one_fails(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOILED", "onnx")
    assert "the step to make onnx failed" in refusal(amoeba("bundle", "finish", parted, "--quiet"), 1)
    assert left(parted) == (["make quantised"], ["make onnx", "make engines"])
    assert "made-quantised/file" in verify_files(parted)["files"]
    monkeypatch.delenv("SPOILED")
    assert amoeba("bundle", "finish", parted).exit_code == 0
    assert left(parted) == (["make quantised", "make onnx"], ["make engines"])


def test_a_damaged_bundle_is_not_finished(unfinished: Path) -> None:
    (unfinished / "selftest.json").write_text("{}")
    assert "selftest.json" in refusal(amoeba("bundle", "finish", unfinished, "--quiet"), 5)


# Importing


@pytest.fixture
def measured(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A report with one row."""
    return report(checkpoint, tmp_path / "report.json", 2.0)


def report(checkpoint: Checkpoint, file: Path, tpot: float, shape: str = "4x1") -> Path:
    """A report in which one shape was measured."""
    row = make_row("onnx", "int4", Shape.parse(shape), WORK, (9.0, tpot, tpot, tpot, 5), (1000, 1000))
    empty = empty_table(checkpoint, 96)
    write_table(file, Table(empty.device, empty.architecture_digest, empty.facts | {"items": []}, (row,)), force=True)
    return file


def imported(table: Path, *files: object) -> Result:
    """Import files for a device."""
    return amoeba("profile", "import", *files, "--device", "orin-nx", "-o", table, "--quiet")


def test_reports_are_merged_into_one_table_and_newer_rows_replace_older_ones(
    checkpoint: Checkpoint, measured: Path, tmp_path: Path
) -> None:
    table = tmp_path / "orin-nx.json"
    assert imported(table, measured).exit_code == 0
    other = report(checkpoint, tmp_path / "other.json", 1.0, "2x0.5")
    newer = report(checkpoint, tmp_path / "newer.json", 3.0)
    assert imported(table, other, newer).exit_code == 0
    found = read_table(table)
    assert found.device == "orin-nx"
    assert {str(row.shape): row.tpot_ms for row in found.rows} == {"4x1": 3.0, "2x0.5": 1.0}
    assert [entry["file"] for entry in found.facts["imported"]] == ["report.json", "other.json", "newer.json"]
    assert found.facts["engines"]["onnx"]


def llama_bench(file: Path, **changes: Any) -> Path:
    """llama-bench's JSON of a prompt of 64 and 16 tokens, once, and once more with what is changed."""
    whole = {"model_filename": "m.gguf", "n_threads": 1, "build_number": 7000, "build_commit": "abc", "n_depth": 0}
    tests = [
        whole | more | {"n_prompt": prompt, "n_gen": tokens, "samples_ns": [10**7, 10**7]}
        for more in ({}, changes)
        for prompt, tokens in ((64, 0), (0, 16))
    ]
    file.write_text(json.dumps(tests if changes else tests[:2]))
    return file


def imported_bench(checkpoint: Checkpoint, file: Path, table: Path, **asked: str) -> Result:
    told = {"shape": "4x1", "precision": "int4", "peak-memory": "1MB", "artifact-size": "1MB"} | asked
    options = [part for name, value in told.items() for part in (f"--{name}", value)]
    return amoeba(
        "profile", "import", file, "--device", "orin-nx", "-o", table, "--checkpoint", checkpoint.path, *options
    )


def test_a_common_precision_is_written_by_the_engines_own_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert imported_bench(checkpoint, llama_bench(tmp_path / "bench.json"), table).exit_code == 0
    (row,) = read_table(table).rows
    assert (row.flow, row.precision) == ("gguf", "q4_k_m")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"flow": "ggfu"}, "did you mean 'gguf'"),
        ({"precision": "q9"}, "no precision 'q9'"),
        ({"shape": "99x1"}, "the shape 99x1 is deeper than the model, which has 4 blocks"),
    ],
)
def test_what_no_engine_or_model_has_is_not_imported(
    asked: dict[str, str], reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    table = tmp_path / "table.json"
    said = refusal(imported_bench(checkpoint, llama_bench(tmp_path / "bench.json"), table, **asked), 2)
    assert reason in said
    assert not table.exists()


@pytest.mark.parametrize("changes", [{"n_threads": 4}, {"model_filename": "other.gguf"}])
def test_two_measurements_of_one_row_in_a_file_are_refused(
    changes: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = llama_bench(tmp_path / "bench.json", **changes)
    said = refusal(imported_bench(checkpoint, file, tmp_path / "table.json"), 2)
    assert "measures gguf q4_k_m 4x1.0 (batch 1, prompt 64, 16 tokens) more than once" in said


def test_a_file_that_is_imported_again_is_named_once(measured: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert imported(tmp_path / "table.json", measured).exit_code == 0
    assert len(read_table(tmp_path / "table.json").facts["imported"]) == 1


def test_a_table_of_another_device_or_model_is_left_alone(
    checkpoint: Checkpoint, demo: Checkpoint, measured: Path, tmp_path: Path
) -> None:
    write_table(tmp_path / "table.json", empty_table(checkpoint, 96, "rtx-4090"))
    assert "rtx-4090" in refusal(imported(tmp_path / "table.json", measured), 2)
    foreign = report(demo, tmp_path / "foreign.json", 1.0)
    assert "another model architecture" in refusal(imported(tmp_path / "both.json", measured, foreign), 2)
    assert not (tmp_path / "both.json").exists()
    named = ("profile", "import", measured, "--device", "orin-nx", "-o", tmp_path / "named.json")
    assert "another model architecture" in refusal(amoeba(*named, "--checkpoint", demo.path), 2)


def test_a_report_in_which_nothing_passed_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_table(tmp_path / "report.json", empty_table(checkpoint, 96))
    assert "holds no measurement" in refusal(imported(tmp_path / "table.json", tmp_path / "report.json"), 2)


@pytest.mark.parametrize("content", ["", "tok/s 12", '{"samples": []}'])
def test_a_file_of_no_known_form_is_refused_with_those_known(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.txt").write_text(content)
    said = refusal(imported(tmp_path / "table.json", tmp_path / "log.txt"), 2)
    assert "log.txt: is of no known form" in said
    assert "report of the device test" in said


def test_a_missing_file_and_a_mistyped_device_are_named(measured: Path, tmp_path: Path) -> None:
    assert "gone.json" in refusal(imported(tmp_path / "table.json", tmp_path / "gone.json"), 2)
    command = ("profile", "import", measured, "--device", "orin-mx", "-o", tmp_path / "table.json")
    assert "did you mean 'orin-nx'" in refusal(amoeba(*command), 2)


class LineReader:
    """A form in which a file says nothing but two latencies."""

    name = "lines of a bench"

    def recognises(self, start: str) -> bool:
        return start.startswith("bench ")

    def read(self, file: Path, told: Told) -> Table:
        ttft, tpot = map(float, file.read_text().split()[1:])
        sizes = told.peak_memory_bytes or 0, told.artifact_bytes or 0
        names = told.needed(file, "flow"), told.needed(file, "precision"), told.needed(file, "shape")
        row = make_row(*names, told.workload(file), (ttft, tpot, tpot, tpot, 1), sizes)
        return Table("", told.needed(file, "architecture").digest, {}, (row,))


def test_a_reader_of_another_form_asks_for_what_its_file_does_not_say(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.profiles.imported.FOREIGN", (LineReader(),))
    (tmp_path / "log.txt").write_text("bench 30 4.5")
    options: list[object] = []
    needed = {"--flow": "onnx", "--precision": "int4", "--shape": "2x0.5", "--prompt": 16, "--tokens": 8}
    for name, value in (needed | {"--checkpoint": checkpoint.path}).items():
        said = refusal(imported(tmp_path / "table.json", tmp_path / "log.txt", *options), 2)
        assert name in said
        options += [name, value]
    assert imported(tmp_path / "table.json", tmp_path / "log.txt", *options).exit_code == 0
    (row,) = read_table(tmp_path / "table.json").rows
    assert (row.flow, str(row.shape), row.ttft_ms, row.tpot_ms, row.prompt) == ("onnx", "2x0.5", 30.0, 4.5, 16)


LLAMA_BENCH = [
    {"model_filename": "m.gguf", "n_prompt": prompt, "n_gen": tokens, "n_threads": 2, "samples_ns": samples,
     "build_number": 7000, "build_commit": "abc"}
    for prompt, tokens, samples in ((16, 0, [30_000_000]), (0, 8, [36_000_000, 44_000_000, 40_000_000]))
]  # fmt: skip
SERVING = {
    "mean_ttft_ms": 31.0, "median_ttft_ms": 30.0, "mean_tpot_ms": 5.5, "median_tpot_ms": 5.0, "p90_tpot_ms": 6.0,
    "completed": 4, "total_input_tokens": 64, "total_output_tokens": 32,
}  # fmt: skip
MLC_COLUMNS = {
    "num_completed_requests": 4, "time_to_first_token_s.quantiles.p50": 0.03,
    "time_per_output_token_s.quantiles.p25": 0.0045, "time_per_output_token_s.quantiles.p50": 0.005,
    "time_per_output_token_s.quantiles.p90": 0.006, "input_tokens.mean": 16, "output_tokens.mean": 8,
}  # fmt: skip
MLC_BENCH = "\n".join(",".join(map(str, line)) for line in (MLC_COLUMNS, MLC_COLUMNS.values())) + "\n"


@pytest.mark.parametrize(
    ("content", "flow", "precision"),
    [
        (json.dumps(LLAMA_BENCH), "gguf", "q8_0"),
        (json.dumps(SERVING), "tensorrt-llm", "fp8"),
        (MLC_BENCH, "mlc-llm", "q4f16_1"),
    ],
    ids=["llama-bench", "benchmark_serving", "mlc_llm.bench"],
)
def test_files_of_the_engines_own_benchmarks_become_rows(
    checkpoint: Checkpoint, tmp_path: Path, content: str, flow: str, precision: str
) -> None:
    (tmp_path / "bench").write_text(content)
    told = ("--precision", precision, "--shape", "2x0.5", "--checkpoint", checkpoint.path)
    sizes = ("--peak-memory", "1GB", "--artifact-size", "10MB")
    assert "--peak-memory" in refusal(imported(tmp_path / "table.json", tmp_path / "bench", *told), 2)
    done = imported(tmp_path / "table.json", tmp_path / "bench", *told, *sizes)
    assert done.exit_code == 0, done.stderr
    (row,) = read_table(tmp_path / "table.json").rows
    assert (row.flow, row.precision, row.prompt, row.tokens) == (flow, precision, 16, 8)
    assert (row.ttft_ms, row.tpot_ms) == (30.0, 5.0)
    assert row.p10 <= row.tpot_ms <= row.p90


def test_profile_is_still_a_command_of_its_own_beside_import(checkpoint: Checkpoint) -> None:
    options = ("--flow", "torch", "--precision", "fp32", "--shapes", "2x0.5", "--repeats", 3)
    result = amoeba("profile", checkpoint.path, *options, "--prompt", 16, "--tokens", 8, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 1
    said = amoeba("profile", "-h").stdout
    assert "amoeba profile --flow onnx" in said
    assert "import  Add what was measured elsewhere" in said


def test_importing_needs_no_engine(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_flow, "_PACKAGES", ("a-runtime-that-is-not-installed",))
    table = import_measurements([measured], "orin-nx", Told(), tmp_path / "table.json")
    assert len(table.rows) == 1


# Formats

SCHEMA = json.loads((ROOT / "docs" / "schemas" / "latency-table.schema.json").read_text())


def test_reports_and_tables_made_of_them_are_what_the_schema_says(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, steps=(finishing(),))
    monkeypatch.setattr(device_test, "peak_memory", lambda *_: 1)
    passed = examine_item(item(checkpoint, "fake"), made(tmp_path / "one"))
    failed = examine_item(item(checkpoint, "no-such-flow"), made(tmp_path / "two"))
    row = Row(**passed.pop("row"))
    failed.pop("row")
    empty = empty_table(checkpoint, 96)
    facts = empty.facts | {"test": {}, "device_facts": device_test.device_facts(), "items": [passed, failed]}
    write_table(tmp_path / "report.json", Table("local", empty.architecture_digest, facts, (row,)))
    assert imported(tmp_path / "table.json", tmp_path / "report.json").exit_code == 0
    for name in ("report.json", "table.json"):
        Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / name).read_text()))
