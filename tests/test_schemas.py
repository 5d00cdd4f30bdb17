"""Every JSON file that the commands write is what its schema in docs/schemas says, and a damaged one is not."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kits
import pytest
from click.testing import CliRunner
from conftest import QUIET, random_adapters, save_random_model
from jsonschema import Draft202012Validator, ValidationError
from released import make_released
from signers import make_key

from amoeba_deploy.checkpoint import create_checkpoint, finish_checkpoint
from amoeba_deploy.cli import main
from amoeba_deploy.delivery.signing import sign
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.quality import WIDTHS, write_quality
from amoeba_deploy.quality_measurement import measure_quality
from amoeba_deploy.selection import DepthChoice, read_selection, write_selection
from amoeba_deploy.stage1.calibration import read_calibration

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCHEMAS = {
    file.name.removesuffix(".schema.json"): json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((DOCS / "schemas").glob("*.schema.json"))
}
BY_FORMAT = {schema["properties"]["format"]["const"]: name for name, schema in SCHEMAS.items()}
# Not JSON, so without a JSON Schema; docs/devices.md describes it.
TOML_FORMATS = {"amoeba.device/1"}
# Of unfinished runs and of the cache folder, for this version alone.
RUN_FORMATS = {
    *("amoeba.depth-table/1", "amoeba.tuning/1", "amoeba.block-rises/1"),
    *("amoeba.build-entry/1", "amoeba.build-last/1", "amoeba.evaluation/1"),
}
# Of one engine's folder, for that engine's backend alone; its own page describes it.
ENGINE_FORMATS = {"amoeba.openvino/1"}

SENTENCE = "once upon a time there was a {} fox who lived in the {} wood and ate {} berries . "
WORDS = ("small", "red", "quiet", "old", "green", "seven", "kind")


def amoeba(*arguments: object) -> str:
    """Run a command and return what it printed on standard output."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def tokenizer_of(text: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *sorted(set(text.split()))])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One real file of every format by its schema's name, and more of some as ``name:variant``."""
    root = tmp_path_factory.mktemp("formats")
    text = "".join(SENTENCE.format(*(WORDS[(i + j) % 7] for j in range(3))) for i in range(20))
    (root / "text.txt").write_text(text)
    (root / "long.txt").write_text(text * 3)
    tokenizer = tokenizer_of(text)
    save_random_model(
        root / "model",
        "llama",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        num_hidden_layers=3,
        vocab_size=tokenizer.get_vocab_size(),
    )
    tokenizer.save(str(root / "model" / "tokenizer.json"))
    few = ("--samples", 4, "--sequence", 32)
    amoeba("select", root / "model", "-o", root / "selection", "--calibration", root / "text.txt", *few, "--quiet")
    asked = {"question": "once upon a time there was a", "choices": ["small fox", "red wood"], "gold": 0}
    (root / "asked.jsonl").write_text(f"{json.dumps(asked)}\n" * 3)
    data = ("--calibration", root / "asked.jsonl", "--width-calibration", root / "long.txt", "--sequence", 16)
    methods = ("--metric", "choice-loss", "--depth-method", "shortened-ppl", "--width-method", "wanda")
    amoeba("select", root / "model", "-o", root / "asked", *data, *methods, "--quiet")
    text_only = ("--calibration", root / "text.txt", *few)
    amoeba("select", root / "model", "-o", root / "apart", *text_only, "--units", "sublayer", "--beam", 2, "--quiet")
    # Whether the random model loses whole blocks is its own affair; here one depth does not.
    chosen = read_selection(root / "apart", ModelFolder(root / "model").architecture)
    partial_depths = chosen.depths | {2: DepthChoice((0, 1, 2), 5.0, (0,), (1,))}
    write_selection(root / "apart", replace(chosen, depths=partial_depths))
    (root / "checkpoint").mkdir()
    made = create_checkpoint(str(root / "model"), root / "selection", root / "checkpoint", name="tiny")
    write_quality(
        root / "checkpoint",
        measure_quality(made, root / "text.txt", None, sequence=32, precisions=["fp32"], progress=QUIET),
    )
    checkpoint, table = root / "checkpoint", root / "table.json"
    plan = amoeba("extract", checkpoint, "--shape", "2x2/3", "--plan-only")
    partial = json.loads(plan)
    partial["blocks"][0]["neurons"] = []
    partial["blocks"].insert(1, {"index": 1, "kv_heads": [], "heads": [], "neurons": [0, 5]})
    partial["blocks"][2]["index"] = 2
    (root / "partial.json").write_text(json.dumps(partial))
    amoeba("extract", checkpoint, "--shape", root / "partial.json", "-o", root / "partial")
    amoeba("extract", checkpoint, "--shape", root / "partial.json", "--layout", "ragged", "-o", root / "ragged")
    amoeba("extract", checkpoint, "--shape", "2x0.75", "-o", root / "subnet")
    short = ("--prompt", 8, "--tokens", 8)
    which = ("--flow", "onnx", "--precision", "fp32")
    amoeba("profile", checkpoint, *which, *short, "--shapes", "3x1", "--repeats", 3, "-o", table, "--quiet")
    here = ("--device", "local", "--table", table, "--latency", "10s", "--shape", "3x1")
    amoeba("export", checkpoint, *here, *which, *short, "-o", root / "here", "--quiet")
    sign(root / "here", (key := make_key(root)).private)
    amoeba("bundle", "install", root / "here", "--root", root / "device", "--trust", key.public, "--quiet")
    project = root / "amoeba.toml"
    project.write_text(
        f'checkpoint = "{checkpoint}"\n[targets.a]\ndevice = "orin-nx"\nshape = "3x1"\nflow = ["onnx"]\n'
        'precision = ["int8"]\nverify = false\nworkload = { prompt = 8, tokens = 8, context = 64 }\n'
    )
    amoeba("build", "--config", project, "--save-baseline", "--quiet")
    there = ("--device", "orin-nx", "--memory", "8GB", "--flow", "onnx", "--precision", "int4", "--no-verify")
    amoeba("export", checkpoint, *there, "--context", 96, *short, "-o", root / "there", "--quiet")
    shutil.copytree(checkpoint, root / "tuned")
    random_adapters(made.model, root / "tuned", WIDTHS)
    how: dict[str, Any] = {
        "widths": WIDTHS,
        "adapters": "smol",
        "tuning": {"steps": 100, "data": {"source": "text.txt"}},
    }
    finish_checkpoint(root / "tuned", made.model, "tuned", include_base=False, policy="uniform", bias=False, **how)
    base = save_random_model(root / "base", "llama", num_key_value_heads=6)
    source = make_released(base).write(root / "released")
    amoeba("checkpoint", "import", source, "--base", root / "base", "-o", root / "imported", "--quiet")
    amoeba("extract", root / "imported", "--shape", "3x0.75", "-o", root / "masked", "--quiet")
    kit = kits.written(root / "kit", "--config", root / "base", "--precision", "fp32", shapes="3x1")
    assert kits.start(Path(sys.executable), kit).returncode == 0
    return {
        "selection": read(root / "selection" / "selection.json"),
        "selection:questions": read(root / "asked" / "selection.json"),
        "selection:sublayers": read(root / "apart" / "selection.json"),
        "selection:imported": read(root / "imported" / "selection.json"),
        "checkpoint:imported": read(root / "imported" / "amoeba.json"),
        "subnet:imported": read(root / "masked" / "subnet.json"),
        "checkpoint": read(checkpoint / "amoeba.json"),
        "checkpoint:tuned": read(root / "tuned" / "amoeba.json"),
        "quality": read(checkpoint / "quality.json"),
        "plan": json.loads(plan),
        "plan:sublayers": partial,
        "subnet:sublayers": read(root / "partial" / "subnet.json"),
        "subnet:ragged": read(root / "ragged" / "subnet.json"),
        "subnet": read(root / "subnet" / "subnet.json"),
        "latency-table": read(table),
        "manifest": read(root / "here" / "manifest.json"),
        "manifest:estimated": read(root / "there" / "manifest.json"),
        "measured": read(root / "here" / "measured.json"),
        "measured:unverified": read(root / "there" / "measured.json"),
        "selftest": read(root / "here" / "selftest.json"),
        "baseline": read(root / "amoeba-baseline.json"),
        "release": read(root / "here" / "release.json"),
        "device-state": read(root / "device" / "state.json"),
        "profile-kit": read(kit / "kit.json"),
        "profile-results": kits.lines(kit)[0],
        "lines": {"of a kit": kits.lines(kit)[1:]},
        "subnet:in-a-bundle": read(root / "there" / "engine" / "subnet.json"),
    }


def check(name: str, value: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMAS[name.partition(":")[0]]).validate(value)


def with_row(entry: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["rows"][0].update({entry: value})


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a depth that is no number": ("selection", lambda d: d["depth"].update({"all": {"kept": [0], "metric": 1.0}})),
    "a block kept twice": ("selection", lambda d: d["depth"]["3"].update(kept=[0, 1, 1])),
    "a block without attention and not without feed-forward": (
        "selection",
        lambda d: d["depth"]["2"].update(without_attention=[0]),
    ),
    "a count of nothing known": ("selection", lambda d: d["block_evaluations"].update(saved=3)),
    "evaluations as one number": ("selection", lambda d: d.update(block_evaluations=27)),
    "a count of the plain recurrence alone": ("selection", lambda d: d["block_evaluations"].pop("prefix")),
    "a metric that is not known": ("selection", lambda d: d.update(metric="perplexity")),
    "a depth method that is not known": ("selection", lambda d: d.update(depth_method="greedy")),
    "a width method that is not known": ("selection", lambda d: d.update(width_method="sparsegpt")),
    "units that are not known": ("selection", lambda d: d.update(units="head")),
    "a data set without its split": ("selection", lambda d: d["calibration"].update(dataset="x/y", config="z")),
    "width data without a digest": ("selection", lambda d: d.update(width_calibration={"source": "a", "samples": 1})),
    "a short digest": ("selection", lambda d: d.update(base_digest="sha256:12")),
    "masks without their file": ("selection:imported", lambda d: d.pop("imported")),
    "masks of the full width": ("selection:imported", lambda d: d["widths"].insert(0, 1.0)),
    "masks and scores": ("selection:imported", lambda d: d.update(width_method="flap")),
    "a file without masks": ("selection:imported", lambda d: d.pop("widths")),
    "no metric where one was measured": ("selection", lambda d: d["depth"]["3"].update(metric=None)),
    "adapters": ("checkpoint", lambda d: d.update(adapters="smol.safetensors")),
    "tuning in a word": ("checkpoint:tuned", lambda d: d.update(tuning="alpaca-gpt4")),
    "no multiple of neurons": ("checkpoint", lambda d: d.update(multiple=0)),
    "a width above 1": ("checkpoint", lambda d: d["widths"].append(1.5)),
    "an unknown entry in the head": ("checkpoint", lambda d: d.update(pickle="base.bin")),
    "no row in fp32": ("quality", lambda d: [row.update(precision="int4") for row in d["rows"]]),
    "an accuracy in percent": ("quality", with_row("accuracy", 61.0)),
    "bias neither on nor off": ("quality", with_row("bias", "some")),
    "a width as a word": ("plan", lambda d: d["shape"].update(width="half")),
    "a block that keeps nothing": ("plan", lambda d: d["blocks"][0].update(kv_heads=[], heads=[], neurons=[])),
    "heads without their key/value heads": ("plan", lambda d: d["blocks"][0].update(kv_heads=[])),
    "a subnet's block that keeps nothing": (
        "subnet",
        lambda d: d["blocks"][0].update(kv_heads=[], heads=[], neurons=[]),
    ),
    "a negative head": ("plan", lambda d: d["blocks"][0].update(heads=[-1, 0])),
    "a layout that is not known": ("subnet", lambda d: d.update(layout="sparse")),
    "bytes of one layout alone": ("subnet:ragged", lambda d: d["layout_bytes"].pop("uniform")),
    "a row of no time": ("latency-table", with_row("tpot_ms", 0)),
    "an unknown entry in a row": ("latency-table", with_row("watts", 7)),
    "a prefixed architecture": ("latency-table", lambda d: d.update(architecture="sha256:" + d["architecture"])),
    "a file outside the bundle": ("manifest", lambda d: d["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}})),
    "its own digest": ("manifest", lambda d: d["files"].update({"manifest.json": {"sha256": "0" * 64, "bytes": 1}})),
    "a latency from nowhere": ("manifest", lambda d: d["predicted"].update(source="hoped")),
    "a kit's file outside": (
        "profile-kit",
        lambda d: d["files"].update({"a/../../x": {"bytes": 1, "sha256": "0" * 64}}),
    ),
    "an item's name with a slash": ("profile-kit", lambda d: d["items"][0].update(id="a/b")),
    "weights from nowhere": ("profile-results", lambda d: d.update(weights="guessed")),
    "a third slot": ("device-state", lambda d: d["slots"].update(c=None)),
    "one refused delivery without a list": ("device-state", lambda d: d.update(refused={"digest": "x"})),
    "more refused deliveries than are remembered": (
        "device-state",
        lambda d: d.update(refused=[{"digest": f"sha256:{0:064}", "reason": "x", "at": "2026-01-01T00:00:00Z"}] * 17),
    ),
    "a refused delivery without a reason": (
        "device-state",
        lambda d: d.update(refused=[{"digest": f"sha256:{0:064}", "at": "2026-01-01T00:00:00Z"}]),
    ),
    "a slot that is confirmed and not there": ("device-state", lambda d: d.update(confirmed="c")),
    "a slot without its manifest's digest": ("device-state", lambda d: d["slots"]["a"].pop("manifest")),
    "a serial below zero": ("release", lambda d: d.update(serial=-1)),
    "a latency of no source": ("baseline", lambda d: d["targets"]["a"]["predicted"].update(source="hoped")),
    "a target without its content": ("baseline", lambda d: d["targets"]["a"].pop("content")),
    "no fingerprint": ("measured", lambda d: d["machine"].pop("fingerprint")),
    "a verdict in words": ("measured", lambda d: d["verified"].update(greedy_tokens_equal="yes")),
    "no prompt": ("selftest", lambda d: d.update(prompt=[])),
    "a negative token": ("selftest", lambda d: d["tokens"].append(-1)),
    "a self-test that compares nothing": ("selftest", lambda d: d.update(tokens=[], margins=[])),
}


def test_every_format_has_a_schema_that_is_one(documents: dict[str, dict[str, Any]]) -> None:
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        assert name in documents


def test_files_are_what_their_schemas_say(documents: dict[str, dict[str, Any]]) -> None:
    for name, value in documents.items():
        if name != "lines":
            check(name, value)


LINE = Draft202012Validator(SCHEMAS["profile-results"]["$defs"]["line"])
REST = [
    {"record": "failed", "item": "a", "error": "it ended", "error_code": 1},
    {"record": "interrupted", "item": "a"},
    {"record": "again", "item": "a"},
    {"record": "report", "item": "a", "file": "reports/a.json", "sha256": "0" * 64, "tool": "x", "memory_bytes": 1},
]
"""Kinds of lines that no run to the end writes; tests of kits write them all."""


def test_all_lines_of_results_are_what_their_schema_says(documents: dict[str, dict[str, Any]]) -> None:
    found = documents["lines"]["of a kit"]
    for line in [*found, *REST]:
        LINE.validate(line)
    assert {line["record"] for line in found} == {"session", "run", "memory", "ended"}
    known = {each["properties"]["record"]["const"] for each in SCHEMAS["profile-results"]["$defs"]["line"]["oneOf"]}
    assert known == {line["record"] for line in [*found, *REST]}
    for line in found:
        for entry in set(line) - {"record", "stopped"}:
            with pytest.raises(ValidationError):
                LINE.validate({key: value for key, value in line.items() if key != entry})


def test_the_files_cover_measured_and_estimated_verified_and_not(documents: dict[str, dict[str, Any]]) -> None:
    assert documents["manifest"]["predicted"]["source"] == "measured"
    assert documents["manifest"]["table"] is not None
    assert documents["manifest:estimated"]["predicted"]["source"] == "estimated"
    assert documents["manifest:estimated"]["budget"]["ms"] is None
    assert documents["measured"]["timing"] is not None
    assert documents["measured:unverified"]["verified"] is None
    assert documents["plan"]["shape"]["width"] == "2/3"


def test_the_selections_cover_text_and_questions_blocks_and_sublayers(documents: dict[str, dict[str, Any]]) -> None:
    text, asked, apart = (documents[f"selection{kind}"] for kind in ("", ":questions", ":sublayers"))
    assert "naive" in text["block_evaluations"]
    assert "sequence" in text["calibration"]
    assert "width_calibration" not in text
    assert "sequence" not in asked["calibration"]
    assert asked["width_calibration"]["sequence"] == 16
    assert "naive" not in asked["block_evaluations"]
    assert "without_attention" in apart["depth"]["2"]
    assert "naive" not in apart["block_evaluations"]


def local_rows(root: Path, place: str, rows: list[dict[str, Any]]) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_calibration_data_by_name_is_described(
    documents: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("AMOEBA_DATA", str(tmp_path))
    words = SENTENCE.format(*WORDS[:3])
    local_rows(tmp_path, "wikitext2/wikitext-2-raw-v1/train.jsonl", [{"text": words * 4}] * 3)
    question = {"question": words, "subject": "anatomy", "choices": ["red", "small", "old", "kind"], "answer": 1}
    for split in ("dev", "validation"):
        local_rows(tmp_path, f"mmlu/all/{split}.jsonl", [question] * 5)
    text = read_calibration("wikitext2", tokenizer_of(words), 4096, samples=2, sequence=32)
    asked = read_calibration("mmlu", tokenizer_of(words), 4096, samples=3)
    assert text.facts["from"] == "local copy"
    assert "shots" in asked.facts
    check("selection", documents["selection"] | {"calibration": asked.facts, "width_calibration": text.facts})
    on_hub = text.facts | {"from": "hub", "revision": "b08601e04326c79dfdd32d625aee71d232d685c3"}
    check("selection", documents["selection"] | {"calibration": on_hub})


@pytest.mark.parametrize("name", SCHEMAS)
def test_another_format_version_is_refused(name: str, documents: dict[str, dict[str, Any]]) -> None:
    form = documents[name]["format"]
    for other in (form.replace("/1", "/2"), form.replace("amoeba.", "amoeba.other-"), None):
        with pytest.raises(ValidationError):
            check(name, documents[name] | {"format": other})


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_entry_is_needed(name: str, documents: dict[str, dict[str, Any]]) -> None:
    for entry in SCHEMAS[name]["required"] + SCHEMAS[name].get("else", {}).get("required", []):
        with pytest.raises(ValidationError, match=f"'{entry}' is a required property"):
            check(name, {key: value for key, value in documents[name].items() if key != entry})


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, documents: dict[str, dict[str, Any]]) -> None:
    name, change = DAMAGE[damage]
    value = copy.deepcopy(documents[name])
    change(value)
    with pytest.raises(ValidationError):
        check(name, value)


def test_the_document_names_every_format_of_the_package() -> None:
    files = [*(ROOT / "amoeba_deploy").rglob("*.py"), *(ROOT / "amoeba_deploy").rglob("devices/*.toml")]
    used = {form for file in files for form in re.findall(r"amoeba\.[a-z-]+/1\b", file.read_text(encoding="utf-8"))}
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert used == set(BY_FORMAT) | TOML_FORMATS | RUN_FORMATS | ENGINE_FORMATS
    assert {form for form in used - ENGINE_FORMATS if form not in text} == set()


def test_examples_in_the_document_are_what_the_schemas_say() -> None:
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    shown = {BY_FORMAT[example["format"]] for example in examples}
    assert shown == set(SCHEMAS)
    for example in examples:
        check(BY_FORMAT[example["format"]], example)
