"""What is measured on this machine for a request: a grid for a search, one shape where it is named, settings apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import amoeba, sentence

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.onnx import OnnxBackend
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.local_latency import SPREAD
from amoeba_deploy.profiles.local import ready_combinations
from amoeba_deploy.profiles.profiler import empty_table, local_table, local_table_file
from amoeba_deploy.profiles.row import make_row
from amoeba_deploy.profiles.table import write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

SHORT = ("--prompt", 8, "--tokens", 4, "--context", 32)
HERE = ("--device", "local", "--flow", "onnx", "--precision", "fp32", *SHORT)


def rows(checkpoint: Checkpoint) -> list[tuple[str, dict[str, str]]]:
    """Shape and settings of what this machine's table holds."""
    table = local_table(checkpoint)
    return [] if table is None else [(str(row.shape), dict(row.settings)) for row in table.rows]


def known(checkpoint: Checkpoint, *shapes: str, settings: dict[str, str] | None = None) -> None:
    """Put rows into this machine's table as though they had been measured."""
    made = [
        make_row("onnx", "fp32", Shape.parse(shape), Workload(1, 8, 4), (1.0, 1.0, 1.0, 1.0, 9), (1000, 1000))
        for shape in shapes
    ]
    for row in made:
        object.__setattr__(row, "settings", settings or {})
    write_table(local_table_file(checkpoint), empty_table(checkpoint, 32).merged(made), force=True)


def test_a_named_shape_is_measured_alone_and_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    command = ("export", checkpoint.path, *HERE, "--shape", "2x0.67", "--no-verify", "--json")
    first = amoeba(*command, "-o", tmp_path / "a")
    assert first.exit_code == 0, first.output
    assert "profiling 2x0.67 in onnx fp32" in first.stderr
    assert rows(checkpoint) == [("2x0.67", {})]
    assert json.loads(first.stdout)["predicted"]["source"] == "measured"
    again = amoeba(*command, "-o", tmp_path / "b")
    assert "profiling" not in again.stderr
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_one_measured_shape_does_not_stand_for_all_in_a_search(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a spread of shapes takes to measure is tested elsewhere; here it is asked for, and once."""
    asked = []

    def profile(_checkpoint: Checkpoint, *what: object, **_more: object) -> None:
        asked.append(what)
        known(checkpoint, *map(str, checkpoint.shapes()))

    monkeypatch.setattr("amoeba_deploy.local_latency.profile_to", profile)
    known(checkpoint, "2x0.67")
    for _ in range(2):
        done = amoeba("search", checkpoint.path, *HERE, "--latency", "10s", "--json")
        assert done.exit_code == 0, done.output
    assert asked == [(["onnx"], ["fp32"], SPREAD, Workload(1, 8, 4), 32)]


def test_where_the_corners_are_measured_nothing_more_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shapes = checkpoint.shapes()
    depths, widths = {s.depth for s in shapes}, {s.width for s in shapes}
    corners = [str(Shape(d, w)) for d in (min(depths), max(depths)) for w in (min(widths), max(widths))]
    known(checkpoint, *corners)
    found = amoeba("search", checkpoint.path, *HERE, "--latency", "10s", "--json")
    assert found.stderr == ""
    named = ("--shape", "3x0.67", "--no-verify", "--json", "-o", tmp_path / "out")
    made = amoeba("export", checkpoint.path, *HERE, *named)
    assert "profiling" not in made.stderr
    assert json.loads(made.stdout)["predicted"]["source"] == "interpolated"
    assert len(rows(checkpoint)) == 4


def test_a_refusal_names_no_other_shape_than_the_one_that_was_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    asked = ("--device", "local", "--flow", "onnx", "--precision", "bf16", *SHORT, "--shape", "2x0.67", "--quiet")
    said = sentence(amoeba("export", checkpoint.path, *asked, "-o", tmp_path / "out"), 4)
    assert "onnx bf16 cannot run on this machine, ONNX Runtime's CPU provider has no bfloat16" in said
    assert "4x1" not in said


def test_a_plan_by_hand_gets_the_rows_of_a_search(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its width is a name only, so a row of that name would say nothing of it."""
    asked = []

    def profile(_checkpoint: Checkpoint, *what: object, **_more: object) -> None:
        asked.append(what[2])
        known(checkpoint, *map(str, checkpoint.shapes()))

    monkeypatch.setattr("amoeba_deploy.local_latency.profile_to", profile)
    value = checkpoint.plan(Shape.parse("2x1")).to_json()
    value["blocks"][0]["neurons"] = value["blocks"][0]["neurons"][:-32]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    named = ("--shape", tmp_path / "plan.json", "--no-verify", "--quiet", "-o", tmp_path / "out")
    assert amoeba("export", checkpoint.path, *HERE, *named).exit_code == 0
    assert asked == [SPREAD]


# Settings of the engine's own


def test_the_default_engine_does_not_stand_for_one_with_settings(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def profile(_checkpoint: Checkpoint, *_what: object, settings: dict[str, str], **_more: object) -> None:
        asked.append(settings)
        known(checkpoint, *map(str, checkpoint.shapes()), settings=settings)

    monkeypatch.setattr("amoeba_deploy.local_latency.profile_to", profile)
    known(checkpoint, *map(str, checkpoint.shapes()))
    command = ("search", checkpoint.path, *HERE, "--latency", "10s", "--quiet")
    assert amoeba(*command).exit_code == 0
    assert asked == []
    for _ in range(2):
        assert amoeba(*command, "--set", "emitter=oga").exit_code == 0
    assert asked == [{"emitter": "oga"}]


def test_a_named_shape_with_settings_is_measured_with_them(demo: Checkpoint, tmp_path: Path) -> None:
    command = ("export", *HERE, "--shape", "6x0.5", "--set", "emitter=oga", "--no-verify", "--json")
    done = amoeba(*command, "-o", tmp_path / "a")
    if "which is not installed" in done.stderr:
        pytest.skip("onnxruntime-genai's builder is not installed")
    assert done.exit_code == 0, done.output
    assert "profiling 6x0.5 in onnx fp32 emitter=oga" in done.stderr
    assert rows(demo) == [("6x0.5", {"emitter": "oga"})]
    table = local_table(demo)
    assert table is not None
    assert table.rows[0].context == 32
    assert json.loads(done.stdout)["predicted"]["source"] == "measured"
    assert "profiling 6x0.5" not in amoeba(*command, "-o", tmp_path / "b").stderr


def test_settings_that_cannot_run_here_leave_nothing_known(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "cannot_run", lambda *_: "it has no CUDA device")
    asked = ("export", checkpoint.path, *HERE, "--shape", "2x0.67", "--set", "provider=cuda", "--quiet")
    said = sentence(amoeba(*asked, "-o", tmp_path / "out"), 4)
    assert "onnx fp32 provider=cuda cannot run on this machine, it has no CUDA device" in said
    assert rows(checkpoint) == []


def test_a_setting_at_its_default_is_no_setting(checkpoint: Checkpoint) -> None:
    known(checkpoint, *map(str, checkpoint.shapes()))
    default = load_backend("onnx").settings["emitter"].default
    asked = ("search", checkpoint.path, *HERE, "--latency", "10s", "--quiet", "--set", f"emitter={default}")
    assert amoeba(*asked).exit_code == 0


# What is said first


def test_a_wrong_shape_is_said_before_an_output_that_is_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for flow in ("onnx", "all"):
        asked = ("export", checkpoint.path, "--device", "orin-nx", "--flow", flow, "--shape", "99x1", "--quiet")
        assert "99" in sentence(amoeba(*asked, "-o", tmp_path / "taken"), 2)


def test_all_names_every_flow_whose_toolchain_is_here() -> None:
    here = [flow for flow in flow_names() if not load_backend(flow).toolchain().missing]
    assert {"torch", "onnx"} <= set(here)
    pairs = ready_combinations(["all"], [])
    assert pairs == [(flow, precision) for flow in here for precision in load_backend(flow).precisions()]


def test_all_flows_are_profiled_and_those_that_cannot_run_here_are_said(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.profiles.local.flow_names", lambda: ("torch", "onnx", "torch-compile"))
    monkeypatch.setattr(load_backend("torch-compile"), "cannot_run", lambda *_: "there is no compiler here")
    asked = ("--flow", "all", "--precision", "fp32", "--shapes", "2x1", "--prompt", 8, "--tokens", 4, "--repeats", 3)
    done = amoeba("profile", checkpoint.path, *asked, "--json")
    assert done.exit_code == 0, done.output
    assert "left out torch-compile fp32: it refuses the shape 2x1: there is no compiler here" in done.stderr
    table = local_table(checkpoint)
    assert table is not None
    assert {(row.flow, row.precision) for row in table.rows} == {("torch", "fp32"), ("onnx", "fp32")}


def test_all_flows_and_one_of_them_are_not_named_together(checkpoint: Checkpoint) -> None:
    said = sentence(amoeba("profile", checkpoint.path, "--flow", "all,onnx"), 2)
    assert said == "amoeba: --flow all names every flow already; leave the others out"
