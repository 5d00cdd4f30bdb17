"""Results by everything that decides them: found again, never mistaken, and no failure where they cannot be kept."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from amoeba_deploy.evaluation_cache import remembered

FACTS = {"who": {"model": "sha256:1"}, "text": "sha256:2", "sequence": 256}


class Counted:
    """Something to measure that counts how often it is."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return {"loss": 1.5, "times": self.times}


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    measure = Counted()
    assert remembered(FACTS, measure, folder=tmp_path) == ({"loss": 1.5, "times": 1}, False)
    assert remembered(FACTS, measure, folder=tmp_path) == ({"loss": 1.5, "times": 1}, True)
    assert measure.times == 1


def test_the_order_of_facts_does_not_matter(tmp_path: Path) -> None:
    measure = Counted()
    remembered(FACTS, measure, folder=tmp_path)
    assert remembered(dict(reversed(FACTS.items())), measure, folder=tmp_path)[1]


@pytest.mark.parametrize(
    "change", [{"sequence": 128}, {"text": "sha256:3"}, {"who": {"model": "sha256:9"}}, {"limit": None}], ids=str
)
def test_another_fact_is_another_result(change: dict[str, Any], tmp_path: Path) -> None:
    measure = Counted()
    remembered(FACTS, measure, folder=tmp_path)
    assert not remembered(FACTS | change, measure, folder=tmp_path)[1]
    assert remembered(FACTS, measure, folder=tmp_path)[0]["times"] == 1


def test_a_result_may_be_measured_anew(tmp_path: Path) -> None:
    measure = Counted()
    remembered(FACTS, measure, folder=tmp_path)
    assert remembered(FACTS, measure, fresh=True, folder=tmp_path) == ({"loss": 1.5, "times": 2}, False)
    assert remembered(FACTS, measure, folder=tmp_path)[0]["times"] == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "amoeba.evaluation/2"}', "\x00\xff"])
def test_a_damaged_file_is_measured_and_written_again(text: str, tmp_path: Path) -> None:
    measure = Counted()
    remembered(FACTS, measure, folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text(text, encoding="latin-1")
    assert not remembered(FACTS, measure, folder=tmp_path)[1]
    assert remembered(FACTS, measure, folder=tmp_path)[1]


def test_a_file_of_other_facts_under_this_name_is_not_taken(tmp_path: Path) -> None:
    measure = Counted()
    remembered(FACTS, measure, folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    value = json.loads(file.read_text(encoding="utf-8"))
    value["facts"]["text"] = "sha256:other"
    file.write_text(json.dumps(value), encoding="utf-8")
    assert not remembered(FACTS, measure, folder=tmp_path)[1]


def test_where_nothing_can_be_kept_nothing_fails(tmp_path: Path) -> None:
    """The folder is a file: whoever asks has the result, and has it measured again the next time."""
    place = tmp_path / "cache"
    place.write_text("in the way", encoding="utf-8")
    measure = Counted()
    assert remembered(FACTS, measure, folder=place)[0]["loss"] == 1.5
    assert remembered(FACTS, measure, folder=place)[0]["times"] == 2
    assert place.read_text(encoding="utf-8") == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_no_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert remembered(FACTS, Counted(), folder=tmp_path / "evaluations")[0]["loss"] == 1.5


def test_several_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    begin, found = threading.Barrier(8), []

    def ask() -> None:
        begin.wait()
        found.append(remembered(FACTS, Counted(), folder=tmp_path)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"loss": 1.5, "times": 1}] * 8
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
    assert remembered(FACTS, Counted(), folder=tmp_path)[1]


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no logits")

    with pytest.raises(RuntimeError, match="no logits"):
        remembered(FACTS, fail, folder=tmp_path)
    assert not list(tmp_path.iterdir())
