"""Finishing a bundle: the steps that are left run where they belong, and a failed one leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from conftest import amoeba, sentence
from fake_backends import finishing, offer_fake

from amoeba_deploy.backends.backend import Step, Where
from amoeba_deploy.bundle import finish_bundle, read_manifest, verify_files
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError, VerificationFailed

ROOT = Path(__file__).parent.parent


@pytest.fixture
def unfinished(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose engine is compiled on its device."""
    offer_fake(monkeypatch, "tensorrt-llm", steps=(finishing(),))
    target = ("--device", "orin-nx", "--prompt", 64, "--flow", "tensorrt-llm", "--precision", "fp32", "--shape", "2x1")
    done = amoeba("export", checkpoint.path, *target, "-o", tmp_path / "bundle", "--quiet")
    assert done.exit_code == 0, done.output
    return tmp_path / "bundle"


def test_running_a_bundle_with_steps_left_names_them_and_what_to_do(unfinished: Path) -> None:
    said = sentence(amoeba("run", unfinished, "-p", "x", "--quiet"), 6)
    assert f"amoeba bundle finish {unfinished}" in said
    assert "compile the engine: " in said


def test_verifying_a_bundle_with_steps_left_says_why_the_self_test_did_not_run(unfinished: Path) -> None:
    result = amoeba("bundle", "verify", unfinished, "--quiet")
    assert result.exit_code == 0, result.output
    assert "files intact, self-test not run: its engine is not finished" in result.stdout
    found = json.loads(amoeba("bundle", "verify", unfinished, "--quiet", "--json").stdout)
    assert found["selftest_tokens"] is None and "compile the engine: " in found["not_run"]


def test_finishing_runs_the_steps_and_lists_what_they_made(unfinished: Path) -> None:
    result = amoeba("bundle", "finish", unfinished)
    assert result.exit_code == 0, result.output
    assert "1 steps run" in result.stdout
    assert "compile the engine: " in result.stderr
    manifest = read_manifest(unfinished)
    assert manifest["steps"] == []
    assert [step["does"] for step in manifest["finished"]] == ["compile the engine"]
    assert "engine/finished.bin" in manifest["files"]
    assert amoeba("bundle", "verify", unfinished, "--quiet").exit_code == 0
    assert "nothing left to do" in amoeba("bundle", "finish", unfinished).stdout


def test_a_step_that_fails_leaves_the_bundle_as_it_was(unfinished: Path) -> None:
    before = (unfinished / "manifest.json").read_bytes()

    def fail(_step: object) -> None:
        (unfinished / "engine" / "half.bin").write_text("half")
        raise AmoebaError("out of memory")

    with pytest.raises(AmoebaError, match="out of memory"):
        finish_bundle(unfinished, fail)
    assert (unfinished / "manifest.json").read_bytes() == before
    verify_files(unfinished)


def test_what_a_failed_step_made_is_removed_whatever_it_is(unfinished: Path) -> None:
    before = set(unfinished.rglob("*"))

    def fail(_step: object) -> None:
        (unfinished / "engine" / "deep" / "empty").mkdir(parents=True)
        (unfinished / "deep" / "full").mkdir(parents=True)
        (unfinished / "deep" / "full" / "half.bin").write_text("half")
        (unfinished / "link").symlink_to("manifest.json")
        (unfinished / "deep" / "folder").symlink_to(unfinished / "engine")
        raise AmoebaError("out of memory")

    with pytest.raises(AmoebaError, match="out of memory"):
        finish_bundle(unfinished, fail)
    assert set(unfinished.rglob("*")) == before
    verify_files(unfinished)


def test_a_step_that_makes_a_link_has_failed(unfinished: Path) -> None:
    with pytest.raises(VerificationFailed, match="link: is a link, which a bundle does not hold"):
        finish_bundle(unfinished, lambda _: (unfinished / "link").symlink_to("manifest.json"))
    assert len(read_manifest(unfinished)["steps"]) == 1
    verify_files(unfinished)


# On two machines


def writing(name: str, where: Where) -> Step:
    """A step that writes a file into a bundle's folder."""
    return Step(f"make {name}", ("a-maker", name), f"the maker of {name}", where)


@pytest.fixture
def parted(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for sm_87 of which a host does two steps, and the device the last; the tool of all is on the PATH."""
    (tool := tmp_path / "bin" / "a-maker").parent.mkdir()
    tool.write_text('#!/bin/sh\ntest "$1" != "$SPOILED" && mkdir made-$1 && echo $1 > made-$1/file\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    steps = (writing("quantised", "host"), writing("onnx", "host"), writing("engines", "device"))
    offer_fake(monkeypatch, "tensorrt-llm", steps=steps)
    target = ("--device", "orin-nx", "--prompt", 64, "--flow", "tensorrt-llm", "--precision", "fp32", "--shape", "2x1")
    done = amoeba("export", checkpoint.path, *target, "-o", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert "step 2 on a host (needs the maker of onnx), make onnx:" in done.stdout
    assert "step 3 on the device (needs the maker of engines)" in done.stdout
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["identity"]["chip"] = "sm_87"
    file.write_text(json.dumps(manifest))
    jsonschema.validate(manifest, json.loads((ROOT / "docs/schemas/manifest.schema.json").read_text()))
    return tmp_path / "bundle"


def left(bundle: Path) -> tuple[list[str], list[str]]:
    """What steps of a bundle do: of those that were run, and of those that are left."""
    manifest = read_manifest(bundle)
    done, still = ([step["does"] for step in manifest.get(key, [])] for key in ("finished", "steps"))
    return done, still


def test_a_host_runs_its_steps_and_the_device_the_rest(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on a host and then on the device" in sentence(amoeba("run", parted, "-p", "x", "--quiet"), 6)
    done = amoeba("bundle", "finish", parted)
    assert done.exit_code == 0, done.output
    assert "2 steps run, 1 left for the device: copy the bundle there" in done.stdout
    assert left(parted) == (["make quantised", "make onnx"], ["make engines"])
    assert "made-onnx/file" in verify_files(parted)["files"]
    assert "was built for sm_87, and this machine is" in sentence(amoeba("bundle", "finish", parted, "--quiet"), 2)
    monkeypatch.setattr("amoeba_deploy.bundle.own_chips", lambda: ("aarch64", "sm_87"))
    done = amoeba("bundle", "finish", parted, "--json")
    assert json.loads(done.stdout) == {"path": str(parted), "steps": 1, "left": 0}
    assert left(parted) == (["make quantised", "make onnx", "make engines"], [])
    jsonschema.validate(read_manifest(parted), json.loads((ROOT / "docs/schemas/manifest.schema.json").read_text()))
    verify_files(parted)


def test_a_device_does_not_begin_with_a_hosts_steps(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amoeba_deploy.bundle.own_chips", lambda: ("aarch64", "sm_87"))
    said = sentence(amoeba("bundle", "finish", parted, "--quiet"), 6)
    assert "the step to make quantised is not for the device" in said
    assert "on the maker of quantised first, and copy the bundle here" in said
    assert left(parted)[0] == []


def test_a_step_that_is_done_stays_done_where_a_later_one_fails(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOILED", "onnx")
    assert "the step to make onnx failed" in sentence(amoeba("bundle", "finish", parted, "--quiet"), 1)
    assert left(parted) == (["make quantised"], ["make onnx", "make engines"])
    assert "made-quantised/file" in verify_files(parted)["files"]
    monkeypatch.delenv("SPOILED")
    assert amoeba("bundle", "finish", parted).exit_code == 0
    assert left(parted) == (["make quantised", "make onnx"], ["make engines"])


def test_a_damaged_bundle_is_not_finished(unfinished: Path) -> None:
    (unfinished / "selftest.json").write_text("{}")
    assert "selftest.json" in sentence(amoeba("bundle", "finish", unfinished, "--quiet"), 5)
