"""Kits: a folder measures on an interpreter without torch, survives whatever ends it, and becomes a latency table."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import amoeba, sentence
from kits import SHORT, bare_python, environment, imported, lines, results, start, written

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.kit.form import read_kit
from amoeba_deploy.profiles.kit.results import read_results
from amoeba_deploy.profiles.table import Table, read_table

PI = "raspberry-pi-5"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device's interpreter."""
    return bare_python(tmp_path_factory.mktemp("device") / "venv")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of two small shapes in one precision; tests take copies."""
    return written(tmp_path_factory.mktemp("kits") / "kit", "--precision", "int8", shapes="6x0.5,7x0.5")


@pytest.fixture(scope="module")
def run_once(python: Path, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kit after a run to the end; tests that change it take copies."""
    kit = Path(shutil.copytree(original, tmp_path_factory.mktemp("run") / "kit"))
    done = start(python, kit)
    assert done.returncode == 0, done.stderr
    return kit


@pytest.fixture
def kit(original: Path, tmp_path: Path) -> Path:
    """A kit of a test's own."""
    return Path(shutil.copytree(original, tmp_path / "kit"))


@pytest.fixture
def done(run_once: Path, tmp_path: Path) -> Path:
    """A kit of a test's own that was run."""
    return Path(shutil.copytree(run_once, tmp_path / "kit"))


# On the device


def test_the_interpreter_of_these_tests_has_numpy_and_the_engine_alone(python: Path) -> None:
    script = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    names = ("torch", "transformers", "click", "onnx", "psutil", "tokenizers", "amoeba_deploy", "numpy", "onnxruntime")
    found = subprocess.run(
        [python, "-c", script, *names], capture_output=True, text=True, check=True, env=environment(), cwd="/"
    )
    assert found.stdout.strip() == "['numpy', 'onnxruntime']"


def test_a_kit_measures_without_our_stack_and_its_table_is_searched(run_once: Path, tmp_path: Path) -> None:
    file = tmp_path / "pi.json"
    told = imported(run_once, file, PI, "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["rows"] == 2
    table = read_table(file)
    for row in table.rows:
        mine = [line for line in lines(run_once, "run") if line["item"] == f"onnx-int8-{row.depth}x0.5"]
        assert row.repeats == len(mine) >= 3
        # Numbers are rounded to a tenth of a microsecond in tables.
        assert row.ttft_ms == pytest.approx(1e3 * np.median([line["first_s"] for line in mine]), abs=1e-4)
        middles = [np.median(line["steps_s"]) for line in mine]
        assert row.tpot_ms == pytest.approx(1e3 * np.median(middles), abs=1e-4)
        assert row.stopped in ("budget", "confident")
        assert row.peak_memory_bytes > 20e6  # an interpreter with numpy alone takes that
        assert row.context == 64
    asked = ("--flow", "onnx", "--precision", "int8", "--prompt", 8, "--tokens", 4, "--context", 64)
    found = amoeba("search", "--device", PI, *asked, "--latency", "10s", "--table", file, "--json")
    assert found.exit_code == 0, found.output
    (best,) = (c for c in json.loads(found.stdout)["pareto"] if (c["depth"], c["width"]) == (6, 0.5))
    assert best["source"] == "measured"
    # Rounded to a microsecond in answers.
    assert best["tpot_ms"] == pytest.approx(next(row.tpot_ms for row in table.rows if row.depth == 6), abs=6e-4)


def test_the_head_and_the_session_say_what_was_measured_where(run_once: Path) -> None:
    head, session = lines(run_once)[0], lines(run_once, "session")[0]
    assert head["device"] == PI
    assert head["workload"] == {"batch": 1, "prompt": 8, "tokens": 4}
    assert {item["id"] for item in head["items"]} == {"onnx-int8-6x0.5", "onnx-int8-7x0.5"}
    assert set(session["engines"]) == {"onnxruntime"}
    assert session["machine"]["cores"] >= 1
    assert "load" in session["conditions"]


def test_every_round_runs_each_engine_once_in_an_order_of_its_own(run_once: Path) -> None:
    order = [line["item"] for line in lines(run_once, "run")]
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order) - 1, 2)][:3]
    assert all(len(set(each)) == 2 for each in rounds)


def test_a_kit_carries_code_that_python_3_9_reads_and_no_more_of_the_package(original: Path) -> None:
    files = sorted((original / "package").rglob("*.py"))
    for file in [*files, original / "run.py"]:
        ast.parse(file.read_text(), feature_version=(3, 9))
    names = {file.relative_to(original / "package" / "amoeba_deploy").parts[0] for file in files}
    assert not names & {"commands", "stage1", "stage2", "pictures", "demo"}
    assert {file.name for file in (original / "package/amoeba_deploy/backends").iterdir()} >= {"onnx", "backend.py"}


# What ends a run


def until(condition: Any) -> None:
    """Wait for something that another process does."""
    while not condition():
        time.sleep(0.02)


def test_a_run_that_was_killed_goes_on_where_it_was(python: Path, kit: Path) -> None:
    command = [str(python), str(kit / "run.py"), "--budget", "600"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True)
    until(lambda: results(kit).is_file() and len(lines_so_far(kit)) >= 6)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    with results(kit).open("ab") as stream:
        stream.write(b'{"record":"run","item":"onnx-int8-6x0.5","first_s":9')
    before = results(kit).read_bytes().rpartition(b"\n")[0] + b"\n"
    done = start(python, kit)
    assert done.returncode == 0, done.stderr
    after = results(kit).read_bytes()
    assert after.startswith(before)
    assert read_results(results(kit)).sessions[1]["record"] == "session"
    runs = sum(b'"record":"run"' in line for line in before.splitlines())
    assert runs >= 3
    assert len(lines(kit, "run")) >= runs


def lines_so_far(kit: Path) -> list[bytes]:
    """The whole lines of a file that is being written."""
    return results(kit).read_bytes().split(b"\n")[:-1]


def test_a_runner_that_was_killed_takes_its_worker_with_it(python: Path, kit: Path) -> None:
    command = [str(python), str(kit / "run.py"), "--budget", "600"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
    until(lambda: results(kit).is_file() and len(lines_so_far(kit)) >= 4)
    running.kill()
    running.wait()
    again = start(python, kit, "--budget", 1)  # waits for the worker's lock, which ends with it
    assert again.returncode == 0, again.stderr


def test_a_finished_kit_is_not_measured_again_unless_told(python: Path, done: Path) -> None:
    before = len(lines(done, "run"))
    assert start(python, done).returncode == 0
    assert len(lines(done, "run")) == before
    assert start(python, done, "--redo", "onnx-int8-6x0.5").returncode == 0
    fresh = lines(done, "run")[before:]
    assert {line["item"] for line in fresh} == {"onnx-int8-6x0.5"}
    state = read_results(results(done)).states["onnx-int8-6x0.5"]
    assert len(state.runs) == len(fresh)
    unknown = start(python, done, "--redo", "nothing")
    assert unknown.returncode == 2
    assert "has no item 'nothing'" in unknown.stderr


CRASHING = """
import importlib, os, sys
here = os.path.dirname(__file__)
sys.path.remove(here)
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")
sys.path.insert(0, here)
session = real.InferenceSession
def opened(source, *arguments, **options):
    if "7x0.5" in str(source):
        os.abort()
    return session(source, *arguments, **options)
real.InferenceSession = opened
"""


def test_an_engine_that_ends_its_process_fails_alone_and_import_says_so(
    python: Path, kit: Path, tmp_path: Path
) -> None:
    (tmp_path / "before" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "before" / "onnxruntime" / "__init__.py").write_text(
        CRASHING.replace("os.path.dirname(__file__)", "os.path.dirname(os.path.dirname(__file__))")
    )
    done = start(python, kit, PYTHONPATH=str(tmp_path / "before"))
    assert done.returncode == 1
    assert "1 of 2 items failed" in done.stderr
    assert "SIGABRT" in lines(kit, "failed")[0]["error"]
    told = imported(kit, tmp_path / "pi.json")
    assert told.exit_code == 0, told.output
    assert "onnx int8 7x0.5 gave no row: its process ended with SIGABRT" in told.stderr
    assert [row.depth for row in read_table(tmp_path / "pi.json").rows] == [6]
    # What failed stays failed, until it is asked for again.
    assert start(python, kit).returncode == 1
    assert start(python, kit, "--redo", "onnx-int8-7x0.5").returncode == 0


def test_an_engine_whose_package_is_missing_is_tried_again_by_the_next_start(
    python: Path, kit: Path, tmp_path: Path
) -> None:
    bare = bare_python(tmp_path / "bare")
    site = next((tmp_path / "bare" / "lib").glob("python3.*/site-packages"))
    for entry in site.glob("onnxruntime*"):
        entry.unlink()
    done = start(bare, kit)
    assert done.returncode == 6
    assert "pip install onnxruntime" in done.stderr
    assert start(python, kit).returncode == 0


# What is refused


def test_a_changed_artefact_is_refused_before_anything_is_measured(python: Path, kit: Path) -> None:
    weights = kit / "artefacts" / "onnx-int8-6x0.5" / "weights.int8.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = start(python, kit)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].endswith(
        "weights.int8.safetensors: is not the file that the kit was written with; copy the kit again"
    )
    assert not results(kit).exists()


def test_changed_code_is_refused(python: Path, kit: Path) -> None:
    file = kit / "package" / "amoeba_deploy" / "errors.py"
    file.write_text(file.read_text() + "\n")
    assert start(python, kit).returncode == 5


def test_a_kit_refuses_the_results_of_another(python: Path, done: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", "--precision", "int8", shapes="6x0.5")
    shutil.copytree(done / "results", other / "results")
    refused = start(python, other)
    assert refused.returncode == 2
    assert "holds the results of another kit" in refused.stderr
    assert "holds the results of another kit" in sentence(imported(other, tmp_path / "pi.json"), 2)


def test_results_of_another_device_or_architecture_are_refused(
    run_once: Path, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    assert f"is of a kit for '{PI}', not for 'orin-nx'" in sentence(
        imported(run_once, tmp_path / "t.json", "orin-nx"), 2
    )
    told = imported(run_once, tmp_path / "t.json", PI, "--checkpoint", checkpoint.path)
    assert "another model architecture" in sentence(told, 2)
    assert not (tmp_path / "t.json").exists()


def test_results_are_read_up_to_their_last_whole_line(run_once: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(run_once / "results", folder)
    file = folder / "results.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b'"record":"memory"') + 20])
    whole = read_results(file)
    assert sum(state.measured for state in whole.states.values()) == 1
    told = imported(folder, tmp_path / "pi.json")
    assert told.exit_code == 0, told.output
    assert "not finished; run the kit again" in told.stderr
    assert len(read_table(tmp_path / "pi.json").rows) == 1
    damaged = content.splitlines(keepends=True)
    damaged[2] = b"{}\n"
    file.write_bytes(b"".join(damaged))
    with pytest.raises(BadInput, match="line 3 is not one of a kit's results"):
        read_results(file)


@pytest.mark.parametrize("damage", ["items", "files", "workload", "sizes", "device"])
def test_a_kit_file_that_lacks_an_entry_is_refused(python: Path, kit: Path, damage: str) -> None:
    value = json.loads((kit / "kit.json").read_text())
    del value[damage]
    (kit / "kit.json").write_text(json.dumps(value))
    refused = start(python, kit)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("run.py: ")


def test_a_kit_file_that_names_files_outside_is_refused(kit: Path) -> None:
    value = json.loads((kit / "kit.json").read_text())
    value["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (kit / "kit.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match="holds one that cannot be"):
        read_kit(kit)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--flow", "onnx"), "needs --device"),
        (("--device", PI, "--flow", "onnx", "--precision", "bf16"), "refuses the shape"),
        (("--device", PI, "--flow", "onnx", "--precision", "w4a16"), "has the precision w4a16"),
        (("--device", PI, "--flow", "onnx", "--shapes", "99x1"), "99"),
        (("--device", "nothing", "--flow", "onnx"), "is not a device"),
        (("--device", PI, "--flow", "onnx", "--on", "host"), "is no address"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    assert said in sentence(amoeba("profile", "kit", *options, "-o", tmp_path / "kit"), 2)
    assert not list(tmp_path.glob("*kit*"))


def test_a_kit_is_not_written_over(kit: Path) -> None:
    asked = ("--device", PI, "--flow", "onnx", "--precision", "int8", "--shapes", "6x0.5", *SHORT, "-o", kit)
    assert "exists already" in sentence(amoeba("profile", "kit", *asked), 2)
    assert amoeba("profile", "kit", *asked, "--force").exit_code == 0
    assert len(read_kit(kit).items) == 1


# From a config alone


def test_a_kit_of_a_config_has_random_weights_and_the_architecture_of_the_model(
    python: Path, demo: Checkpoint, tmp_path: Path
) -> None:
    config = demo.model.path / "config.json"
    kit = written(tmp_path / "kit", "--config", config, "--precision", "fp32", shapes="6x0.5")
    head = json.loads((kit / "kit.json").read_text())
    assert head["weights"] == "random"
    assert head["architecture"] == demo.architecture.digest
    assert start(python, kit).returncode == 0
    table = imported_table(kit, tmp_path / "pi.json")
    assert table.architecture_digest == demo.architecture.digest
    assert len(table.rows) == 1
    both = amoeba(
        "profile", "kit", demo.path, "--config", config, "--device", PI, "--flow", "onnx", "-o", tmp_path / "k"
    )
    assert "give one of them" in sentence(both, 2)


def imported_table(kit: Path, file: Path) -> Table:
    """The table of a kit's results."""
    told = imported(kit, file)
    assert told.exit_code == 0, told.output
    return read_table(file)


# Engines that only their own tools measure


def tool(folder: Path, name: str, script: str) -> str:
    """A command of an engine, in a folder that goes in front of the PATH; returns that PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/usr/bin/env python3\n" + script)
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


LLAMA_BENCH = """
import json, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
assert open(given["-m"], "rb").read(4) == b"GGUF"
common = {"model_filename": given["-m"], "model_type": "llama", "build_number": 1, "n_threads": 2}
prompt, tokens = int(given["-p"]), int(given["-n"])
tests = [
    {**common, "n_prompt": prompt, "n_gen": 0, "n_depth": 0, "samples_ns": [8000000, 9000000, 7000000]},
    {**common, "n_prompt": 0, "n_gen": tokens, "n_depth": prompt, "samples_ns": [4000000, 6000000, 5000000]},
]
print(json.dumps(tests))
"""


def test_llama_bench_stands_in_where_llama_cpp_python_is_missing(python: Path, tmp_path: Path) -> None:
    kit = written(tmp_path / "kit", "--precision", "fp32", shapes="6x0.5", flow="gguf")
    without = start(python, kit)
    assert without.returncode == 6
    assert "llama-cpp-python" in without.stderr
    done = start(python, kit, PATH=tool(tmp_path / "bin", "llama-bench", LLAMA_BENCH))
    assert done.returncode == 0, done.stderr
    (row,) = imported_table(kit, tmp_path / "pi.json").rows
    assert (row.ttft_ms, row.tpot_ms, row.repeats) == (8.0, 1.25, 3)
    assert row.peak_memory_bytes > 0
    report = kit / "results" / "reports" / "gguf-fp32-6x0.5.json"
    report.write_text(report.read_text() + " ")
    assert "is not the report that the kit kept" in sentence(imported(kit, tmp_path / "other.json"), 2)


TRTLLM_BENCH = """
import json, os, sys
words = sys.argv[1:]
assert os.path.isfile("engine/config.json")
assert words[words.index("--model") + 1] == "engine"
if "prepare-dataset" in words:
    assert words[words.index("--input-mean") + 1] == "8"
    open(words[words.index("--output") + 1], "w").write("{}")
else:
    assert os.path.isfile(words[words.index("--dataset") + 1])
    streaming = {"ttft_percentiles": {"p50": 8.0, "p90": 9.0, "average": 8.2},
                 "tpot_percentiles": {"p50": 2.0, "p90": 3.0, "average": 2.1}}
    report = {"engine": {"version": "1.0"}, "world_info": {"tp_size": 1, "max_batch_size": 1},
              "performance": {}, "request_info": {"num_requests": 64, "avg_num_concurrent_requests": 1.0},
              "streaming_metrics": streaming}
    open(words[words.index("--report_json") + 1], "w").write(json.dumps(report))
"""


def test_an_engine_of_tensorrt_llm_is_measured_by_its_own_command(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    more = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 32}
    config.write_text(json.dumps({**sizes, **more, "max_position_embeddings": 128, "dtype": "float16"}))
    kit = tmp_path / "kit"
    asked = ("--config", config, "--device", "a100-80", "--flow", "tensorrt-llm", "--precision", "fp16")
    done = amoeba("profile", "kit", *asked, "--shapes", "2x1", *SHORT, "-o", kit)
    assert done.exit_code == 0, done.output
    assert start(python, kit).returncode == 6
    ran = start(python, kit, PATH=tool(tmp_path / "bin", "trtllm-bench", TRTLLM_BENCH))
    assert ran.returncode == 0, ran.stderr
    table = tmp_path / "table.json"
    told = imported(kit, table, "a100-80")
    assert told.exit_code == 0, told.output
    (row,) = read_table(table).rows
    assert (row.ttft_ms, row.tpot_ms, row.p90, row.repeats) == (8.0, 2.0, 3.0, 64)
