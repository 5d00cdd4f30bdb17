"""How engines take turns, when they are done, and what is kept of their runs; with engines that only wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count, cycle
from typing import Any

import numpy as np
import pytest

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.profiles import measure as measuring
from amoeba_deploy.profiles.latency_model import LatencyModel
from amoeba_deploy.profiles.measure import (
    LEAST_REPEATS,
    VISIT_REPEATS,
    Peak,
    Run,
    Subject,
    measure,
    run_once,
    summary,
)
from amoeba_deploy.profiles.row import measured_row
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

WORK = Workload(1, 4, 3)
FULL = Architecture("llama", 2, 16, 2, 2, 8, 32, 8, 16, True)


class Clock:
    """A clock that only engines advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, _seconds: float) -> None:
        pass


@dataclass
class Waiting:
    """An engine whose every feed takes the next of some seconds."""

    name: str
    clock: Clock
    times: Iterator[float]
    log: list[str] = field(default_factory=list)

    def reset(self) -> None:
        self.log.append(self.name)

    def feed(self, ids: Any, lengths: Any = None) -> Any:  # noqa: ARG002
        self.clock.now += next(self.times)
        return np.zeros((*ids.shape, 8), np.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(measuring, "time", found)
    return found


def steady(clock: Clock, name: str, log: list[str], seconds: float = 1.0) -> Subject:
    return Subject(lambda: Waiting(name, clock, cycle([seconds]), log), 10)


def test_a_steady_engine_is_done_after_the_fewest_runs_that_can_be_trusted(clock: Clock) -> None:
    found = measure([steady(clock, "a", [])], 8, WORK)[0]
    assert (found.repeats, found.stopped, found.noisy) == (LEAST_REPEATS, "confident", False)
    assert (found.ttft_ms, found.tpot_ms, found.p10, found.p90) == (1000, 1000, 1000, 1000)
    assert (found.prompt_rate, found.token_rate, found.token_rate_sd) == (4.0, 1.0, 0.0)


def test_engines_take_turns_in_orders_drawn_anew_and_each_round_has_each_of_them(clock: Clock) -> None:
    log: list[str] = []
    measure([steady(clock, name, log) for name in "abcd"], 8, WORK, repeats=6)
    # The first round warms up: two runs each.
    first, rest = log[:8], log[8:]
    assert sorted(first) == sorted("aabbccdd")
    rounds = ["".join(rest[at : at + 4]) for at in range(0, len(rest), 4)]
    assert len(rounds) == 5
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 1
    again: list[str] = []
    measure([steady(clock, name, again) for name in "abcd"], 8, WORK, repeats=6)
    assert again == log


def test_a_noisy_engine_goes_on_until_the_time_is_up_and_says_so(clock: Clock) -> None:
    noise = np.random.default_rng(0).uniform(1, 3, 10**4)
    engine = Waiting("noisy", clock, iter(noise))
    found = measure([Subject(lambda: engine)], 8, WORK, deadline=150.0)[0]
    assert found.stopped == "budget"
    assert found.noisy
    assert found.repeats > LEAST_REPEATS
    # The deadline passed during the last run, which takes at most 3 feeds of 3 s.
    assert 150 < clock.now < 150 + 9


def test_three_runs_are_made_however_short_the_time_is(clock: Clock) -> None:
    found = measure([steady(clock, "a", []), steady(clock, "b", [])], 8, WORK, deadline=-1.0)
    assert [(each.repeats, each.stopped) for each in found] == [(3, "budget")] * 2


def test_a_number_of_repeats_is_kept_whatever_the_noise(clock: Clock) -> None:
    found = measure([steady(clock, "a", [])], 8, WORK, repeats=20)[0]
    assert (found.repeats, found.stopped) == (20, "repeats")


def test_engines_that_do_not_fit_together_are_closed_and_opened_again(clock: Clock) -> None:
    opened, living = count(), set[int]()
    most = 0

    class Counted(Waiting):
        def __init__(self, name: str) -> None:
            super().__init__(name, clock, cycle([1.0]))
            self.number = next(opened)
            living.add(self.number)

        def reset(self) -> None:
            nonlocal most
            most = max(most, len(living))

        def __del__(self) -> None:
            living.discard(self.number)

    subjects = [Subject(lambda name=name: Counted(name), 10) for name in "abc"]  # type: ignore[misc]
    found = measure(subjects, 8, WORK, repeats=6, room=20)
    assert [each.repeats for each in found] == [6, 6, 6]
    assert most == 2
    assert next(opened) > 3
    assert not living
    assert VISIT_REPEATS == 3


def test_a_median_of_tokens_is_taken_of_each_run_and_the_median_of_runs_of_those() -> None:
    runs = [Run(0.1, (0.01, 0.01, 0.9)), Run(0.3, (0.03, 0.02, 0.03)), Run(0.2, (0.05, 0.05, 0.05))]
    found = summary(runs, WORK)
    assert found.ttft_ms == 200
    assert found.tpot_ms == pytest.approx(30)
    assert found.ttft_error == pytest.approx(0.5)
    assert found.p90 == pytest.approx(np.percentile([10, 10, 900, 30, 20, 30, 50, 50, 50], 90))
    assert (found.ttft_least, found.ttft_most) == (100, pytest.approx(300))
    assert (found.tpot_least, found.tpot_most) == (pytest.approx(10), pytest.approx(50))


@pytest.mark.parametrize(
    ("seconds", "interval"),
    [
        # One slow run in twenty: the median is known well, and the percentiles count.
        ([0.0100] * 19 + [0.0140], (10.0, 10.0)),
        # Half of the runs are slow: another time all may be fast, or all slow.
        ([0.0060, *[0.0100] * 4, *[0.0180] * 4, 0.0240], (6.0, 24.0)),
    ],
    ids=["steady", "noisy"],
)
def test_an_interval_reaches_from_the_fastest_run_to_the_slowest_where_the_median_is_not_known_well(
    seconds: list[float], interval: tuple[float, float]
) -> None:
    runs = [Run(0.1, (each, each)) for each in seconds]
    row = measured_row("onnx", "fp32", Shape(2, Fraction(1)), WORK, summary(runs, WORK), Peak(1, None), 1)
    found = LatencyModel.fit([row], lambda _: FULL)(FULL)
    assert found.source == "measured"
    assert found.tpot_interval == pytest.approx(interval)


def test_no_interval_reaches_below_zero_where_runs_were_interrupted() -> None:
    """Two of six runs took thirty times as long: half of the median's interval is more than the median itself."""
    runs = [Run(0.1, (each, each)) for each in (0.010, 0.010, 0.011, 0.011, 0.300, 0.310)]
    row = measured_row("onnx", "fp32", Shape(2, Fraction(1)), WORK, summary(runs, WORK), Peak(1, None), 1)
    assert row.tpot_error is not None and row.tpot_error > 1
    assert row.tpot_interval is not None
    assert 0 < row.tpot_interval[0] <= 10.0


def test_on_a_noisy_machine_no_interval_is_narrower_than_those_of_other_rows() -> None:
    """Engines that ran in turns may each have seen only a part of what the machine's speed can be."""
    half = FULL.subnet(1, 2, 32)
    swings = {FULL: [0.010] * 5 + [0.020] * 5, half: [0.004, *[0.005] * 5, *[0.006] * 4]}
    rows, sizes = [], {}
    for number, (of, seconds) in enumerate(swings.items()):
        runs = [Run(0.1, (each, each)) for each in seconds]
        shape = Shape(2 - number, Fraction(1))
        rows.append(measured_row("onnx", "fp32", shape, WORK, summary(runs, WORK), Peak(1, None), 1))
        sizes[shape] = of
    found = LatencyModel.fit(rows, sizes.__getitem__)(half)
    assert found.tpot_ms == pytest.approx(5.0)
    low, high = found.tpot_interval or (0.0, 0.0)
    assert low == pytest.approx(5 * 10 / 15, rel=0.05)
    assert high == pytest.approx(5 * 20 / 15, rel=0.05)


def test_energy_is_that_of_a_generated_token(clock: Clock) -> None:
    class Meter:
        used = 0.0

        def energy_j(self) -> float:
            self.used += 6.0
            return self.used

    run = run_once(Waiting("a", clock, cycle([1.0])), 8, Workload(2, 4, 4), Meter())  # type: ignore[arg-type]
    assert run.energy_j == 6.0
    assert summary([run], Workload(2, 4, 4)).energy_per_token_j == 1.0


def test_a_run_of_a_real_clock_measures_what_an_engine_waits() -> None:
    class Sleeping(Waiting):
        def feed(self, *_: Any, **__: Any) -> Any:
            time.sleep(0.01)

    run = run_once(Sleeping("a", Clock(), cycle([0.0])), 8, WORK)
    assert run.first >= 0.01
    assert len(run.steps) == 2
    assert min(run.steps) >= 0.01


def test_of_fewer_than_six_runs_no_median_is_known() -> None:
    runs = [Run(0.1, (0.01, 0.01))] * 6
    assert summary(runs[:5], WORK).noisy
    assert not summary(runs, WORK).noisy
