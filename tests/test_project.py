"""amoeba.toml: its schema for editors says what its reader says, and targets are complete with their defaults."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from projects import Project

from amoeba_deploy.errors import BadInput
from amoeba_deploy.project.asked import search_options, shape_of
from amoeba_deploy.project.config import load_project, schema
from amoeba_deploy.project.inputs import UNUSED
from amoeba_deploy.project.template import SCHEMA, template, write_project

DOCS = Path(__file__).parent.parent / "docs"
SHIPPED: dict[str, Any] = json.loads((DOCS / "amoeba.toml.schema.json").read_text(encoding="utf-8"))
EXAMPLE = '[targets.kiosk]\ndevice = "orin-nx"\nlatency = "40ms"\nmemory = "8GB"\nflow = ["tensorrt-llm", "onnx"]\n'


def valid(text: str) -> bool:
    """Whether the schema takes a file."""
    return Draft202012Validator(SHIPPED).is_valid(tomllib.loads(text))


def test_the_schema_in_the_docs_is_the_readers() -> None:
    Draft202012Validator.check_schema(SHIPPED)
    assert schema() == SHIPPED


def test_every_key_is_described() -> None:
    for part in (SHIPPED, *SHIPPED["$defs"].values()):
        for name, entry in part["properties"].items():
            assert entry.get("description"), name


def test_what_init_writes_and_what_the_docs_show_is_taken_by_both(tmp_path: Path) -> None:
    shown = re.findall(r"```toml\n(.*?)```", (DOCS / "build.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    for text in (*shown, template(), template("checkpoint", "orin-nx", "a.b-c_1"), EXAMPLE):
        assert valid(text), text
        assert load_project(Project(tmp_path).write(text).config).targets


@pytest.mark.parametrize(
    "text",
    [
        'chekpoint = "x"',
        "[build]\njobs = 0",
        '[targets.a]\nlatency = "40"',
        '[targets.a]\nmemory = "8Gb"',
        '[targets.a]\nflow = "onnx"',
        "[targets.a]\nmax-loss = 0.0",
        '[targets.a]\nmetric = "speed"',
        "[targets.a]\nmax_loss = 1.0",
        "[targets.a]\nworkload = { bach = 1 }",
        "[targets.a]\nsettings = { tp = 2 }",
    ],
)
def test_what_the_reader_refuses_the_schema_refuses(tmp_path: Path, text: str) -> None:
    assert not valid(text)
    with pytest.raises(BadInput):
        load_project(Project(tmp_path).write(text).config)


def test_defaults_stand_in_for_what_a_target_does_not_say(tmp_path: Path) -> None:
    text = (
        '[defaults]\ndevice = "orin-nx"\nlatency = "40ms"\nprecision = ["int4"]\nverify = false\n'
        "workload = { prompt = 8, tokens = 4 }\n"
        '[targets.a]\n[targets.b]\nlatency = "2s"\nmetric = "e2e"\nverify = true\nworkload = { tokens = 9 }\n'
    )
    loaded = load_project(Project(tmp_path).write(text).config)
    a, b = loaded.targets["a"], loaded.targets["b"]
    assert (a.device, a.latency, a.precision, a.verify) == ("orin-nx", "40ms", ["int4"], False)
    assert (a.workload.batch, a.workload.prompt, a.workload.tokens) == (1, 8, 4)
    assert (b.latency, b.metric, b.verify, b.precision) == ("2s", "e2e", True, ["int4"])
    assert (b.workload.prompt, b.workload.tokens) == (8, 9)
    assert search_options(loaded, b)["latency"] == 2000.0


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = (
        'checkpoint = "ck"\n[build]\noutput = "out"\n'
        '[targets.a]\ndevice = "boards/x.toml"\nshape = "plans/p.json"\ntable = ["t.json"]\n'
        '[targets.b]\ndevice = "orin-nx"\nshape = "6x0.5"\noutput = "elsewhere/b"\n'
    )
    loaded = load_project(Project(tmp_path / "project").write(text).config)
    folder, target = tmp_path / "project", loaded.targets["a"]
    assert loaded.checkpoint == folder / "ck"
    assert loaded.output("a") == folder / "out" / "a"
    assert loaded.output("b") == folder / "elsewhere" / "b"
    options = search_options(loaded, target)
    assert options["device"] == str(folder / "boards" / "x.toml")
    assert options["table"] == (folder / "t.json",)
    assert shape_of(loaded, target) == str(folder / "plans" / "p.json")
    assert shape_of(loaded, loaded.targets["b"]) == "6x0.5"


def test_only_known_keys_are_left_out_of_what_decides_a_bundle() -> None:
    keys = {name.replace("-", "_") for name in SHIPPED["$defs"]["Target"]["properties"]}
    assert keys >= UNUSED


def test_init_refuses_what_cannot_stand_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no quotes"):
        write_project(tmp_path, 'a"b', "orin-nx", "kiosk", False)
    with pytest.raises(BadInput, match="not a device"):
        write_project(tmp_path, None, "orin-mx", "kiosk", False)
    assert list(tmp_path.iterdir()) == []
    assert [file.name for file in write_project(tmp_path, None, "orin-nx", "kiosk", False)] == ["amoeba.toml", SCHEMA]
    assert json.loads((tmp_path / SCHEMA).read_text()) == SHIPPED
