"""Bundles in a real registry: what is pushed is what is pulled, everything is sent once, and by the specification."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import QUIET, amoeba, sentence
from registries import INDEX_TYPE, WEIGHTS, Registry, contents, needs_registry, noise, running_registry, small_bundle
from signers import make_key

from amoeba_deploy.bundle import verify_files
from amoeba_deploy.delivery.connection import Connection
from amoeba_deploy.delivery.media_types import media_type_of
from amoeba_deploy.delivery.reference import Reference, is_loopback
from amoeba_deploy.delivery.registry import pull, push
from amoeba_deploy.delivery.signing import sign
from amoeba_deploy.errors import BadInput, VerificationFailed

pytestmark = needs_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that the tests of this file share, each in repositories of its own."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle."""
    return small_bundle(tmp_path / "bundle")


def printed(*command: object) -> dict[str, Any]:
    """What a command prints with --json."""
    result = amoeba(*command, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


# What is pushed is what is pulled


def test_what_was_pushed_is_pulled_byte_for_byte(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    pushed = printed("bundle", "push", bundle, registry.reference("team/same:1"))
    pulled = printed("bundle", "pull", registry.reference("team/same:1"), "-o", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(bundle)
    verify_files(tmp_path / "out")
    assert pulled["digest"] == pushed["digest"]
    assert pulled["files"] == len(contents(bundle))
    assert pulled["bytes"] == sum(map(len, contents(bundle).values()))
    assert pulled["unchanged"] is False


def test_what_is_done_is_said(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    reference = registry.reference("team/said:1")
    pushed = amoeba("bundle", "push", bundle, reference)
    assert f"pushed to {reference}, 7 files sent (0.4 MB)" in pushed.stdout
    pulled = amoeba("bundle", "pull", reference, "-o", tmp_path / "out")
    assert f"7 files from {reference}, 0.4 MB fetched" in pulled.stdout
    digest = pulled.stdout.splitlines()[-1]
    assert f"{reference}: is {digest}, 7 files" in pulled.stderr
    again = amoeba("bundle", "pull", reference, "-o", tmp_path / "out", "--quiet")
    assert again.stdout == f"{tmp_path / 'out'}: is {reference} already, nothing was done\n{digest}\n"
    assert again.stderr == ""


def test_a_bundle_is_pulled_by_its_digest(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    done = push(bundle, registry.reference("team/digest:1"), progress=QUIET)
    pull(registry.reference(f"team/digest@{done.digest}"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(bundle)


def test_a_tag_that_moved_is_pulled_as_it_is_now(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    reference = registry.reference("team/moved")
    first = push(bundle, reference, progress=QUIET)
    second = push(small_bundle(tmp_path / "second", seed=1), reference, progress=QUIET)
    assert first.reference == second.reference == f"{reference}:latest"
    assert pull(reference, tmp_path / "out", progress=QUIET).digest == second.digest != first.digest


def test_an_output_that_is_the_bundle_already_is_left_alone(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    reference = registry.reference("team/already:1")
    push(bundle, reference, progress=QUIET)
    pull(reference, tmp_path / "out", progress=QUIET)
    before = (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns
    again = pull(reference, tmp_path / "out", progress=QUIET, force=True)
    assert again.unchanged
    assert again.bytes_fetched == 0
    assert (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less", "a link"])
def test_an_output_that_differs_in_anything_is_not_taken_for_the_bundle(
    registry: Registry, bundle: Path, tmp_path: Path, change: str
) -> None:
    reference, out = registry.reference("team/differs:1"), tmp_path / "out"
    push(bundle, reference, progress=QUIET)
    pull(reference, out, progress=QUIET)
    if change == "a byte":
        data = (out / WEIGHTS).read_bytes()
        (out / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "a file more":
        (out / "more").write_text("")
    elif change == "a file less":
        (out / "README.md").unlink()
    else:
        (out / "README.md").unlink()
        (out / "README.md").symlink_to(bundle / "README.md")
    said = sentence(amoeba("bundle", "pull", reference, "-o", out, "--quiet"), 2)
    assert "exists already" in said
    pull(reference, out, progress=QUIET, force=True)
    assert contents(out) == contents(bundle)
    assert not (out / "README.md").is_symlink()


def test_an_update_fetches_only_what_changed(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    push(bundle, registry.reference("team/update:1"), progress=QUIET)
    second = small_bundle(tmp_path / "second", seed=1)
    push(second, registry.reference("team/update:2"), progress=QUIET)
    pull(registry.reference("team/update:1"), tmp_path / "out", progress=QUIET)
    new = pull(registry.reference("team/update:2"), tmp_path / "new", progress=QUIET, reuse=[tmp_path / "out"])
    over = pull(registry.reference("team/update:2"), tmp_path / "out", progress=QUIET, force=True)
    changed = sum(len(data) for name, data in contents(second).items() if contents(bundle).get(name) != data)
    assert new.bytes_fetched == over.bytes_fetched == changed
    assert new.bytes_kept == over.bytes_kept > 50_000
    assert contents(tmp_path / "out") == contents(tmp_path / "new") == contents(second)


def test_what_comes_is_kept_where_the_caller_says_and_goes_with_the_pull(
    registry: Registry, bundle: Path, tmp_path: Path
) -> None:
    push(bundle, registry.reference("team/staging:1"), progress=QUIET)
    staging = tmp_path / "device" / "staging"
    pull(registry.reference("team/staging:1"), tmp_path / "out" / "slot", progress=QUIET, staging=staging)
    assert contents(tmp_path / "out" / "slot") == contents(bundle)
    assert not staging.exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slot"]


# Everything is sent once


def test_the_same_bundle_has_the_same_digest_and_is_not_sent_twice(
    registry: Registry, bundle: Path, tmp_path: Path
) -> None:
    first = printed("bundle", "push", bundle, registry.reference("team/twice:1"))
    copy = Path(shutil.copytree(bundle, tmp_path / "elsewhere" / "other-name"))
    os.utime(copy / WEIGHTS, (1, 1))
    second = printed("bundle", "push", copy, registry.reference("team/twice:2"))
    assert first["digest"] == second["digest"]
    assert (first["layers_sent"], first["layers_present"]) == (7, 0)
    assert (second["layers_sent"], second["bytes_sent"], second["layers_present"]) == (0, 0, 7)
    assert second["bytes_present"] == first["bytes_sent"]


def test_what_two_shapes_of_a_checkpoint_share_is_sent_once(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    other = small_bundle(tmp_path / "other", seed=1)
    push(bundle, registry.reference("team/shared:24x1"), progress=QUIET)
    done = push(other, registry.reference("team/shared:12x1"), progress=QUIET)
    equal = [name for name, data in contents(other).items() if contents(bundle)[name] == data]
    assert sorted(equal) == ["README.md", "empty.txt", "measured.json", "tokenizer.json"]
    assert done.layers_present == len(equal)
    assert done.bytes_present == sum(len(contents(other)[name]) for name in equal)
    assert done.layers_sent == len(contents(other)) - len(equal)


def test_what_another_repository_of_the_registry_has_is_mounted(
    registry: Registry, bundle: Path, tmp_path: Path
) -> None:
    push(bundle, registry.reference("team/here:1"), progress=QUIET)
    done = push(small_bundle(tmp_path / "other", seed=1), registry.reference("others/there:1"), progress=QUIET)
    assert (done.layers_mounted, done.bytes_mounted) == (1, 50_000)
    assert amoeba("bundle", "push", bundle, registry.reference("third/place:1")).stdout.count("taken from another") == 1
    pull(registry.reference("third/place:1"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(bundle)


def test_a_mount_from_what_is_gone_is_a_plain_upload(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    push(bundle, registry.reference("team/away:1"), progress=QUIET)
    for file in (tmp_path / "cache" / "registries").rglob("*"):
        if file.is_file():
            file.write_text("no/such/place")
    done = push(bundle, registry.reference("team/back:1"), progress=QUIET)
    assert (done.layers_mounted, done.layers_sent) == (0, 7)


def test_equal_files_of_a_bundle_are_sent_and_fetched_once(registry: Registry, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", copy=noise(50_000, 99))
    done = push(bundle, registry.reference("team/equal:1"), progress=QUIET)
    assert (done.layers_sent, done.layers_present, done.bytes_present) == (7, 1, 50_000)
    got = pull(registry.reference("team/equal:1"), tmp_path / "out", progress=QUIET)
    assert got.bytes - got.bytes_fetched == 50_000
    assert got.bytes_kept == 0
    assert contents(tmp_path / "out") == contents(bundle)


# By the specification

TEXT = {"type": "string", "minLength": 1}
DIGEST = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
SIZE = {"type": "integer", "minimum": 0}
MODALITIES = {"type": "array", "items": {"enum": ["text", "image", "audio", "video", "embedding", "other"]}}
CONFIG_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["descriptor", "config", "modelfs"],
    "properties": {
        "descriptor": {
            "type": "object",
            "additionalProperties": False,
            "properties": dict.fromkeys(("family", "name", "version", "vendor", "title", "description"), TEXT),
        },
        "config": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **dict.fromkeys(("architecture", "format", "paramSize", "precision", "quantization"), TEXT),
                "capabilities": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"inputTypes": MODALITIES, "outputTypes": MODALITIES},
                },
            },
        },
        "modelfs": {
            "type": "object",
            "additionalProperties": False,
            "required": ["type", "diffIds"],
            "properties": {"type": {"enum": ["layers"]}, "diffIds": {"type": "array", "items": DIGEST, "minItems": 1}},
        },
    },
}
"""The ModelPack specification's schema of a config, without what is not written here."""
RAW_TYPES = [f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc", "code")]
MANIFEST_SCHEMA = {
    "type": "object",
    "required": ["schemaVersion", "mediaType", "artifactType", "config", "layers"],
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.manifest.v1+json"},
        "artifactType": {"const": "application/vnd.cncf.model.manifest.v1+json"},
        "config": {
            "required": ["mediaType", "digest", "size"],
            "properties": {
                "mediaType": {"const": "application/vnd.cncf.model.config.v1+json"},
                "digest": DIGEST,
                "size": SIZE,
            },
        },
        "layers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["mediaType", "digest", "size", "annotations"],
                "properties": {
                    "mediaType": {"enum": RAW_TYPES},
                    "digest": DIGEST,
                    "size": SIZE,
                    "annotations": {
                        "required": ["org.cncf.model.filepath", "org.opencontainers.image.title"],
                        "additionalProperties": TEXT,
                    },
                },
            },
        },
        "annotations": {"additionalProperties": TEXT},
    },
}
"""What the OCI image and the ModelPack specification ask of a manifest."""


def test_manifest_and_config_are_as_the_specification_asks(registry: Registry, bundle: Path) -> None:
    done = push(bundle, registry.reference("team/spec:1"), progress=QUIET)
    answer = registry.get("team/spec/manifests/1")
    manifest = answer.json()
    assert answer.headers["Docker-Content-Digest"] == done.digest
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    config = registry.get(f"team/spec/blobs/{manifest['config']['digest']}").json()
    jsonschema.validate(config, CONFIG_SCHEMA)
    assert config["config"]["format"] == "gguf"
    assert config["config"]["quantization"] == "q8_0"
    assert config["descriptor"] == {"name": "stories-4x0.5", "title": "stories-4x0.5: gguf q8_0 for orin-nx"}
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    paths = [layer["annotations"]["org.cncf.model.filepath"] for layer in manifest["layers"]]
    assert paths == sorted(contents(bundle))
    assert "createdAt" not in json.dumps(config)
    assert "created" not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("engine/model-q8_0.gguf", "weight"),
        ("engine/model.onnx", "weight"),
        ("engine/model.onnx.data", "weight"),
        ("engine/openvino_model.bin", "weight"),
        ("engine/model.safetensors", "weight"),
        ("engine/model.pte", "weight"),
        ("engine/openvino_model.xml", "weight.config"),
        ("engine/modeling_amoeba.py", "code"),
        ("engine/lib.so", "code"),
        ("tokenizer.json", "weight.config"),
        ("manifest.json", "weight.config"),
        ("model.sig", "weight.config"),
        ("README.md", "doc"),
        ("LICENSE", "doc"),
    ],
)
def test_every_kind_of_file_has_its_media_type(path: str, kind: str) -> None:
    assert media_type_of(path) == f"application/vnd.cncf.model.{kind}.v1.raw"


def test_the_one_model_of_an_index_is_pulled(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    done = push(bundle, registry.reference("team/index:1"), progress=QUIET)
    size = len(registry.get("team/index/manifests/1").content)
    model = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": done.digest, "size": size}
    model |= {"artifactType": "application/vnd.cncf.model.manifest.v1+json"}
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [model]}
    registry.put_manifest("team/index", index, "one", INDEX_TYPE)
    assert pull(registry.reference("team/index:one"), tmp_path / "out", progress=QUIET).digest == done.digest
    registry.put_manifest("team/index", index | {"manifests": [model, model]}, "two", INDEX_TYPE)
    with pytest.raises(BadInput, match="an index of 2 models where one is needed"):
        pull(registry.reference("team/index:two"), tmp_path / "two", progress=QUIET)


# What is not pushed


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less", "a link"])
def test_a_broken_bundle_is_not_pushed(registry: Registry, bundle: Path, change: str) -> None:
    if change == "a byte":
        (bundle / WEIGHTS).write_bytes(noise(300_000, 5))
    elif change == "a file more":
        (bundle / "more").write_text("")
    elif change == "a file less":
        (bundle / WEIGHTS).unlink()
    else:
        (bundle / "link").symlink_to("/etc/hostname")
    name = f"team/broken-{change.replace(' ', '-')}"
    sentence(amoeba("bundle", "push", bundle, registry.reference(name), "--quiet"), 5)
    assert registry.get(f"{name}/tags/list").status_code == 404


def test_a_bundle_is_not_pushed_under_the_digest_of_another(registry: Registry, bundle: Path) -> None:
    with pytest.raises(BadInput, match="push it with a tag instead"):
        push(bundle, registry.reference(f"team/other@sha256:{'0' * 64}"), progress=QUIET)


def test_a_bundle_is_pushed_with_a_tag_and_its_own_digest(registry: Registry, bundle: Path) -> None:
    digest = push(bundle, registry.reference("team/both:1"), progress=QUIET).digest
    done = push(bundle, registry.reference(f"team/both:2@{digest}"), progress=QUIET)
    assert done.reference == registry.reference(f"team/both:2@{digest}")
    assert registry.get("team/both/manifests/2").headers["Docker-Content-Digest"] == digest
    push(bundle, registry.reference(f"team/untagged@{digest}"), progress=QUIET)
    assert registry.get(f"team/untagged/manifests/{digest}").status_code == 200


def test_a_registry_that_gives_another_digest_is_not_believed(
    registry: Registry, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.delivery.artifact.Artifact.digest", f"sha256:{'1' * 64}")
    with pytest.raises(VerificationFailed, match="the registry gives the digest sha256:"):
        push(bundle, registry.reference("team/lies:1"), progress=QUIET)


# References


@pytest.mark.parametrize(
    ("text", "host", "name", "wanted"),
    [
        ("localhost:5000/a/b:1", "localhost:5000", "a/b", "1"),
        ("registry.example/a", "registry.example", "a", "latest"),
        ("localhost/a:v1.2_x-y", "localhost", "a", "v1.2_x-y"),
        (f"r.io/a/b@sha256:{'a' * 64}", "r.io", "a/b", f"sha256:{'a' * 64}"),
        (f"r.io/a/b:1@sha256:{'a' * 64}", "r.io", "a/b", f"sha256:{'a' * 64}"),
        ("[::1]:5000/a__b/c-d.e:1", "[::1]:5000", "a__b/c-d.e", "1"),
    ],
)
def test_references_are_read(text: str, host: str, name: str, wanted: str) -> None:
    reference = Reference.parse(text)
    assert (reference.host, reference.name, reference.wanted) == (host, name, wanted)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    ["", "stories", "team/stories:1", "r.io/", "r.io/Team/x", "r.io/a:", "r.io/a:b c", "r.io/a@sha256:12", "r.io/a//b"]
    + ["r.io/../x", "user@r.io/a", "http://r.io/a", "r.io:port/a", "r.io/a?b", "r.io/a#b", "-r.io/a", "r.io/a@md5:12"]
    + [f"r.io/{'a' * 256}", f"r.io/a:{'b' * 129}", "r.io/a\n", "r.io\n/a"],
)
def test_what_is_no_reference_is_refused(text: str, tmp_path: Path) -> None:
    sentence(amoeba("bundle", "pull", text, "-o", tmp_path / "out", "--quiet"), 2)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1:5000", "[::1]:5000", "LOCALHOST:1"])
def test_this_machine_is_spoken_to_without_tls(host: str) -> None:
    assert is_loopback(host)
    assert Connection(Reference(host, "a")).url("x").startswith("http://")


@pytest.mark.parametrize("host", ["registry.example", "localhost.example", "10.0.0.1:5000", "127.0.0.1.example"])
def test_other_machines_are_spoken_to_with_tls_unless_told_otherwise(host: str) -> None:
    assert not is_loopback(host)
    assert Connection(Reference(host, "a")).url("x").startswith("https://")
    assert Connection(Reference(host, "a"), plain_http=True).url("x").startswith("http://")


def test_a_signed_bundle_is_pushed_only_as_it_was_signed(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    sign(bundle, make_key(tmp_path / "keys").private, serial=1)
    reference = registry.reference("team/signed:1")
    whole = (bundle / "release.json").read_bytes()
    (bundle / "release.json").write_bytes(whole.replace(b"1", b"2", 1))
    said = sentence(amoeba("bundle", "push", bundle, reference, "--quiet"), 5)
    assert "is not what was signed: release.json is changed; sign it again" in said
    (bundle / "release.json").unlink()
    assert "release.json is missing" in sentence(amoeba("bundle", "push", bundle, reference, "--quiet"), 5)
    (bundle / "release.json").write_bytes(whole)
    signature = (bundle / "model.sig").read_bytes()
    (bundle / "model.sig").write_bytes(signature[:-20])
    assert "model.sig: is damaged" in sentence(amoeba("bundle", "push", bundle, reference, "--quiet"), 5)
    (bundle / "model.sig").write_bytes(signature)
    assert amoeba("bundle", "push", bundle, reference, "--quiet").exit_code == 0
