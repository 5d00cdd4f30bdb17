"""Several latency tables as one, and which of their rows count: device, machine, versions, context and settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba, sentence

from amoeba_deploy.backends import load_backend
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.files import sha256_of
from amoeba_deploy.profiles import shipped
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.profiles.machine import fingerprint
from amoeba_deploy.profiles.sizes import sizes_of_table

ASKED = ("--latency", "40ms", "--flow", "onnx", "--precision", "int4", "--measured-only")
ORIN = ("search", "--device", "orin-nx", *ASKED)
HERE = ("search", "--device", "local", *ASKED)
MakeTable = Callable[..., Path]


@pytest.fixture
def table(demo: Checkpoint, tmp_path: Path) -> MakeTable:
    """Writes a table with the TPOT of some shapes in onnx int4; ``row`` and ``head`` are changed as asked."""

    def make(name: str, shapes: dict[str, float], row: dict[str, Any] | None = None, **head: Any) -> Path:
        rows = []
        for shape, tpot in shapes.items():
            depth, width = shape.split("x")
            one = {"flow": "onnx", "precision": "int4", "depth": int(depth), "width": float(width), "policy": "uniform"}
            one |= {"batch": 1, "prompt": 128, "tokens": 32, "ttft_ms": 2 * tpot, "tpot_ms": tpot, "repeats": 9}
            one |= {"p10": tpot, "p90": tpot, "peak_memory_bytes": 10**9, "artifact_bytes": 10**9}
            rows.append(one | (row or {}))
        facts = {"format": "amoeba.latency-table/1", "device": "orin-nx", "architecture": demo.architecture.digest}
        (tmp_path / name).write_text(json.dumps(facts | head | {"rows": rows}))
        return tmp_path / name

    return make


def tpots(*command: object) -> dict[str, float]:
    """TPOT of the measured shapes, by their names."""
    result = amoeba(*command, "--top", 1000, "--json")
    assert result.exit_code == 0, result.output
    shapes = json.loads(result.stdout)["top"]
    return {f"{s['depth']}x{s['width']:g}": s["tpot_ms"] for s in shapes if s["source"] == "measured"}


# Several tables


def test_tables_of_one_device_are_merged(table: MakeTable) -> None:
    first, second = table("a.json", {"12x1": 12.0}), table("b.json", {"10x1": 10.0, "6x1": 4.0})
    found = tpots(*ORIN, "--table", first, "--table", second)
    assert (found["12x1"], found["10x1"], found["6x1"]) == (12.0, 10.0, 4.0)


def test_of_rows_that_agree_the_last_named_counts(table: MakeTable) -> None:
    first, second = table("a.json", {"12x1": 12.0}), table("b.json", {"12x1": 12.3})
    assert tpots(*ORIN, "--table", first, "--table", second)["12x1"] == 12.3
    assert tpots(*ORIN, "--table", second, "--table", first)["12x1"] == 12.0


def test_tables_that_disagree_are_refused_with_files_row_and_values(table: MakeTable) -> None:
    first = table("a.json", {"12x1": 12.0}, {"p10": 11.9, "p90": 12.2})
    second = table("b.json", {"12x1": 12.5}, {"p10": 12.4, "p90": 12.6})
    said = sentence(amoeba(*ORIN, "--quiet", "--table", first, "--table", second), 2)
    assert f"{first} and {second} disagree on onnx int4 12x1 (batch 1, prompt 128, 32 tokens)" in said
    assert "TPOT 12 ms (11.9 to 12.2) in the one and 12.5 ms (12.4 to 12.6) in the other" in said


@pytest.mark.parametrize(
    ("other", "spread"),
    [(12.3, {}), (14.0, {"p10": 11.0, "p90": 15.0}), (20.0, {"context": 64}), (20.0, {"settings": {"emitter": "oga"}})],
    ids=["within 3 %", "within a spread", "of another context", "of other settings"],
)
def test_rows_that_need_not_be_equal_do_not_disagree(table: MakeTable, other: float, spread: dict[str, Any]) -> None:
    first, second = table("a.json", {"12x1": 12.0}), table("b.json", {"12x1": other}, spread)
    assert amoeba(*ORIN, "--quiet", "--table", first, "--table", second).exit_code == 0


def test_each_device_takes_its_own_tables(table: MakeTable) -> None:
    nx, agx = table("nx.json", {"12x1": 12.0}), table("agx.json", {"12x1": 6.0}, device="agx-orin-64")
    both = ("--device", "agx-orin-64", "--table", nx, "--table", agx)
    found = json.loads(amoeba(*ORIN, *both, "--json").stdout)["devices"]
    assert [(one["device"], one["predicted"]["tpot_ms"]) for one in found] == [("orin-nx", 12.0), ("agx-orin-64", 6.0)]


def test_a_table_of_a_device_that_is_not_searched_is_refused(table: MakeTable) -> None:
    nx, h100 = table("nx.json", {"12x1": 12.0}), table("h100.json", {"12x1": 1.0}, device="h100-sxm")
    both = ("--table", nx, "--table", h100, "--quiet")
    assert f"{h100}: was measured on 'h100-sxm', not on 'orin-nx'" in sentence(amoeba(*ORIN, *both), 2)
    said = sentence(amoeba(*ORIN, "--device", "agx-orin-64", *both), 2)
    assert f"{h100}: was measured on 'h100-sxm', not on 'orin-nx' or 'agx-orin-64'" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "bad.json"), ('{"format": "amoeba.latency-table/9"}', "bad.json"), (None, "another model architecture")],
    ids=["damaged", "of an unknown format", "of another architecture"],
)
def test_the_second_table_is_checked_as_the_first(table: MakeTable, content: str | None, said: str) -> None:
    good, bad = table("a.json", {"12x1": 12.0}), table("bad.json", {"12x1": 12.0}, architecture="0" * 64)
    if content is not None:
        bad.write_text(content)
    found = sentence(amoeba(*ORIN, "--quiet", "--table", good, "--table", bad), 2)
    assert said in found
    assert "bad.json" in found


def test_no_row_of_what_is_asked_for_is_said_with_the_command_that_measures_it(table: MakeTable) -> None:
    facts = {"device": "local"}
    file = table("a.json", {"12x1": 12.0}, **facts)
    said = sentence(amoeba(*HERE, "--prompt", 64, "--quiet", "--table", file), 4)
    assert "nothing measured for onnx in int4" in said
    assert "amoeba profile --flow onnx --precision int4 --batch 1 --prompt 64 --tokens 32 --context 512" in said


def test_the_digest_in_a_manifest_is_that_of_the_table_or_of_all_tables(table: MakeTable, tmp_path: Path) -> None:
    first, second = table("a.json", {"12x1": 12.0}), table("b.json", {"6x1": 4.0})
    digests = []
    for files in ((first,), (first, second), (second, first)):
        out = tmp_path / f"out{len(digests)}"
        given = [part for file in files for part in ("--table", file)]
        made = amoeba("export", *ORIN[1:], *given, "--no-verify", "--quiet", "-o", out)
        assert made.exit_code == 0, made.output
        digests.append(json.loads((out / "manifest.json").read_text())["table"])
    assert digests[0] == "sha256:" + sha256_of(first)
    assert len(set(digests)) == 3


# This machine and its engines


def test_a_table_of_this_machine_serves_here(table: MakeTable) -> None:
    versions = load_backend("onnx").toolchain().versions
    file = table("a.json", {"12x1": 12.0}, device="local", machine={"fingerprint": fingerprint()}, engines=versions)
    assert tpots(*HERE, "--table", file)["12x1"] == 12.0


def test_a_table_of_another_machine_is_not_this_machines(table: MakeTable) -> None:
    file = table("a.json", {"12x1": 12.0}, device="local", machine={"fingerprint": "0" * 16})
    said = sentence(amoeba(*HERE, "--quiet", "--table", file), 2)
    assert f"a.json: was measured on the machine {'0' * 16}, and this one is {fingerprint()}" in said


def test_another_version_of_an_engine_is_refused_here_and_a_remark_elsewhere(table: MakeTable) -> None:
    installed = load_backend("onnx").toolchain().versions["onnxruntime"]
    old = {"engines": {"onnxruntime": "1.2.3", "torch": "0.1"}}
    here, there = table("a.json", {"12x1": 12.0}, device="local", **old), table("b.json", {"12x1": 12.0}, **old)
    said = sentence(amoeba(*HERE, "--quiet", "--table", here), 2)
    assert f"measured onnx with onnxruntime 1.2.3, and {installed} is installed" in said
    remarks = json.loads(amoeba(*ORIN, "--table", there, "--json").stdout)["remarks"]
    assert remarks == [f"{there} measured onnx with onnxruntime 1.2.3; this installation builds with {installed}"]


# Rows of the engine in question


def test_rows_of_other_settings_do_not_stand_for_an_engines_default(table: MakeTable) -> None:
    settings = ("--set", "emitter=oga")
    file = table("a.json", {"12x1": 12.0}, {"settings": {"emitter": "oga"}}, device="local")
    assert tpots(*HERE, *settings, "--table", file)["12x1"] == 12.0
    assert "nothing measured for onnx in int4" in sentence(amoeba(*HERE, "--quiet", "--table", file), 4)
    plain = table("b.json", {"12x1": 12.0}, device="local")
    said = sentence(amoeba(*HERE, *settings, "--quiet", "--table", plain), 4)
    assert "--set emitter=oga" in said
    default = load_backend("onnx").settings["emitter"].default
    assert tpots(*HERE, "--set", f"emitter={default}", "--table", plain)["12x1"] == 12.0


def test_rows_of_another_context_do_not_count_and_those_of_an_unknown_one_do(table: MakeTable) -> None:
    known, unknown = table("a.json", {"12x1": 12.0}, {"context": 256}), table("b.json", {"12x1": 11.0})
    assert tpots(*ORIN, "--context", 256, "--table", known, "--table", unknown)["12x1"] == 12.0
    assert tpots(*ORIN, "--context", 512, "--table", known, "--table", unknown)["12x1"] == 11.0
    assert "only estimates" in sentence(amoeba(*ORIN, "--context", 512, "--quiet", "--table", known), 4)


# Tables that ship with the package


@pytest.fixture
def shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in the place of the tables that ship with the package."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr(shipped, "SHIPPED", folder)
    shipped.all_shipped.cache_clear()
    yield folder
    shipped.all_shipped.cache_clear()


def test_a_shipped_table_of_the_device_and_the_model_is_used_and_named(table: MakeTable, shipped_folder: Path) -> None:
    assert "only estimates exist" in sentence(amoeba(*ORIN, "--quiet"), 4)
    heads = {"orin.json": {}, "h100.json": {"device": "h100-sxm"}, "other.json": {"architecture": "0" * 64}}
    for name, head in heads.items():
        table(name, {"12x1": 12.0}, **head).rename(shipped_folder / name)
    shipped.all_shipped.cache_clear()
    assert tpots(*ORIN)["12x1"] == 12.0
    remarks = json.loads(amoeba(*ORIN, "--json").stdout)["remarks"]
    assert remarks == ["uses the table that ships with amoeba-deploy for this device and model: orin.json"]
    own = table("own.json", {"12x1": 13.0})
    assert tpots(*ORIN, "--table", own)["12x1"] == 13.0


def test_every_table_that_ships_is_of_a_known_device_and_was_measured_there() -> None:
    tables = shipped.all_shipped()
    assert tables
    for file, found in tables:
        device = load_device(found.device)
        assert file.name.startswith(f"{found.device}-")
        assert device.name != "local"
        assert sizes_of_table(found) is not None
        assert found.facts["machine"]["processor"]
        assert sum(run["rows"] for run in found.facts["runs"]) == len(found.rows)
        for row in found.rows:
            assert row.flow in {entry.flow for entry in device.flows}
            assert row.precision in load_backend(row.flow).precisions()
            assert row.stopped in ("confident", "budget", "repeats")
            assert row.repeats >= 9
            assert row.tpot_error is not None


def test_the_embedded_checkpoint_is_searched_by_what_ships() -> None:
    """Of the machine that was measured; no estimate is used where rows are."""
    (named,) = (found for _, found in shipped.all_shipped() if found.device == "epyc-zen4-2")
    pairs = {(row.flow, row.precision) for row in named.rows}
    assert {flow for flow, _ in pairs} == {"onnx", "gguf", "openvino", "torch"}
    for flow, precision in (("onnx", "int4"), ("gguf", "q8_0")):
        asked = ("--device", "epyc-zen4-2", "--flow", flow, "--precision", precision, "--latency", "5ms")
        done = amoeba("search", *asked, "--measured-only", "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["predicted"]["source"] in ("measured", "interpolated")
        assert found["predicted"]["tpot_interval_ms"][0] < found["predicted"]["tpot_ms"]
        assert any("ships with amoeba-deploy" in remark for remark in found["remarks"])


def test_rows_of_the_table_that_ships_count_once_in_a_calibration(tmp_path: Path) -> None:
    (file,) = (file for file, found in shipped.all_shipped() if found.device == "epyc-zen4-2")
    asked = ("search", "--device", "epyc-zen4-2", "--flow", "onnx", "--precision", "int8", "--latency", "1s")
    copied = tmp_path / "copy.json"
    copied.write_bytes(file.read_bytes())
    for more in ((), ("--table", copied)):
        remarks = json.loads(amoeba(*asked, "--prompt", 64, "--json", *more).stdout)["remarks"]
        assert any("calibrated by 12 measurements in int8 of this model on this device" in remark for remark in remarks)


def test_a_median_outside_its_own_runs_is_refused(tmp_path: Path) -> None:
    (file,) = (file for file, found in shipped.all_shipped() if found.device == "epyc-zen4-2")
    value = json.loads(file.read_text())
    value["rows"][3]["tpot_ms"] *= 100
    (tmp_path / "wrong.json").write_text(json.dumps(value))
    asked = ("search", "--device", "epyc-zen4-2", "--latency", "1s", "--table", tmp_path / "wrong.json")
    assert "holds a value that cannot be" in sentence(amoeba(*asked, "--quiet"), 2)
