"""Completion in shells: the scripts as each shell runs them, and the values of options; --version as JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from conftest import amoeba, sentence

import amoeba_deploy
from amoeba_deploy.backends import flow_names as known_flows
from amoeba_deploy.cli import main
from amoeba_deploy.commands import completion
from amoeba_deploy.profiles.device import device_names

ENGINES = {"torch", "transformers", "onnx", "onnxruntime", "openvino", "executorch", "llama_cpp", "safetensors"}
Complete = Callable[..., list[str]]

BASH = """
eval "$(amoeba completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_amoeba_completion amoeba 2> errors
printf '%s\\n' "${COMPREPLY[@]}"
"""
# What the completion system would do with its answers is stood in for by printing them.
ZSH = """
compdef() { : }
compadd() { print -rl -- $completions }
_describe() { print -rl -- ${completions_with_descriptions%%:*} }
eval "$(amoeba completion zsh)"
words=("$@")
CURRENT=$#
_amoeba_completion
"""
FISH = """
amoeba completion fish | source
complete -C "$argv" | string replace -r '\\t.*' ''
true
"""
STARTS = {
    "bash": ("bash", "--norc", "-c", BASH, "bash"),
    "zsh": ("zsh", "-f", "-c", ZSH, "zsh"),
    "fish": ("fish", "-N"),
}


def run(folder: Path, *command: str) -> str:
    """Standard output of a command that has this installation's amoeba on its path, and a home of its own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=STARTS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Complete:
    """What a real shell offers for the last of some words."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")

    def ask(*words: str) -> list[str]:
        if shell == "fish":
            (tmp_path / "ask.fish").write_text(FISH)
            return run(tmp_path, *STARTS[shell], str(tmp_path / "ask.fish"), " ".join(words)).split()
        return run(tmp_path, *STARTS[shell], *words).split()

    return ask


def offered(*words: str) -> list[str]:
    """What click offers for the last of some words, asked in this process."""
    found = click.shell_completion.ShellComplete(main, {}, "amoeba", completion.VARIABLE)
    return [item.value for item in found.get_completions(list(words[:-1]), words[-1])]


# Shells


def test_a_shell_completes_commands(complete: Complete) -> None:
    assert complete("amoeba", "do") == ["doctor"]


def test_a_shell_completes_devices(complete: Complete) -> None:
    found = complete("amoeba", "export", "--device", "orin-na")
    assert found == [name for name in device_names() if name.startswith("orin-na")] != []


def test_a_shell_completes_the_second_of_several_flows(complete: Complete) -> None:
    assert complete("amoeba", "export", "--flow", "onnx,g") == ["onnx,gguf"]


def test_a_shell_completes_the_targets_of_the_project(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "amoeba.toml").write_text("[targets.kiosk]\n[targets.shelf]\n[targets.kitchen]\n")
    assert complete("amoeba", "build", "--target", "ki") == ["kiosk", "kitchen"]


def test_a_shell_completes_a_command_where_a_path_could_stand(complete: Complete) -> None:
    assert complete("amoeba", "profile", "ki") == ["kit"]


def test_a_broken_project_completes_to_nothing(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "amoeba.toml").write_text("[targets\n")
    assert complete("amoeba", "build", "--target", "ki") == []


def test_bash_reads_the_script_whole(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(amoeba("completion", "bash").stdout)
    run(tmp_path, "bash", "-n", "script")


# Values


@pytest.mark.parametrize("command", [("doctor",), ("export",), ("search",), ("profile",), ("profile", "import")])
def test_every_flow_is_offered_and_nothing_else(command: tuple[str, ...]) -> None:
    assert offered(*command, "--flow", "") == list(known_flows())


def test_flows_of_other_packages_are_offered_too(tmp_path: Path) -> None:
    metadata = tmp_path / "other_engine-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[amoeba_deploy.backends]\nother = other_engine:BACKEND\n")
    script = "from amoeba_deploy.commands.completion import flow_names; print(*flow_names(None))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*known_flows(), "other"]


def test_a_flow_that_was_named_is_not_offered_again() -> None:
    found = offered("export", "--flow", "onnx,gguf,")
    assert "onnx,gguf,torch" in found
    assert {each.rpartition(",")[2] for each in found} == set(known_flows()) - {"onnx", "gguf"}


@pytest.mark.parametrize("command", [("export",), ("search",), ("init",), ("extract",), ("profile", "kit")])
def test_every_device_is_offered(command: tuple[str, ...]) -> None:
    assert offered(*command, "--device", "") == list(device_names())


def test_devices_completes_its_argument() -> None:
    assert offered("devices", "h") == [name for name in device_names() if name.startswith("h")]


def test_targets_are_those_of_the_file_that_config_names(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[targets.shelf]\n")
    assert offered("build", "--config", str(tmp_path / "other.toml"), "--target", "") == ["shelf"]


@pytest.mark.parametrize("text", [None, "targets = 3\n", "", "\udcff"])
def test_a_file_without_targets_offers_none(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "amoeba.toml"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert offered("build", "--config", str(file), "--target", "") == []


def test_completing_values_changes_no_value() -> None:
    assert "did you mean 'onnx'?" in sentence(amoeba("doctor", "--flow", "onx"), 2)


def test_completing_flows_imports_no_engine_and_no_numpy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from click.shell_completion import ShellComplete\n"
        "from amoeba_deploy.cli import main\n"
        "for option in ('--flow', '--device', '--target'):\n"
        "    command = 'build' if option == '--target' else 'export'\n"
        "    ShellComplete(main, {}, 'amoeba', '').get_completions([command, option], '')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    assert {*run(tmp_path, sys.executable, "-c", script).split()} & {*ENGINES, "numpy", "pydantic"} == set()


def test_an_unknown_shell_is_refused() -> None:
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in sentence(amoeba("completion", "tcsh"), 2)


# --version


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_version_as_json_is_one_object_whatever_the_order(arguments: tuple[str, ...]) -> None:
    result = amoeba(*arguments)
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["amoeba-deploy"] == amoeba_deploy.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found["engines"]) == set(known_flows())
    assert found["engines"]["torch"]["torch"] == found["packages"]["torch"]
    assert "click" in found["packages"] and "pytest" not in found["packages"]


def test_version_alone_stays_one_line() -> None:
    assert amoeba("--version").stdout == f"amoeba, version {amoeba_deploy.__version__}\n"


@pytest.mark.parametrize("arguments", [("--json",), ("--json", "devices"), ("--debug", "--json", "devices")])
def test_json_before_a_command_is_refused_with_where_it_belongs(arguments: tuple[str, ...]) -> None:
    assert "'amoeba devices --json'" in sentence(amoeba(*arguments), 2)


def test_version_as_json_imports_no_engine(tmp_path: Path) -> None:
    script = (
        "import contextlib, io, sys\n"
        "from amoeba_deploy.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['--version', '--json'])\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    assert {*run(tmp_path, sys.executable, "-c", script).split()} & ENGINES == set()
