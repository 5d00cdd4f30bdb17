"""Search: what is best within a budget, what stands on the front, what bounds the choice; and LLaMA2-7B by hand."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba
from hypothesis import given, settings
from hypothesis import strategies as st

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import NoShapeFits
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quality import QualityValue
from amoeba_deploy.search import Budget, Candidate, Metric, SearchResult, pareto_front, search
from amoeba_deploy.shape import Shape

WORKLOAD = Workload(batch=1, prompt=128, tokens=32)
GB = 10**9


def candidate(
    depth: int = 8,
    width: str = "1",
    *,
    loss: float = 1.0,
    tpot: float = 10.0,
    ttft: float = 20.0,
    memory: int = GB,
    weights: float = 1e6,
    kept: float | None = None,
) -> Candidate:
    """A candidate with everything that it is judged by; ``kept`` ranks it by parameters instead of loss."""
    quality = (
        QualityValue("loss", loss, "measured") if kept is None else QualityValue("parameters_kept", kept, "counted")
    )
    prediction = Prediction(tpot, ttft, memory, "estimated")
    return Candidate(Shape(depth, Fraction(width)), "onnx", "int4", prediction, quality, weights)


def within(
    found: list[Candidate], ms: float | None = 40.0, memory: int | None = None, metric: Metric = "tpot"
) -> SearchResult:
    """Search within a budget."""
    return search(found, Budget(metric, ms, memory), WORKLOAD)


# The best shape


def test_the_best_quality_within_the_budget_wins() -> None:
    slow, good, fast = candidate(9, loss=1, tpot=50), candidate(8, loss=2, tpot=39), candidate(7, loss=3, tpot=5)
    assert within([fast, slow, good]).best == good


def test_a_shape_exactly_at_the_budget_fits() -> None:
    assert within([candidate(tpot=40.0)], 40.0).best.prediction.tpot_ms == 40.0


def test_of_equal_quality_the_lower_budget_metric_wins() -> None:
    small, fast = candidate(tpot=20, weights=1), candidate(tpot=10, weights=2)
    assert within([small, fast]).best == fast


def test_the_metric_that_breaks_ties_is_the_budgets() -> None:
    first, later = candidate(tpot=20, ttft=10), candidate(tpot=10, ttft=20)
    assert within([first, later], metric="ttft").best == first
    assert within([first, later], metric="tpot").best == later


def test_of_equal_quality_and_metric_fewer_bytes_win() -> None:
    large, small = candidate(9, weights=2), candidate(8, weights=1)
    assert within([large, small]).best == small


def test_of_equal_quality_metric_and_bytes_the_greater_depth_wins() -> None:
    shallow, deep = candidate(7), candidate(8, "0.5")
    assert within([shallow, deep]).best == deep


def test_where_no_quality_is_known_more_parameters_are_better() -> None:
    less, more = candidate(7, kept=0.5), candidate(8, kept=0.75)
    assert within([less, more]).best == more


def test_e2e_is_the_first_token_and_all_later_ones() -> None:
    found = candidate(tpot=10, ttft=100)
    assert within([found], 100 + 31 * 10, metric="e2e").best == found
    with pytest.raises(NoShapeFits, match="E2E 410 ms where 409 ms is allowed"):
        within([found], 100 + 31 * 10 - 1, metric="e2e")


def test_a_shape_beyond_the_memory_is_not_chosen() -> None:
    large, small = candidate(9, loss=1, memory=8 * GB + 1), candidate(8, loss=2, memory=8 * GB)
    assert within([large, small], memory=8 * GB).best == small


def test_memory_alone_is_a_budget() -> None:
    large, small = candidate(9, loss=1, memory=9 * GB), candidate(8, loss=2, tpot=1e6, memory=8 * GB)
    assert within([large, small], None, 8 * GB).best == small


def test_the_runners_up_follow_in_order() -> None:
    found = [candidate(d, loss=loss) for d, loss in ((5, 3), (6, 1), (7, 4), (8, 2))]
    assert [c.shape.depth for c in within(found).ranked] == [6, 8, 5, 7]


# What bounds the choice


def test_nothing_binds_where_the_best_of_all_fits() -> None:
    assert within([candidate(9, loss=1), candidate(8, loss=2, tpot=99)], memory=8 * GB).binding is None


def test_latency_binds_where_it_keeps_a_better_shape_out() -> None:
    assert within([candidate(9, loss=1, tpot=41), candidate(8, loss=2)], memory=8 * GB).binding == "latency"


def test_memory_binds_where_it_keeps_a_better_shape_out() -> None:
    assert within([candidate(9, loss=1, memory=9 * GB), candidate(8, loss=2)], memory=8 * GB).binding == "memory"


def test_both_bind_where_each_keeps_a_better_shape_out() -> None:
    found = [candidate(9, loss=1, tpot=41), candidate(9, "0.9", loss=1.5, memory=9 * GB), candidate(8, loss=2)]
    assert within(found, memory=8 * GB).binding == "latency and memory"


def test_both_bind_where_they_keep_the_same_better_shape_out() -> None:
    found = [candidate(9, loss=1, tpot=41, memory=9 * GB), candidate(8, loss=2)]
    assert within(found, memory=8 * GB).binding == "latency and memory"


def test_where_nothing_fits_the_shape_that_exceeds_least_is_named() -> None:
    found = [candidate(9, tpot=100), candidate(8, "0.5", tpot=50), candidate(7, tpot=80)]
    with pytest.raises(
        NoShapeFits, match=r"closest is 8x0\.5 in onnx int4, which needs TPOT 50 ms .* 1\.25 times over"
    ):
        within(found)


def test_where_nothing_fits_the_worse_of_both_excesses_counts() -> None:
    found = [candidate(9, tpot=60, memory=8 * GB), candidate(8, tpot=40, memory=16 * GB)]
    with pytest.raises(NoShapeFits, match=r"closest is 9x1 .*latency bounds it"):
        within(found, memory=8 * GB)


def test_where_memory_is_exceeded_it_is_named_with_its_size() -> None:
    with pytest.raises(NoShapeFits, match=r"needs 9 GB where 8 GB is allowed .*memory bounds it"):
        within([candidate(memory=9 * GB)], memory=8 * GB)


# The front

FEW = st.integers(1, 4)
"""Small numbers, so that ties are frequent."""
CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.integers(1, 6),
        loss=FEW.map(float),
        tpot=FEW.map(float),
        ttft=FEW.map(float),
        memory=FEW,
        weights=FEW.map(float),
    ),
    min_size=1,
    max_size=12,
)
REPEATABLY = settings(deadline=None, derandomize=True, database=None)
METRICS = st.sampled_from(["tpot", "ttft", "e2e"])


def point(found: Candidate, metric: Metric) -> tuple[float, float]:
    """Where a candidate stands: budget metric and loss, lower is better in both."""
    latency = {
        "tpot": found.prediction.tpot_ms,
        "ttft": found.prediction.ttft_ms,
        "e2e": found.prediction.ttft_ms + 31 * found.prediction.tpot_ms,
    }
    return latency[metric], found.quality.value


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """At least as good in both and better in one."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@REPEATABLY
@given(CANDIDATES, METRICS)
def test_the_front_is_what_no_other_shape_dominates(found: list[Candidate], metric: Metric) -> None:
    points = {point(c, metric) for c in found}
    free = {p for p in points if not any(dominates(other, p) for other in points)}
    assert [point(c, metric) for c in pareto_front(found, metric, 32)] == sorted(free)


@REPEATABLY
@given(CANDIDATES, METRICS)
def test_of_shapes_that_stand_at_one_point_the_front_has_the_one_of_fewest_bytes(
    found: list[Candidate], metric: Metric
) -> None:
    for chosen in pareto_front(found, metric, 32):
        same = [c.weight_bytes for c in found if point(c, metric) == point(chosen, metric)]
        assert chosen.weight_bytes == min(same)


@REPEATABLY
@given(CANDIDATES, METRICS, FEW, FEW)
def test_the_best_shape_is_found_by_trying_all(found: list[Candidate], metric: Metric, ms: int, memory: int) -> None:
    fitting = [c for c in found if point(c, metric)[0] <= ms and c.prediction.memory_bytes <= memory]
    if not fitting:
        with pytest.raises(NoShapeFits):
            within(found, ms, memory, metric)
        return
    best = min(fitting, key=lambda c: (c.quality.value, point(c, metric)[0], c.weight_bytes, -c.shape.depth))
    assert within(found, ms, memory, metric).best == best


@REPEATABLY
@given(CANDIDATES, METRICS, FEW)
def test_the_best_shape_stands_on_the_front(found: list[Candidate], metric: Metric, memory: int) -> None:
    if any(c.prediction.memory_bytes <= memory for c in found):
        result = within(found, None, memory, metric)
        assert result.best in result.front


def test_of_equal_metric_quality_and_bytes_the_front_has_the_deeper_shape_as_best_does() -> None:
    shallow, deep = candidate(7), candidate(8, "0.5")
    assert within([shallow, deep]).front == (deep,)


def test_the_front_has_no_shape_that_the_memory_cannot_hold() -> None:
    large, small = candidate(9, loss=1, memory=9 * GB), candidate(8, loss=2)
    assert within([large, small], memory=8 * GB).front == (small,)


def test_the_front_goes_beyond_the_latency_budget() -> None:
    slow, fast = candidate(9, loss=1, tpot=50), candidate(8, loss=2, tpot=30)
    assert within([slow, fast], 40.0).front == (fast, slow)


# LLaMA2-7B on an Orin NX, by hand

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
Answer = dict[str, Any]


def found_by(*arguments: object) -> Answer:
    """What a search prints as JSON."""
    result = amoeba("search", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA2-7B's config, and nothing else of it."""
    file = tmp_path_factory.mktemp("llama-2-7b") / "config.json"
    file.write_text(json.dumps(LLAMA2_7B))
    return file


@pytest.fixture(scope="module")
def answer(config: Path) -> Answer:
    """The best shape of LLaMA2-7B in int4 that gives a token in 40 ms on an Orin NX."""
    asked = ("--device", "orin-nx", "--flow", "onnx", "--precision", "int4", "--latency", "40ms")
    return found_by("--config", config, *asked)


def kept(width: Fraction) -> tuple[int, int]:
    """Heads and neurons that a width keeps: floor(ratio * n / m + 1/2) * m, neurons in multiples of 32."""
    return math.floor(width * 32 + Fraction(1, 2)), math.floor(width * 11008 / 32 + Fraction(1, 2)) * 32


def tpot_by_hand(depth: int, heads: int, neurons: int) -> float:
    """Milliseconds a token: bytes read over the bandwidth reached, and the time of launching blocks and step.

    int4 takes 5 bits a weight, the scales of each 32 weights included; norms and the key/value cache take 32 bits.
    102.4 GB/s is the data sheet's peak, of which quantised weights reach 0.7.
    """
    matrices = 4 * 4096 * heads * 128 + 3 * 4096 * neurons
    weights = (depth * matrices + 32000 * 4096) * 5 / 8 + (depth * 2 * 4096 + 4096) * 4
    cache = 2 * depth * heads * 128 * (128 + 32 / 2) * 4
    return (weights + cache) / (102.4e9 * 0.7) * 1e3 + depth * 0.05 + 0.8


def parameters(depth: int, heads: int, neurons: int) -> int:
    """Parameters of all blocks."""
    return depth * (4 * 4096 * heads * 128 + 3 * 4096 * neurons + 2 * 4096)


@pytest.fixture(scope="module")
def shapes() -> set[tuple[int, int, int]]:
    """Depth, heads and neurons of every distinct subnet from half the depth and half the width up."""
    borders = {Fraction(2 * step + 1, 2 * 32) for step in range(32)} | {
        Fraction(2 * s + 1, 2 * 344) for s in range(344)
    }
    widths = sorted({Fraction(1, 2), Fraction(1), *(b for b in borders if b > Fraction(1, 2))})
    return {(depth, *kept(width)) for depth in range(16, 33) for width in widths}


def sizes(shape: Answer) -> tuple[int, int, int]:
    """Depth, heads and neurons of a shape as JSON has it."""
    return (shape["depth"], *kept(Fraction(str(shape["width"]))))


def test_llama2_7b_must_be_pruned_for_40_ms(answer: Answer) -> None:
    assert tpot_by_hand(32, 32, 11008) > 62
    assert parameters(*sizes(answer["shape"])) < parameters(32, 32, 11008)
    assert answer["binding"] == "latency"


def test_the_chosen_shape_has_the_tpot_that_one_reckons_by_hand(answer: Answer) -> None:
    assert answer["predicted"]["tpot_ms"] == pytest.approx(tpot_by_hand(*sizes(answer["shape"])), abs=5e-4)
    assert answer["predicted"]["tpot_ms"] <= 40
    assert answer["predicted"]["source"] == "estimated"


def test_every_shape_that_keeps_more_exceeds_40_ms(answer: Answer, shapes: set[tuple[int, int, int]]) -> None:
    chosen = parameters(*sizes(answer["shape"]))
    larger = [shape for shape in shapes if parameters(*shape) > chosen]
    assert len(larger) > 100
    assert min(tpot_by_hand(*shape) for shape in larger) > 40


def test_every_distinct_subnet_is_considered(answer: Answer, shapes: set[tuple[int, int, int]]) -> None:
    assert answer["considered"] == len(shapes)


def test_without_a_quality_shapes_are_ranked_by_the_parameters_they_keep(answer: Answer) -> None:
    share = parameters(*sizes(answer["shape"])) / parameters(32, 32, 11008)
    assert answer["quality"]["metric"] == "parameters_kept"
    assert answer["quality"]["value"] == pytest.approx(share, abs=1e-6)


def test_people_are_told_that_no_quality_is_known(config: Path) -> None:
    said = amoeba(
        "search", "--config", config, "--device", "orin-nx", "--precision", "int4", "--latency", "40ms"
    ).stdout
    assert "ranked by the parameters they keep" in said


def test_the_front_of_llama2_7b_is_sorted_and_rises_in_both(answer: Answer) -> None:
    latencies = [tpot_by_hand(*sizes(shape)) for shape in answer["pareto"]]
    shares = [parameters(*sizes(shape)) for shape in answer["pareto"]]
    assert latencies == sorted(set(latencies))
    assert shares == sorted(set(shares))


def test_the_front_of_llama2_7b_is_what_no_other_subnet_dominates(
    answer: Answer, shapes: set[tuple[int, int, int]]
) -> None:
    most, front = 0, []
    for shape in sorted(shapes, key=lambda s: (tpot_by_hand(*s), -parameters(*s))):
        if parameters(*shape) > most:
            most = parameters(*shape)
            front.append(shape)
    assert [sizes(shape) for shape in answer["pareto"]] == front


def test_every_latency_is_printed_with_its_source(answer: Answer) -> None:
    assert {shape["source"] for shape in answer["pareto"]} == {"estimated"}


def test_a_larger_budget_never_gives_a_worse_shape(config: Path) -> None:
    common = ("--config", config, "--device", "orin-nx", "--precision", "int4")
    shares = [found_by(*common, "--latency", f"{ms}ms")["quality"]["value"] for ms in (20, 40, 60, 80)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_memory_can_be_what_bounds_llama2_7b(config: Path) -> None:
    found = found_by("--config", config, "--device", "orin-nx", "--precision", "int4", "--memory", "5GB")
    assert found["binding"] == "memory"
    assert found["predicted"]["memory_bytes"] <= 5 * GB


def test_no_memory_budget_exceeds_what_the_device_has(config: Path) -> None:
    found = found_by("--config", config, "--device", "orin-nx", "--precision", "int4", "--memory", "99GB")
    assert found["budget"]["memory_bytes"] == 14_500_000_000


# Precisions and flows

ORIN = ("--device", "orin-nx", "--latency", "40ms")


def test_precisions_of_measured_quality_make_one_front() -> None:
    found = found_by("--device", "orin-nx", "--latency", "1.2ms", "--flow", "onnx", "--precision", "fp32,int8,int4")
    assert {shape["precision"] for shape in found["pareto"]} > {"int4"}
    latencies = [shape["tpot_ms"] for shape in found["pareto"]]
    losses = [shape["quality"]["value"] for shape in found["pareto"]]
    assert latencies == sorted(latencies)
    assert losses == sorted(losses, reverse=True)


def test_each_flow_takes_the_precisions_that_it_has() -> None:
    options = ("search", "--device", "orin-nx", "--latency", "40ms", "--flow", "torch,onnx")
    found = json.loads(amoeba(*options, "--precision", "fp32,int4", "--json").stdout)
    pairs = {(entry["flow"], entry["precision"]) for entry in [*found["top"], *found["pareto"]]}
    assert ("onnx", "int4") in pairs
    assert ("torch", "int4") not in pairs
    refused = amoeba(*options, "--precision", "fp32,q8_0")
    assert refused.exit_code == 2
    assert "none of the flows torch, onnx has the precision q8_0" in refused.stderr


def test_a_precision_of_unknown_quality_is_left_out_of_a_ranking_and_named(demo: Checkpoint) -> None:
    assert demo.quality is not None
    assert "bf16" not in demo.quality.precisions
    found = found_by(*ORIN, "--flow", "torch,onnx")
    assert {shape["flow"] for shape in (*found["pareto"], *found["top"])} == {"onnx"}
    assert any("torch bf16" in remark and "not measured" in remark for remark in found["remarks"])


def test_a_precision_of_unknown_quality_is_used_when_it_alone_is_named() -> None:
    found = found_by(*ORIN, "--flow", "torch", "--precision", "bf16")
    assert found["quality"]["source"] == "fp32 (this precision not measured)"
    assert {shape["precision"] for shape in found["pareto"]} == {"bf16"}


def test_precisions_are_not_ranked_where_no_quality_is_known_at_all(config: Path) -> None:
    result = amoeba("search", *ORIN, "--config", config, "--flow", "onnx", "--precision", "int8,int4", "--quiet")
    assert result.exit_code == 2, result.stdout
    assert "quality" in result.stderr


def test_a_repeated_search_prints_the_same(answer: Answer, config: Path) -> None:
    asked = ("--device", "orin-nx", "--flow", "onnx", "--precision", "int4", "--latency", "40ms")
    assert found_by("--config", config, *asked) == answer


def test_quiet_prints_no_remark() -> None:
    assert amoeba("search", *ORIN, "--quiet").stderr == ""


# Latency tables


def write_table(file: Path, checkpoint: Checkpoint, shapes: dict[str, float]) -> Path:
    """A table of an Orin NX with the TPOT of some shapes in the flow onnx and int4."""
    rows = []
    for shape, tpot in shapes.items():
        depth, width = shape.split("x")
        row = {"flow": "onnx", "precision": "int4", "depth": int(depth), "width": float(width), "policy": "uniform"}
        row |= {"batch": 1, "prompt": 128, "tokens": 32, "ttft_ms": 2 * tpot, "tpot_ms": tpot, "p10": tpot, "p90": tpot}
        rows.append(row | {"repeats": 9, "peak_memory_bytes": GB, "artifact_bytes": GB})
    head = {"format": "amoeba.latency-table/1", "device": "orin-nx", "architecture": checkpoint.architecture.digest}
    file.write_text(json.dumps(head | {"rows": rows}))
    return file


@pytest.fixture
def measured(demo: Checkpoint, tmp_path: Path) -> dict[tuple[int, float], Answer]:
    """Every shape on the front of a search with a table of three depths at full width, by depth and width."""
    table = write_table(tmp_path / "table.json", demo, {"12x1": 12.0, "10x1": 10.0, "6x1": 6.0})
    found = found_by(*ORIN, "--table", table, "--measured-only")
    return {(shape["depth"], shape["width"]): shape for shape in found["pareto"]}


def test_a_shape_with_a_row_has_the_rows_latency(measured: dict[tuple[int, float], Answer]) -> None:
    found = measured[12, 1.0]
    assert (found["tpot_ms"], found["ttft_ms"], found["source"]) == (12.0, 24.0, "measured")


def test_a_shape_between_rows_has_the_latency_between_them(measured: dict[tuple[int, float], Answer]) -> None:
    found = measured[8, 1.0]
    assert (found["tpot_ms"], found["source"]) == (pytest.approx(8.0, abs=1e-3), "interpolated")


def test_a_flow_without_rows_is_estimated_and_says_so(demo: Checkpoint, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.json", demo, {"12x1": 12.0})
    found = found_by(*ORIN, "--table", table, "--flow", "onnx", "--precision", "int8")
    assert found["predicted"]["source"] == "estimated"
