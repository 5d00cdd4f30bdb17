"""The search per block on the embedded checkpoint: rises held to extracted folders, the plan file to the commands."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUIET, SHARED, amoeba, random_selection, save_random_model
from jsonschema import Draft202012Validator

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, options_for
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import BadInput, NoShapeFits
from amoeba_deploy.evaluation import text_loss, text_rows, torch_logits
from amoeba_deploy.extraction.folder import Learnt, extract
from amoeba_deploy.masks import BlockMask, Masks
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.per_block.costs import BlockCosts, BlockMemory, LinearCosts, RooflineCosts
from amoeba_deploy.per_block.options import DROPPED, BlockOption, block_options, options_plan, options_width
from amoeba_deploy.per_block.pipeline import BlockSearchResult, search_blocks
from amoeba_deploy.per_block.report import blocks_text, print_block_search
from amoeba_deploy.per_block.surrogate import Rises, measure_rises, option_learnt
from amoeba_deploy.plan import Plan, read_plan
from amoeba_deploy.profiles.calibration import estimator
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.profiles.factors import Factors
from amoeba_deploy.profiles.roofline import SMALL_BYTES, estimate, memory_bytes
from amoeba_deploy.profiles.shipped import all_shipped
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.selection import write_selection
from amoeba_deploy.shape import Shape

LENGTH = 48
ROUNDING = 2e-5
"""Between two orders of summing a loss of some thousand float32 logits; losses here differ by 1e-3 and more."""
FEW = (DROPPED, BlockOption(2, 256), BlockOption(4, 512))
WORKLOAD = Workload()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AMOEBA_CACHE", str(folder))
    return folder


@pytest.fixture
def text(demo: Checkpoint, tmp_path: Path) -> Path:
    """A text of three short rows."""
    tokenizer = demo.model.tokenizer()
    whole = (Path(demo.path).parent / "validation.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(whole, add_special_tokens=False).ids[: 3 * LENGTH + 20]
    file = tmp_path / "calibration.txt"
    file.write_text(tokenizer.decode(ids), encoding="utf-8")
    return file


@pytest.fixture(params=["off", "on"])
def untuned(demo: Checkpoint, tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    """The embedded model and its selection without adapters, with bias compensation and without."""
    folder = tmp_path / "untuned"
    folder.mkdir()
    return create_checkpoint(str(demo.model.path), demo.path, folder, bias=request.param == "on")


def rises_of(checkpoint: Checkpoint, options: Sequence[BlockOption], text: Path, **asked: Any) -> Rises:
    """Rises on the short rows."""
    return measure_rises(checkpoint, options, text, sequence=LENGTH, progress=QUIET, **asked)


def extracted_loss(checkpoint: Checkpoint, plan: Plan, text: Path, learnt: Learnt | None = None) -> float:
    """The loss of a plan's extracted folder on the short rows, through stock transformers."""
    rows = text_rows(text, checkpoint.model.tokenizer(), LENGTH)
    with tempfile.TemporaryDirectory() as work:
        extract(checkpoint.model, plan, Path(work), learnt=learnt or checkpoint.learnt(plan))
        return text_loss(torch_logits(load_torch_model(Path(work))), rows).loss


def alone(checkpoint: Checkpoint, index: int, option: BlockOption) -> Plan:
    """The plan in which one block alone takes an option."""
    full = checkpoint.architecture
    whole = BlockOption(full.kv_heads, full.neurons)
    return options_plan(checkpoint, [option if i == index else whole for i in range(full.depth)])


def learnt(checkpoint: Checkpoint, flow: str, precision: str) -> Factors:
    """What the tables that ship say of an engine on a Raspberry Pi."""
    device, storage = load_device("raspberry-pi-5"), load_backend(flow).storage(precision)
    tables = [found for _, found in all_shipped()]
    found = estimator(device, flow, precision, storage, WORKLOAD, 512, tables, architecture=checkpoint.architecture)
    assert found.rows
    return found.factors


def costs_of(checkpoint: Checkpoint, flow: str = "torch", precision: str = "fp32") -> RooflineCosts:
    """The estimate for a Raspberry Pi, as it is for a search and an export."""
    factors = learnt(checkpoint, flow, precision)
    return RooflineCosts.of(checkpoint.architecture, load_device("raspberry-pi-5"), flow, precision, WORKLOAD, factors)


# Options


def options_of(checkpoint: Checkpoint, flow: str, precision: str, **asked: Any) -> tuple[BlockOption, ...]:
    """The options for an engine."""
    built = options_for(load_backend(flow), checkpoint.architecture.context)
    return block_options(checkpoint, flow, precision, built, **asked)


def test_the_options_are_to_drop_a_block_and_all_pairs_down_to_the_narrowest_width(demo: Checkpoint) -> None:
    found = options_of(demo, "torch", "fp32")
    assert found[0] == DROPPED
    assert list(found[1:]) == [BlockOption(g, n) for g in (2, 3, 4) for n in range(256, 513, 32)]


def test_an_engine_with_coarser_steps_has_fewer_options(demo: Checkpoint) -> None:
    takes = load_backend("gguf").takes
    found = options_of(demo, "gguf", "q4_k_m")
    assert len(found) < len(options_of(demo, "torch", "fp32"))
    full = demo.architecture
    for option in found[1:]:
        assert takes.count_refusal(full, option.kv_heads * full.group, option.neurons, "q4_k_m") is None


def test_too_many_options_are_thinned_and_keep_the_whole_block_and_uniform_widths(demo: Checkpoint) -> None:
    lowest = Fraction(1, 16)
    every = options_of(demo, "torch", "fp32", minimum_width=lowest, most=1000)
    assert len(every) == 1 + 4 * 16
    found = options_of(demo, "torch", "fp32", minimum_width=lowest, most=20)
    assert len(found) == 20
    assert set(found) < set(every)
    assert {DROPPED, BlockOption(4, 512), BlockOption(1, 32)} <= set(found)
    diagonal = [option for option in found[1:] if abs(option.kv_heads / 4 - option.neurons / 512) <= 1 / 8]
    assert len(diagonal) >= 5


def test_an_engine_of_one_width_is_refused_with_the_flows_that_take_varying_ones(demo: Checkpoint) -> None:
    with pytest.raises(BadInput, match="'mlc-llm' takes blocks of one width only") as refused:
        options_of(demo, "mlc-llm", "q4f16_1")
    named = str(refused.value).rpartition("are ")[2].split(", ")
    assert {"torch", "onnx", "openvino", "gguf"} <= set(named)
    assert "mlc-llm" not in named


def test_an_engine_that_pads_the_blocks_of_a_family_is_refused_for_it(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "qwen3", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    (tmp_path / "selection").mkdir()
    (tmp_path / "checkpoint").mkdir()
    write_selection(tmp_path / "selection", random_selection(model))
    made = create_checkpoint(str(model.path), tmp_path / "selection", tmp_path / "checkpoint")
    with pytest.raises(BadInput, match="'gguf' takes blocks of one width only of this qwen3 in fp32; flows that") as no:
        options_of(made, "gguf", "fp32")
    assert "torch" in str(no.value)
    assert len(options_of(made, "torch", "fp32")) > 2


def test_the_plan_of_options_keeps_the_best_units_and_says_the_share_of_parameters(demo: Checkpoint) -> None:
    chosen = [DROPPED, BlockOption(2, 256), *[BlockOption(4, 512)] * 10]
    plan = options_plan(demo, chosen)
    assert plan.kept_blocks == tuple(range(1, 12))
    assert plan.shape.depth == 11
    assert float(plan.shape.width) == pytest.approx(plan.width_reached(demo.architecture), abs=5e-5)
    heads, neurons = demo.selection.scores(1)
    assert set(plan.blocks[0].kv_heads) == set(np.argsort(-heads, kind="stable")[:2].tolist())
    assert set(plan.blocks[0].neurons) == set(np.argsort(-neurons, kind="stable")[:256].tolist())
    assert options_width(demo.architecture, [BlockOption(4, 512)]) == 1


# Rises


def test_rises_of_an_untuned_checkpoint_are_those_of_extracted_plans(untuned: Checkpoint, text: Path) -> None:
    found = rises_of(untuned, FEW, text)
    whole = extracted_loss(untuned, untuned.plan(untuned.full_shape), text)
    assert found.whole == pytest.approx(whole, abs=ROUNDING)
    for index, place in ((0, 1), (5, 1), (8, 0), (11, 1)):
        wanted = extracted_loss(untuned, alone(untuned, index, FEW[place]), text)
        assert found.losses[index, place] == pytest.approx(wanted, abs=ROUNDING)
    # Of the whole block nothing is removed.
    assert np.abs(found.rises[:, 2]).max() < ROUNDING


def test_rises_of_a_tuned_checkpoint_are_those_of_folders_with_the_same_adapters(demo: Checkpoint, text: Path) -> None:
    found = rises_of(demo, FEW, text)
    whole = demo.learnt(demo.plan(demo.full_shape))
    for index, place in ((0, 1), (6, 1), (11, 1)):
        own = option_learnt(demo, FEW[place])

        def low_rank(block: int, matrix: str, index: int = index, own: Learnt = own) -> Any:
            return (own if block == index else whole).low_rank(block, matrix)

        wanted = extracted_loss(demo, alone(demo, index, FEW[place]), text, Learnt(low_rank))
        assert found.losses[index, place] == pytest.approx(wanted, abs=ROUNDING)


def test_a_second_search_takes_all_rises_from_the_cache(demo: Checkpoint, text: Path) -> None:
    first = rises_of(demo, FEW[:2], text, rows=1)
    again = rises_of(demo, FEW[:2], text, rows=1)
    assert (first.measured, again.measured) == (2 * 12 + 1 + 7, 0)
    assert (first.losses == again.losses).all()
    assert first.whole == again.whole
    more = rises_of(demo, FEW, text, rows=1)
    assert more.measured == 12
    assert (more.losses[:, :2] == first.losses).all()


def test_rises_are_measured_again_for_another_text_or_other_rows(demo: Checkpoint, text: Path) -> None:
    rises_of(demo, FEW[:1], text, rows=1)
    assert rises_of(demo, FEW[:1], text, rows=2).measured == 12 + 1 + 7
    text.write_text(text.read_text(encoding="utf-8") + " again", encoding="utf-8")
    assert rises_of(demo, FEW[:1], text, rows=1).measured == 12 + 1 + 7


def test_a_damaged_cache_file_is_named(demo: Checkpoint, text: Path, cache: Path) -> None:
    rises_of(demo, FEW[:1], text, rows=1)
    (file,) = cache.rglob("block-004.json")
    file.write_text(file.read_text().replace("0,", "null,", 1), encoding="utf-8")
    with pytest.raises(BadInput, match=r"block-004\.json: is damaged; remove it"):
        rises_of(demo, FEW[:1], text, rows=1)


def test_more_rows_than_the_text_has_are_refused(demo: Checkpoint, text: Path) -> None:
    with pytest.raises(BadInput, match="has 3 rows of 48 tokens where 9 are asked for"):
        rises_of(demo, FEW, text, rows=9)


def test_losses_of_the_selections_depths_are_those_of_their_extracted_plans(demo: Checkpoint, text: Path) -> None:
    found = rises_of(demo, FEW[:1], text)
    assert set(found.depths) == set(demo.selection.depths)
    for depth in (11, 6):
        plan = demo.plan(Shape(depth, Fraction(1), "uniform"))
        assert found.depths[depth] == pytest.approx(extracted_loss(demo, plan, text), abs=ROUNDING)


# Costs


PLANS = (
    [BlockOption(4, 512)] * 12,
    [BlockOption(2, 256), DROPPED, *[BlockOption(3, 320)] * 10],
)


@pytest.mark.parametrize("chosen", PLANS)
@pytest.mark.parametrize(("flow", "precision"), [("torch", "fp32"), ("onnx", "int4"), ("gguf", "q4_k_m")])
def test_roofline_costs_sum_to_the_estimate_of_the_plan(
    demo: Checkpoint, chosen: list[BlockOption], flow: str, precision: str
) -> None:
    costs, device = costs_of(demo, flow, precision), load_device("raspberry-pi-5")
    storage, full = load_backend(flow).storage(precision), demo.architecture
    kept = [option for option in chosen if not option.dropped]
    parts = [full.subnet(1, option.kv_heads, option.neurons) for option in kept]
    factors = learnt(demo, flow, precision)
    wanted = estimate(full, storage, device, flow, precision, WORKLOAD, 512, parts, factors)
    found = costs.fixed_ms + sum(costs.block_ms(option.kv_heads, option.neurons) for option in kept)
    assert found == pytest.approx(wanted.tpot_ms, rel=1e-12)
    memory = BlockMemory(full, storage, WORKLOAD, 512)
    held = memory.fixed_bytes + sum(memory.block_bytes(option.kv_heads, option.neurons) for option in kept)
    assert held == pytest.approx(memory_bytes(full, storage, WORKLOAD, 512, parts), abs=1)


@pytest.mark.parametrize("neurons", [4096, 8192, 11008, 28672])
def test_beyond_two_gigabytes_roofline_costs_are_never_below_the_estimate(demo: Checkpoint, neurons: int) -> None:
    full = demo.architecture.subnet(32, 4, neurons)
    full = replace(full, hidden=4096, heads=32, kv_heads=8, head_dim=128, vocabulary=32000, context=4096)
    storage, device = load_backend("torch").storage("fp16"), load_device("raspberry-pi-5")
    device = replace(device, efficiency_bandwidth_full=replace(device.bandwidth, value=0.85, unit="ratio"))
    factors = learnt(demo, "torch", "fp32")
    costs = RooflineCosts.of(full, device, "torch", "fp16", WORKLOAD, factors)
    assert storage.read_bytes(full) > SMALL_BYTES
    for depth in (32, 20, 8):
        for part in (full.subnet(depth, 8, neurons), full.subnet(depth, 4, neurons // 2)):
            wanted = estimate(full, storage, device, "torch", "fp16", WORKLOAD, 2048, [part], factors).tpot_ms
            found = costs.fixed_ms + depth * costs.block_ms(part.kv_heads, part.neurons)
            assert found >= wanted * (1 - 1e-12)
    whole = estimate(full, storage, device, "torch", "fp16", WORKLOAD, 2048, factors=factors).tpot_ms
    assert costs.fixed_ms + 32 * costs.block_ms(8, neurons) == pytest.approx(whole, rel=1e-12)


def test_linear_costs_are_a_latency_model_and_a_negative_one_is_refused(demo: Checkpoint, text: Path) -> None:
    assert isinstance(LinearCosts(1.0, 0.1, 0.01, 0.001), BlockCosts)
    assert LinearCosts(1.0, 0.1, 0.01, 0.001).block_ms(4, 512) == pytest.approx(0.652)
    with pytest.raises(BadInput, match=r"gives a block of 2 key/value heads and 256 neurons -0\.\d+ ms"):
        search_blocks(demo, text, LinearCosts(1, -1, 0.3, 0), 9.0, flow="torch", precision="fp32", progress=QUIET)


# The whole search


def searched(checkpoint: Checkpoint, text: Path, share: float, **asked: Any) -> BlockSearchResult:
    """A search at a share of the whole model's estimated time."""
    costs = costs_of(checkpoint)
    whole = costs.fixed_ms + 12 * costs.block_ms(4, 512)
    settings = {"flow": "torch", "precision": "fp32", "sequence": LENGTH, "most_options": 5, "progress": QUIET}
    return search_blocks(checkpoint, text, costs, share * whole, **(settings | asked))


def test_the_plan_of_a_search_is_extracted_and_loses_what_was_said(
    demo: Checkpoint, text: Path, tmp_path: Path
) -> None:
    result = searched(demo, text, 0.8, method="exact")
    file, folder = tmp_path / "plan.json", tmp_path / "subnet"
    result.write_plan(file)
    assert read_plan(file, demo.architecture) == result.best.plan
    schema = Path(__file__).parent.parent / "docs" / "schemas" / "plan.schema.json"
    Draft202012Validator(json.loads(schema.read_text())).validate(json.loads(file.read_text(encoding="utf-8")))
    assert amoeba("extract", "--shape", file, "-o", folder, "--quiet").exit_code == 0
    done = amoeba("evaluate", folder, "--text", text, "--sequence", LENGTH, "--json", "--quiet")
    assert json.loads(done.stdout)["loss"] == pytest.approx(result.best.true, abs=ROUNDING)


def test_the_plan_found_is_exported_within_its_budget(demo: Checkpoint, text: Path, tmp_path: Path) -> None:
    result = searched(demo, text, 0.8, method="exact")
    file, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    with file.open("w", encoding="utf-8") as stream:
        json.dump(result.exact.plan.to_json(), stream)
    assert result.exact.plan.is_ragged
    pi = ("--device", "raspberry-pi-5", "--flow", "torch", "--precision", "fp32")
    done = amoeba("export", *pi, "--shape", file, "-o", bundle, "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["predicted"]["tpot_ms"] == pytest.approx(result.exact.ms, abs=1e-3)
    assert found["predicted"]["tpot_ms"] <= result.budget_ms
    assert found["verified"]["greedy_tokens_equal"]


def test_the_answer_names_uniform_exact_and_evolutionary_plans_with_their_losses(
    demo: Checkpoint, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = searched(demo, text, 0.75, rows=1, generations=20)
    assert result.uniform
    assert result.evolved is not None
    assert result.exact.surrogate <= min(one.surrogate for one in (*result.uniform, result.evolved)) + 1e-12
    assert result.selected is not None
    assert result.selected.plan.kept_blocks in {choice.kept for choice in demo.selection.depths.values()}
    assert result.evolutionary_gap == pytest.approx(result.evolved.surrogate - result.exact.surrogate)
    assert all(one.ms <= result.budget_ms * (1 + 1e-9) for one in result.finalists)
    assert result.best.true == min(one.true for one in result.finalists if one.true is not None)
    milliseconds, losses = zip(*result.front, strict=True)
    assert list(milliseconds) == sorted(milliseconds)
    assert list(losses) == sorted(losses, reverse=True)
    print_block_search(result, tmp_path / "plan.json")
    said = capsys.readouterr().out
    for words in ("uniform shape", "per block, exact", "NSGA-II ends", "true loss", str(tmp_path / "plan.json")):
        assert words in said
    value = json.loads(json.dumps(result.to_json()))
    exact = value["exact"]
    assert exact["true_loss"] == round(result.exact.true or 0, 6)
    assert exact["surrogate_error"] == pytest.approx(exact["true_loss"] - exact["surrogate_loss"], abs=2e-6)
    assert value["evolutionary"]["gap"] >= 0
    assert value["plan"] == result.best.plan.to_json()
    assert blocks_text([DROPPED, BlockOption(2, 256)]) == "- 2x256"


def test_a_search_keeps_memory_and_depth_and_measures_a_held_out_text(demo: Checkpoint, text: Path) -> None:
    memory = BlockMemory(demo.architecture, load_backend("torch").storage("fp32"), WORKLOAD, 512)
    allowed = memory.fixed_bytes + 9.5 * memory.block_bytes(4, 512)
    asked = {"memory": memory, "memory_bytes": allowed, "minimum_depth": 11, "held_out": text}
    result = searched(demo, text, 2.0, method="exact", rows=3, **asked)
    assert len(result.exact.plan.blocks) >= 11
    kept = [option for option in result.exact.options if not option.dropped]
    assert memory.fixed_bytes + sum(memory.block_bytes(o.kv_heads, o.neurons) for o in kept) <= allowed
    assert result.exact.held_out == pytest.approx(result.exact.true)


def test_an_impossible_budget_is_refused_before_anything_is_measured(demo: Checkpoint, text: Path, cache: Path) -> None:
    with pytest.raises(NoShapeFits, match=r"least possible TPOT is [\d.]+ ms where [\d.]+ ms is allowed"):
        searched(demo, text, 0.05)
    assert not cache.exists()


def test_imported_masks_are_refused(demo: Checkpoint) -> None:
    mask = BlockMask(np.ones(4, np.uint8), np.ones(512, np.uint8))
    masked = replace(demo, selection=replace(demo.selection, masks=Masks({Fraction(1, 2): (mask,) * 12})))
    with pytest.raises(BadInput, match="holds imported masks"):
        block_options(masked, "torch", "fp32", BuildOptions(512))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "tinystories").is_dir(), reason="../shared/data/tinystories is not here")
def test_stories_of_another_kind_are_searched_on_as_well(demo: Checkpoint) -> None:
    result = searched(demo, SHARED / "data" / "tinystories" / "tiny_stories.txt", 0.7, method="exact", rows=2)
    assert result.exact.true == pytest.approx(extracted_on(demo, result.exact.plan), abs=ROUNDING)


def extracted_on(checkpoint: Checkpoint, plan: Plan) -> float:
    """The loss of a plan on the first two rows of those stories."""
    text = SHARED / "data" / "tinystories" / "tiny_stories.txt"
    rows = text_rows(text, checkpoint.model.tokenizer(), LENGTH)[:2]
    with tempfile.TemporaryDirectory() as work:
        extract(checkpoint.model, plan, Path(work), layout="ragged", learnt=checkpoint.learnt(plan))
        return text_loss(torch_logits(load_torch_model(Path(work))), rows).loss
