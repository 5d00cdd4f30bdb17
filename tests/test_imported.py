"""Measurements from elsewhere in a device's table: reports of the device test, and other benchmarks' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import amoeba, sentence

from amoeba_deploy.backends import onnx as onnx_flow
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.profiles.imported import import_measurements
from amoeba_deploy.profiles.profiler import empty_table
from amoeba_deploy.profiles.row import make_row
from amoeba_deploy.profiles.table import Table, read_table, write_table
from amoeba_deploy.profiles.told import Told
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

WORK = Workload(1, 16, 8)


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


def llama_bench(**changes: Any) -> list[dict[str, Any]]:
    """llama-bench's tests of a prompt of 16 and of 8 tokens."""
    whole = {"model_filename": "m.gguf", "n_threads": 2, "build_number": 7000, "build_commit": "abc"} | changes
    samples = ((16, 0, [30_000_000]), (0, 8, [36_000_000, 44_000_000, 40_000_000]))
    return [whole | {"n_prompt": prompt, "n_gen": count, "samples_ns": taken} for prompt, count, taken in samples]


def written(file: Path, tests: list[dict[str, Any]]) -> Path:
    """What llama-bench prints, in a file."""
    file.write_text(json.dumps(tests))
    return file


def imported_bench(checkpoint: Checkpoint, file: Path, table: Path, **asked: str) -> Result:
    told = {"shape": "4x1", "precision": "int4", "peak-memory": "1MB", "artifact-size": "1MB"} | asked
    options = [part for name, value in told.items() for part in (f"--{name}", value)]
    return amoeba(
        "profile", "import", file, "--device", "orin-nx", "-o", table, "--checkpoint", checkpoint.path, *options
    )


def test_a_common_precision_is_written_by_the_engines_own_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert imported_bench(checkpoint, written(tmp_path / "bench.json", llama_bench()), table).exit_code == 0
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
    said = sentence(imported_bench(checkpoint, written(tmp_path / "bench.json", llama_bench()), table, **asked), 2)
    assert reason in said
    assert not table.exists()


@pytest.mark.parametrize("changes", [{"n_threads": 4}, {"model_filename": "other.gguf"}])
def test_two_measurements_of_one_row_in_a_file_are_refused(
    changes: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = written(tmp_path / "bench.json", llama_bench() + llama_bench(**changes))
    said = sentence(imported_bench(checkpoint, file, tmp_path / "table.json"), 2)
    assert "measures gguf q4_k_m 4x1.0 (batch 1, prompt 16, 8 tokens) more than once" in said


def test_a_file_that_is_imported_again_is_named_once(measured: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert imported(tmp_path / "table.json", measured).exit_code == 0
    assert len(read_table(tmp_path / "table.json").facts["imported"]) == 1


def test_a_table_of_another_device_or_model_is_left_alone(
    checkpoint: Checkpoint, demo: Checkpoint, measured: Path, tmp_path: Path
) -> None:
    write_table(tmp_path / "table.json", empty_table(checkpoint, 96, "rtx-4090"))
    assert "rtx-4090" in sentence(imported(tmp_path / "table.json", measured), 2)
    foreign = report(demo, tmp_path / "foreign.json", 1.0)
    assert "another model architecture" in sentence(imported(tmp_path / "both.json", measured, foreign), 2)
    assert not (tmp_path / "both.json").exists()
    named = ("profile", "import", measured, "--device", "orin-nx", "-o", tmp_path / "named.json")
    assert "another model architecture" in sentence(amoeba(*named, "--checkpoint", demo.path), 2)


def test_a_report_in_which_nothing_passed_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_table(tmp_path / "report.json", empty_table(checkpoint, 96))
    assert "holds no measurement" in sentence(imported(tmp_path / "table.json", tmp_path / "report.json"), 2)


@pytest.mark.parametrize("content", ["", "tok/s 12", '{"samples": []}'])
def test_a_file_of_no_known_form_is_refused_with_those_known(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.txt").write_text(content)
    said = sentence(imported(tmp_path / "table.json", tmp_path / "log.txt"), 2)
    assert "log.txt: is of no known form" in said
    assert "report of the device test" in said


def test_a_missing_file_and_a_mistyped_device_are_named(measured: Path, tmp_path: Path) -> None:
    assert "gone.json" in sentence(imported(tmp_path / "table.json", tmp_path / "gone.json"), 2)
    command = ("profile", "import", measured, "--device", "orin-mx", "-o", tmp_path / "table.json")
    assert "did you mean 'orin-nx'" in sentence(amoeba(*command), 2)


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
        said = sentence(imported(tmp_path / "table.json", tmp_path / "log.txt", *options), 2)
        assert name in said
        options += [name, value]
    assert imported(tmp_path / "table.json", tmp_path / "log.txt", *options).exit_code == 0
    (row,) = read_table(tmp_path / "table.json").rows
    assert (row.flow, str(row.shape), row.ttft_ms, row.tpot_ms, row.prompt) == ("onnx", "2x0.5", 30.0, 4.5, 16)


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
        (json.dumps(llama_bench()), "gguf", "q8_0"),
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
    assert "--peak-memory" in sentence(imported(tmp_path / "table.json", tmp_path / "bench", *told), 2)
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
