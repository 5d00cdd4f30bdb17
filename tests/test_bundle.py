"""Bundles: what ``export`` writes, that it is the same every time, that damage is found, and that it runs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba, sentence
from safetensors import safe_open

from amoeba_deploy.bundle import UNLISTED
from amoeba_deploy.checkpoint import Checkpoint

Exported = tuple[Path, dict[str, Any]]
PROMPT = "Question: Where does Mirel live? Answer:"
FLOWS = [("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int4")]
SHAPE = ("--shape", "6x0.75")


def export(output: Path, *options: object) -> dict[str, Any]:
    """Build a bundle of the checkpoint that ships in the package; returns what ``--json`` prints."""
    result = amoeba("export", "--device", "orin-nx", *options, "--json", "-o", output)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The bundle of the first command that the help shows, and what that command printed."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    return folder, export(folder, "--latency", "40ms")


@pytest.fixture(scope="module")
def printed(exported: Exported) -> dict[str, Any]:
    """What ``export --json`` printed."""
    return exported[1]


@pytest.fixture(scope="module")
def manifest(exported: Exported) -> dict[str, Any]:
    """The bundle's manifest."""
    return dict(json.loads((exported[0] / "manifest.json").read_text()))


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(exported[0], tmp_path / "bundle"))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, by its relative path."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def change(file: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file in place."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def list_again(folder: Path, name: str) -> None:
    """Enter a changed file into the manifest, as someone would who wants the change to pass unseen."""
    entry = {"sha256": digest(folder / name), "bytes": (folder / name).stat().st_size}
    change(folder / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


# What export prints


def test_the_first_preference_that_can_be_lowered_is_taken_and_earlier_ones_are_explained(
    printed: dict[str, Any],
) -> None:
    assert (printed["device"], printed["flow"], printed["precision"]) == ("orin-nx", "onnx", "int4")
    assert printed["remarks"][0].startswith("passed over tensorrt-llm int4: ")


def test_the_workload_and_the_budget_are_printed(printed: dict[str, Any]) -> None:
    assert printed["workload"] == {"batch": 1, "prompt": 128, "tokens": 32}
    assert (printed["budget"]["metric"], printed["budget"]["ms"]) == ("tpot", 40)


def test_the_visible_memory_of_the_device_is_a_budget_too(printed: dict[str, Any]) -> None:
    assert printed["budget"]["memory_bytes"] == 14_500_000_000


def test_the_shape_its_prediction_and_its_quality_are_printed(printed: dict[str, Any]) -> None:
    assert printed["shape"] == {"depth": 12, "width": 1.0, "policy": "uniform"}
    assert set(printed["predicted"]) >= {"tpot_ms", "ttft_ms", "memory_bytes", "source"}
    assert printed["predicted"]["source"] == "estimated"
    assert (printed["quality"]["metric"], printed["quality"]["source"]) == ("loss", "measured")


def test_every_shape_of_the_front_is_printed_with_everything_that_it_is_judged_by(printed: dict[str, Any]) -> None:
    wanted = {"depth", "width", "policy", "flow", "precision", "tpot_ms", "ttft_ms", "memory_bytes", "source"}
    assert len(printed["pareto"]) > 1
    for shape in printed["pareto"]:
        assert set(shape) >= wanted | {"quality"}
        assert set(shape["quality"]) >= {"metric", "value", "source"}


def test_the_bundle_is_printed(exported: Exported) -> None:
    assert exported[1]["bundle"] == str(exported[0])


def test_the_verification_is_printed(printed: dict[str, Any]) -> None:
    verified = printed["verified"]
    assert 0 <= verified["max_logit_error"] <= verified["tolerance"]
    assert verified["greedy_tokens_equal"] is True
    assert verified["measured_tpot_ms"] is None


def test_what_was_not_verified_is_null(tmp_path: Path) -> None:
    assert export(tmp_path / "bundle", *SHAPE, "--no-verify")["verified"] is None


def test_what_is_built_for_this_machine_is_measured_on_it(tmp_path: Path) -> None:
    profile = ("--flow", "onnx", "--precision", "int4", "--shapes", "6x0.75", "--repeats", 3)
    assert amoeba("profile", *profile, "--quiet").exit_code == 0
    command = ("--device", "local", "--flow", "onnx", *SHAPE, "--json", "-o", tmp_path / "bundle")
    result = amoeba("export", *command)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["predicted"]["source"] == "measured"
    assert printed["verified"]["measured_tpot_ms"] > 0


# What a bundle holds


def test_the_manifest_has_every_file_but_itself_and_the_measurements(
    exported: Exported, manifest: dict[str, Any]
) -> None:
    found = contents(exported[0])
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: value for name, value in found.items() if name not in UNLISTED
    }


def test_the_manifest_has_the_size_of_every_file(exported: Exported, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (exported[0] / name).stat().st_size


def test_the_manifest_says_what_was_built_from_what_and_by_what(manifest: dict[str, Any], demo: Checkpoint) -> None:
    assert manifest["format"] == "amoeba.bundle/1"
    assert manifest["checkpoint_digest"] == demo.digest
    assert manifest["base_digest"] == demo.model.digest
    assert set(manifest["engine_versions"]) == {"onnx", "onnxruntime"}
    assert manifest["tool"].startswith("amoeba-deploy ")
    assert manifest["steps"] == manifest["usage"] == []


def test_the_manifest_agrees_with_what_export_printed(manifest: dict[str, Any], printed: dict[str, Any]) -> None:
    for key in ("device", "flow", "precision", "workload", "budget", "shape", "predicted"):
        assert manifest[key] == printed[key]
    # How well losses are interpolated is of the checkpoint, not of what was built.
    assert manifest["quality"] == {name: printed["quality"][name] for name in ("metric", "value", "source")}


def test_the_manifest_names_the_units_that_were_kept(manifest: dict[str, Any]) -> None:
    assert [block["index"] for block in manifest["plan"]] == list(range(12))
    assert all(len(block["heads"]) == 8 and len(block["neurons"]) == 512 for block in manifest["plan"])


def test_dates_and_measurements_stand_in_a_file_of_their_own(exported: Exported) -> None:
    measured = json.loads((exported[0] / "measured.json").read_text())
    assert measured["format"] == "amoeba.measured/1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", measured["date"])
    dated = [f for f in contents(exported[0]) if measured["date"][:10].encode() in (exported[0] / f).read_bytes()]
    assert dated == ["measured.json"]


def test_the_self_test_holds_what_the_engine_gave_with_its_margins(exported: Exported) -> None:
    test = json.loads((exported[0] / "selftest.json").read_text())
    assert test["format"] == "amoeba.selftest/1"
    assert len(test["prompt"]) > 1
    assert len(test["tokens"]) == len(test["margins"]) == 32


def test_the_tokenizer_is_the_base_models(exported: Exported, demo: Checkpoint) -> None:
    for folder in (exported[0], exported[0] / "engine"):
        assert digest(folder / "tokenizer.json") == digest(demo.model.path / "tokenizer.json")


def test_tensors_are_held_as_safetensors_and_everything_else_as_text_or_graph(exported: Exported) -> None:
    kinds = {Path(name).suffix for name in contents(exported[0])}
    assert kinds == {".json", ".onnx", ".safetensors"}
    with safe_open(exported[0] / "engine" / "weights.int4.safetensors", "np") as tensors:
        assert len(list(tensors.keys())) > 0


def test_a_bundle_can_be_read_by_everyone(exported: Exported) -> None:
    assert exported[0].stat().st_mode & 0o777 == 0o755


# The same inputs, the same bytes


@pytest.mark.parametrize(("flow", "precision"), FLOWS)
def test_the_same_export_gives_the_same_bytes(tmp_path: Path, flow: str, precision: str) -> None:
    for name in ("one", "two"):
        export(tmp_path / name, "--flow", flow, "--precision", precision, *SHAPE, "--no-verify")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"measured.json"}


def test_verifying_changes_no_byte(exported: Exported, tmp_path: Path) -> None:
    export(tmp_path / "bundle", "--latency", "40ms")
    one, two = contents(exported[0]), contents(tmp_path / "bundle")
    assert {name for name in one | two if one.get(name) != two.get(name)} <= {"measured.json"}


# Verifying


def test_an_intact_bundle_is_verified(exported: Exported) -> None:
    result = amoeba("bundle", "verify", exported[0], "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["files"] == len(contents(exported[0]).keys() - UNLISTED)
    assert value["selftest_tokens"] > 0


def test_a_bundle_may_be_moved(bundle: Path, tmp_path: Path) -> None:
    bundle.rename(tmp_path / "elsewhere")
    assert amoeba("bundle", "verify", tmp_path / "elsewhere").exit_code == 0


def test_verifying_writes_nothing(bundle: Path) -> None:
    before = contents(bundle)
    amoeba("bundle", "verify", bundle)
    assert contents(bundle) == before


@pytest.mark.parametrize(
    "name",
    [
        "engine/weights.int4.safetensors",
        "engine/shared.int4.safetensors",
        "engine/model.onnx",
        "engine/config.json",
        "engine/genai_config.json",
        "engine/generation_config.json",
        "engine/subnet.json",
        "engine/tokenizer.json",
        "engine/tokenizer_config.json",
        "selftest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_one_changed_byte_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert name in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


@pytest.mark.parametrize("name", ["stray.txt", "engine/stray.txt", "engine/measured.json", "new/stray.txt", ".stray"])
def test_an_added_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("stray")
    assert name in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


@pytest.mark.parametrize("name", ["engine/weights.int4.safetensors", "selftest.json", "tokenizer.json"])
def test_a_removed_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert name in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


def test_a_file_that_became_a_link_is_found(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "link" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


def test_a_folder_that_became_a_link_is_found(bundle: Path, tmp_path: Path) -> None:
    (bundle / "engine").rename(tmp_path / "engine")
    (bundle / "engine").symlink_to(tmp_path / "engine")
    assert "link" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


def test_a_name_that_leads_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("outside")
    list_again(bundle, "../outside.txt")
    assert "outside.txt" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


def test_measurements_and_a_signature_are_outside_the_digests(bundle: Path) -> None:
    (bundle / "measured.json").unlink()
    (bundle / "model.sig").write_text("signature")
    assert amoeba("bundle", "verify", bundle, "--quiet").exit_code == 0


def test_wrong_tokens_are_found_although_their_digest_is_right(bundle: Path) -> None:
    change(bundle / "selftest.json", lambda test: test["tokens"].__setitem__(0, test["tokens"][0] ^ 1))
    list_again(bundle, "selftest.json")
    assert "step 0" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


def test_other_weights_are_found_although_their_digest_is_right(bundle: Path) -> None:
    weights = bundle / "engine" / "weights.int4.safetensors"
    data = bytearray(weights.read_bytes())
    start = len(data) // 2
    data[start:] = data[start:][::-1]
    weights.write_bytes(data)
    list_again(bundle, "engine/weights.int4.safetensors")
    assert "the engine gives token" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 5)


@pytest.mark.parametrize("name", ["manifest.json", "selftest.json"])
def test_another_version_of_a_format_is_refused(bundle: Path, name: str) -> None:
    change(bundle / name, lambda value: value.update(format=value["format"].replace("/1", "/2")))
    if name != "manifest.json":
        list_again(bundle, name)
    assert f"{name}: has format" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 2)


@pytest.mark.parametrize("key", ["files", "flow", "precision"])
def test_a_manifest_that_lacks_an_entry_is_refused(bundle: Path, key: str) -> None:
    change(bundle / "manifest.json", lambda manifest: manifest.pop(key))
    assert "manifest.json" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 2)


def test_a_manifest_of_an_unknown_precision_is_refused(bundle: Path) -> None:
    change(bundle / "manifest.json", lambda manifest: manifest.update(precision="int3"))
    assert "int3" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 2)


def test_a_bundle_of_a_flow_that_this_version_lacks_is_refused(bundle: Path) -> None:
    change(bundle / "manifest.json", lambda manifest: manifest.update(flow="tomorrow"))
    assert "'tomorrow' is not a flow" in sentence(amoeba("bundle", "verify", bundle, "--quiet"), 2)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert "is not a bundle" in sentence(amoeba("bundle", "verify", tmp_path, "--quiet"), 2)


# Running


def test_run_streams_text_and_tells_its_speed(exported: Exported) -> None:
    result = amoeba("run", exported[0], "-p", PROMPT, "--tokens", 16)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) > 1
    assert re.search(r"TTFT [\d.]+ ms, TPOT [\d.]+ ms \(measured\)", result.stderr)


def test_run_prints_one_json_object_with_the_same_text(exported: Exported) -> None:
    streamed = amoeba("run", exported[0], "-p", PROMPT, "--tokens", 16).stdout
    value = json.loads(amoeba("run", exported[0], "-p", PROMPT, "--tokens", 16, "--json").stdout)
    assert value["text"] + "\n" == streamed
    assert value["tokens"] == 16
    assert value["ttft_ms"] > 0
    assert value["tpot_ms"] > 0


def test_run_refuses_a_prompt_that_exceeds_the_context(exported: Exported, manifest: dict[str, Any]) -> None:
    said = sentence(amoeba("run", exported[0], "-p", PROMPT, "--tokens", manifest["context"], "--quiet"), 2)
    assert f"context of {manifest['context']}" in said


@pytest.fixture(scope="module", params=FLOWS, ids=" ".join)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A verified bundle of the same shape in each flow and precision."""
    flow, precision = request.param
    folder = tmp_path_factory.mktemp("built") / "bundle"
    return folder, export(folder, "--flow", flow, "--precision", precision, *SHAPE)


def test_every_flow_and_precision_is_verified_against_the_reference(built: Exported) -> None:
    verified = built[1]["verified"]
    assert verified["greedy_tokens_equal"] is True
    assert verified["max_logit_error"] <= verified["tolerance"]


def test_every_flow_and_precision_passes_its_own_self_test(built: Exported) -> None:
    value = json.loads(amoeba("bundle", "verify", built[0], "--json").stdout)
    assert value["selftest_tokens"] > 0


def test_every_flow_and_precision_gives_text(built: Exported) -> None:
    value = json.loads(amoeba("run", built[0], "-p", PROMPT, "--tokens", 8, "--json").stdout)
    assert value["text"].strip()


def test_every_flow_and_precision_is_as_large_as_it_says(built: Exported) -> None:
    folder, printed = built
    assert printed["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
