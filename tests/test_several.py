"""A search for several devices: an answer each, and the one shape that suits all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import amoeba, sentence
from hypothesis import given
from hypothesis import strategies as st
from test_search import WORKLOAD, candidate

from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.search import Budget, Candidate, search
from amoeba_deploy.search.together import Single, best_for_all, why_none

COMMON = ("search", "--flow", "onnx", "--precision", "int4", "--quiet")
BOTH = (*COMMON, "--device", "orin-nx", "--device", "agx-orin-64")


def named(depth: int, **judged: Any) -> Candidate:
    """A candidate whose subnet is told by its depth."""
    flow, precision = judged.pop("flow", "onnx"), judged.pop("precision", "int4")
    made = replace(candidate(depth, **judged), identity=((depth, 4, 512),))
    return replace(made, flow=flow, precision=precision)


def single(device: str, found: list[Candidate], ms: float) -> Single:
    """A device's own search."""
    budget = Budget("tpot", ms, None)
    return Single(device, search(found, budget, WORKLOAD), budget, WORKLOAD.tokens)


# The best shape for all


def test_the_best_for_all_fits_every_device() -> None:
    a = single("a", [named(8, loss=1, tpot=9), named(7, loss=2, tpot=8), named(6, loss=3, tpot=7)], 10)
    b = single("b", [named(8, loss=1, tpot=90), named(7, loss=2, tpot=40), named(6, loss=3, tpot=30)], 50)
    found = best_for_all([a, b])
    assert found is not None
    assert [one.shape.depth for one in found.candidates] == [7, 7]
    assert (a.result.best.shape.depth, b.result.best.shape.depth) == (8, 7)


def test_each_device_uses_its_own_best_flow() -> None:
    a = single("a", [named(7, tpot=9), named(7, tpot=5, flow="gguf", precision="q4_k_m")], 10)
    b = single("b", [named(7, tpot=5), named(7, tpot=9, flow="gguf", precision="q4_k_m")], 10)
    found = best_for_all([a, b])
    assert found is not None
    assert [one.flow for one in found.candidates] == ["gguf", "onnx"]
    assert found.to_json()["precision"] == "int4"


def test_precisions_of_other_names_are_not_the_same() -> None:
    a, b = single("a", [named(7, precision="int4")], 20), single("b", [named(7, precision="int8")], 20)
    assert best_for_all([a, b]) is None
    assert "no precision in common (a: int4; b: int8)" in why_none([a, b])


def test_where_losses_differ_between_engines_the_worse_one_counts() -> None:
    a = single("a", [named(8, loss=1.0), named(7, loss=1.2)], 20)
    b = single("b", [named(8, loss=1.5), named(7, loss=1.3)], 20)
    found = best_for_all([a, b])
    assert found is not None
    assert found.worst.quality.value == 1.3


def test_of_equal_losses_the_one_that_uses_less_of_the_tightest_budget_wins() -> None:
    a = single("a", [named(8, tpot=9), named(7, tpot=5)], 10)
    b = single("b", [named(8, tpot=5), named(7, tpot=6)], 10)
    found = best_for_all([a, b])
    assert found is not None
    assert found.candidates[0].shape.depth == 7


def test_where_none_fits_all_it_is_said_how_many_fit_each() -> None:
    a = single("a", [named(8, tpot=5), named(7, tpot=50)], 10)
    b = single("b", [named(8, tpot=50), named(7, tpot=5)], 10)
    assert best_for_all([a, b]) is None
    assert why_none([a, b]) == "no shape fits the budgets of all devices: 1 on a, 1 on b fit, none of them on all"


LATENCIES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8)


@given(LATENCIES, st.integers(1, 4), st.integers(1, 4))
def test_it_is_found_by_trying_all(rows: list[tuple[int, int, int]], first: int, second: int) -> None:
    """Each row is one subnet: its loss, and its latency on either device."""
    singles = []
    for place, budget in ((1, first), (2, second)):
        found = [named(depth, loss=row[0], tpot=row[place]) for depth, row in enumerate(rows, 1)]
        try:
            singles.append(single(str(place), found, budget))
        except NoShapeFits:
            return
    fitting = [row[0] for row in rows if row[1] <= first and row[2] <= second]
    shared = best_for_all(singles)
    assert (None if shared is None else shared.worst.badness) == min(fitting, default=None)


# The command


def test_several_devices_give_an_answer_each_and_one_for_all() -> None:
    found = json.loads(amoeba(*BOTH, "--latency", "orin-nx=1.3ms", "--latency", "agx-orin-64=1.35ms", "--json").stdout)
    assert set(found) == {"devices", "best_for_all", "why_none_for_all"}
    for one, latency in zip(found["devices"], ("1.3ms", "1.35ms"), strict=True):
        alone = json.loads(amoeba(*COMMON, "--device", one["device"], "--latency", latency, "--json").stdout)
        assert one == alone
    shared = found["best_for_all"]
    assert [entry["device"] for entry in shared["devices"]] == ["orin-nx", "agx-orin-64"]
    for entry, budget in zip(shared["devices"], (1.3, 1.35), strict=True):
        assert {"depth": entry["depth"], "width": entry["width"], "policy": "uniform"} == shared["shape"]
        assert entry["tpot_ms"] <= budget
    assert shared["quality"]["value"] == max(one["quality"]["value"] for one in found["devices"])


def test_one_latency_serves_all_devices_and_people_read_both_answers() -> None:
    said = amoeba(*BOTH, "--latency", "1.35ms").stdout
    assert "amoeba-demo-7m on orin-nx: " in said
    assert "amoeba-demo-7m on agx-orin-64: " in said
    assert "best for all 2 devices: " in said


def test_devices_without_a_precision_in_common_have_no_shape_for_all_and_exit_code_0() -> None:
    asked = ("search", "--flow", "onnx", "--device", "orin-nx", "--device", "h100-sxm", "--latency", "40ms", "--quiet")
    result = amoeba(*asked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["precision"] for one in found["devices"]] == ["int4", "fp32"]
    assert found["best_for_all"] is None
    assert "no precision in common (orin-nx: int4; h100-sxm: fp32)" in found["why_none_for_all"]
    assert "no precision in common" in amoeba(*asked).stdout


def test_where_one_device_has_no_shape_the_exit_code_is_its_own_and_it_is_named() -> None:
    said = sentence(amoeba(*BOTH, "--latency", "orin-nx=1us", "--latency", "agx-orin-64=40ms"), 3)
    assert said.startswith("amoeba: orin-nx: no shape fits the budget")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--latency", "orin-nx=1ms"), "no --latency is given for agx-orin-64"),
        (("--latency", "h100=1ms"), "--latency h100=... is of none of the devices"),
        (("--latency", "1ms", "--latency", "2ms"), "--latency is given twice"),
        (("--latency", "orin-nx=1ms", "--latency", "orin-nx=2ms", "--latency", "1ms"), "given twice for orin-nx"),
        (("--latency", "orin-nx=40"), "is not a number with one of the units"),
        (("--device", "orin-nx", "--latency", "1ms"), "names one device twice"),
        (("--device", "orin-mx", "--latency", "1ms"), "did you mean 'orin-nx'"),
    ],
    ids=["lacking", "of none", "twice", "twice for one", "no unit", "one device twice", "unknown"],
)
def test_latencies_and_devices_must_belong_together(options: tuple[object, ...], said: str) -> None:
    assert said in sentence(amoeba(*BOTH, *options), 2)


def test_an_export_is_for_one_device() -> None:
    both = ("export", "--device", "orin-nx", "--device", "agx-orin-64", "--latency", "40ms", "--quiet")
    assert "export builds for one device, and --device names 2" in sentence(amoeba(*both), 2)
    assert "names 2" in sentence(amoeba(*both, "--flow", "all"), 2)
