"""amoeba doctor: what it finds in whole, bare and broken installations, and the commands that it names."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba, sentence
from fake_backends import Fake, offer, offer_fake, point

import amoeba_deploy
from amoeba_deploy import doctor
from amoeba_deploy.backends import flow_names
from amoeba_deploy.installation import grouped, plain, requirements

ROOT = Path(__file__).parent.parent
GB = 10**9
Bare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without GPUs and with room on its disks, whatever this one has."""
    places = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(place for place in places if not Path(place, "nvidia-smi").exists()))
    monkeypatch.setattr(doctor, "_by_library", list)
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    for name in ("_TEGRA", "_BOARD", "_GPU_FILE"):
        monkeypatch.setattr(doctor, name, tmp_path / "nothing")


def examined(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What ``doctor --json`` prints."""
    result = amoeba("doctor", "--json", *arguments)
    assert result.exit_code == code, result.output
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def tool(folder: Path, name: str, script: str) -> Path:
    """A program of that name, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return folder


# A whole installation


def test_everything_is_found_where_everything_is_installed() -> None:
    found = examined()
    assert set(found["flows"]) == set(flow_names())
    assert found["installation"]["amoeba-deploy"]["version"] == amoeba_deploy.__version__
    assert found["installation"]["torch"]["version"] == version("torch")
    assert found["flows"]["onnx"]["builds"] and found["flows"]["onnx"]["runs"]
    assert found["flows"]["onnx"]["versions"] == {name: version(name) for name in ("onnx", "onnxruntime")}
    assert found["machine"]["system"]["cores"] >= 1 and found["machine"]["memory"]["bytes"] > GB / 2
    assert found["problems"] == []


def test_an_engine_that_only_its_own_tools_run_builds_and_says_so() -> None:
    found = examined()["flows"]["tensorrt-llm"]
    assert (found["builds"], found["runs"], found["state"]) == (True, False, "ok")
    assert "NVIDIA" in found["cannot_run"] and found["cannot_run"] in found["said"]


def test_people_get_one_aligned_line_for_each_finding() -> None:
    result = amoeba("doctor")
    assert result.exit_code == 0
    *lines, last = result.stdout.splitlines()
    found = examined()
    kinds = ("installation", "machine", "cache", "flows", "extras")
    assert len(lines) == sum(len(found[kind]) for kind in kinds)
    (column,) = {re.match(r"(.*?) {2,}(ok|missing|problem) +", line).end() for line in lines}  # type: ignore[union-attr]
    assert all(line[column] != " " for line in lines)
    assert re.fullmatch(r"0 problems, \d+ not installed", last)


def test_a_flow_that_can_build_passes_and_an_unknown_one_is_bad_input() -> None:
    assert "onnx" in examined("--flow", "onnx", "--flow", "torch")["flows"]
    assert "did you mean 'onnx'?" in sentence(amoeba("doctor", "--flow", "onx"), 2)


def test_nothing_of_an_engine_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from amoeba_deploy.doctor import examine\n"
        "examine()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    engines = {"torch", "transformers", "onnx", "onnxruntime", "openvino", "executorch", "llama_cpp", "safetensors"}
    assert {*done.stdout.split()} & engines == set()


# Bare installations


def closure(packages: Iterable[str]) -> set[str]:
    """Some packages with all that they need, as far as it is installed."""
    found: set[str] = set()
    todo = [plain(package) for package in packages]
    while todo:
        name = todo.pop()
        try:
            needs = grouped(distribution(name).requires or [])[""]
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            todo += needs
    return found


def link(package: str, folder: Path) -> None:
    """Links to all that a package of this environment installed into its site-packages."""
    found = distribution(package)
    for part in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
        source, target = Path(str(found.locate_file(part))), folder / part
        if source.exists() and not target.exists() and not part.endswith(".pth") and part != "__pycache__":
            target.symlink_to(source.resolve())


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    """Run the command where only the base packages and some others are installed."""

    def run(*arguments: str, packages: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        for name in closure([*requirements()[""], *packages]):
            link(name, site)
        link("amoeba-deploy", site)
        (site / "amoeba_deploy").unlink(missing_ok=True)
        (site / "amoeba_deploy").symlink_to(Path(amoeba_deploy.__file__).parent)
        start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from amoeba_deploy.cli import main; main()"
        command = [sys.executable, "-S", "-c", start, str(site), *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_base_installation_has_no_torch_and_says_how_to_get_it(bare: Bare) -> None:
    done = bare("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["installation"]["torch"]["state"] == "missing"
    assert "pip install 'amoeba-deploy[build]'" in found["installation"]["torch"]["todo"]
    assert found["extras"]["build"]["missing"] == sorted(requirements()["build"] - closure(requirements()[""]))
    assert not any(flow["builds"] for flow in found["flows"].values())
    assert not [name for name in found["problems"] if name.startswith(("installation", "flows", "extras"))]


@pytest.mark.parametrize(
    ("flow", "command"),
    [
        ("onnx", "pip install 'amoeba-deploy[onnx]'"),
        ("torch", "pip install 'amoeba-deploy[build]'"),
        ("tensorrt-llm", "pip install 'amoeba-deploy[build]'"),
        ("mlc-llm", "pip install 'amoeba-deploy[build]' and pip install --pre -f https://mlc.ai/wheels"),
    ],
)
def test_a_flow_that_cannot_build_fails_with_the_command_that_helps(bare: Bare, flow: str, command: str) -> None:
    done = bare("doctor", "--flow", flow, "--json")
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert line.startswith("amoeba: 1 of 1 flows cannot build here; ") and f"; run {command}" in line
    assert json.loads(done.stdout)["flows"][flow]["install"].startswith(command)


def test_every_command_of_a_base_installation_names_extras_that_exist(bare: Bare) -> None:
    done = bare("doctor")
    named = set(re.findall(r"amoeba-deploy\[([^\]]*)\]", done.stdout))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"build", "deliver", "onnx", "plot", "device-onnx"} <= named <= set(extras)


def test_a_device_runs_an_engine_that_it_cannot_build(bare: Bare) -> None:
    found = json.loads(bare("doctor", "--json", packages=["onnxruntime", "tokenizers"]).stdout)
    assert (found["flows"]["onnx"]["builds"], found["flows"]["onnx"]["runs"]) == (False, True)
    assert "runs: onnxruntime" in found["flows"]["onnx"]["said"]
    assert found["flows"]["gguf"]["runs"] is False


def test_an_engine_without_what_runs_it_names_the_extra_of_devices(bare: Bare) -> None:
    found = json.loads(bare("doctor", "--json", packages=["onnxruntime"]).stdout)["flows"]["onnx"]
    assert found["cannot_run"] == "tokenizers is not installed; run pip install 'amoeba-deploy[device-onnx]'"


def test_the_runtime_for_gpus_stands_for_the_other(bare: Bare, tmp_path: Path) -> None:
    metadata = tmp_path / "site" / "onnxruntime_gpu-1.32.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.32.0\n")
    found = json.loads(bare("doctor", "--json", packages=["tokenizers"]).stdout)["flows"]["onnx"]
    assert found["runs"] and found["versions"] == {"onnxruntime-gpu": "1.32.0"}


def test_a_folder_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", dict)
    found = examined()
    assert found["problems"] == ["installation.amoeba-deploy"]
    assert f"run pip install {ROOT}" == found["installation"]["amoeba-deploy"]["todo"]
    assert set(found["flows"]) == set(flow_names()) and found["flows"]["onnx"]["runs"]


def test_extras_hold_what_they_name_each_other_for() -> None:
    lines = [
        "click>=8",
        "Torch_Vision>=2 ; extra == 'a'",
        "amoeba-deploy[a,c]; extra == 'b'",
        "amoeba_deploy[b] ; extra == 'c'",
        "one[x]>=1; (sys_platform == 'plan9') and extra == 'a'",
        f"two; (sys_platform == '{sys.platform}') and extra == \"c\"",
    ]
    everything = frozenset({"torch-vision", "two"})
    assert grouped(lines) == {"": {"click"}, "a": {"torch-vision"}, "b": everything, "c": everything}


def test_every_extra_is_an_engines_or_told_of() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    engines = {name for name in extras if name in flow_names() or name.startswith("device")}
    assert extras - engines - {"all", "test", "lint", "docs"} == set(doctor.EXTRAS)


# Flows


def test_a_missing_toolchain_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_fake(monkeypatch, "fake", missing=("fake-compiler",))
    found = examined("--flow", "onnx")["flows"]["fake"]
    assert (found["state"], found["builds"]) == ("missing", False)
    assert found["todo"] == "run pip install fake-runtime"
    result = amoeba("doctor", "--flow", "fake", "--flow", "onnx")
    assert result.exit_code == 6
    assert "1 of 2 flows cannot build here; fake: " in result.stderr and "lacks fake-compiler" in result.stderr


def test_why_an_engine_does_not_run_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_fake(monkeypatch, "fake", reason="the processor has no such instructions")
    found = examined("--flow", "fake")["flows"]["fake"]
    assert (found["builds"], found["runs"]) == (True, False)
    assert "does not run here: the processor has no such instructions" in found["said"]


def test_a_compiler_that_is_missing_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = examined()["flows"]["torch-compile"]
    assert (found["builds"], found["runs"]) == (True, False)
    assert "install it" in found["cannot_run"]


def test_a_flow_of_another_package_that_cannot_be_loaded_is_a_problem_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise ImportError("no module named gone")

    offer(monkeypatch, point("broken", load))
    found = examined()
    assert found["problems"] == ["flows.broken"]
    assert "no module named gone" in found["flows"]["broken"]["said"] and found["flows"]["broken"]["todo"]
    assert found["flows"]["onnx"]["builds"]
    examined("--flow", "broken", code=6)


def test_a_flow_that_fails_when_asked_is_a_problem_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Fake):
        def toolchain(self) -> Any:
            raise RuntimeError("who knows")

    offer(monkeypatch, point("failing", lambda: Failing("failing")))
    found = examined()
    assert found["problems"] == ["flows.failing"]
    assert "who knows" in found["flows"]["failing"]["said"]
    assert "failing" not in json.loads(amoeba("--version", "--json").stdout)["engines"]


# GPUs


def smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put an nvidia-smi first on the path."""
    monkeypatch.setenv("PATH", f"{tool(folder, 'nvidia-smi', script)}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_told_with_driver_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(monkeypatch, tmp_path / "bin", "echo 'NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB'; echo 'Orin, 1.0, [N/A]'")
    found = examined()
    assert found["machine"]["gpu"]["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "driver": "580.65.06", "memory": "81559 MiB"},
        {"name": "Orin", "driver": "1.0"},
    ]
    assert found["machine"]["gpu"]["state"] == "ok"


def test_a_torch_for_cpus_beside_a_gpu_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(monkeypatch, tmp_path / "bin", "echo 'NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB'")
    monkeypatch.setattr(doctor, "installed", lambda name: "2.13.0+cpu" if name == "torch" else version(name))
    found = examined()["installation"]["torch"]
    assert found["state"] == "missing" and "computes on the CPU alone" in found["said"]
    monkeypatch.setattr(doctor, "installed", lambda name: "2.13.0+cu130" if name == "torch" else version(name))
    assert examined()["installation"]["torch"]["state"] == "ok"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not reach the driver'; exit 9", "could not reach the driver"),
        ("echo >&2 gone; exit 1", "gone"),
        ("exit 3", "nvidia-smi ended with 3"),
        ("exec sleep 60", "nvidia-smi failed (TimeoutExpired)"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    smi(monkeypatch, tmp_path / "bin", script)
    monkeypatch.setattr(doctor, "TOOL_SECONDS", 0.2 if "sleep" in script else 60)
    found = examined()
    assert found["problems"] == ["machine.gpu"]
    assert said in found["machine"]["gpu"]["said"] and "driver" in found["machine"]["gpu"]["todo"]


@pytest.mark.parametrize("script", ["true", "echo nonsense", "printf '\\377\\376\\n'"])
def test_an_answer_without_gpus_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    smi(monkeypatch, tmp_path / "bin", script)
    assert examined()["machine"]["gpu"]["said"] == "none of NVIDIA's"


def test_a_gpu_without_a_driver_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "_GPU_FILE", tmp_path / "nvidia0")
    assert examined()["problems"] == ["machine.gpu"]


def test_a_jetson_is_told_by_its_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tegra").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    monkeypatch.setattr(doctor, "_TEGRA", tmp_path / "tegra")
    assert examined()["machine"]["gpu"]["gpus"] == [{"name": "Jetson", "system": "R36 (release), REVISION: 4.3"}]
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    monkeypatch.setattr(doctor, "_BOARD", tmp_path / "model")
    (found,) = examined()["machine"]["gpu"]["gpus"]
    assert found["name"] == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


# Memory and the cache


@pytest.mark.parametrize(("text", "limit"), [("2000000000\n", 2 * GB), ("max\n", None), (f"{10**18}\n", None)])
def test_the_memory_limit_of_a_container_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, limit: int | None
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(doctor, "_MEMORY_LIMIT", tmp_path / "memory.max")
    found = examined()["machine"]["memory"]
    assert found["limit_bytes"] == limit
    assert ("this container may use 2.0 GB" in found["said"]) == (limit is not None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that does not exist yet."""
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("AMOEBA_CACHE", str(folder))
    return folder


def test_a_cache_that_does_not_exist_is_tried_and_not_made(cache: Path) -> None:
    found = examined()["cache"]["cache"]
    assert (found["path"], found["locks"], found["links"], found["state"]) == (str(cache), True, True, "ok")
    assert not cache.parent.exists()


def test_the_sizes_of_the_cache_are_told_and_nothing_in_it_changes(cache: Path) -> None:
    (cache / "tables").mkdir(parents=True)
    (cache / "builds" / "bundles" / "x").mkdir(parents=True)
    (cache / "tables" / "one.json").write_bytes(b"x" * 1000)
    (cache / "builds" / "bundles" / "x" / "model").write_bytes(b"x" * 5_000_000)
    (cache / "builds" / "gone").symlink_to("nowhere")
    before = sorted(cache.rglob("*"))
    found = examined()["cache"]["cache"]
    assert found["bytes"]["tables"] == 1000 and found["bytes"]["builds"] == 5_000_000
    assert "builds 5.0 MB" in found["said"]
    assert sorted(cache.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_a_problem(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    found = examined()
    assert found["problems"] == ["cache.cache"]
    assert "cannot be written" in found["cache"]["cache"]["said"]
    assert "AMOEBA_CACHE" in found["cache"]["cache"]["todo"]


@pytest.mark.parametrize("answer", [None, OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_a_problem(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: OSError | None
) -> None:
    def flock(*_arguments: Any) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(fcntl, "flock", flock)
    found = examined()
    assert found["problems"] == ["cache.cache"]
    assert found["cache"]["cache"]["said"] == f"{cache}: locks do not work on its file system"
    assert not cache.exists()


def test_a_file_system_without_links_is_a_problem(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert examined()["cache"]["cache"]["said"] == f"{cache}: links do not work on its file system"


def test_a_disk_with_little_room_is_a_problem_and_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 10**18)
    found = examined()
    assert found["problems"] == ["cache.cache", "cache.temporary"]
    assert "amoeba cache prune" in found["cache"]["cache"]["todo"]
    assert "TMPDIR" in found["cache"]["temporary"]["todo"]


def test_a_machine_without_a_folder_for_temporary_files_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", refuse)
    assert doctor.temporary().state == "problem"
    assert "TMPDIR" in doctor.temporary().todo


def test_every_missing_module_is_named_with_the_extra_that_brings_it() -> None:
    from amoeba_deploy.installation import extra_of

    known = {"torch": "build", "yaml": "build", "OpenSSL": "deliver", "onnx": "onnx", "gguf": "gguf", "pymoo": "search"}
    assert {module: extra_of(module) for module in known} == known
    assert extra_of("model_signing.signing") == "deliver"
    assert extra_of("no_such_module") is None


def test_a_command_that_lacks_a_package_says_which_extra_has_it(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from amoeba_deploy.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 2000)
    command = [sys.executable, "-c", script, "evaluate", "--text", str(text)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "this needs torch, which is not installed; run pip install 'amoeba-deploy[build]'" in done.stderr
