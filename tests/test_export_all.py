"""``export --flow all``: a bundle of every engine that can be built, one table, and why the others were passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import amoeba
from fake_backends import finishing, offer, offer_fake, point

from amoeba_deploy.backends import onnx as onnx_flow
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.profiles.profiler import empty_table
from amoeba_deploy.profiles.row import make_row
from amoeba_deploy.profiles.table import write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

TARGET = ("--device", "orin-nx", "--prompt", 64)
SHAPE = ("--shape", "2x0.67")
ALL = ("--flow", "all")


def export(checkpoint: Checkpoint, output: Path, *more: object) -> Result:
    """Export all flows of the small random checkpoint."""
    return amoeba("export", checkpoint.path, *TARGET, *ALL, "-o", output, *more)


def printed(result: Result, code: int = 0) -> dict[str, Any]:
    """What ``--json`` printed."""
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def engines(value: dict[str, Any]) -> list[str]:
    """The engines that were built."""
    return [f"{one['flow']}-{one['precision']}" for one in value["bundles"]]


def reasons(value: dict[str, Any]) -> dict[str, str]:
    """Why engines were passed over."""
    return {f"{one['flow']}-{one['precision']}": one["reason"] for one in value["passed_over"]}


@pytest.fixture
def own_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch`` and ``onnx`` and nothing else."""
    offer(monkeypatch)


# What is built


@pytest.mark.usefixtures("own_flows")
def test_every_engine_gets_a_bundle_of_its_own_that_is_complete(checkpoint: Checkpoint, tmp_path: Path) -> None:
    value = printed(export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "fp32,int8", "--json", "--quiet"))
    assert engines(value) == ["onnx-fp32", "onnx-int8", "torch-fp32"]
    assert value["passed_over"] == []
    assert sorted(folder.name for folder in (tmp_path / "all").iterdir()) == engines(value)
    for one in value["bundles"]:
        assert one["bundle"] == str(tmp_path / "all" / f"{one['flow']}-{one['precision']}")
        assert one["verified"]["greedy_tokens_equal"] is True
        assert one["predicted"]["source"] == "estimated"
        assert amoeba("bundle", "verify", one["bundle"], "--quiet").exit_code == 0


@pytest.mark.usefixtures("own_flows")
def test_without_precisions_each_flow_takes_the_one_that_the_device_prefers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert engines(printed(export(checkpoint, tmp_path / "all", *SHAPE, "--json", "--quiet"))) == [
        "onnx-int4",
        "torch-bf16",
    ]


def test_a_flow_that_the_device_does_not_list_takes_its_first_precision_and_needs_a_table(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch)
    value = printed(export(checkpoint, tmp_path / "all", *SHAPE, "--json", "--quiet"))
    assert "lists no flow 'fake'" in reasons(value)["fake-fp32"]
    assert engines(value) == ["onnx-int4", "torch-bf16"]


@pytest.mark.usefixtures("own_flows")
def test_each_flow_gets_its_own_best_shape_within_the_budget(checkpoint: Checkpoint, tmp_path: Path) -> None:
    workload, rows = Workload(1, 64, 32), []
    for flow, slow in (("onnx", 1.0), ("torch", 2.0)):
        for shape in checkpoint.shapes():
            tpot = slow * shape.depth * float(shape.width)
            rows.append(make_row(flow, "fp32", shape, workload, (1.0, tpot, tpot, tpot, 9), (1000, 1000)))
    write_table(tmp_path / "table.json", empty_table(checkpoint, 128, "orin-nx").merged(rows))
    budget = ("--latency", "4ms", "--table", tmp_path / "table.json", "--precision", "fp32", "--no-verify")
    value = printed(export(checkpoint, tmp_path / "all", *budget, "--json", "--quiet"))
    found = {one["flow"]: one for one in value["bundles"]}
    assert found["onnx"]["shape"] == {"depth": 4, "width": 1.0, "policy": "uniform"}
    assert found["torch"]["shape"]["depth"] * found["torch"]["shape"]["width"] <= 2
    assert all(one["predicted"]["source"] == "measured" for one in found.values())


# The table


@pytest.mark.usefixtures("own_flows")
def test_one_table_shows_size_build_time_verification_and_latencies_with_their_source(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--quiet")
    assert result.exit_code == 0, result.output
    head, onnx, torch, end = result.stdout.splitlines()
    assert head.split() == [
        "engine",
        "shape",
        "artefact",
        "build",
        "s",
        "verified",
        "TTFT",
        "ms",
        "TPOT",
        "ms",
        "latency",
    ]
    assert onnx.split()[:3] == ["onnx", "int4", "2x0.67"]
    assert torch.split()[:3] == ["torch", "bf16", "2x0.67"]
    for line in (onnx, torch):
        assert line.split()[6] == "yes"
        assert line.split()[-1] == "estimated"
        assert all(float(number) >= 0 for number in line.split()[7:9])
    assert end == f"2 bundles: {tmp_path / 'all'}"


@pytest.mark.usefixtures("own_flows")
def test_engines_for_this_machine_are_measured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    workload = Workload(1, 64, 32)
    row = make_row("onnx", "fp32", Shape.parse("2x1"), workload, (1.0, 1.0, 1.0, 1.0, 9), (1000, 1000))
    write_table(tmp_path / "table.json", empty_table(checkpoint, 128, "local").merged([row]))
    local = ("--device", "local", "--prompt", 64, *ALL, "--precision", "fp32", "--shape", "2x1")
    result = amoeba("export", checkpoint.path, *local, "--table", tmp_path / "table.json", "-o", tmp_path / "all")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[-1] == "measured"
    assert "passed over torch fp32: the table of 'local' has nothing measured" in result.stdout


def test_an_engine_that_cannot_run_here_is_built_and_verified_on_the_device(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", reason="this machine has no such accelerator", steps=(finishing(),))
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "fp32", "--quiet", "--force")
    assert result.exit_code == 0, result.output
    assert "on the device" in next(line for line in result.stdout.splitlines() if line.startswith("tensorrt-llm fp32"))
    assert "tensorrt-llm-fp32 cannot run here: this machine has no such accelerator" in result.stdout
    assert "step 1 of tensorrt-llm-fp32 on the device (needs a compiler), compile the engine:" in result.stdout


# What is not built


def test_a_missing_toolchain_is_passed_over_with_the_command_that_installs_it(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", missing=("fake-runtime",))
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--quiet")
    assert result.exit_code == 0
    assert "passed over tensorrt-llm fp32: the flow 'tensorrt-llm' needs fake-runtime" in result.stdout
    assert "pip install tensorrt-llm-runtime" in result.stdout


def test_a_refused_shape_is_passed_over_with_the_reason(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", takes={"hidden_multiple": {"fp32": 256}})
    value = printed(export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "fp32", "--json", "--quiet"))
    assert "256" in reasons(value)["tensorrt-llm-fp32"]
    assert "torch-fp32" in engines(value)


def test_a_flow_of_another_package_that_cannot_be_loaded_is_passed_over(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Any:
        raise ImportError("no libengine.so")

    offer(monkeypatch, point("acme", load))
    value = printed(export(checkpoint, tmp_path / "all", *SHAPE, "--json", "--quiet"))
    assert value["passed_over"][0]["precision"] is None
    assert "no libengine.so" in value["passed_over"][0]["reason"]
    assert len(value["bundles"]) == 2


def test_a_flow_without_any_of_the_precisions_is_passed_over_with_those_it_has(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch)
    value = printed(export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "int4", "--json", "--quiet"))
    assert "it has fp32, fp16, bf16" in reasons(value)["torch-None"]
    assert engines(value) == ["onnx-int4"]


def test_a_wrong_engine_leaves_no_bundle_and_exit_code_5_and_the_others_are_kept(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch)
    monkeypatch.setattr(onnx_flow.OnnxBackend, "tolerance", lambda *_: 0.0)
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--json", "--quiet")
    value = printed(result, 5)
    assert "is wrong" in reasons(value)["onnx-int4"]
    assert [folder.name for folder in (tmp_path / "all").iterdir()] == ["torch-bf16"]
    assert result.stderr.splitlines()[-1].startswith("amoeba: 1 of 2 engines failed")


def test_an_engine_that_fails_unexpectedly_is_named_with_exit_code_1_and_the_others_are_kept(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", broken=RuntimeError("segments overlap"))
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "fp32", "--json", "--quiet")
    assert reasons(printed(result, 1))["tensorrt-llm-fp32"] == "unexpected RuntimeError: segments overlap"
    assert sorted(folder.name for folder in (tmp_path / "all").iterdir()) == ["onnx-fp32", "torch-fp32"]


def test_where_no_toolchain_is_there_the_exit_code_is_6_and_nothing_is_left(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", missing=("fake-runtime",))
    monkeypatch.setattr("amoeba_deploy.backends._own_modules", dict)
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--json", "--quiet")
    assert printed(result, 6)["bundles"] == []
    assert "pip install tensorrt-llm-runtime" in result.stderr
    assert list(tmp_path.glob("all*")) == []


@pytest.mark.usefixtures("own_flows")
def test_where_no_engine_has_a_shape_within_the_budget_the_exit_code_is_3(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = export(checkpoint, tmp_path / "all", "--latency", "1us", "--json", "--quiet")
    assert all("no shape fits the budget" in reason for reason in reasons(printed(result, 3)).values())
    assert not (tmp_path / "all").exists()


@pytest.mark.usefixtures("own_flows")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shape", "99x1"), "99"),
        (("--device", "orin-mx", "--latency", "40ms"), "orin-mx"),
        ((), "--latency 40ms"),
        ((*SHAPE, "--precision", "fp32,int3"), "int3"),
        ((*SHAPE, "--set", "tp=2"), "--set"),
        ((*SHAPE, "--context", 4096), "4096"),
        ((*SHAPE, "--table", "gone.json"), "gone.json"),
    ],
    ids=["shape", "device", "budget", "precision", "setting", "context", "table"],
)
def test_a_request_that_no_engine_could_answer_is_refused_at_once(
    checkpoint: Checkpoint, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    result = export(checkpoint, tmp_path / "all", *options, "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not (tmp_path / "all").exists()


# The folder


@pytest.mark.usefixtures("own_flows")
def test_a_folder_that_holds_something_is_kept_unless_forced_and_then_only_its_bundles_are_replaced(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    assert export(checkpoint, folder, *SHAPE, "--precision", "int4", "--quiet").exit_code == 0
    (folder / "mine.txt").write_text("mine")
    stale = folder / "onnx-int4" / "stale.txt"
    stale.write_text("stale")
    result = export(checkpoint, folder, *SHAPE, "--precision", "int4", "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--force" in result.stderr
    assert stale.exists()
    assert export(checkpoint, folder, *SHAPE, "--precision", "int4", "--quiet", "--force").exit_code == 0
    assert not stale.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "onnx-int4"]


def test_what_was_done_when_interrupted_is_kept_and_said(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", broken=KeyboardInterrupt())
    result = export(checkpoint, tmp_path / "all", *SHAPE, "--precision", "fp32", "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"amoeba: interrupted; the bundles that were done (2) are in {tmp_path / 'all'}\n"
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["onnx-fp32", "torch-fp32"]


@pytest.mark.usefixtures("own_flows")
def test_a_file_or_a_bundle_is_no_folder_for_bundles(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in export(checkpoint, tmp_path / "file", *SHAPE, "--quiet", "--force").stderr
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert "is a bundle itself" in export(checkpoint, tmp_path / "bundle", *SHAPE, "--quiet", "--force").stderr


@pytest.mark.usefixtures("own_flows")
def test_without_an_output_the_folder_is_named_after_the_device(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = amoeba("export", checkpoint.path, *TARGET, *ALL, *SHAPE, "--precision", "int4", "--quiet")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("orin-nx-all").iterdir()] == ["onnx-int4"]


@pytest.mark.usefixtures("own_flows")
def test_several_flows_by_name_are_still_one_search(checkpoint: Checkpoint, tmp_path: Path) -> None:
    named = ("--flow", "onnx,torch", "--precision", "fp32", *SHAPE)
    result = amoeba("export", checkpoint.path, *TARGET, *named, "-o", tmp_path / "one", "--json", "--quiet")
    assert "bundle" in printed(result)
    assert (tmp_path / "one" / "manifest.json").is_file()
