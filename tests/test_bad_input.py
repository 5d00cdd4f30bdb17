"""What can go wrong around engines: each ends in one sentence that says what to do, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chatting import build_bundle
from conftest import amoeba, sentence
from fake_backends import offer_fake

from amoeba_deploy import export as exporting
from amoeba_deploy.backends.backend import Identity
from amoeba_deploy.bundle import foreign_to
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.files import write_json

TARGET = ("--device", "orin-nx", "--prompt", 64, "--quiet")


def change(file: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


# Bundles from elsewhere


@pytest.fixture
def bundle(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A bundle of the flow ``onnx``."""
    return build_bundle(checkpoint, "onnx", tmp_path / "bundle")


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (
        lambda identity: identity.update(bound=["onnxruntime"], versions={"onnxruntime": "0.1"}),
        "was built with onnxruntime 0.1, which is",
    ),
    "a package that is not here": (
        lambda identity: identity.update(bound=["acme"], versions={"acme": "7"}),
        "was built with acme 7, which is missing here",
    ),
    "another chip": (lambda identity: identity.update(chip="sm_87"), "was built for sm_87, and this machine is"),
}


@pytest.mark.parametrize("command", ["run", "bundle verify", "evaluate"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_bundle_of_another_version_or_chip_is_refused(bundle: Path, what: str, command: str) -> None:
    edit, said = FOREIGN[what]
    change(bundle / "manifest.json", lambda manifest: edit(manifest["identity"]))
    more = {"run": ("-p", "x"), "evaluate": ("--text", bundle / "manifest.json")}.get(command, ())
    found = sentence(amoeba(*command.split(), bundle, *more, "--quiet"), 2)
    assert f"{bundle}: its engine {said}" in found
    assert "build it again, or run it there" in found


def test_a_version_that_does_not_bind_may_differ(bundle: Path) -> None:
    change(bundle / "manifest.json", lambda manifest: manifest["identity"].update(versions={"onnxruntime": "0.1"}))
    (bundle / "provenance.json").unlink()  # it speaks of the manifest as it was
    assert amoeba("bundle", "verify", bundle, "--quiet").exit_code == 0


def test_the_identity_of_an_engine_that_was_built_here_is_valid_here() -> None:
    own = Identity("fp32", 1, 128, {"engine": "1.0"}, bound=("engine",), chip=os.uname().machine)
    assert foreign_to(own.to_json(), {"engine": "1.0"}) is None
    assert foreign_to(own.to_json(), {"engine": "1.0"}, ["riscv64", "sm_90"]) == (
        f"was built for {os.uname().machine}, and this machine is riscv64 with sm_90"
    )


def test_a_bundle_that_cannot_run_here_says_why(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = offer_fake(monkeypatch)
    made = build_bundle(checkpoint, "fake", tmp_path / "bundle")
    fake.reason = "it needs an accelerator"
    reason = "its fake engine cannot run here: it needs an accelerator"
    assert f"{made}: {reason}" in sentence(amoeba("run", made, "-p", "x", "--quiet"), 6)
    verified = amoeba("bundle", "verify", made, "--quiet")
    assert verified.exit_code == 0
    assert f"files intact, self-test not run: {reason}" in verified.stdout


# Shapes that an engine does not take


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """A flow that takes neurons in multiples of 64, and the options that name it."""
    offer_fake(monkeypatch, "tensorrt-llm", takes={"neuron_multiple": {"": 64}})
    return (*TARGET, "--flow", "tensorrt-llm", "--precision", "fp32")


def test_a_refused_plan_names_the_nearest_that_the_engine_takes(
    checkpoint: Checkpoint, tmp_path: Path, picky: tuple[object, ...]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(amoeba("extract", checkpoint.path, "--shape", "2x0.6", "--plan-only").stdout)
    assert len(json.loads(plan.read_text())["blocks"][0]["neurons"]) == 96
    output = tmp_path / "outputs" / "bundle"
    said = sentence(amoeba("export", checkpoint.path, *picky, "--shape", plan, "-o", output), 2)
    assert "a block keeps 96 neurons, where tensorrt-llm takes multiples of 64 in fp32" in said
    assert "the nearest that it takes is 2 key/value heads and 128 neurons" in said
    assert not output.parent.exists()


def test_a_shape_is_rounded_to_what_the_engine_takes(
    checkpoint: Checkpoint, tmp_path: Path, picky: tuple[object, ...]
) -> None:
    done = amoeba("export", checkpoint.path, *picky, "--shape", "2x0.6", "-o", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert len(manifest["plan"][0]["neurons"]) == 128


# Toolchains


def test_a_missing_toolchain_of_any_flow_ends_with_6_and_the_command_that_installs_it(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", missing=("fake-runtime",))
    for command in (("export", "--shape", "2x1", "-o", tmp_path / "bundle"), ("search", "--memory", "8GB")):
        said = sentence(amoeba(command[0], checkpoint.path, *TARGET, "--flow", "tensorrt-llm", *command[1:]), 6)
        assert "needs fake-runtime, which is not installed; run pip install tensorrt-llm-runtime" in said
    assert not (tmp_path / "bundle").exists()


# Disks and permissions

EXPORT = (*TARGET, "--flow", "onnx", "--precision", "int8", "--shape", "2x1")


def test_a_disk_that_fills_up_while_exporting_is_one_sentence_and_nothing_is_left(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        if path.name == exporting.MEASURED:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(exporting, "write_json", full)
    outputs = tmp_path / "outputs"
    said = sentence(amoeba("export", checkpoint.path, *EXPORT, "-o", outputs / "bundle"), 2)
    assert f"{outputs / 'bundle'}: was not written: No space left on device" in said
    assert "free some there, or choose another output" in said
    assert list(outputs.iterdir()) == []


def test_an_engine_that_reports_a_full_disk_in_its_own_words_is_understood(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm", broken=RuntimeError("basic_ios::clear: iostream error"))
    command = ("export", checkpoint.path, *TARGET, "--flow", "tensorrt-llm", "--precision", "bf16", "--shape", "2x1")
    assert "unexpected RuntimeError" in sentence(amoeba(*command, "-o", tmp_path / "outputs" / "bundle"), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=0))
    said = sentence(amoeba(*command, "-o", tmp_path / "outputs" / "bundle"), 2)
    assert "no space left" in said
    assert "iostream error" in said
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "check its permissions, or choose another path"),
        (errno.ENOENT, "check its name"),
        (errno.EIO, "look at its folder"),
    ],
)
def test_a_file_that_the_system_refuses_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number), "/somewhere/model.bin")

    monkeypatch.setattr("amoeba_deploy.profiles.device.device_names", refuse)
    assert sentence(amoeba("devices"), 2) == f"amoeba: {os.strerror(number)} at /somewhere/model.bin; {advice}"


def test_a_failure_of_the_system_without_a_file_is_unexpected(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("the driver is gone")

    monkeypatch.setattr("amoeba_deploy.profiles.device.device_names", refuse)
    assert "unexpected OSError: the driver is gone" in sentence(amoeba("devices"), 1)


@pytest.mark.parametrize("command", ["profile import", "bundle finish", "run", "export"])
def test_the_help_of_a_command_has_an_example(command: str) -> None:
    result = amoeba(*command.split(), "-h")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"  amoeba {command}" in result.stdout
