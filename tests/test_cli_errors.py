"""Every expected failure: one sentence on standard error, its own exit code, and nothing half-written.

The sentence says what was found and where; exit codes are 2 for bad input, 3 where no shape fits, 4 where no latency
is known, 5 where verification fails and 6 where a toolchain is missing.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import amoeba, sentence

from amoeba_deploy.backends import onnx as onnx_flow
from amoeba_deploy.checkpoint import Checkpoint

Refuse = Callable[..., str]
SEARCH = ("--device", "orin-nx", "--latency", "40ms")
TORCH = ("--flow", "torch", "--precision", "fp32")
SHORT = ("--prompt", "64")
"""For the random checkpoint, whose context is 128."""


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


@pytest.fixture
def refuse(outputs: Path) -> Refuse:
    """Run a writing command that must fail with an exit code; returns its sentence. Nothing may be left behind."""

    def run(code: int, *arguments: object) -> str:
        result = amoeba(*arguments, "-o", outputs / "result", "--quiet")
        said = sentence(result, code)
        assert list(outputs.iterdir()) == []
        return said

    return run


def flip(file: Path, position: int = -1) -> None:
    """Change one bit of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def change(file: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


COMMANDS = (
    "devices", "select", "checkpoint create", "checkpoint import", "checkpoint show", "checkpoint verify", "extract",
    "evaluate", "run", "profile", "search", "export", "bundle verify",
)  # fmt: skip


# Names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_failure_and_has_an_example(command: str) -> None:
    result = amoeba(*command.split(), "-h")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"  amoeba {command}" in result.stdout


def test_an_unknown_option_before_the_command_is_named() -> None:
    assert "--wat" in sentence(amoeba("--wat", "devices"), 2)


def test_a_mistyped_command_is_answered_with_the_closest_one() -> None:
    assert "'export'" in sentence(amoeba("exprot"), 2)


def test_a_mistyped_command_of_a_group_is_answered_with_the_closest_one() -> None:
    assert "'show'" in sentence(amoeba("checkpoint", "shwo"), 2)


def test_an_unknown_option_is_named() -> None:
    assert "--latancy" in sentence(amoeba("search", "--latancy", "40ms"), 2)


def test_a_missing_option_is_named() -> None:
    assert "--device" in sentence(amoeba("search", "--latency", "40ms"), 2)


def test_a_mistyped_device_is_answered_with_the_closest_one(refuse: Refuse) -> None:
    assert "did you mean 'orin-nx'" in refuse(2, "export", "--device", "orin-mx", "--latency", "40ms")


def test_a_mistyped_flow_is_answered_with_the_closest_one(refuse: Refuse) -> None:
    assert "did you mean 'onnx'" in refuse(2, "export", *SEARCH, "--flow", "onx")


def test_an_unknown_precision_is_named(refuse: Refuse) -> None:
    assert "int3" in refuse(2, "export", *SEARCH, "--precision", "int3")


def test_a_precision_that_the_flow_lacks_is_answered_with_those_it_has(refuse: Refuse) -> None:
    assert "fp32, fp16, bf16, int8, int4" in refuse(2, "export", *SEARCH, "--flow", "onnx", "--precision", "q8_0")


# Budgets


@pytest.mark.parametrize("latency", ["40", "-40ms", "0ms", "ms", "40 parsecs", "nanms", ""])
def test_a_latency_needs_a_positive_number_and_a_unit(refuse: Refuse, latency: str) -> None:
    said = refuse(2, "export", "--device", "orin-nx", "--latency", latency)
    assert f"'{latency}'" in said
    assert "40ms" in said


@pytest.mark.parametrize("memory", ["8", "0GB", "-1GB", "8TBs"])
def test_a_memory_needs_a_positive_number_and_a_unit(refuse: Refuse, memory: str) -> None:
    assert f"'{memory}'" in refuse(2, "export", "--device", "orin-nx", "--memory", memory)


def test_a_budget_or_a_shape_must_be_given(refuse: Refuse) -> None:
    assert "--latency 40ms" in refuse(2, "export", "--device", "orin-nx")


def test_an_impossible_latency_names_the_closest_shape_and_what_bounds_it(refuse: Refuse) -> None:
    said = refuse(3, "export", "--device", "orin-nx", "--latency", "1us")
    assert "closest is 6x0.5 in onnx int4" in said
    assert "latency bounds it" in said


def test_an_impossible_memory_names_the_closest_shape_and_what_bounds_it(refuse: Refuse) -> None:
    said = refuse(3, "export", "--device", "orin-nx", "--latency", "40ms", "--memory", "1MB")
    assert "closest is 6x0.5 in onnx int4" in said
    assert "memory bounds it" in said


def test_a_shape_that_exceeds_the_budget_is_not_built(refuse: Refuse) -> None:
    assert "12x1" in refuse(3, "export", "--device", "orin-nx", "--latency", "1us", "--shape", "12x1")


def test_estimates_do_not_serve_where_measurements_are_demanded(refuse: Refuse) -> None:
    assert "only estimates exist for 'orin-nx'" in refuse(4, "export", *SEARCH, "--measured-only")


def test_a_context_beyond_the_models_is_refused(refuse: Refuse, demo: Checkpoint) -> None:
    context = demo.architecture.context
    assert str(context) in refuse(2, "export", *SEARCH, "--context", context + 1)


# Shapes


@pytest.mark.parametrize(
    "shape", ["0x1", "13x1", "5x1", "12x0", "12x1.5", "12x1/0", "-3x1", "abc", "12", "x", "", "12x0.5x1", "12x1e-1"]
)
@pytest.mark.parametrize("command", ["export", "extract"])
def test_a_shape_must_be_one_that_the_checkpoint_has(refuse: Refuse, command: str, shape: str) -> None:
    device = ("--device", "orin-nx") if command == "export" else ()
    said = refuse(2, command, *device, "--shape", shape)
    assert re.search(r"\d", shape) is None or any(number in said for number in re.findall(r"[\d.]+", shape))


def test_a_depth_below_the_selections_minimum_is_answered_with_the_range(refuse: Refuse) -> None:
    assert "6 to 12" in refuse(2, "extract", "--shape", "5x1")


def test_a_plan_file_that_is_not_there_is_named(refuse: Refuse, tmp_path: Path) -> None:
    assert "gone.json" in refuse(2, "extract", "--shape", tmp_path / "gone.json")


def test_a_plan_file_of_another_model_is_refused(refuse: Refuse, checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(amoeba("extract", "--shape", "12x1", "--plan-only").stdout)
    assert "plan.json" in refuse(2, "extract", checkpoint.path, "--shape", plan)


# Checkpoints


def test_a_missing_checkpoint_is_named(refuse: Refuse, tmp_path: Path) -> None:
    assert "gone" in refuse(2, "export", tmp_path / "gone", *SEARCH)


def test_a_model_folder_is_told_from_a_checkpoint(refuse: Refuse, demo: Checkpoint) -> None:
    assert "amoeba checkpoint create" in refuse(2, "export", demo.model.path, *SEARCH)


def test_an_empty_folder_is_no_checkpoint(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "amoeba.json" in refuse(2, "export", tmp_path / "empty", *SEARCH)


def test_a_truncated_shard_is_named(refuse: Refuse, checkpoint: Checkpoint) -> None:
    shard = checkpoint.path / "base" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    said = refuse(2, "export", checkpoint.path, *SEARCH)
    assert "model.safetensors" in said
    assert "truncated" in said


def header(text: bytes) -> bytes:
    """A safetensors file with that header and a little data."""
    return len(text).to_bytes(8, "little") + text + bytes(64)


def entry(**parts: Any) -> bytes:
    """A header that describes one tensor."""
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | parts}).encode()


@pytest.mark.parametrize(
    "content",
    {
        "nothing": b"",
        "four bytes": b"\1\0\0\0",
        "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "no JSON": header(b"\x80garbage"),
        "half of a JSON object": header(b'{"a": {"dtype"'),
        "a list": header(b"[]"),
        "null": header(b"null"),
        "deeply nested lists": header(b"[" * 100_000),
        "an entry that is a number": header(b'{"a": 3}'),
        "an unknown dtype": header(entry(dtype="F1")),
        "a dtype that is a list": header(entry(dtype=[])),
        "a negative size": header(entry(shape=[-4])),
        "a size that is a fraction": header(entry(shape=[4.5])),
        "offsets beyond the file": header(entry(shape=[400], data_offsets=[0, 1600])),
        "negative offsets": header(entry(data_offsets=[-16, 0])),
        "offsets that contradict the shape": header(entry(data_offsets=[0, 12])),
        "offsets of other tensors only": header(entry()),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_shard_that_is_no_safetensors_file_of_the_model_is_refused(
    refuse: Refuse, checkpoint: Checkpoint, content: tuple[str, bytes]
) -> None:
    (checkpoint.path / "base" / "model.safetensors").write_bytes(content[1])
    assert str(checkpoint.path / "base") in refuse(2, "export", checkpoint.path, *SEARCH)


@pytest.fixture
def sharded(demo: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the checkpoint that ships in the package, whose base is in shards."""
    return Path(shutil.copytree(demo.path, tmp_path / "demo"))


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(refuse: Refuse, sharded: Path) -> None:
    shard = sorted((sharded / "base").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refuse(2, "export", sharded, *SEARCH)


def test_an_index_that_names_a_file_outside_the_folder_is_refused(refuse: Refuse, sharded: Path) -> None:
    index = sharded / "base" / "model.safetensors.index.json"
    change(index, lambda value: value["weight_map"].update({"lm_head.weight": "../../secret.safetensors"}))
    assert "outside its own folder" in refuse(2, "export", sharded, *SEARCH)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_base_model_that_differs_in_one_byte_is_not_the_checkpoints(
    refuse: Refuse, checkpoint: Checkpoint, name: str
) -> None:
    file = checkpoint.path / "base" / name
    if name == "config.json":
        file.write_text(file.read_text().replace('"bos_token_id": 0', '"bos_token_id": 3'))
    else:
        flip(file)
    assert "digest" in refuse(2, "export", checkpoint.path, *SEARCH)


DAMAGE: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a newer format": ("amoeba.json", lambda v: v.update(format="amoeba.checkpoint/2")),
    "no base": ("amoeba.json", lambda v: v.pop("base")),
    "no widths": ("amoeba.json", lambda v: v.update(widths=[])),
    "widths above one": ("amoeba.json", lambda v: v.update(widths=[2])),
    "neurons in multiples of nothing": ("amoeba.json", lambda v: v.update(multiple=0)),
    "selection of another model": ("selection.json", lambda v: v.update(base_digest="sha256:0")),
    "selection of more blocks": ("selection.json", lambda v: v.update(blocks=99)),
    "a block kept twice": ("selection.json", lambda v: v["depth"]["2"].update(kept=[1, 1])),
    "a block that is not there": ("selection.json", lambda v: v["depth"]["2"].update(kept=[1, 99])),
    "no full depth": ("selection.json", lambda v: v["depth"].pop("4")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(
    refuse: Refuse, checkpoint: Checkpoint, damage: str
) -> None:
    name, edit = DAMAGE[damage]
    change(checkpoint.path / name, edit)
    assert str(checkpoint.path) in refuse(2, "export", checkpoint.path, *SEARCH)


QUALITY_DAMAGE: dict[str, Callable[[Any], object]] = {
    "no loss": lambda rows: rows[0].pop("loss"),
    "a loss that is no number": lambda rows: rows[0].update(loss=float("nan")),
    "a width above one": lambda rows: rows[0].update(width=7),
    "a depth that is text": lambda rows: rows[0].update(depth="12"),
    "no rows": lambda rows: rows.clear(),
}


@pytest.mark.parametrize("damage", QUALITY_DAMAGE)
def test_a_damaged_quality_is_refused_by_the_name_of_its_file(refuse: Refuse, sharded: Path, damage: str) -> None:
    change(sharded / "quality.json", lambda value: QUALITY_DAMAGE[damage](value["rows"]))
    assert "quality.json" in refuse(2, "export", sharded, *SEARCH)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "[" * 100_000], ids=["empty", "half", "list", "number", "deep"]
)
@pytest.mark.parametrize("name", ["amoeba.json", "selection.json", "base/config.json"])
def test_a_file_that_is_no_json_object_is_named(
    refuse: Refuse, checkpoint: Checkpoint, name: str, content: str
) -> None:
    (checkpoint.path / name).write_text(content)
    assert Path(name).name in refuse(2, "export", checkpoint.path, *SEARCH)


def test_truncated_scores_are_named(refuse: Refuse, checkpoint: Checkpoint) -> None:
    os.truncate(checkpoint.path / "selection.safetensors", 1000)
    assert "selection.safetensors" in refuse(2, "export", checkpoint.path, *SEARCH)


# Texts and questions


def test_a_calibration_text_that_is_too_short_is_answered_with_its_tokens(
    refuse: Refuse, demo: Checkpoint, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Where does Mirel live?")
    tokens = len(demo.model.tokenizer().encode(text.read_text(), add_special_tokens=False).ids)
    said = refuse(2, "select", demo.model.path, "--calibration", text, "--samples", 4, "--sequence", 64)
    assert f"has {tokens} tokens where 256 are needed" in said


def test_a_missing_calibration_text_is_named(refuse: Refuse, demo: Checkpoint, tmp_path: Path) -> None:
    assert "gone.txt" in refuse(2, "select", demo.model.path, "--calibration", tmp_path / "gone.txt")


QUESTION = '{"question": "Where does Mirel live?", "choices": ["Kowick", "Tarn"], "gold": 0}\n'


@pytest.mark.parametrize(
    "line",
    [
        "Where does Mirel live?",
        "[]",
        '{"question": "Where?", "gold": 0}',
        '{"question": "Where?", "choices": ["here", "there"], "gold": 2}',
        '{"question": "Where?", "choices": ["here", "there"], "gold": "0"}',
        '{"question": "Where?", "choices": ["here", ""], "gold": 0}',
    ],
)
def test_a_bad_question_is_refused_by_its_line(demo: Checkpoint, tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(QUESTION * 2 + line + "\n" + QUESTION)
    said = sentence(amoeba("evaluate", demo.model.path, "--tasks", file, "--quiet"), 2)
    assert "questions.jsonl, line 3" in said


# Latency tables


def table(file: Path, digest: str, **changes: Any) -> Path:
    """A latency table with one row, in which entries may be changed."""
    row = {"flow": "onnx", "precision": "int4", "depth": 4, "width": 1.0, "policy": "uniform"}
    row |= {"batch": 1, "prompt": 64, "tokens": 32, "ttft_ms": 2.0, "tpot_ms": 1.0, "p10": 1.0, "p90": 1.0}
    row |= {"repeats": 9, "peak_memory_bytes": 1000, "artifact_bytes": 1000}
    row = {key: value for key, value in (row | changes).items() if value is not None}
    head = {"format": "amoeba.latency-table/1", "device": "orin-nx", "architecture": digest}
    file.write_text(json.dumps(head | {"rows": [row]}))
    return file


def with_table(checkpoint: Checkpoint, file: Path) -> tuple[object, ...]:
    """The arguments of an export that reads a table."""
    return ("export", checkpoint.path, *SEARCH, *SHORT, "--table", file)


def test_a_table_of_another_architecture_is_refused(refuse: Refuse, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = table(tmp_path / "table.json", "0" * 64)
    assert "another model architecture" in refuse(2, *with_table(checkpoint, file))


def test_a_table_of_another_device_is_refused(refuse: Refuse, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = table(tmp_path / "table.json", checkpoint.architecture.digest)
    change(file, lambda value: value.update(device="rtx-4090"))
    assert "rtx-4090" in refuse(2, *with_table(checkpoint, file))


@pytest.mark.parametrize(
    "changes",
    [
        {"tpot_ms": None},
        {"tpot_ms": 0},
        {"tpot_ms": -1},
        {"tpot_ms": "fast"},
        {"tpot_ms": float("nan")},
        {"tpot_ms": float("inf")},
        {"peak_memory_bytes": -1},
        {"depth": 0},
        {"depth": "4"},
        {"width": 2},
        {"width": "wide"},
        {"batch": 0},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_corrupted_row_is_refused_by_the_name_of_its_table(
    refuse: Refuse, checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    file = table(tmp_path / "table.json", checkpoint.architecture.digest, **changes)
    assert "table.json" in refuse(2, *with_table(checkpoint, file))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "amoeba.latency-table/2"}'])
def test_a_file_that_is_no_table_is_named(refuse: Refuse, checkpoint: Checkpoint, tmp_path: Path, content: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(content)
    assert "table.json" in refuse(2, *with_table(checkpoint, file))


# Toolchains


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow ``onnx`` as an installation sees it that lacks one of its packages."""
    monkeypatch.setattr(onnx_flow, "_PACKAGES", ("onnx", "a-runtime-that-is-not-installed"))


@pytest.mark.usefixtures("without_onnx")
def test_a_missing_toolchain_is_answered_with_the_command_that_installs_it(refuse: Refuse) -> None:
    said = refuse(6, "export", *SEARCH, "--flow", "onnx")
    assert "a-runtime-that-is-not-installed" in said
    assert "pip install 'amoeba-deploy[onnx]'" in said


@pytest.mark.usefixtures("without_onnx")
def test_profile_answers_a_missing_toolchain_in_the_same_way(refuse: Refuse) -> None:
    assert "pip install 'amoeba-deploy[onnx]'" in refuse(6, "profile", "--flow", "onnx")


@pytest.mark.usefixtures("without_onnx")
def test_search_passes_over_a_flow_whose_toolchain_is_missing_and_says_so() -> None:
    found = json.loads(amoeba("search", *SEARCH, "--json").stdout)
    assert (found["flow"], found["precision"]) == ("torch", "bf16")
    assert any("a-runtime-that-is-not-installed" in remark for remark in found["remarks"])


# Outputs


def export(checkpoint: Checkpoint, output: Path, *more: object) -> Result:
    """Build a small bundle."""
    return amoeba("export", checkpoint.path, *SEARCH, *SHORT, *TORCH, "--shape", "2x1", "--quiet", "-o", output, *more)


def test_an_existing_output_is_kept_unless_forced(checkpoint: Checkpoint, outputs: Path) -> None:
    (outputs / "bundle").mkdir()
    (outputs / "bundle" / "mine.txt").write_text("mine")
    assert "--force" in sentence(export(checkpoint, outputs / "bundle"), 2)
    assert [file.name for file in (outputs / "bundle").iterdir()] == ["mine.txt"]


def test_an_existing_output_is_replaced_whole_when_forced(checkpoint: Checkpoint, outputs: Path) -> None:
    assert export(checkpoint, outputs / "bundle").exit_code == 0
    (outputs / "bundle" / "mine.txt").write_text("mine")
    assert export(checkpoint, outputs / "bundle", "--force").exit_code == 0
    assert [file.name for file in outputs.iterdir()] == ["bundle"]
    assert not (outputs / "bundle" / "mine.txt").exists()
    assert amoeba("bundle", "verify", outputs / "bundle").exit_code == 0


def test_a_forced_output_stays_as_it_was_when_the_command_fails(
    checkpoint: Checkpoint, outputs: Path, tmp_path: Path
) -> None:
    (outputs / "made").mkdir()
    (outputs / "made" / "amoeba.json").write_text("mine")
    create = ("checkpoint", "create", checkpoint.model.path, "--selection", tmp_path, "-o", outputs / "made")
    assert "selection.json" in sentence(amoeba(*create, "--force"), 2)
    assert [file.name for file in outputs.rglob("*")] == ["made", "amoeba.json"]


def test_force_never_replaces_a_folder_that_somebody_else_wrote(checkpoint: Checkpoint, outputs: Path) -> None:
    (outputs / "photos").mkdir()
    (outputs / "photos" / "mine.txt").write_text("mine")
    assert "was not written by amoeba" in sentence(export(checkpoint, outputs / "photos", "--force"), 2)
    assert (outputs / "photos" / "mine.txt").read_text() == "mine"
    (outputs / "empty").mkdir()
    assert export(checkpoint, outputs / "empty", "--force").exit_code == 0


def test_an_output_below_a_file_is_refused(checkpoint: Checkpoint, outputs: Path) -> None:
    (outputs / "file").write_text("mine")
    assert "cannot be written" in sentence(export(checkpoint, outputs / "file" / "bundle"), 2)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_is_not_replaced_by_a_folder(checkpoint: Checkpoint, outputs: Path, force: tuple[str, ...]) -> None:
    (outputs / "file").write_text("mine")
    assert "file" in sentence(export(checkpoint, outputs / "file", *force), 2)
    assert (outputs / "file").read_text() == "mine"


def test_an_engine_outside_its_tolerance_is_not_bundled(
    refuse: Refuse, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_flow.OnnxBackend, "tolerance", lambda *_: 0.0)
    said = refuse(5, "export", checkpoint.path, *SEARCH, *SHORT, "--flow", "onnx", "--precision", "int8")
    assert "the onnx engine in int8 is wrong" in said


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("flow", [TORCH, ("--flow", "onnx", "--precision", "int8")], ids=["torch", "onnx"])
def test_a_full_disk_is_named_and_left_as_it_was(
    checkpoint: Checkpoint, tiny_disk: Path, flow: tuple[str, ...]
) -> None:
    result = amoeba("export", checkpoint.path, *SEARCH, *SHORT, *flow, "--quiet", "-o", tiny_disk / "bundle")
    assert "No space left" in sentence(result, 2)
    assert list(tiny_disk.iterdir()) == []


# Processes


class Started:
    """The command line as a process of its own, with its own folder for temporary files."""

    def __init__(self, folder: Path, *arguments: object, **options: Any) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "amoeba_deploy", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            # A shell's background jobs ignore interrupts, and so would what they start.
            **{"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | options,
        )

    def wait_for(self, folder: Path, pattern: str) -> None:
        """Wait until a path appears in a folder; the process must still run then."""
        while not any(folder.glob(pattern)):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err


def demo_export(output: Path) -> tuple[object, ...]:
    """The arguments of an export that takes a few seconds."""
    return ("export", *SEARCH, "--flow", "onnx", "--precision", "fp32", "--quiet", "-o", output)


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (signal.SIGINT, "model-00001-of-00002.safetensors"),
        (signal.SIGINT, "genai_config.json"),
        (signal.SIGTERM, "genai_config.json"),
    ],
)
def test_an_interrupted_export_leaves_nothing(outputs: Path, tmp_path: Path, number: int, written: str) -> None:
    started = Started(tmp_path, *demo_export(outputs / "bundle"))
    started.wait_for(outputs, f".bundle.*.part/engine/{written}")
    started.process.send_signal(number)
    status, out, err = started.finish()
    # Where the interrupt fell into Python code that a C extension was running, CPython ends the process by SIGINT
    # afterwards, although the exception was handled.
    assert (status in (1, -signal.SIGINT), out) == (True, ""), err
    assert err.splitlines() == ["amoeba: interrupted; nothing was left under the output's name"]
    assert list(outputs.iterdir()) == []
    # An interrupt in the instant in which a temporary folder is made may leave that folder, empty.
    assert [path for path in started.temporary.rglob("*") if path.is_file()] == []


def test_an_interrupted_selection_leaves_nothing(outputs: Path, tmp_path: Path, demo: Checkpoint) -> None:
    text = demo.path.parent / "validation.txt"
    command = ("select", demo.model.path, "--calibration", text, "--quiet", "-o", outputs / "selection")
    started = Started(tmp_path, *command)
    started.wait_for(outputs, ".selection.*.part")
    time.sleep(1)
    started.process.send_signal(signal.SIGINT)
    status, out, err = started.finish()
    # As above: an interrupt inside a C extension's Python code ends the process by SIGINT.
    assert (status in (1, -signal.SIGINT), out) == (True, ""), err
    assert err.splitlines() == ["amoeba: interrupted; nothing was left under the output's name"]
    assert list(outputs.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_its_name_and_can_be_repeated(outputs: Path, tmp_path: Path) -> None:
    started = Started(tmp_path, *demo_export(outputs / "bundle"))
    started.wait_for(outputs, ".bundle.*.part/engine/model-00001-of-00002.safetensors")
    started.process.kill()
    started.finish()
    assert not (outputs / "bundle").exists()
    assert amoeba(*demo_export(outputs / "bundle"), "--no-verify").exit_code == 0


def test_a_write_that_the_system_refuses_leaves_nothing(checkpoint: Checkpoint, outputs: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = ("export", checkpoint.path, *SEARCH, *SHORT, *TORCH, "--quiet", "-o", outputs / "bundle")
    status, out, err = Started(tmp_path, *command, preexec_fn=limit).finish()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert str(outputs / "bundle") in err
    assert list(outputs.iterdir()) == []


def test_a_reader_that_stops_early_is_no_failure_of_ours() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "amoeba_deploy", "devices"]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert found.stderr == ""


# Tracebacks


def test_debug_shows_the_traceback_of_an_expected_failure(tmp_path: Path) -> None:
    result = amoeba("--debug", "export", tmp_path / "gone", *SEARCH)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("amoeba: ")


def test_an_unexpected_failure_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ArithmeticError("two and two are five")

    monkeypatch.setattr("amoeba_deploy.profiles.device.device_names", broken)
    assert "two and two are five" in sentence(amoeba("devices"), 1)


def test_debug_shows_the_traceback_of_an_unexpected_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ArithmeticError("two and two are five")

    monkeypatch.setattr("amoeba_deploy.profiles.device.device_names", broken)
    assert "in broken" in amoeba("--debug", "devices").stderr


@pytest.mark.parametrize("inside", ["", "base"])
def test_force_never_replaces_a_folder_that_the_command_reads(checkpoint: Checkpoint, inside: str) -> None:
    output = checkpoint.path / inside
    before = {file: file.read_bytes() for file in checkpoint.path.rglob("*") if file.is_file()}
    result = amoeba("extract", checkpoint.path, "--shape", "2x0.67", "-o", output, "--force")
    assert "which this command needs" in sentence(result, 2)
    assert {file: file.read_bytes() for file in checkpoint.path.rglob("*") if file.is_file()} == before


def test_force_never_replaces_the_working_folder(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.chdir(home / "work")
    for output in (".", ".."):
        result = amoeba("extract", checkpoint.path, "--shape", "2x0.67", "-o", output, "--force")
        assert "which this command needs" in sentence(result, 2)
    assert (home / "work").is_dir()
