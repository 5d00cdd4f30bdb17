"""Calibration data by name, from copies in the hub's layout that are made here, and from what the library has cached.

Contents are invented, or taken from real files beside the project where they are at hand. Nothing asks the network.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.evaluation import Question
from amoeba_deploy.named_data import QUESTIONS, TEXTS, questions_by_name, text_by_name

WIKITEXT = "wikitext2/wikitext-2-raw-v1/train-00000-of-00001.parquet"
Rows = list[dict[str, Any]]


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``$AMOEBA_DATA``; the library keeps its own files in the test's folder too."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("AMOEBA_DATA", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "library"))
    return folder


def put(file: Path, rows: Rows) -> None:
    """Write rows as Parquet, JSON lines or compressed JSON lines, as the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines, encoding="utf-8")


def texts(*rows: str, column: str = "text") -> Rows:
    return [{column: row} for row in rows]


def asked(subject: str, count: int, mark: str = "") -> Rows:
    """Invented questions of one subject in the columns of cais/mmlu; the right choice goes round."""
    choices = ["one", "two", "three", "four"]
    return [
        {"question": f"{mark}{subject} {n}?", "subject": subject, "choices": choices, "answer": n % 4}
        for n in range(count)
    ]


def put_mmlu(copies: Path, dev: Rows, validation: Rows, ending: str = "parquet") -> None:
    put(copies / f"mmlu/all/dev-00000-of-00001.{ending}", dev)
    put(copies / f"mmlu/all/validation-00000-of-00001.{ending}", validation)


# Text


def test_wikitext_is_the_published_file_with_its_blank_lines(copies: Path) -> None:
    put(copies / WIKITEXT, texts("", " = A title = \n", "", " A line . \n", " Another . \n"))
    text, facts = text_by_name("wikitext2", 10_000)
    assert text == " \n = A title = \n \n A line . \n Another . \n"
    assert facts == {
        "source": "wikitext2",
        "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "train",
        "from": "local copy",
    }


def test_rows_of_other_texts_are_joined_over_all_files_of_the_split(copies: Path) -> None:
    put(copies / "bookcorpus/plain_text/train/0001.parquet", texts("third", ""))
    put(copies / "bookcorpus/plain_text/train/0000.parquet", texts("first", "second"))
    put(copies / "c4/en/c4-train.00000-of-00002.json.gz", texts("a page\nof lines"))
    put(copies / "c4/en/c4-train.00001-of-00002.json.gz", texts("the next"))
    put(copies / "ptb/penn_treebank/train/0000.parquet", texts("<unk> is n", "so it is", column="sentence"))
    put(copies / "ptb/penn_treebank/test/0000.parquet", texts("not this", column="sentence"))
    assert text_by_name("bookcorpus", 1000)[0] == "first\nsecond\nthird\n"
    assert text_by_name("c4", 1000)[0] == "a page\nof lines\n\nthe next"
    assert text_by_name("ptb", 1000)[0] == "<unk> is n\nso it is"


@pytest.mark.parametrize("name", ["wikitext2", "bookcorpus"])
def test_a_larger_request_continues_a_smaller_one_by_whole_rows(copies: Path, name: str) -> None:
    rows = [f" Line {n} of {n % 7 * 'many '}words . \n" if n % 3 else "" for n in range(200)]
    put(copies / WIKITEXT, texts(*rows))
    put(copies / "bookcorpus/plain_text/train/0000.parquet", texts(*rows))
    data, before = TEXTS[name], ""
    whole = data.join.join(row or data.blank for row in rows)
    for characters in (1, 2, 17, 100, 1001, len(whole), 10**6):
        text, _ = text_by_name(name, characters)
        assert whole.startswith(text)
        assert text.startswith(before)
        assert min(characters, len(whole)) <= len(text) < characters + 60
        before = text
    assert before == whole


def test_the_head_of_a_real_text_comes_back_as_it_is(copies: Path) -> None:
    file = SHARED / "data" / "wikitext2" / "train_head.raw.txt"
    if not file.is_file():
        pytest.skip("../shared/data/wikitext2 is not here")
    whole = file.read_text(encoding="utf-8")
    rows = texts(*whole.splitlines(keepends=True))
    put(copies / WIKITEXT, rows)
    text, _ = text_by_name("wikitext2", 100_000)
    assert 100_000 <= len(text) < 110_000
    assert whole.startswith(text)
    assert text_by_name("wikitext2", 10**9)[0] == whole


# Questions


def test_a_question_has_five_worked_examples_before_it(copies: Path) -> None:
    put_mmlu(copies, asked("sub_a", 6, "dev ") + asked("b", 5, "dev "), asked("b", 1) + asked("sub_a", 1))
    questions, facts = questions_by_name("mmlu", 1)
    choices = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    shots = "".join(f"dev b {n}?\n{choices} {'ABCDA'[n]}\n\n" for n in range(5))
    head = "The following are multiple choice questions (with answers) about b.\n\n"
    assert questions == [Question(f"{head}{shots}b 0?\n{choices}", ("A", "B", "C", "D"), 0)]
    assert facts == {
        "source": "mmlu",
        "dataset": "cais/mmlu",
        "config": "all",
        "split": "validation",
        "from": "local copy",
        "shots": 5,
        "shots_split": "dev",
    }
    second = questions_by_name("mmlu", 2)[0][1].question
    assert second.startswith(
        "The following are multiple choice questions (with answers) about sub a.\n\ndev sub_a 0?\n"
    )
    assert "dev sub_a 5?" not in second


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_subjects_take_turns_in_alphabetical_order(copies: Path, ending: str) -> None:
    dev = [row for subject in ("c", "a", "b") for row in asked(subject, 5, "dev ")]
    put_mmlu(copies, dev, asked("c", 3) + asked("a", 1) + asked("b", 2), ending)
    questions, _ = questions_by_name("mmlu", 6)
    assert [item.question.splitlines()[-6] for item in questions] == ["a 0?", "b 0?", "c 0?", "b 1?", "c 1?", "c 2?"]
    assert [item.gold for item in questions] == [0, 0, 0, 1, 1, 2]
    assert questions_by_name("mmlu", 4)[0] == questions[:4]


def test_real_questions_make_the_published_prompt(copies: Path) -> None:
    folder = SHARED / "data" / "mmlu"
    if not folder.is_dir():
        pytest.skip("../shared/data/mmlu is not here")
    dev, test = (
        [json.loads(line) for line in (folder / name).open(encoding="utf-8")]
        for name in ("dev_5shot.jsonl", "test.jsonl")
    )
    put_mmlu(copies, *([row | {"answer": row["gold"]} for row in rows] for rows in (dev, test)))
    questions, _ = questions_by_name("mmlu", 60)
    subjects = sorted({row["subject"] for row in test})
    assert len(subjects) == 57
    for number, item in enumerate(questions):
        subject = subjects[number % 57]
        row = [row for row in test if row["subject"] == subject][number // 57]
        assert item.question.startswith(
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        )
        assert item.question.count("\nAnswer:") == 6
        assert item.question.endswith(f"{row['question']}\n" + letters(row["choices"]))
        assert item.gold == row["gold"]
    first = questions[0].question
    assert first.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
        "Statement 1 | If aH is an element of a factor group, then |aH| divides |a|."
    )
    assert first.endswith(
        "\n\nFind the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )


def letters(choices: list[str]) -> str:
    return "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True)) + "Answer:"


# The library, its cache and its silence


def offline(home: Path, code: str) -> str:
    """What a new interpreter prints that has no network and the library's files in ``home``; it must say no more."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "AMOEBA_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"from amoeba_deploy.named_data import text_by_name, questions_by_name\n{code}"],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_network_or_copy_every_name_fails_at_once_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "from amoeba_deploy.errors import BadInput\n"
        f"calls = [(text_by_name, name) for name in {sorted(TEXTS)}]\n"
        f"calls += [(questions_by_name, name) for name in {sorted(QUESTIONS)}]\n"
        "for call, name in calls:\n"
        "    try:\n        call(name, 1)\n"
        "    except BadInput as error:\n        print(error)\n"
    )
    lines = offline(tmp_path / "home", code).splitlines()
    assert len(lines) == len(TEXTS) + len(QUESTIONS)
    for line, data in zip(lines, [TEXTS[name] for name in sorted(TEXTS)] + list(QUESTIONS.values()), strict=True):
        assert line.startswith(f"{data.name}: the hub did not give {data.dataset} (Couldn't reach")
        assert line.endswith(f"connect to it, or keep a copy in the folder $AMOEBA_DATA/{data.name}")


def test_what_the_library_has_cached_serves_without_network(tmp_path: Path) -> None:
    from datasets import load_dataset_builder

    config, commit = "wikitext-2-raw-v1", "0123456789abcdef" * 2 + "01234567"
    hub = tmp_path / "wikitext"
    put(hub / config / "train-00000-of-00001.parquet", texts("", " A line . \n"))
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n---\n"
    )
    cached = tmp_path / "home" / "datasets" / "Salesforce___wikitext" / config / "0.0.0" / commit
    load_dataset_builder(str(hub), config, cache_dir=str(tmp_path / "other")).download_and_prepare(str(cached))
    text, facts = json.loads(
        offline(tmp_path / "home", "import json\nprint(json.dumps(text_by_name('wikitext2', 99)))")
    )
    assert text == " \n A line . \n"
    assert (facts["from"], facts["revision"]) == ("hub", commit)


def test_the_terminal_stays_clean_and_settings_come_back(copies: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled

    before = (
        datasets.utils.are_progress_bars_disabled(),
        are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
    )
    put(copies / WIKITEXT, texts("a line"))
    text_by_name("wikitext2", 1)
    (copies / WIKITEXT).write_bytes(b"PAR1 but no more")
    with pytest.raises(
        BadInput, match=r"wikitext2: cannot be read \(.*\); copy the files of Salesforce/wikitext again"
    ):
        text_by_name("wikitext2", 1)
    assert capfd.readouterr() == ("", "")
    after = (
        datasets.utils.are_progress_bars_disabled(),
        are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
    )
    assert after == before


def test_a_missing_library_is_named_with_what_installs_it(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(copies / WIKITEXT, texts("a line"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ToolchainMissing, match=r"^wikitext2 is read by .*; run pip install 'amoeba-deploy\[evaluate\]'$"
    ):
        text_by_name("wikitext2", 1)


# Names and copies that are wrong


def test_unknown_names_are_answered_with_those_that_are_known() -> None:
    with pytest.raises(
        BadInput, match=r"^pile: is not the name of text that .*; give one of bookcorpus, c4, ptb, wiki"
    ):
        text_by_name("pile", 1)
    with pytest.raises(
        BadInput, match=r"^wikitext2: is not the name of questions that Amoeba knows; give one of mmlu$"
    ):
        questions_by_name("wikitext2", 1)


def test_a_copy_without_the_split_says_which_file_it_needs(copies: Path) -> None:
    put(copies / "wikitext2/wikitext-2-raw-v1/test-00000-of-00001.parquet", texts("a line"))
    wanted = r"wikitext2: has no file wikitext-2-raw-v1/train\*\.parquet or .*; copy the split 'train' of Salesforce/"
    with pytest.raises(BadInput, match=wanted):
        text_by_name("wikitext2", 1)
    put(copies / "mmlu/all/validation-00000-of-00001.parquet", asked("a", 1))
    with pytest.raises(BadInput, match=r"mmlu: has no file all/dev\*\.parquet .*; copy the split 'dev' of cais/mmlu"):
        questions_by_name("mmlu", 1)


def test_a_copy_is_read_by_its_files_whatever_its_card_lists(copies: Path) -> None:
    put(copies / WIKITEXT, texts("a line"))
    card = "---\nconfigs:\n- config_name: other\n  data_files:\n  - split: train\n    path: other/train-*\n---\n"
    (copies / "wikitext2" / "README.md").write_text(card)
    assert text_by_name("wikitext2", 1)[0] == "a line"


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"line": "a", "n": 1}], "the split 'train' has no column 'text' but line, n; use files as Salesforce/wiki"),
        ([{"text": 1}], "the column 'text' of 'train' holds more than text"),
        ([{"text": "a"}, {"text": None}], "the column 'text' of 'train' holds more than text"),
    ],
)
def test_text_rows_that_are_not_as_on_the_hub(copies: Path, rows: Rows, wanted: str) -> None:
    put(copies / WIKITEXT, rows)
    with pytest.raises(BadInput, match=wanted):
        text_by_name("wikitext2", 100)


def test_a_split_without_text(copies: Path) -> None:
    put(copies / "bookcorpus/plain_text/train/0000.parquet", texts(""))
    with pytest.raises(BadInput, match="bookcorpus: the split 'train' holds no text; use another copy"):
        text_by_name("bookcorpus", 1)


@pytest.mark.parametrize(
    ("dev", "validation", "wanted"),
    [
        (asked("a", 5), asked("a", 2), "has 2 questions where 3 are needed; ask for fewer"),
        (asked("a", 4), asked("a", 3), "'dev' has 4 questions about 'a' where 5 are needed; use a whole copy"),
        (asked("b", 5), asked("a", 3), "'dev' has 0 questions about 'a' where 5 are needed; use a whole copy"),
        (
            [{"question": "?"}],
            [{"question": "?"}],
            "the split 'dev' has no column 'subject' but question; use files as cais",
        ),
        ([{"question": "?"}], asked("a", 3), "row 0 of 'dev' is not a question of four choices and an answer"),
        (asked("a", 5), [row | {"answer": 4} for row in asked("a", 3)], "row 0 of 'validation' is not a question of"),
        (asked("a", 5), [row | {"choices": ["x"]} for row in asked("a", 3)], "row 0 of 'validation' is not a question"),
    ],
)
def test_questions_that_are_too_few_or_damaged(copies: Path, dev: Rows, validation: Rows, wanted: str) -> None:
    put_mmlu(copies, dev, validation)
    with pytest.raises(BadInput, match=wanted):
        questions_by_name("mmlu", 3)
