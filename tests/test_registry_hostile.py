"""Artifacts that are meant to do harm, or are no bundles: each lies in a real registry, and none is pulled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, amoeba, sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registries import Registry, contents, needs_registry, running_registry, small_bundle

from amoeba_deploy.delivery.artifact import read_document, read_layers
from amoeba_deploy.delivery.registry import pull, push
from amoeba_deploy.errors import BadInput

pytestmark = needs_registry
NAME = "team/hostile"
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that has a sound bundle, whose blobs the hostile manifests name."""
    root = tmp_path_factory.mktemp("registry")
    with running_registry(root) as running:
        push(small_bundle(root / "bundle"), running.reference(f"{NAME}:sound"), progress=QUIET)
        yield running


@pytest.fixture
def manifest(registry: Registry) -> Manifest:
    """The sound bundle's manifest, which a test spoils."""
    return dict(registry.get(f"{NAME}/manifests/sound").json())


def refused(registry: Registry, manifest: Manifest, tmp_path: Path, code: int = 2) -> str:
    """The sentence of pulling a manifest; nothing is left anywhere but what the folder had."""
    place = tmp_path / "place" / "deep"
    place.mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    registry.put_manifest(NAME, manifest, "bad")
    said = sentence(amoeba("bundle", "pull", registry.reference(f"{NAME}:bad"), "-o", place / "out", "--quiet"), code)
    after = [path for path in sorted(tmp_path.rglob("*")) if ".out.pull" not in path.parts]
    assert after == before
    assert str(place) not in said
    return said


def layer(manifest: Manifest, path: str) -> dict[str, Any]:
    """The layer of one file."""
    return dict(next(each for each in manifest["layers"] if each["annotations"]["org.cncf.model.filepath"] == path))


def name_it(entry: dict[str, Any], path: str) -> None:
    """Give a layer another path."""
    entry["annotations"] = {"org.cncf.model.filepath": path, "org.opencontainers.image.title": "README.md"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("../evil", "leaves its folder"),
        ("a/../../evil", "leaves its folder"),
        ("..", "leaves its folder"),
        ("/tmp/evil", "absolute"),
        ("//evil", "absolute"),
        ("C:/evil", "absolute"),
        ("c:evil", "absolute"),
        ("a\\..\\evil", "backslash"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("a//b", "empty parts"),
        ("a/", "empty parts"),
        ("./a", "empty parts"),
        ("a/./b", "empty parts"),
        ("x" * 256, "too long"),
        ("/".join(["x" * 200] * 6), "too long"),
        ("\ud800", "not valid text"),
        ("readme.MD", "which are one file"),
        ("README.md", "which are one file"),
        ("manifest.json/inside", "which is a file"),
        ("engine", "which is a file and a folder"),
        ("MANIFEST.json/inside", "which is a file"),
    ],
)
def test_a_path_that_leaves_its_folder_or_is_taken_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, path: str, said: str
) -> None:
    extra = layer(manifest, "README.md")
    name_it(extra, path)
    manifest["layers"].append(extra)
    assert said in refused(registry, manifest, tmp_path)


def test_names_that_differ_by_their_accents_form_are_one_file(
    registry: Registry, manifest: Manifest, tmp_path: Path
) -> None:
    for path in ("caf\u00e9.txt", "cafe\u0301.txt"):
        extra = layer(manifest, "README.md")
        name_it(extra, path)
        manifest["layers"].append(extra)
    assert "which are one file" in refused(registry, manifest, tmp_path)


def no_annotations(manifest: Manifest) -> None:
    for each in manifest["layers"]:
        del each["annotations"]


def drop(path: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["layers"].remove(layer(manifest, path))

    return change


def add_more(manifest: Manifest) -> None:
    manifest["layers"].append(layer(manifest, "README.md") | {"annotations": {"org.cncf.model.filepath": "more"}})


def retype(kind: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["layers"][0]["mediaType"] = kind

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_annotations, "names no file"),
        (drop("manifest.json"), "has no manifest.json"),
        (lambda manifest: manifest.update(layers=[]), "lists no layers"),
        (retype("application/vnd.cncf.model.weight.v1.tar"), "is an archive"),
        (retype("application/vnd.oci.image.layer.v1.tar+gzip"), "is an archive"),
    ],
)
def test_what_is_no_bundle_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, change: Callable[[Manifest], None], said: str
) -> None:
    change(manifest)
    assert said in refused(registry, manifest, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("tokenizer.json"), "tokenizer.json is missing"),
        (lambda m: name_it(m["layers"][0], "renamed"), "is missing"),
        (add_more, "more is not in its manifest"),
    ],
)
def test_files_that_the_bundles_own_manifest_does_not_list_so_are_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, change: Callable[[Manifest], None], said: str
) -> None:
    change(manifest)
    assert said in refused(registry, manifest, tmp_path, 5)


def test_a_file_that_was_exchanged_for_another_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path
) -> None:
    evil = registry.put_blob(NAME, b"#!/bin/sh\nevil\n")
    for each in manifest["layers"]:
        if each["annotations"]["org.cncf.model.filepath"] == "README.md":
            each.update(evil)
    said = refused(registry, manifest, tmp_path, 5)
    assert "README.md: differs from what its manifest lists" in said


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "amoeba.bundle/2"}', '{"format": "amoeba.bundle/1"}']
)
def test_a_bundles_manifest_that_is_none_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, text: str
) -> None:
    other = registry.put_blob(NAME, text.encode())
    for each in manifest["layers"]:
        if each["annotations"]["org.cncf.model.filepath"] == "manifest.json":
            each.update(other)
    refused(registry, manifest, tmp_path)


def served(registry: Registry, manifest: Manifest) -> Any:
    """A server of a manifest that no registry takes."""
    from registries import Answer, Proxy

    body = json.dumps(manifest).encode()
    return Proxy(registry.port, lambda seen, _: Answer(200, {}, body) if "manifests" in seen.path else None)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:../../../etc/passwd"},
        {"digest": "md5:00"},
        {"digest": None},
        {"digest": "sha256:" + "A" * 64},
        {"size": -1},
        {"size": "5"},
        {"size": 1.5},
        {"size": True},
        {"size": None},
        {"size": 1 << 60},
    ],
)
def test_a_layer_whose_digest_or_size_is_none_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, change: dict[str, Any]
) -> None:
    manifest["layers"][0] |= change
    with served(registry, manifest) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference(NAME), "-o", tmp_path / "out", "--quiet"), 2)
        assert proxy.count("/blobs/") == 0
    assert "a layer without a sha256 digest and a size" in said


@pytest.mark.parametrize("notes", [5, "x", [], {"org.cncf.model.filepath": 5}, {"org.cncf.model.filepath": ["a"]}])
def test_a_layer_whose_annotations_are_none_is_refused(
    registry: Registry, manifest: Manifest, tmp_path: Path, notes: object
) -> None:
    manifest["layers"][0]["annotations"] = notes
    with served(registry, manifest) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference(NAME), "-o", tmp_path / "out", "--quiet"), 2)
    assert "names no file" in said


def test_a_bundles_manifest_of_a_hundred_megabytes_is_not_fetched(
    registry: Registry, manifest: Manifest, tmp_path: Path
) -> None:
    for each in manifest["layers"]:
        if each["annotations"]["org.cncf.model.filepath"] == "manifest.json":
            each["size"] = 100_000_000
    with served(registry, manifest) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference(NAME), "-o", tmp_path / "out", "--quiet"), 2)
        assert proxy.count("/blobs/") == 0
    assert "is of 100000000 bytes, more than any bundle's" in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_manifest_is_read_or_refused(manifest: Manifest, data: st.DataObject) -> None:
    spoiled = json.loads(json.dumps(manifest))
    place: Any = spoiled
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    with contextlib.suppress(BadInput):
        layers = read_layers(read_document(json.dumps(spoiled).encode(), "here"), "here")
        assert all(layer.path and not layer.path.startswith("/") and ".." not in layer.path for layer in layers)


@given(st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_or_refused(body: bytes) -> None:
    with contextlib.suppress(BadInput):
        read_layers(read_document(body, "here"), "here")


def test_more_layers_than_any_bundle_has_are_refused(registry: Registry, manifest: Manifest, tmp_path: Path) -> None:
    one = {key: value for key, value in layer(manifest, "README.md").items() if key in ("digest", "size")}
    manifest["layers"] = [one | {"annotations": {"org.cncf.model.filepath": f"f{index}"}} for index in range(10_001)]
    with served(registry, manifest) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference(NAME), "-o", tmp_path / "out", "--quiet"), 2)
    assert "names more than 10000 files" in said


def test_an_output_that_is_a_link_is_replaced_and_not_followed(registry: Registry, tmp_path: Path) -> None:
    pull(registry.reference(f"{NAME}:sound"), tmp_path / "real", progress=QUIET)
    before = contents(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    said = sentence(amoeba("bundle", "pull", registry.reference(f"{NAME}:sound"), "-o", tmp_path / "out", "--quiet"), 2)
    assert "exists already" in said
    assert contents(tmp_path / "real") == before
