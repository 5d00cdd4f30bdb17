"""Shapes and plans: the rounding rule, names of widths, nesting, policies, sublayers, and plan files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import amoeba, random_selection
from hypothesis import given
from hypothesis import strategies as st
from test_families import IDS, TOLERANCE, mask, masked_logits, relative_error, stock_logits

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import (
    Plan,
    Ranking,
    Scores,
    Steps,
    best_units,
    make_plan,
    plan_from_json,
    read_plan,
    subnet_widths,
)
from amoeba_deploy.selection import DepthChoice, Selection, depth_choice, read_selection, write_selection
from amoeba_deploy.shape import Shape, distinct_widths, format_width, kept_units, parse_width

LLAMA2_7B = Architecture(
    family="llama", depth=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, neurons=11008, vocabulary=32000,
    context=4096, tied=False,
)  # fmt: skip
GROUPED = Architecture(
    family="llama", depth=4, hidden=96, heads=6, kv_heads=3, head_dim=16, neurons=160, vocabulary=128, context=128,
    tied=True,
)  # fmt: skip
MULTIHEAD = replace(GROUPED, kv_heads=6)
WIDTHS = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)


@pytest.mark.parametrize(
    ("units", "ratio", "multiple", "kept"),
    [
        (32, "0.75", 1, 24),
        (11008, "0.75", 32, 8256),
        (172, "0.75", 32, 128),  # 172 * 0.75 / 32 = 4.03
        (172, "1", 32, 172),  # all of them, though 32 does not divide 172
        (172, "0.999", 32, 160),
        (20, "0.5", 32, 20),  # fewer than one multiple: all
        (4, "0.625", 1, 3),  # 2.5 is rounded up
        (4, "0.01", 1, 1),  # never below one multiple
        (512, "0.01", 32, 32),
        (100, "0.99", 32, 96),
        (8, "13/16", 1, 7),  # 6.5 exactly, which binary floating point could take for less
    ],
)
def test_the_rounding_rule(units: int, ratio: str, multiple: int, kept: int) -> None:
    assert kept_units(units, Fraction(ratio), multiple) == kept


@given(st.integers(1, 4096), WIDTHS, WIDTHS, st.sampled_from([1, 32, 256]))
def test_wider_never_keeps_fewer(units: int, one: Fraction, two: Fraction, multiple: int) -> None:
    low, high = sorted((one, two))
    assert kept_units(units, low, multiple) <= kept_units(units, high, multiple) <= units


@given(st.integers(1, 64), WIDTHS)
def test_a_shape_is_read_back_from_its_name(depth: int, width: Fraction) -> None:
    shape = Shape(depth, width)
    assert Shape.parse(str(shape)) == shape
    assert parse_width(str(shape.to_json()["width"])) == width


def test_names_of_shapes() -> None:
    assert str(Shape.parse("24x0.750")) == "24x0.75"
    assert str(Shape.parse("24x3/4")) == "24x0.75"
    assert str(Shape.parse("24x2/3")) == "24x2/3"
    assert str(Shape.parse("24x1.0")) == "24x1"
    assert Shape.parse("24x0.75") == Shape(24, Fraction(3, 4))


@pytest.mark.parametrize(
    "text", ["24", "x0.75", "24x", "24x-1", "24x0", "24x1.01", "0x1", "24x1/0", "24X0.5", "24x0.5 6"]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Shape.parse(text)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([1, 8, 32])), min_size=1, max_size=3),
    st.sampled_from([Fraction(1, 2), Fraction(1, 4), Fraction(1, 10)]),
)
def test_distinct_widths_are_all_and_only_the_different_subnets(units: list[tuple[int, int]], low: Fraction) -> None:
    def kept(width: Fraction) -> tuple[int, ...]:
        return tuple(kept_units(count, width, multiple) for count, multiple in units)

    edges = [
        Fraction(2 * i + 1, 2) * multiple / count for count, multiple in units for i in range(count // multiple + 2)
    ]
    found = distinct_widths(kept, edges, low)
    assert len({kept(width) for width in found}) == len(found)
    assert {kept(width) for width in found} == {kept(low + (1 - low) * Fraction(i, 4000)) for i in range(4001)} | {
        kept(width) for width in found
    }
    assert found[0] == 1
    assert min(found) >= low


def test_each_width_has_its_shortest_name() -> None:
    names = [
        format_width(width)
        for width in subnet_widths(replace(LLAMA2_7B, heads=4, kv_heads=4, neurons=512), Fraction(1, 2))
    ]
    assert names == ["1", "0.94", "0.9", "0.87", "0.8", "0.75", "0.7", "0.63", "0.6", "0.56", "0.5"]
    assert len(subnet_widths(LLAMA2_7B, Fraction(1, 2))) == 189


def test_parameters_of_llama_2_7b() -> None:
    assert LLAMA2_7B.parameters == 6_738_415_616


def test_equal_scores_keep_the_lower_index() -> None:
    assert best_units(np.array([1.0, 2.0, 2.0, 1.0, 2.0]), 2).tolist() == [1, 2]
    assert best_units(np.zeros(5), 3).tolist() == [0, 1, 2]


def test_plans_are_nested_in_width_and_keep_whole_groups(checkpoint: Checkpoint) -> None:
    widths = subnet_widths(checkpoint.architecture, Fraction(1, 10))
    plans = [checkpoint.plan(Shape(3, width)) for width in widths]
    for wide, narrow in pairwise(plans):
        for outer, inner in zip(wide.blocks, narrow.blocks, strict=True):
            assert set(inner.kv_heads) <= set(outer.kv_heads)
            assert set(inner.neurons) <= set(outer.neurons)
    for plan in plans:
        for block in plan.blocks:
            assert block.heads == tuple(2 * g + member for g in block.kv_heads for member in (0, 1))


def test_plans_are_values(checkpoint: Checkpoint) -> None:
    plan = checkpoint.plan(Shape.parse("3x0.5"))
    assert plan == checkpoint.plan(Shape.parse("3x1/2"))
    assert hash(plan) == hash(checkpoint.plan(Shape.parse("3x0.5")))
    with pytest.raises(AttributeError):
        plan.shape = Shape.parse("2x1")  # type: ignore[misc]


def test_a_plan_file_gives_the_plan_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = checkpoint.plan(Shape.parse("2x0.67"))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    assert read_plan(file, checkpoint.architecture) == plan
    assert checkpoint.plan_of(str(file)) == plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format="amoeba.plan/2"), "amoeba.plan/1"),
        (lambda v: v.update(blocks=[]), "at least one block"),
        (lambda v: v["blocks"][0].update(index=9), "ascend"),
        (lambda v: v["blocks"][0].update(neurons=[3, 2]), "ascend"),
        (lambda v: v["blocks"][0].update(neurons=[160]), "0..159"),
        (lambda v: v["blocks"][0].update(kv_heads=[], heads=[], neurons=[]), "keeps neither heads nor neurons"),
        (
            lambda v: [b.update(kv_heads=[], heads=[]) for b in v["blocks"]] + [v["shape"].update(depth=1)],
            "no block keeps its attention",
        ),
        (lambda v: [b.update(neurons=[]) for b in v["blocks"]] + [v["shape"].update(depth=1)], "or none its feed"),
        (lambda v: v["blocks"][0].update(kv_heads=[]), "query heads of the kept"),
        (
            lambda v: [v["blocks"][0].update(neurons=[]), v["blocks"][1].update(kv_heads=[], heads=[])],
            "says 2 blocks and the plan has 1",
        ),
        (lambda v: v["blocks"][0].update(heads=[0]), "query heads of the kept"),
        (lambda v: v["shape"].update(depth=4), "the plan has 2"),
        (lambda v: v["shape"].update(width=2), "not in (0, 1]"),
    ],
)
def test_a_wrong_plan_is_refused(change: object, says: str, checkpoint: Checkpoint) -> None:
    value = checkpoint.plan(Shape.parse("2x0.67")).to_json()
    change(value)  # type: ignore[operator]
    with pytest.raises(BadInput) as caught:
        plan_from_json(value, checkpoint.architecture, "plan.json")
    assert says in str(caught.value)


def random_scores(sizes: Architecture, seed: int, *, ties: bool = False) -> Scores:
    """Scores of every block, standard normal, or whole numbers of which many are equal."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray[Any, Any]:
        return (rng.integers(0, 3, count) if ties else rng.standard_normal(count)).astype(np.float32)

    blocks = [(some(sizes.kv_heads), some(sizes.neurons)) for _ in range(sizes.depth)]
    return blocks.__getitem__


def best_under_one_threshold(sizes: Architecture, width: Fraction, scores: Scores) -> Counter[tuple[int, str]]:
    """How many groups and neurons of each block are among the best of the model that reach a width, counted plainly."""
    weight = {
        "group": 2 * (sizes.heads // sizes.kv_heads + 1) * sizes.head_dim * sizes.hidden,
        "neuron": 3 * sizes.hidden,
    }
    units = []
    for block in range(sizes.depth):
        groups, neurons = scores(block)
        units += [(-float(score), block, 0, index, "group") for index, score in enumerate(groups)]
        units += [(-float(score), block, 1, index, "neuron") for index, score in enumerate(neurons)]
    everything = sum(weight[unit[-1]] for unit in units)
    kept: Counter[tuple[int, str]] = Counter()
    reached = 0
    for _, block, _, _, kind in sorted(units):
        if reached >= width * everything:
            break
        reached += weight[kind]
        kept[block, kind] += 1
    return kept


@pytest.mark.parametrize("sizes", [GROUPED, MULTIHEAD], ids=["grouped-query", "multi-head"])
@given(WIDTHS, st.integers(0, 2**32 - 1), st.booleans())
def test_adaptive_keeps_the_best_of_all_blocks_until_the_width_is_reached(
    sizes: Architecture, width: Fraction, seed: int, ties: bool
) -> None:
    scores = random_scores(sizes, seed, ties=ties)
    wanted = best_under_one_threshold(sizes, width, scores)
    for block, (groups, neurons) in enumerate(Ranking.of(sizes, scores).ratios(width)):
        assert groups == Fraction(wanted[block, "group"], sizes.kv_heads)
        assert neurons == Fraction(wanted[block, "neuron"], sizes.neurons)


def constant_scores(values: Sequence[float]) -> Scores:
    """Of each block one score for all of its groups and neurons."""
    return [(np.full(3, value, np.float32), np.full(160, value, np.float32)) for value in values].__getitem__


def test_of_equal_scores_adaptive_keeps_the_lower_block_and_groups_first() -> None:
    alike = constant_scores([0, 0, 0, 0])
    block = GROUPED.block_matrix_parameters
    # A group of two query heads and its key/value head: their rows of q, k and v and their columns of o.
    group = 2 * (2 + 1) * 16 * 96
    none, whole = (Fraction(0), Fraction(0)), (Fraction(1), Fraction(1))
    two_groups, one_group = (Fraction(2, 3), Fraction(0)), (Fraction(1, 3), Fraction(0))
    ranked = Ranking.of(GROUPED, alike)
    assert ranked.ratios(Fraction(2 * group, 4 * block)) == [two_groups, none, none, none]
    assert ranked.ratios(Fraction(1, 4)) == [whole, none, none, none]
    assert ranked.ratios(Fraction(block + 1, 4 * block)) == [whole, one_group, none, none]


def test_adaptive_rounds_each_block_and_leaves_none_without_heads_or_neurons() -> None:
    scores = constant_scores([2, 1, -1, -2])
    # 37 % of 4 * 73728 parameters is block 0, the groups of block 1 (27648) and 27 of its neurons (288 each).
    shape = Shape(4, Fraction(37, 100), "adaptive")
    exact, rounded = (make_plan(GROUPED, shape, range(4), scores, Steps.of(GROUPED, multiple)) for multiple in (1, 32))
    assert [len(block.kv_heads) for block in rounded.blocks] == [3, 3, 1, 1]
    assert [len(block.neurons) for block in exact.blocks] == [160, 27, 1, 1]
    assert [len(block.neurons) for block in rounded.blocks] == [160, 32, 32, 32]


@pytest.mark.parametrize("sizes", [GROUPED, MULTIHEAD], ids=["grouped-query", "multi-head"])
@given(WIDTHS, WIDTHS, st.integers(0, 2**32 - 1), st.booleans())
def test_adaptive_plans_are_nested_in_width_and_keep_the_best(
    sizes: Architecture, one: Fraction, two: Fraction, seed: int, ties: bool
) -> None:
    scores = random_scores(sizes, seed, ties=ties)
    narrow, wide = (make_plan(sizes, Shape(4, width, "adaptive"), range(4), scores) for width in sorted((one, two)))
    for inner, outer in zip(narrow.blocks, wide.blocks, strict=True):
        assert set(inner.kv_heads) <= set(outer.kv_heads)
        assert set(inner.neurons) <= set(outer.neurons)
        assert inner.neurons == tuple(best_units(scores(inner.index)[1], len(inner.neurons)))


@given(WIDTHS, st.integers(0, 2**32 - 1), st.sets(st.integers(0, 3), min_size=1))
def test_adaptive_plans_are_nested_in_depth(width: Fraction, seed: int, kept: set[int]) -> None:
    scores = random_scores(GROUPED, seed)
    deep = make_plan(GROUPED, Shape(4, width, "adaptive"), range(4), scores)
    shallow = make_plan(GROUPED, Shape(len(kept), width, "adaptive"), sorted(kept), scores)
    assert shallow.blocks == tuple(block for block in deep.blocks if block.index in kept)


def test_adaptive_at_full_width_keeps_everything() -> None:
    plan = make_plan(GROUPED, Shape(4, Fraction(1), "adaptive"), range(4), random_scores(GROUPED, 0))
    assert not plan.is_ragged
    assert all((len(block.heads), len(block.neurons)) == (6, 160) for block in plan.blocks)


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-multihead", "qwen2", "qwen3"])
def test_an_adaptive_subnet_is_padded_and_equals_the_masked_model(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    plan = random_selection(model).plan(model.architecture, Shape(3, Fraction(1, 2), "adaptive"))
    assert plan.is_ragged
    done = extract(model, plan, tmp_path)
    assert (done.subnet.kv_heads, done.subnet.neurons) == plan.widest
    assert relative_error(stock_logits(tmp_path), masked_logits(model, plan)) < TOLERANCE


def test_removed_sublayers_leave_partial_blocks() -> None:
    # Sublayers 2i and 2i + 1 are the attention and the feed-forward of block i.
    assert depth_choice(4, (0, 3, 4, 5), 2.5, True) == DepthChoice((0, 1, 3), 2.5, (0,), (1,))
    assert depth_choice(4, (2, 3), 2.5, True) == DepthChoice((0, 2, 3), 2.5)
    assert depth_choice(4, (2, 3), 2.5, False) == DepthChoice((0, 1), 2.5)
    assert depth_choice(4, (2, 3), 2.5, True).whole_blocks
    assert not depth_choice(4, (2, 5), 2.5, True).whole_blocks


def sublayer_plan(sizes: Architecture, width: Fraction = Fraction(2, 3)) -> Plan:
    """Three of four blocks, the second without attention and the last without feed-forward."""
    scores = random_scores(sizes, 1)
    return make_plan(sizes, Shape(2, width), (0, 1, 3), scores, without_attention=(1,), without_feed_forward=(3,))


def test_a_plan_leaves_out_sublayers() -> None:
    plan = sublayer_plan(GROUPED)
    sizes = [(block.index, len(block.kv_heads), len(block.heads), len(block.neurons)) for block in plan.blocks]
    assert sizes == [(0, 2, 4, 96), (1, 0, 0, 96), (3, 2, 4, 0)]
    assert plan.widest == (2, 96)


def test_a_plan_without_some_sublayers_is_read_back_from_its_file(tmp_path: Path) -> None:
    plan = sublayer_plan(GROUPED)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    assert read_plan(file, GROUPED) == plan


def test_the_depth_of_a_plan_counts_half_blocks_rounded_up() -> None:
    value = sublayer_plan(GROUPED).to_json()
    value["blocks"][1] |= {"kv_heads": [0], "heads": [0, 1]}
    with pytest.raises(BadInput, match=r"says 2 blocks and the plan has 2\.5"):
        plan_from_json(value, GROUPED, "plan.json")
    value["shape"]["depth"] = 3
    assert plan_from_json(value, GROUPED, "plan.json").shape.depth == 3


def silenced_logits(model: ModelFolder, plan: Plan) -> torch.Tensor:
    """Logits of the full model in which sublayers that a plan lacks give zero, and other removed units are masked."""
    reference: Any = load_torch_model(model.path)
    sizes, layers = model.architecture, reference.model.layers

    def masked(keep: torch.Tensor) -> Callable[..., Any]:
        return lambda _module, inputs: (inputs[0] * keep,)

    for block in plan.blocks:
        layer = layers[block.index]
        heads, neurons = mask(block.heads, sizes.heads, sizes.head_dim), mask(block.neurons, sizes.neurons)
        layer.self_attn.o_proj.register_forward_pre_hook(masked(heads))
        layer.mlp.down_proj.register_forward_pre_hook(masked(neurons))
        if not block.heads:
            layer.self_attn.register_forward_hook(lambda _module, _inputs, out: (torch.zeros_like(out[0]), *out[1:]))
        if not block.neurons:
            layer.mlp.register_forward_hook(lambda _module, _inputs, out: torch.zeros_like(out))
    reference.model.layers = torch.nn.ModuleList(layers[i] for i in plan.kept_blocks)
    reference.config.num_hidden_layers = len(plan.blocks)
    with torch.inference_mode():
        logits: torch.Tensor = reference(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("width", ["1", "2/3"])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "qwen2", "qwen3"])
def test_a_subnet_without_some_sublayers_equals_the_model_in_which_they_give_zero(
    name: str, width: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    plan = sublayer_plan(model.architecture, Fraction(width))
    extract(model, plan, tmp_path)
    assert relative_error(stock_logits(tmp_path), silenced_logits(model, plan)) < TOLERANCE


def sublayer_selection(model: ModelFolder) -> Selection:
    """A random selection whose lower depths remove sublayers apart."""
    depths = {
        4: DepthChoice((0, 1, 2, 3), 1.0),
        3: DepthChoice((0, 1, 2, 3), 1.5, (1,), (2,)),
        2: DepthChoice((0, 1, 3), 2.0, (1,), (0,)),
    }
    return replace(random_selection(model), depths=depths)


def test_a_selection_of_sublayers_is_read_back(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    made = sublayer_selection(model)
    write_selection(tmp_path, made)
    back = read_selection(tmp_path, model.architecture)
    assert back.depths == made.depths
    assert not back.whole_blocks
    assert back.plan(model.architecture, Shape.parse("3x0.5")) == made.plan(model.architecture, Shape.parse("3x0.5"))


def test_whole_blocks_are_written_without_sublayers(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    write_selection(tmp_path, sublayer_selection(models("llama-grouped-tied")))
    depth = json.loads((tmp_path / "selection.json").read_text())["depth"]
    assert set(depth["4"]) == {"kept", "metric"}
    assert depth["3"] == {
        "kept": [0, 1, 2, 3], "without_attention": [1], "without_feed_forward": [2], "metric": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"without_attention": []}, "the blocks kept at depth 3 are not 3"),  # three and a half blocks
        ({"without_attention": [1, 3]}, "the blocks kept at depth 3 are not 3"),  # two and a half
        ({"without_attention": [2]}, "the blocks kept at depth 3"),  # block 2 would keep neither
        ({"without_attention": [4]}, "the blocks kept at depth 3"),  # not a block
        ({"kept": [0, 1, 3], "without_feed_forward": []}, "the blocks kept at depth 3"),
        ({"kept": [0, 1, 2], "without_attention": [3], "without_feed_forward": []}, "the blocks kept at depth 3"),
        ({"without_attention": [2, 1], "without_feed_forward": []}, "the blocks kept at depth 3"),
        ({"without_attention": ["1"]}, "the blocks kept at depth 3"),
        ({"without_attention": 1}, "'depth' table is malformed"),
    ],
)
def test_a_damaged_selection_of_sublayers_is_refused(
    change: dict[str, Any], says: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models("llama-grouped-tied")
    write_selection(tmp_path, sublayer_selection(model))
    value = json.loads((tmp_path / "selection.json").read_text())
    value["depth"]["3"] |= change
    (tmp_path / "selection.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match=says):
        read_selection(tmp_path, model.architecture)


@pytest.fixture
def apart(models: Callable[[str], ModelFolder], tmp_path: Path) -> Checkpoint:
    """A checkpoint whose selection removes attention and feed-forward apart."""
    model = models("llama-grouped-tied")
    for name in ("selection", "apart"):
        (tmp_path / name).mkdir()
    write_selection(tmp_path / "selection", sublayer_selection(model))
    return create_checkpoint(str(model.path), tmp_path / "selection", tmp_path / "apart")


@pytest.mark.parametrize(
    "command",
    [
        ("search", "--device", "orin-nx", "--latency", "40ms", "--prompt", "64"),
        ("export", "--device", "orin-nx", "--latency", "40ms", "--prompt", "64", "-o", "out"),
        ("export", "--device", "local", "--shape", "3x1", "--prompt", "64", "-o", "out"),
        ("profile", "--flow", "torch", "--precision", "fp32", "--shapes", "4x1", "--prompt", "64", "-o", "out"),
    ],
    ids=["search", "export", "export of a shape", "profile"],
)
def test_no_latency_is_asked_of_blocks_without_a_sublayer(
    command: tuple[str, ...], apart: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = amoeba(command[0], apart.path, *command[1:], "--quiet")
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("amoeba: ")
    assert "removes attention and feed-forward apart" in line
    assert not (tmp_path / "out").exists()


def test_a_shape_of_partial_blocks_is_extracted(apart: Checkpoint, tmp_path: Path) -> None:
    result = amoeba("extract", apart.path, "--shape", "3x0.67", "-o", tmp_path / "subnet", "--quiet")
    assert result.exit_code == 0, result.output
    plan = apart.plan(Shape.parse("3x0.67"))
    assert relative_error(stock_logits(tmp_path / "subnet"), silenced_logits(apart.model, plan)) < TOLERANCE


def test_a_depth_without_any_attention_is_refused(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    choice = DepthChoice((0, 1), 2.0, without_attention=(0, 1))
    plan = replace(random_selection(model), depths={1: choice}).plan(model.architecture, Shape.parse("1x1"))
    with pytest.raises(BadInput, match=r"keeps no attention in any block"):
        extract(model, plan, tmp_path)


def test_a_plan_file_without_a_sublayer_is_extracted_and_not_exported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    choice = DepthChoice((0, 1, 2, 3), 1.5, (1,), (2,))
    plan = replace(checkpoint.selection, depths={3: choice}).plan(checkpoint.architecture, Shape.parse("3x1"))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert amoeba("extract", checkpoint.path, "--shape", tmp_path / "plan.json", "-o", tmp_path / "a").exit_code == 0
    refused = amoeba(
        "export",
        checkpoint.path,
        "--device",
        "orin-nx",
        "--prompt",
        16,
        "--shape",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "b",
    )
    assert refused.exit_code == 2
    assert "without their attention or feed-forward, of which no latency is known" in refused.stderr
    assert not (tmp_path / "b").exists()
