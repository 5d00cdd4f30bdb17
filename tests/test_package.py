"""The package as users get it: what the archives hold, that an installed wheel works anywhere, and starts lightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import amoeba_deploy

ROOT = Path(__file__).parent.parent
LINKS = ("backends", "profiles", "cli.py")
"""Links at the top of the repository that point into the package."""
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "numpy", "safetensors", "tokenizers"}


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the Python path of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from that archive alone."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("archives are built from the repository only")
    folder = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    """The wheel."""
    (file,) = archives.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    """The paths inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source_files(archives: Path) -> set[str]:
    """The paths inside the source archive, without its one top folder."""
    (file,) = archives.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        members = archive.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    return {member.name.partition("/")[2] for member in members}


def package_files() -> set[str]:
    """All files of the package in the repository that belong in an archive, relative to the repository."""
    files = (file for file in (ROOT / "amoeba_deploy").rglob("*") if file.is_file())
    return {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}


def top(names: set[str]) -> set[str]:
    """The first part of every path."""
    return {name.partition("/")[0] for name in names}


# Archives


def test_the_wheel_holds_the_package_and_nothing_else_at_its_top(wheel_files: set[str]) -> None:
    assert top(wheel_files) == {"amoeba_deploy", f"amoeba_deploy-{amoeba_deploy.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package_once(wheel_files: set[str]) -> None:
    assert {name for name in wheel_files if name.startswith("amoeba_deploy/")} == package_files()


def test_the_source_archive_holds_no_link_of_the_repositorys_top(source_files: set[str]) -> None:
    assert top(source_files).isdisjoint(LINKS)


def test_the_source_archive_holds_every_file_of_the_package(source_files: set[str]) -> None:
    assert {name for name in source_files if name.startswith("amoeba_deploy/")} == package_files()


def test_the_source_archive_holds_what_building_and_testing_need(source_files: set[str]) -> None:
    assert source_files >= {"pyproject.toml", "Makefile", "README.md", "LICENSE", "tests/test_package.py"}


@pytest.mark.parametrize(
    "name",
    [
        "amoeba_deploy/py.typed",
        "amoeba_deploy/extraction/modeling_amoeba.py",
        "amoeba_deploy/profiles/devices/orin-nx.toml",
        "amoeba_deploy/demo/checkpoint/amoeba.json",
        "amoeba_deploy/demo/checkpoint/selection.json",
        "amoeba_deploy/demo/checkpoint/selection.safetensors",
        "amoeba_deploy/demo/checkpoint/quality.json",
        "amoeba_deploy/demo/checkpoint/base/config.json",
        "amoeba_deploy/demo/checkpoint/base/tokenizer.json",
        "amoeba_deploy/demo/checkpoint/base/model.safetensors.index.json",
    ],
)
def test_data_files_are_in_both_archives(wheel_files: set[str], source_files: set[str], name: str) -> None:
    assert name in wheel_files
    assert name in source_files


def test_every_shard_of_the_embedded_model_is_in_the_wheel(wheel: Path, wheel_files: set[str]) -> None:
    base = "amoeba_deploy/demo/checkpoint/base/"
    with zipfile.ZipFile(wheel) as archive:
        index = json.loads(archive.read(base + "model.safetensors.index.json"))
    assert {base + shard for shard in index["weight_map"].values()} <= wheel_files


def test_no_file_of_the_package_is_a_pickle(wheel_files: set[str]) -> None:
    assert not any(Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".npy", ".npz") for name in wheel_files)


def test_the_wheels_metadata_have_the_packages_version_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"amoeba_deploy-{amoeba_deploy.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {amoeba_deploy.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_everything_that_the_install_hints_name_is_an_extra_of_the_package() -> None:
    from amoeba_deploy.backends import flow_names, load_backend

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    hints = " ".join(load_backend(flow).toolchain().install for flow in flow_names())
    named = {part.partition("]")[0] for part in hints.split("amoeba-deploy[")[1:]}
    assert named <= set(extras)


# An installed wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment with the wheel in it; dependencies come from the environment of this test."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    scripts = folder / "bin"
    command = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"]
    run(*command, "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file's folders come after the environment's own, and path files inside of them are not followed: an
    # editable install of the repository stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return scripts


def test_an_installed_package_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    found = run(installed / "python", "-c", "import amoeba_deploy; print(amoeba_deploy.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)


def test_an_installed_command_tells_its_version(installed: Path, tmp_path: Path) -> None:
    assert amoeba_deploy.__version__ in run(installed / "amoeba", "--version", cwd=tmp_path)


def test_the_package_runs_as_a_module_too(installed: Path, tmp_path: Path) -> None:
    assert amoeba_deploy.__version__ in run(installed / "python", "-m", "amoeba_deploy", "--version", cwd=tmp_path)


def test_an_installed_command_knows_the_device_catalogue(installed: Path, tmp_path: Path) -> None:
    known = {
        device["name"] for device in json.loads(run(installed / "amoeba", "devices", "--json", cwd=tmp_path))["devices"]
    }
    assert known == {file.stem for file in (ROOT / "amoeba_deploy" / "profiles" / "devices").glob("*.toml")}


def test_an_installed_command_searches_the_embedded_checkpoint(installed: Path, tmp_path: Path) -> None:
    command = ("search", "--device", "orin-nx", "--latency", "40ms", "--json")
    found = json.loads(run(installed / "amoeba", *command, cwd=tmp_path))
    assert found["shape"] == {"depth": 12, "width": 1.0, "policy": "uniform"}


def test_an_installed_command_exports_and_runs_as_the_help_shows(installed: Path, tmp_path: Path) -> None:
    run(installed / "amoeba", "export", "--device", "orin-nx", "--latency", "40ms", "-o", "out", cwd=tmp_path)
    text = run(installed / "amoeba", "run", "out", "-p", "Once upon a time", "--tokens", 8, cwd=tmp_path)
    assert text.strip()


def test_commands_write_nothing_into_the_working_folder_unless_told_so(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    run(installed / "amoeba", "search", "--device", "orin-nx", "--latency", "40ms", cwd=folder)
    run(installed / "amoeba", "checkpoint", "verify", cwd=folder)
    assert list(folder.iterdir()) == []


# Starting


def imported(*arguments: str, cwd: Path) -> set[str]:
    """The top-level modules that a command of this installation has imported when it ends."""
    script = (
        "import contextlib, io, json, sys\n"
        "from amoeba_deploy.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    return set(json.loads(run(sys.executable, "-c", script, *arguments, cwd=cwd)))


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("export", "-h"), ("devices",), ("devices", "orin-nx")]
)
def test_help_and_the_catalogue_import_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert imported(*arguments, cwd=tmp_path) & HEAVY == set()


def test_a_search_imports_no_engine(tmp_path: Path) -> None:
    arguments = ("search", "--device", "orin-nx", "--latency", "40ms")
    engines = {"torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai"}
    assert imported(*arguments, cwd=tmp_path) & engines == set()
