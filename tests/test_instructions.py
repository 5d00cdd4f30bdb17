"""What stage 2 tunes on: files in each form, data sets by name from invented copies, prompts, and what is held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from amoeba_deploy.errors import BadInput
from amoeba_deploy.stage2.instructions import Example, Instructions, RunningText, read_examples, split

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"instruction": "Name a baker.", "output": "Weven."},
    {"instruction": "Name one.", "input": "A miller", "output": "Bodo."},
]
EXAMPLES = (Example("Name a baker.", "", "Weven.", "line 1"), Example("Name one.", "A miller", "Bodo.", "line 2"))


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder: Path, name: str, content: str) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return str(file)


def read(source: str) -> Instructions:
    data = read_examples(source)
    assert isinstance(data, Instructions)
    return data


def contents(data: Instructions) -> list[tuple[str, str, str]]:
    return [(each.instruction, each.input, each.output) for each in data.examples]


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``$AMOEBA_DATA``; the library keeps its own files in the test's folder too."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("AMOEBA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "library"))
    return tmp_path / "data"


# Files


def test_a_jsonl_file_holds_an_example_a_line(tmp_path: Path) -> None:
    file = put(tmp_path, "own.jsonl", lines(ROWS))
    data = read(file)
    assert data.examples == EXAMPLES
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert data.facts == {"source": "own.jsonl", "digest": f"sha256:{digest}"}
    assert (data.source, data.named) == (file, False)


def test_a_json_file_is_a_list_of_examples(tmp_path: Path) -> None:
    data = read(put(tmp_path, "own.json", json.dumps(ROWS, indent=1)))
    assert [example.place for example in data.examples] == ["entry 1", "entry 2"]
    assert contents(data) == [("Name a baker.", "", "Weven."), ("Name one.", "A miller", "Bodo.")]


def test_every_instance_of_self_instruct_is_an_example(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "0"}]}
    data = read(put(tmp_path, "own.jsonl", lines([row, ROWS[0]])))
    assert contents(data) == [("Add.", "1 1", "2"), ("Add.", "", "0"), ("Name a baker.", "", "Weven.")]
    assert [example.place for example in data.examples] == ["line 1", "line 1", "line 2"]


def test_a_line_ends_at_a_line_feed_only_and_empty_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    row = json.dumps({"instruction": "a\u2028b", "output": "c"}, ensure_ascii=False)
    (example,) = read(put(tmp_path, "own.jsonl", f"\n{row}\n\n")).examples
    assert example == Example("a\u2028b", "", "c", "line 2")


def test_an_input_that_is_null_is_none(tmp_path: Path) -> None:
    (example,) = read(put(tmp_path, "own.jsonl", lines([ROWS[0] | {"input": None}]))).examples
    assert example.input == ""


def test_examples_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    data = read(put(tmp_path, "own.jsonl", lines([ROWS[0] | {"output": ""}, ROWS[1], ROWS[0] | {"output": " \n"}])))
    assert data.examples == (EXAMPLES[1],)
    assert data.facts["skipped"] == 2


def test_any_other_file_is_text(tmp_path: Path) -> None:
    data = read_examples(put(tmp_path, "own.txt", "One line.\nAnother: é.\n"))
    assert isinstance(data, RunningText)
    assert data.text == "One line.\nAnother: é.\n"
    assert data.facts["source"] == "own.txt"
    assert data.facts["digest"].startswith("sha256:")


def test_the_seed_tasks_of_self_instruct_are_read() -> None:
    file = SHARED / "data" / "instructions" / "stanford_seed_tasks.jsonl"
    if not file.is_file():
        pytest.skip("../shared/data/instructions is not here")
    data = read(str(file))
    assert len(data.examples) == 175
    assert "skipped" not in data.facts
    assert sum(bool(example.input) for example in data.examples) == 125


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", "", r"a\.jsonl: is empty; give instructions"),
        ("a.txt", " \n", r"a\.txt: is empty; give instructions"),
        ("a.json", "[]", r"a\.json: has no answers to learn from"),
        ("a.jsonl", lines([ROWS[0] | {"output": ""}]), r"a\.jsonl: has no answers to learn from"),
        ("a.jsonl", lines(ROWS) + "{\n", r"a\.jsonl, line 3: is not valid JSON \(Expecting"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: is not valid JSON \("),
        ("a.json", lines(ROWS), r"a\.json, line 2: is not valid JSON \(Extra data\); .* named \.jsonl"),
        ("a.json", json.dumps({"data": ROWS}), r"a\.json: is not a JSON list of objects with instruction"),
        ("a.jsonl", "\n[1]\n", r"a\.jsonl, line 2: is not a JSON object of instruction, input and output"),
        ("a.json", json.dumps([ROWS[0], 1]), r"a\.json, entry 2: is not a JSON object of instruction"),
        ("a.jsonl", lines([{"output": "b"}]), r"a\.jsonl, line 1: has no 'instruction'; each example needs"),
        ("a.jsonl", lines([ROWS[0], {"instruction": "a"}]), r"a\.jsonl, line 2: has no 'output'; each example"),
        ("a.jsonl", lines([ROWS[0] | {"output": 4}]), r"line 1: 'output' is not text but int; put it in quotes"),
        ("a.jsonl", lines([ROWS[0] | {"output": None}]), r"line 1: 'output' is not text but NoneType"),
        ("a.jsonl", lines([ROWS[0] | {"input": ["a"]}]), r"line 1: 'input' is not text but list"),
        ("a.jsonl", lines([ROWS[0] | {"output": "\ud800"}]), r"line 1: 'output' holds half a character"),
        ("a.jsonl", lines([{"instruction": "a", "instances": {}}]), r"line 1: 'instances' is not a list of objects"),
        ("a.jsonl", lines([{"instruction": "a", "instances": ["b"]}]), r"line 1: 'instances' is not a list of"),
        ("a.jsonl", lines([{"instruction": "a", "instances": [{"input": ""}]}]), r"line 1: has no 'output'"),
    ],
)
def test_a_file_that_is_not_as_it_should_be(tmp_path: Path, name: str, content: str, wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted):
        read_examples(put(tmp_path, name, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.jsonl: cannot be read \(No such file"):
        read_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"latin\.txt: is not a text file in UTF-8"):
        read_examples(str(tmp_path / "latin.txt"))


# Names


@pytest.mark.parametrize(("name", "dataset"), [("alpaca-gpt4", "vicgalle/alpaca-gpt4"), ("alpaca", "tatsu-lab/alpaca")])
def test_alpaca_by_name(copies: Path, name: str, dataset: str) -> None:
    rows = [{"input": "", "text": "all of it"} | row for row in [*ROWS, ROWS[0] | {"output": ""}]]
    put(copies, f"{name}/data/train-00000-of-00001.jsonl", lines(rows))
    data = read(name)
    assert contents(data) == [("Name a baker.", "", "Weven."), ("Name one.", "A miller", "Bodo.")]
    assert (data.source, data.named) == (name, True)
    digest = data.facts.pop("digest")
    assert digest.startswith("sha256:")
    where = {"dataset": dataset, "config": "default", "split": "train", "from": "local copy"}
    assert data.facts == {"source": name, **where, "skipped": 1}


def test_dolly_by_name_has_columns_of_its_own(copies: Path) -> None:
    row = {"instruction": "Who bakes?", "context": "Weven bakes.", "response": "Weven", "category": "closed_qa"}
    put(copies, "dolly/databricks-dolly-15k.jsonl", lines([row, row | {"context": ""}]))
    data = read("dolly")
    assert contents(data) == [("Who bakes?", "Weven bakes.", "Weven"), ("Who bakes?", "", "Weven")]
    assert data.facts["dataset"] == "databricks/databricks-dolly-15k"


def test_a_text_by_name_is_read_up_to_a_number_of_characters(copies: Path) -> None:
    put(copies, "wikitext2/wikitext-2-raw-v1/train.jsonl", lines([{"text": f"line {n:04}\n"} for n in range(1000)]))
    data = read_examples("wikitext2", characters=25)
    assert isinstance(data, RunningText)
    assert data.text == "line 0000\nline 0001\nline 0002\n"
    assert data.facts["from"] == "local copy"
    assert data.facts["digest"].startswith("sha256:")


def test_a_copy_of_instructions_with_other_columns(copies: Path) -> None:
    put(copies, "dolly/databricks-dolly-15k.jsonl", lines(ROWS))
    with pytest.raises(BadInput, match="the split 'train' has no column 'context' but instruction, "):
        read_examples("dolly")


def test_a_copy_of_instructions_that_are_no_text(copies: Path) -> None:
    put(copies, "alpaca/data/train.jsonl", lines([{"instruction": "a", "input": "", "output": 1}]))
    with pytest.raises(BadInput, match="alpaca: row 0 of 'train' holds more than text in its columns"):
        read_examples("alpaca")


def test_a_copy_of_instructions_without_its_file_says_which(copies: Path) -> None:
    (copies / "alpaca-gpt4").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"alpaca-gpt4: has no file data/train\*\.parquet .* of vicgalle/alpaca-gpt4"):
        read_examples("alpaca-gpt4")


def test_a_name_that_nothing_has_is_answered_with_those_that_are_known() -> None:
    known = r"\(alpaca, alpaca-gpt4, bookcorpus, c4, dolly, ptb, wikitext2\)"
    with pytest.raises(
        BadInput, match=rf"^alpaca-gtp4: is neither a file nor .* {known}; did you mean 'alpaca-gpt4'\?$"
    ):
        read_examples("alpaca-gtp4")
    with pytest.raises(BadInput, match=rf"^xyz: is neither a file nor a data set known by name {known}$"):
        read_examples("xyz")


def test_questions_are_nothing_to_tune_on() -> None:
    with pytest.raises(BadInput, match=r"^mmlu: holds multiple-choice questions; tune on instructions or a text"):
        read_examples("mmlu")


# Prompts


def test_the_alpaca_prompt_is_that_of_the_recipe() -> None:
    without, given = EXAMPLES
    assert without.prompt("alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a baker.\n\n### Response: "
    )
    assert given.prompt("alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName one.\n\n### Input:\nA miller\n\n### Response: "
    )


def test_the_plain_prompt_is_instruction_and_input_on_lines() -> None:
    assert [example.prompt("plain") for example in EXAMPLES] == ["Name a baker.\n", "Name one.\nA miller\n"]


def test_braces_in_an_instruction_stay_as_they_are() -> None:
    assert "### Instruction:\n{input} {}\n" in Example("{input} {}", "{instruction}", "c", "").prompt("alpaca")


# Held out


def test_the_last_share_of_instructions_is_held_out_as_text() -> None:
    examples = tuple(Example(f"Say {n}.", "", f"It is {n}.", f"line {n}") for n in range(10))
    data = Instructions(examples, "here", False, {"source": "here"})
    training, held = split(data, 0.25, "plain")
    assert isinstance(training, Instructions)
    assert training.examples == examples[:7]
    assert held == "Say 7.\nIt is 7.\n\nSay 8.\nIt is 8.\n\nSay 9.\nIt is 9."
    assert training.facts == {"source": "here", "held_out": 3}
    assert "### Response: It is 9." in split(data, 0.01)[1], "at least one"


def test_the_last_share_of_a_text_begins_a_line() -> None:
    text = "".join(f"This is line {n:02}.\n" for n in range(50))
    training, held = split(RunningText(text, "here", {}), 0.1)
    assert isinstance(training, RunningText)
    assert training.text + held == text
    assert held.startswith("This is line 45.")
    assert training.facts == {"held_out_characters": len(held)}
    assert len(split(RunningText("a\n" + 1000 * "b", "here", {}), 0.1)[1]) == 100, "no line begins near there"


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(BadInput, match=r"a share of .* cannot be held out; give one between 0 and 1"):
        split(RunningText("a text\n", "here", {}), share)


def test_what_is_held_out_leaves_something() -> None:
    with pytest.raises(BadInput, match=r"here: is too short to hold out a share of 0\.1"):
        split(Instructions(EXAMPLES[:1], "here", False, {}), 0.1)
