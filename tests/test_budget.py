"""Limits that hold together, and fronts of any two quantities."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba, sentence
from hypothesis import given
from hypothesis import strategies as st
from test_search import GB, WORKLOAD, candidate

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput, NoShapeFits
from amoeba_deploy.options import QUANTITY_NAMES
from amoeba_deploy.search import QUANTITIES, Budget, Candidate, Limit, SearchResult, pareto_front, search
from amoeba_deploy.search.budget import further_limits
from amoeba_deploy.search.choice import Axes
from amoeba_deploy.shape import Shape

ORIN = ("search", "--device", "orin-nx", "--flow", "onnx", "--precision", "int4", "--quiet")


def within(found: list[Candidate], axes: Axes | None = None, ms: float | None = None, **bounds: float) -> SearchResult:
    """Search within limits on TPOT and whatever ``bounds`` name."""
    further = tuple(Limit(name, QUANTITIES[name], bound) for name, bound in bounds.items())
    return search(found, Budget("tpot", ms, None, further), WORKLOAD, axes)


# Limits


def test_every_limit_must_hold() -> None:
    good = candidate(9, loss=1, tpot=10, ttft=30, weights=3e8)
    slow = candidate(8, loss=0.9, tpot=20, ttft=20)
    large = candidate(7, loss=0.8, tpot=5, ttft=20, weights=9e8)
    late = candidate(6, loss=0.7, tpot=5, ttft=40)
    result = within([good, slow, large, late], ms=15, ttft=30, size=5e8)
    assert result.ranked == (good,)
    assert result.binding == "latency and size and ttft"


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"ttft": 15.0}, r"which needs TTFT 20 ms where 15 ms is allowed \(estimated\); ttft bounds it, 1\.33 times"),
        ({"tpot": 5.0}, r"which needs TPOT 10 ms where 5 ms is allowed \(estimated\); tpot bounds it, 2\.00 times"),
        ({"e2e": 100.0}, r"which needs E2E 330 ms where 100 ms is allowed \(estimated\); e2e bounds it, 3\.30 times"),
        ({"size": 5e8}, r"whose artefact takes 1 GB where 0\.5 GB is allowed \(the weights alone\); size bounds it"),
        ({"size": 2e6}, r"whose artefact takes 1 GB where 2 MB is allowed"),
        ({"loss": 0.5}, r"whose loss is 1\.0000 where 0\.5 is allowed \(measured\); loss bounds it, 2\.00 times over"),
    ],
    ids=["ttft", "tpot", "e2e", "size", "small size", "loss"],
)
def test_where_nothing_fits_the_closest_and_its_limit_are_named(bounds: dict[str, float], said: str) -> None:
    with pytest.raises(NoShapeFits, match=said):
        within(
            [candidate(tpot=10, ttft=20, weights=1e9), candidate(7, tpot=90, ttft=90, weights=9e9, loss=9)], **bounds
        )


def test_the_size_is_that_of_the_engines_files_where_it_is_known() -> None:
    known = candidate(weights=1e9)
    object.__setattr__(known.prediction, "artifact_bytes", 2e9)
    assert known.artifact_bytes == 2e9
    assert within([known], size=2e9).best == known
    with pytest.raises(NoShapeFits, match=r"2 GB where 1\.5 GB is allowed \(estimated\)"):
        within([known], size=1.5e9)


def test_a_limit_is_not_given_twice() -> None:
    with pytest.raises(BadInput, match="--latency and --ttft both bound TTFT"):
        further_limits("ttft", 5.0, [("tpot", 1.0), ("ttft", 4.0)])
    assert [limit.name for limit in further_limits("ttft", 5.0, [("tpot", 1.0), ("ttft", None)])] == ["tpot"]
    assert [limit.name for limit in further_limits("tpot", None, [("tpot", 1.0)])] == ["tpot"]


# Fronts

FEW = st.integers(1, 4).map(float)
CANDIDATES = st.lists(
    st.builds(candidate, st.integers(1, 6), loss=FEW, tpot=FEW, ttft=FEW, memory=st.integers(1, 4), weights=FEW),
    min_size=1,
    max_size=12,
)
ALL_AXES = sorted(itertools.permutations(QUANTITIES, 2))


def point(found: Candidate, axes: Axes) -> tuple[float, float]:
    """Where a candidate stands, by the test's own reckoning; lower is better in both."""
    prediction = found.prediction
    known = {
        "tpot": prediction.tpot_ms,
        "ttft": prediction.ttft_ms,
        "e2e": prediction.ttft_ms + 31 * prediction.tpot_ms,
        "memory": prediction.memory_bytes,
        "size": found.weight_bytes,
        "loss": found.quality.value,
    }
    return known[axes[0]], known[axes[1]]


@given(CANDIDATES, st.sampled_from(ALL_AXES))
def test_a_front_of_any_two_quantities_is_what_nothing_dominates(found: list[Candidate], axes: Axes) -> None:
    points = {point(c, axes) for c in found}
    free = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert [point(c, axes) for c in pareto_front(found, axes[0], 32, axes[1])] == sorted(free)


def test_the_option_knows_every_quantity() -> None:
    assert set(QUANTITY_NAMES) == set(QUANTITIES)


def test_a_front_keeps_every_limit_but_those_on_its_axes() -> None:
    slow, late = candidate(9, loss=1, tpot=50), candidate(8, loss=2, ttft=99)
    large, good = candidate(7, loss=3, weights=9e9, tpot=5), candidate(6, loss=4, tpot=30, ttft=10)
    found, bounds = [slow, late, large, good], {"ttft": 50.0, "size": 1e9}
    assert within(found, ms=40, **bounds).front == (good, slow)
    assert within(found, ("size", "loss"), 40, **bounds).front == (good, large)


def test_the_memory_of_the_device_holds_on_a_front_of_memory_too() -> None:
    large, small = candidate(9, loss=1, memory=9 * GB), candidate(8, loss=2, memory=2 * GB)
    result = search([large, small], Budget("tpot", None, 8 * GB), WORKLOAD, ("memory", "loss"))
    assert result.front == (small,)


# The command


def found_by(*options: object) -> dict[str, Any]:
    """What the command prints as JSON for the embedded checkpoint on an Orin NX in int4."""
    result = amoeba(*ORIN, *options, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_limits_and_front_stand_in_the_json() -> None:
    found = found_by("--ttft", "1.4ms", "--size", "3MB", "--max-loss", 0.615, "--front", "size,loss")
    limits = {"ttft": 1.4, "size": 3e6, "loss": 0.615}
    assert found["budget"] == {"metric": "tpot", "ms": None, "memory_bytes": 14_500_000_000, "limits": limits}
    assert found["predicted"]["ttft_ms"] <= 1.4
    assert found["quality"]["value"] <= 0.615
    assert found["front"] == ["size", "loss"]
    sizes = [shape["artifact_bytes"] for shape in found["pareto"]]
    losses = [shape["quality"]["value"] for shape in found["pareto"]]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert max(sizes) > 3e6, "the front shows what more would buy"


def test_one_latency_alone_keeps_the_front_and_the_json_as_they_were() -> None:
    found = found_by("--latency", "1.3ms")
    assert "limits" not in found["budget"]
    assert found["front"] == ["tpot", "loss"]


def test_people_read_every_limit() -> None:
    said = amoeba(*ORIN, "--latency", "1.3ms", "--size", "3MB").stdout
    assert "latency and size bind (budget: TPOT 1.3 ms, memory 14.5 GB, artefact size 3 MB)" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--latency", "1ms", "--tpot", "1ms"), "--latency and --tpot both bound TPOT"),
        (("--latency", "1ms", "--metric", "e2e", "--e2e", "1ms"), "--latency and --e2e both bound E2E"),
        (("--tpot", "0ms"), "must be more than zero"),
        (("--max-loss", "0"), "0"),
        (("--latency", "1ms", "--front", "tpot"), "two of"),
        (("--latency", "1ms", "--front", "tpot,tpot"), "two of"),
        (("--latency", "1ms", "--front", "tpot,speed"), "tpot,speed"),
        (("--latency", "1ms", "--front", "tpot,loss,size"), "two of"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_limit_or_front_that_makes_no_sense_is_refused(options: tuple[object, ...], said: str) -> None:
    assert said in sentence(amoeba(*ORIN, *options), 2)


def test_a_limit_on_loss_needs_a_known_loss(checkpoint: Checkpoint, demo: Checkpoint, tmp_path: Path) -> None:
    asked = ("--device", "orin-nx", "--max-loss", 2, "--quiet", "--prompt", 64)
    assert "none is known here" in sentence(amoeba("search", checkpoint.path, *asked), 2)
    config = ("--config", checkpoint.model.path / "config.json")
    assert "none is known here" in sentence(amoeba("search", *config, *asked), 2)
    value = demo.plan(Shape.parse("6x1")).to_json()
    value["blocks"] = [block | {"neurons": block["neurons"][:-32]} for block in value["blocks"]]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    by_hand = ("--flow", "onnx", "--shape", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert "none is known here" in sentence(amoeba("export", *asked, *by_hand), 2)
