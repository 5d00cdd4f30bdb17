"""What a tuning run reports: JSON lines, TensorBoard's events, and standard error."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.progress import Progress
from amoeba_deploy.stage2.log import TuningLog, time_text


def report(log: TuningLog, first: int, last: int, seconds: float = 0.5) -> None:
    """Report steps as a run does; everything but the seconds is decided by the step."""
    for number in range(first, last + 1):
        losses = {"12x1": 1 / number, "6x0.5": 2 / number, "9x0.75": 3 / number, f"{7 + number % 2}x1": 5 / number}
        log.step(number, losses, rate=2e-4, gradient=0.1 * number, tokens=900, seconds=seconds)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(file: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(file)]


def test_a_step_is_a_line(tmp_path: Path) -> None:
    with TuningLog(tmp_path / "log.jsonl", None, QUIET, 10) as log:
        report(log, 1, 2)
        assert len(lines(tmp_path / "log.jsonl")) == 2  # before it is closed
    assert (tmp_path / "log.jsonl").read_text().splitlines()[1] == (
        '{"step": 2, "loss": {"12x1": 0.5, "6x0.5": 1.0, "9x0.75": 1.5, "7x1": 2.5}, "lr": 0.0002, '
        '"gradient_norm": 0.2, "tokens": 900, "seconds": 0.5}'
    )


def test_a_resumed_run_reports_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    with TuningLog(tmp_path / "whole", None, QUIET, 10) as log:
        report(log, 1, 10)
    with TuningLog(tmp_path / "log", None, QUIET, 10) as log:
        report(log, 1, 7, seconds=0.9)
    with (tmp_path / "log").open("a") as file:
        file.write('{"step": 3')  # killed while it wrote
    with TuningLog(tmp_path / "log", None, QUIET, 10, 5) as log:
        report(log, 6, 10)
    assert without_times(tmp_path / "log") == without_times(tmp_path / "whole")
    assert [line["seconds"] for line in lines(tmp_path / "log")] == [0.9] * 5 + [0.5] * 5
    with TuningLog(tmp_path / "log", None, QUIET, 10):
        assert lines(tmp_path / "log") == []  # begun again


def test_lines_are_json_whatever_the_loss(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    with TuningLog(tmp_path / "log", None, Progress(), 1) as log:
        losses = {"4x1": float("nan"), "2x1": float("inf")}
        log.step(1, losses, rate=1.0, gradient=float("nan"), tokens=1, seconds=1.0)
    found = json.loads((tmp_path / "log").read_text(), parse_constant=refuse)
    assert (found["loss"], found["gradient_norm"]) == ({"4x1": None, "2x1": None}, None)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = tmp_path / "board"
    with TuningLog(tmp_path / "log", board, QUIET, 6) as log:
        report(log, 1, 4)
    with TuningLog(tmp_path / "log", board, QUIET, 6, 2) as log:  # steps 3 and 4 were lost
        report(log, 3, 6)
    found = events(board)
    for tag, wanted in (
        ("loss/largest", lambda step: 1 / step),
        ("loss/smallest", lambda step: 2 / step),
        ("loss/random", lambda step: 4 / step),
        ("loss_by_depth/9", lambda step: 3 / step),
        ("lr", lambda _: 2e-4),
        ("gradient_norm", lambda step: 0.1 * step),
        ("tokens_per_second", lambda _: 1800),
    ):
        assert [step for step, _ in found[tag]] == [1, 2, 3, 4, 5, 6], tag
        assert [value for _, value in found[tag]] == pytest.approx([wanted(step) for step in range(1, 7)]), tag
    assert [step for step, _ in found["loss_by_depth/7"]] == [2, 4, 6]


def test_tensorboard_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ToolchainMissing, match=r"pip install 'amoeba-deploy\[tensorboard\]'"):
        TuningLog(tmp_path / "log", tmp_path / "board", QUIET, 6)
    assert not (tmp_path / "log").exists()


def test_without_a_terminal_there_are_some_twenty_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningLog(tmp_path / "log", None, Progress(), 200) as log:
        report(log, 1, 200)
    said = capsys.readouterr()
    assert said.out == ""
    shown = said.err.splitlines()
    assert [line.split()[1] for line in shown] == ["1/200", *(f"{step}/200" for step in range(10, 201, 10))]
    assert shown[0] == "step 1/200  12x1 1.000  6x0.5 2.000  random 4.000  1800 tokens/s  2 min left"
    assert shown[-1].endswith("1800 tokens/s")


def test_a_resumed_run_says_at_once_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningLog(tmp_path / "log", None, Progress(), 200, 13) as log:
        report(log, 14, 25)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["14/200", "20/200"]


def test_losses_are_smoothed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningLog(tmp_path / "log", None, Progress(), 100) as log:
        for number in range(1, 101):
            losses = {"4x1": 1.0 if number % 2 else 3.0}
            log.step(number, losses, rate=1.0, gradient=1.0, tokens=10, seconds=1.0)
    last = capsys.readouterr().err.splitlines()[-1].split()
    assert last[:3] == ["step", "100/100", "4x1"]
    assert float(last[3]) == pytest.approx(2, abs=0.1)
    assert "random" not in last


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningLog(tmp_path / "log", None, QUIET, 20) as log:
        report(log, 1, 20)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with TuningLog(tmp_path / "log", None, Progress(), 20, 10) as log:
            report(log, 11, 12)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says at the end of a terminal that nobody writes to any more
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    text = shown.decode()
    assert "12/20" in text
    assert "12x1 0.087  6x0.5 0.174  9x0.75  7x1" in text
    assert "step" not in text


def test_only_the_main_process_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningLog(tmp_path / "log", tmp_path / "board", Progress(), 20, main=False) as log:
        report(log, 1, 20)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="absent/log: cannot be written"):
        TuningLog(tmp_path / "absent" / "log", None, QUIET, 20)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (40.4, "40 s"), (725, "12 min"), (3599, "1 h 0 min"), (7800, "2 h 10 min")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
