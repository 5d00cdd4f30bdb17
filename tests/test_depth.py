"""Which blocks go: the choices of running every cell on the whole stock model, by every way of running it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import BASE, MODELS, QUIET, amoeba, keep_layers, random_selection, save_random_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import read_questions
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import Selection, read_selection, write_selection
from amoeba_deploy.stage1.blocks import ResidentBlocks, StreamedBlocks, Units
from amoeba_deploy.stage1.calibration import (
    Batch,
    Calibration,
    Metric,
    batch_cost,
    metric_value,
    question_calibration,
    running_batch,
)
from amoeba_deploy.stage1.depth import Column, choose, naive_evaluations, prefix_evaluations
from amoeba_deploy.stage1.depth_baselines import (
    angular_distance,
    first_blocks,
    last_token_states,
    least_important,
    nearest_runs,
)
from amoeba_deploy.stage1.gradients import taylor_saliences
from amoeba_deploy.stage1.pipeline import Settings, Stage1, select
from amoeba_deploy.stage1.removal import Costs, LocalRemover, Removed, Trial, Work, total

DEMO = EMBEDDED.parent
TEXT, QUESTIONS = DEMO / "validation.txt", DEMO / "questions.jsonl"
METRICS: tuple[Metric, ...] = ("loss", "accuracy", "choice-loss")
MEMORY = 10**9
FLOAT32 = 1e-5
"""Relative: float32 sums over matrices of other sizes are rounded elsewhere."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, demo: Checkpoint) -> ModelFolder:
    """A random Llama of four blocks that reads text."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_random_model(folder, "llama", vocab_size=1024)
    shutil.copy(demo.model.path / "tokenizer.json", folder)
    return ModelFolder(folder)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Whole models run on one thread here: as fast for matrices this small, and much faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibration(model: ModelFolder, metric: Metric) -> Calibration:
    """A little data in several batches, so that a set can be given up between them."""
    tokenizer = model.tokenizer()
    if metric == "loss":
        ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")[:2000], add_special_tokens=False).ids
        batches = tuple(running_batch([ids[i : i + 16], ids[i + 16 : i + 32]]) for i in range(0, 160, 32))
        return Calibration("text", batches, batches, {"source": "text"})
    few = read_questions(QUESTIONS)[:12]
    parts = [question_calibration(few[i : i + 3], tokenizer, 512, {"source": "questions"}) for i in range(0, 12, 3)]
    batches, text = (tuple(b for part in parts for b in getattr(part, name)) for name in ("batches", "text"))
    return Calibration("questions", batches, text, {"source": "questions"})


def random_batches(count: int = 3, vocabulary: int = 128) -> list[Batch]:
    """Rows of unequal length, with padding."""
    rng = np.random.default_rng(0)
    return [running_batch([rng.integers(0, vocabulary, n).tolist() for n in (20, 13 + i)]) for i in range(count)]


class Whole:
    """The stock model, run as a whole over every batch for one set of removed units."""

    def __init__(self, folder: ModelFolder) -> None:
        self.model = load_torch_model(folder.path)
        self.layers = self.model.model.layers

    def without_blocks(self, removed: Removed, metric: Metric, batches: Sequence[Batch]) -> list[float]:
        kinds = getattr(self.model.config, "layer_types", None)
        keep_layers(self.model, [index for index in range(len(self.layers)) if index not in removed])
        try:
            return [self._cost(metric, batch) for batch in batches]
        finally:
            self.model.model.layers, self.model.config.num_hidden_layers = self.layers, len(self.layers)
            if kinds is not None:
                self.model.config.layer_types = kinds

    def without_sublayers(self, removed: Removed, metric: Metric, batches: Sequence[Batch]) -> list[float]:
        """Each removed attention (even) or feed-forward (odd) gives zeros to the sum behind it."""
        hooks = []
        for unit in removed:
            layer = self.layers[unit // 2]
            if unit % 2:
                hooks.append(layer.mlp.register_forward_hook(lambda *a: torch.zeros_like(a[2])))
            else:
                hooks.append(layer.self_attn.register_forward_hook(lambda *a: (torch.zeros_like(a[2][0]), None)))
        try:
            return [self._cost(metric, batch) for batch in batches]
        finally:
            for hook in hooks:
                hook.remove()

    def _cost(self, metric: Metric, batch: Batch) -> float:
        with torch.no_grad():
            logits = self.model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.places]
        return batch_cost(metric, batch, torch.log_softmax(logits, -1).gather(1, batch.wanted[:, None])[:, 0])


def resident(folder: ModelFolder) -> ResidentBlocks:
    return ResidentBlocks(load_torch_model(folder.path))


# The recurrence


def plain_table(units: int, removals: int, keep_last: int, cost: Callable[[Removed], float]) -> list[Any]:
    """The paper's recurrence as it stands: a candidate stays unless the metric is better without it."""
    best: dict[tuple[int, int], tuple[Removed, float]] = {(0, 0): ((), cost(()))}
    for n in range(1, units - keep_last + 1):
        best[n, 0] = best[0, 0]
        for m in range(1, min(n, removals) + 1):
            removed = (units - keep_last - n, *best[n - 1, m - 1][0])
            entry = removed, cost(removed)
            kept = best.get((n - 1, m))
            best[n, m] = kept if kept is not None and kept[1] <= entry[1] else entry
    return [best[units - keep_last, m] for m in range(removals + 1)]


def plain_beam(units: int, removals: int, keep_last: int, cost: Callable[[Removed], float], beam: int) -> list[Any]:
    """The same with the ``beam`` best sets a cell; of equals, those that keep the candidate come first."""
    cells: dict[tuple[int, int], list[tuple[Removed, float]]] = {(0, 0): [((), cost(()))]}
    for n in range(1, units - keep_last + 1):
        cells[n, 0] = cells[0, 0]
        for m in range(1, min(n, removals) + 1):
            longer = [(units - keep_last - n, *removed) for removed, _ in cells[n - 1, m - 1]]
            ranked = [*cells.get((n - 1, m), []), *((removed, cost(removed)) for removed in longer)]
            cells[n, m] = sorted(ranked, key=lambda entry: entry[1])[:beam]
    return [cells[units - keep_last, m][0] for m in range(removals + 1)]


class Table:
    """A remover that knows what sets cost on each batch, and gives a set up as soon as it may."""

    def __init__(self, units: int, known: dict[Removed, Costs], gives_up: bool = True) -> None:
        self.units, self.known, self.gives_up = units, known, gives_up
        self.work = Work()

    def cost(self, removed: Removed) -> float:
        return total(self.known[removed])

    def costs(self, boundary: int, trials: Sequence[Trial]) -> list[Costs]:
        assert all(unit >= boundary for trial in trials for unit in trial.removed)
        self.work.trials += len(trials)
        return [self._until(self.known[trial.removed], trial.limit) for trial in trials]

    def _until(self, costs: Costs, limit: float) -> Costs:
        ends = [end for end in range(len(costs)) if self.gives_up and sum(costs[:end]) >= limit]
        return costs[: ends[0]] if ends else costs


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, int, int]:
    """Costs of every set of some units over three batches, often equal, with removals and units kept at the end."""
    units = draw(st.integers(2, 6))
    keep_last = draw(st.integers(0, units - 1))
    removals = draw(st.integers(0, units - keep_last))
    rng, ties = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.booleans())
    sets = [s for m in range(units + 1) for s in itertools.combinations(range(units), m)]
    known = {s: tuple((rng.integers(0, 2, 3) if ties else rng.random(3)).astype(float).tolist()) for s in sets}
    return Table(units, known), removals, keep_last


@given(tables())
def test_the_choice_is_the_recurrences_and_a_tie_keeps_the_candidate(case: tuple[Table, int, int]) -> None:
    table, removals, keep_last = case
    found = choose(table, removals, keep_last, table.cost(()))
    assert found == plain_table(table.units, removals, keep_last, table.cost)


@given(tables(), st.integers(1, 5))
def test_a_beam_keeps_the_best_sets_of_every_cell(case: tuple[Table, int, int], beam: int) -> None:
    table, removals, keep_last = case
    found = choose(table, removals, keep_last, table.cost(()), beam=beam)
    assert found == plain_beam(table.units, removals, keep_last, table.cost, beam)


@given(tables(), st.integers(1, 3))
def test_giving_sets_up_early_changes_no_choice(case: tuple[Table, int, int], beam: int) -> None:
    table, removals, keep_last = case
    patient = Table(table.units, table.known, gives_up=False)
    found = [choose(each, removals, keep_last, table.cost(()), beam=beam) for each in (table, patient)]
    assert found[0] == found[1]


@given(tables(), st.integers(1, 3), st.data())
def test_going_on_from_any_column_gives_the_same_choice(
    case: tuple[Table, int, int], beam: int, data: st.DataObject
) -> None:
    table, removals, keep_last = case
    columns: list[Column] = []
    found = choose(table, removals, keep_last, table.cost(()), beam=beam, done=columns.append)
    assert len(columns) == table.units - keep_last
    saved = Column.from_json(json.loads(json.dumps(data.draw(st.sampled_from(columns)).to_json())))
    assert choose(table, removals, keep_last, table.cost(()), beam=beam, start=saved) == found


@pytest.mark.parametrize(("removals", "keep_last"), [(3, 0), (2, 1), (1, 2)])
def test_a_set_whose_cost_is_no_number_is_named(removals: int, keep_last: int) -> None:
    sets = [s for m in range(4) for s in itertools.combinations(range(3), m)]
    table = Table(3, {s: (1.0 if s != (0,) else math.nan,) for s in sets})
    with pytest.raises(BadInput, match=r"the model without blocks \[0\] gives logits that are not finite"):
        choose(table, removals, keep_last, 1.0)


def test_a_sublayer_whose_cost_is_no_number_is_named_by_its_block() -> None:
    table = Table(4, {s: (math.nan,) for m in range(5) for s in itertools.combinations(range(4), m)})
    with pytest.raises(BadInput, match="the model without feed-forward 1 gives"):
        choose(table, 2, 0, 1.0, units="sublayer")


@pytest.mark.parametrize(("removals", "keep_last"), [(4, 0), (3, 1), (-1, 0)])
def test_more_than_there_are_candidates_cannot_go(removals: int, keep_last: int) -> None:
    with pytest.raises(BadInput, match="cannot be removed while the last"):
        choose(Table(3, {(): (1.0,)}), removals, keep_last, 1.0)


# Real models


def same_choices(model: ModelFolder, metric: Metric, keep_last: int, lowest: int) -> None:
    """Check every depth against the plain recurrence over whole stock models."""
    data, whole, depth = calibration(model, metric), Whole(model), model.architecture.depth
    settings = Settings(metric=metric, keep_last=keep_last, minimum_depth=lowest)
    found, facts = Stage1(model, data, data, settings, QUIET).depths()
    removals = min(depth - lowest, depth - keep_last)
    wanted = plain_table(
        depth, removals, keep_last, lambda removed: sum(whole.without_blocks(removed, metric, data.batches))
    )
    assert sorted(found) == list(range(depth - removals, depth + 1))
    for m, (removed, cost) in enumerate(wanted):
        assert found[depth - m].kept == tuple(i for i in range(depth) if i not in removed)
        # Accuracies may be zero, and are then zero exactly.
        assert found[depth - m].metric == pytest.approx(metric_value(metric, cost, data.count), rel=FLOAT32, abs=1e-9)
    work = facts["block_evaluations"]
    assert work["measured"] <= work["prefix"] < work["naive"]
    assert (work["untouched"], work["repeated"]) == (depth, 0)


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_a_random_model_keeps_what_every_cell_on_the_whole_model_says(
    metric: Metric, keep_last: int, small: ModelFolder
) -> None:
    same_choices(small, metric, keep_last, lowest=1)


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_a_trained_model_keeps_what_every_cell_on_the_whole_model_says(
    metric: Metric, keep_last: int, demo: Checkpoint
) -> None:
    same_choices(demo.model, metric, keep_last, lowest=9)


def test_a_beam_on_a_real_model_keeps_what_the_plain_beam_keeps(small: ModelFolder) -> None:
    data, whole = calibration(small, "loss"), Whole(small)
    found, _ = Stage1(small, data, data, Settings(minimum_depth=1, keep_last=0, beam=3), QUIET).depths()
    wanted = plain_beam(4, 3, 0, lambda removed: sum(whole.without_blocks(removed, "loss", data.batches)), 3)
    for m, (removed, cost) in enumerate(wanted):
        assert found[4 - m].kept == tuple(i for i in range(4) if i not in removed)
        assert found[4 - m].metric == pytest.approx(cost / data.count, rel=FLOAT32)


def test_sublayers_are_chosen_as_if_those_removed_added_nothing(small: ModelFolder) -> None:
    data, whole = calibration(small, "loss"), Whole(small)
    settings = Settings(minimum_depth=2, keep_last=1, units="sublayer")
    found, facts = Stage1(small, data, data, settings, QUIET).depths()
    wanted = plain_table(8, 4, 2, lambda removed: sum(whole.without_sublayers(removed, "loss", data.batches)))
    assert sorted(found) == [2, 3, 4]
    for depth, choice in found.items():
        removed, cost = wanted[2 * (4 - depth)]
        gone = {i for i in range(4) if {2 * i, 2 * i + 1} <= set(removed)}
        assert set(choice.kept) == set(range(4)) - gone
        assert set(choice.without_attention) == {u // 2 for u in removed if u % 2 == 0} - gone
        assert set(choice.without_feed_forward) == {u // 2 for u in removed if u % 2} - gone
        assert choice.metric == pytest.approx(cost / data.count, rel=FLOAT32)
    assert facts["block_evaluations"]["measured"] <= facts["block_evaluations"]["prefix"]


SETS: list[Removed] = [(), (3,), (1,), (0, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_costs_what_its_shrunken_model_costs(name: str, models: Callable[[str], ModelFolder]) -> None:
    batches, whole = random_batches(), Whole(models(name))
    remover = LocalRemover(resident(models(name)), batches, "loss", "block", MEMORY)
    for removed, costs in zip(SETS, remover.costs(0, [Trial(removed) for removed in SETS]), strict=True):
        assert costs == pytest.approx(whole.without_blocks(removed, "loss", batches), rel=FLOAT32)


ONE_OF_EACH = (
    "llama-biases", "mistral", "qwen2", "qwen3", "granite-biases", "gemma2", "gemma3-capped", "phi3-partial",
    "smollm3-biases", "olmo2-biases",
)  # fmt: skip
"""A model of each family, with the switches on that bring the most of it."""


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_familys_sublayers_cost_what_it_costs_to_zero_them(
    name: str, models: Callable[[str], ModelFolder]
) -> None:
    batches, whole = random_batches(), Whole(models(name))
    remover = LocalRemover(resident(models(name)), batches, "loss", "sublayer", MEMORY)
    sets: list[Removed] = [(), (0,), (7,), (1, 4), (0, 1, 5, 6)]
    for removed, costs in zip(sets, remover.costs(0, [Trial(removed) for removed in sets]), strict=True):
        assert costs == pytest.approx(whole.without_sublayers(removed, "loss", batches), rel=FLOAT32)


def test_both_sublayers_of_a_block_cost_what_the_block_costs(models: Callable[[str], ModelFolder]) -> None:
    blocks, batches = resident(models("qwen3")), random_batches()
    (block,) = LocalRemover(blocks, batches, "loss", "block", MEMORY).costs(1, [Trial((1, 3))])
    (both,) = LocalRemover(blocks, batches, "loss", "sublayer", MEMORY).costs(2, [Trial((2, 3, 6, 7))])
    assert both == pytest.approx(block, rel=FLOAT32)


def test_a_set_costs_the_same_whatever_is_measured_beside_it(models: Callable[[str], ModelFolder]) -> None:
    blocks, batches = resident(models("llama-multihead")), random_batches()
    together = LocalRemover(blocks, batches, "loss", "block", MEMORY).costs(0, [Trial(removed) for removed in SETS])
    for removed, costs in zip(SETS, together, strict=True):
        alone = LocalRemover(blocks, batches, "loss", "block", MEMORY)
        assert alone.costs(min(removed, default=4), [Trial(removed)]) == [costs]


def test_a_hopeless_set_is_given_up_and_the_others_are_not(models: Callable[[str], ModelFolder]) -> None:
    batches = random_batches(12)
    remover = LocalRemover(resident(models("llama-multihead")), batches, "loss", "block", MEMORY)
    full, one, other = remover.costs(0, [Trial(()), Trial((1,), limit=1e-3), Trial((2,), limit=1e9)])
    assert len(full) == len(other) == len(batches)
    assert 0 < len(one) < len(batches)
    assert (remover.work.trials, remover.work.given_up) == (3, 1)


# Work


def test_unit_evaluations_of_the_plain_ways_are_those_counted_by_hand() -> None:
    assert (naive_evaluations(16, 8, 0), prefix_evaluations(16, 8, 0)) == (1192, 596)
    assert (naive_evaluations(32, 16, 0), prefix_evaluations(32, 16, 0)) == (9552, 4776)


def test_unit_evaluations_are_those_that_the_recurrence_makes() -> None:
    for units, removals, keep_last in itertools.product((3, 5), (1, 3), (0, 2)):
        removals = min(removals, units - keep_last)
        runs: list[tuple[int, int]] = []

        def cost(removed: Removed, units: int = units, runs: list[tuple[int, int]] = runs) -> float:
            if removed:
                runs.append((units - len(removed), units - removed[0] - len(removed)))
            return 0.0

        plain_table(units, removals, keep_last, cost)
        assert naive_evaluations(units, removals, keep_last) == sum(whole for whole, _ in runs)
        assert prefix_evaluations(units, removals, keep_last) == sum(behind for _, behind in runs)


def table_in(memory: int, folder: ModelFolder, units: Units = "block") -> tuple[list[tuple[Removed, float]], Work]:
    """The choices with so many bytes for hidden states, and the work."""
    batches = random_batches()
    remover = LocalRemover(resident(folder), batches, "loss", units, memory)
    full = total(remover.costs(remover.units, [Trial(())])[0])
    return choose(remover, remover.units - 1, 1, full, units=units), remover.work


@pytest.mark.parametrize("units", ["block", "sublayer"])
def test_less_memory_costs_work_and_changes_nothing(units: Units, models: Callable[[str], ModelFolder]) -> None:
    folder = models("llama-grouped-tied")
    one = sum(4 * batch.tokens * BASE["hidden_size"] for batch in random_batches())
    found = [table_in(states * one, folder, units) for states in (0, 1, 2, 100)]
    assert all(choices == found[-1][0] for choices, _ in found)
    repeated = [work.tokens_repeated for _, work in found]
    assert repeated == sorted(repeated, reverse=True)
    assert repeated[0] > repeated[1] > 0
    assert repeated[-1] == 0
    assert len({work.tokens for _, work in found}) == 1, "what runs behind a boundary does not depend on memory"


@pytest.mark.parametrize("memory", [0, MEMORY])
@pytest.mark.parametrize(
    "name", ["llama-grouped-tied", "llama-grouped-untied", "llama-3-rope", "phi3-long", *ONE_OF_EACH]
)
def test_blocks_read_from_disk_cost_the_same_bit_for_bit(
    name: str, memory: int, models: Callable[[str], ModelFolder]
) -> None:
    batches, trials = random_batches(), [Trial(removed) for removed in SETS]
    here = LocalRemover(resident(models(name)), batches, "loss", "block", MEMORY)
    there = LocalRemover(StreamedBlocks(models(name)), batches, "loss", "block", memory)
    assert there.costs(0, trials) == here.costs(0, trials)


def test_bfloat16_blocks_read_from_disk_cost_the_same_bit_for_bit(demo: Checkpoint) -> None:
    batches, trials = calibration(demo.model, "loss").batches, [Trial(()), Trial((3, 7)), Trial((11,))]
    here = LocalRemover(resident(demo.model), batches, "loss", "block", MEMORY)
    there = LocalRemover(StreamedBlocks(demo.model), batches, "loss", "block", 0)
    assert demo.model.tensors.info("model.embed_tokens.weight").dtype == "BF16"
    assert there.costs(0, trials) == here.costs(0, trials)


# The other ways to choose


def test_the_least_important_go_and_of_equals_the_later() -> None:
    assert least_important([0.3, 0.1, 0.2, 0.1], 3) == [(), (3,), (1, 3), (1, 2, 3)]


def test_the_first_blocks_stay() -> None:
    assert first_blocks(5, 3) == [(), (4,), (3, 4), (2, 3, 4)]


def turned(*degrees: float) -> list[torch.Tensor]:
    """States of one row at boundaries, as directions in a plane."""
    return [torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))]]).double() for d in degrees]


def test_angular_distance_is_the_mean_angle_in_half_turns() -> None:
    before = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]).double()
    after = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]]).double()
    # Cosines near one leave half of a float64's digits to the angle.
    assert angular_distance(before, after) == pytest.approx((0 + 0.5 + 1 + 0.25) / 4, abs=1e-8)


def test_the_run_of_neighbours_that_turns_states_least_goes() -> None:
    states = turned(0, 90, 100, 130, 131)
    assert nearest_runs(states, 4, 3) == [(), (3,), (2, 3), (1, 2, 3)]
    assert nearest_runs(states, 3, 3) == [(), (1,), (1, 2), (0, 1, 2)]


def test_of_runs_that_turn_states_alike_the_later_goes() -> None:
    assert nearest_runs(turned(0, 90, 0, 90, 0), 4, 2) == [(), (3,), (2, 3)]


@pytest.mark.parametrize("name", ["qwen2", "granite", "gemma2"])
def test_angles_are_those_of_each_rows_last_token(name: str, models: Callable[[str], ModelFolder]) -> None:
    folder, batches = models(name), random_batches()
    model = load_torch_model(folder.path)
    wanted: list[list[torch.Tensor]] = [[] for _ in range(5)]
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            inputs: list[torch.Tensor] = []
            hooks = [
                module.register_forward_pre_hook(lambda _, a, inputs=inputs: inputs.append(a[0][0, -1]))
                for module in (*model.model.layers, model.model.norm)
            ]
            with torch.no_grad():
                model(input_ids=batch.ids[row : row + 1, :length], use_cache=False)
            for hook in hooks:
                hook.remove()
            for boundary, state in enumerate(inputs):
                wanted[boundary].append(state.double())
    for found, rows in zip(last_token_states(ResidentBlocks(model), batches, MEMORY), wanted, strict=True):
        torch.testing.assert_close(found, torch.stack(rows), rtol=FLOAT32, atol=1e-5)  # float32, padded rows


def test_shortened_ppl_removes_the_blocks_whose_single_removal_costs_least(small: ModelFolder) -> None:
    data, whole = calibration(small, "loss"), Whole(small)
    settings = Settings(depth_method="shortened-ppl", minimum_depth=1, keep_last=1)
    found, _ = Stage1(small, data, data, settings, QUIET).depths()
    single = [sum(whole.without_blocks((unit,), "loss", data.batches)) for unit in range(3)]
    order = sorted(range(3), key=single.__getitem__)
    for m in range(4):
        removed = tuple(sorted(order[:m]))
        assert found[4 - m].kept == tuple(i for i in range(4) if i not in removed)
        cost = sum(whole.without_blocks(removed, "loss", data.batches))
        assert found[4 - m].metric == pytest.approx(cost / data.count, rel=FLOAT32)


def taylor_importance(folder: ModelFolder, batches: Sequence[Batch]) -> list[float]:
    """Sums of |weight x gradient of the mean loss| over each block's matrices, by one backward pass over it all."""
    model = load_torch_model(folder.path)
    losses = []
    for batch in batches:
        logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.places]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.wanted, reduction="sum"))
    torch.autograd.backward(sum(losses) / sum(batch.count for batch in batches))
    return [
        float(sum((p * p.grad).detach().abs().double().sum() for p in layer.parameters() if p.ndim == 2))
        for layer in model.model.layers
    ]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shortened_taylor_takes_the_whole_models_gradients(name: str, models: Callable[[str], ModelFolder]) -> None:
    folder, batches = models(name), random_batches()
    found = taylor_saliences(resident(folder), batches, folder.architecture, MEMORY)
    importance = [float(heads.sum() + neurons.sum()) for heads, neurons in found]
    # Float32 gradients, summed over batches in another order.
    assert importance == pytest.approx(taylor_importance(folder, batches), rel=1e-4)


def test_shortened_taylor_removes_the_blocks_of_least_importance(small: ModelFolder) -> None:
    data = calibration(small, "loss")
    settings = Settings(depth_method="shortened-taylor", minimum_depth=1, keep_last=0)
    found, _ = Stage1(small, data, data, settings, QUIET).depths()
    importance = taylor_importance(small, data.text)
    order = sorted(range(4), key=importance.__getitem__)
    assert {depth: choice.kept for depth, choice in found.items()} == {
        4 - m: tuple(sorted(order[m:])) for m in range(4)
    }


@pytest.mark.parametrize("method", ["first", "angular", "shortened-ppl", "shortened-taylor"])
def test_no_way_to_choose_removes_the_last_blocks_that_are_to_stay(method: Any, small: ModelFolder) -> None:
    data = calibration(small, "choice-loss")
    settings = Settings(depth_method=method, metric="choice-loss", minimum_depth=1, keep_last=2)
    found, _ = Stage1(small, data, data, settings, QUIET).depths()
    assert sorted(found) == [2, 3, 4]
    assert all({2, 3} <= set(choice.kept) for choice in found.values())


@pytest.mark.parametrize("method", ["first", "angular", "shortened-ppl", "shortened-taylor"])
def test_every_way_to_choose_reports_the_metric_of_what_it_keeps(method: Any, small: ModelFolder) -> None:
    data, whole = calibration(small, "loss"), Whole(small)
    settings = Settings(depth_method=method, minimum_depth=1)
    found, _ = Stage1(small, data, data, settings, QUIET).depths()
    for depth, choice in found.items():
        removed = tuple(i for i in range(4) if i not in choice.kept)
        assert len(choice.kept) == depth
        cost = sum(whole.without_blocks(removed, "loss", data.batches))
        assert choice.metric == pytest.approx(cost / data.count, rel=FLOAT32)


# Going on


class Interrupting(Progress):
    """Progress that is interrupted after so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__(quiet=True)
        self.left = columns

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        def step() -> None:
            self.left -= label == "depth"
            if not self.left:
                raise KeyboardInterrupt

        del total
        yield step


def chosen(model: ModelFolder, progress: Progress = QUIET, **changes: Any) -> Selection:
    settings = replace(Settings(samples=4, sequence=24, minimum_depth=1), **changes)
    return select(model, TEXT, settings, progress=progress)


def same(one: Selection, two: Selection) -> bool:
    """Whether two selections are one, to the last bit."""
    pairs = [(a.tensors(0), b.tensors(0)) for a, b in zip(one.blocks, two.blocks, strict=True)]
    arrays = all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)
    return arrays and (one.base_digest, one.depths) == (two.base_digest, two.depths)


@pytest.mark.parametrize("changes", [{}, {"units": "sublayer"}], ids=str)
def test_a_selection_is_read_back_and_is_the_same_twice(
    changes: dict[str, Any], small: ModelFolder, tmp_path: Path
) -> None:
    first, second = (chosen(small, **changes) for _ in range(2))
    write_selection(tmp_path, first)
    assert same(first, second)
    assert same(first, read_selection(tmp_path, small.architecture))


@pytest.mark.parametrize("width_method", ["flap", "taylor"])
@pytest.mark.parametrize("changes", [{}, {"units": "sublayer"}, {"depth_method": "shortened-taylor"}], ids=str)
def test_blocks_read_from_disk_give_the_same_selection_bit_for_bit(
    changes: dict[str, Any], width_method: Any, small: ModelFolder
) -> None:
    here = chosen(small, width_method=width_method, **changes)
    assert same(here, chosen(small, width_method=width_method, offload=True, state_memory=10**5, **changes))


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory, demo: Checkpoint) -> Callable[[str], ModelFolder]:
    """Models by their name in ``MODELS`` that read text."""
    root = tmp_path_factory.mktemp("reading")

    def get(name: str) -> ModelFolder:
        family, changes = MODELS[name]
        if not (root / name).is_dir():
            save_random_model(root / name, family, **(changes | {"vocab_size": 1024}))
            shutil.copy(demo.model.path / "tokenizer.json", root / name)
        return ModelFolder(root / name)

    return get


@pytest.mark.parametrize(
    "changes",
    [
        {"width_method": "taylor", "units": "sublayer"},
        {"width_method": "wanda", "depth_method": "shortened-taylor"},
        {"width_method": "magnitude", "depth_method": "angular"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["granite", "gemma3-capped", "phi3-partial", "smollm3-biases", "olmo2"])
def test_every_family_is_selected_by_every_method_and_from_disk_bit_for_bit(
    name: str, changes: dict[str, Any], reading: Callable[[str], ModelFolder]
) -> None:
    model = reading(name)
    here = chosen(model, sequence=16, **changes)
    assert sorted(here.depths) == [1, 2, 3, 4]
    assert same(here, chosen(model, sequence=16, offload=True, state_memory=10**5, **changes))


def test_rows_that_are_longer_than_a_blocks_window_are_refused(reading: Callable[[str], ModelFolder]) -> None:
    with pytest.raises(BadInput, match="--sequence 17 exceeds the 16 positions"):
        chosen(reading("gemma2"), sequence=17)


def saved_tables(tmp_path: Path) -> list[Path]:
    """Tables of unfinished runs in the test's own cache."""
    return list((tmp_path / "cache" / "select").glob("*"))


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"units": "sublayer"}, {"beam": 3}], ids=str)
def test_an_interrupted_run_goes_on_and_ends_the_same(
    columns: int, changes: dict[str, Any], small: ModelFolder, tmp_path: Path
) -> None:
    undisturbed = chosen(small, **changes)
    with pytest.raises(KeyboardInterrupt):
        chosen(small, Interrupting(columns), **changes)
    assert len(saved_tables(tmp_path)) == 1
    resumed = chosen(small, resume=True, **changes)
    assert same(resumed, undisturbed)
    assert resumed.facts["evaluations"] < undisturbed.facts["evaluations"]
    work = [each.facts["block_evaluations"]["measured"] for each in (resumed, undisturbed)]
    assert work[0] < work[1]
    assert saved_tables(tmp_path) == []


def test_an_interrupted_run_begins_anew_unless_told_to_go_on(small: ModelFolder) -> None:
    undisturbed = chosen(small)
    with pytest.raises(KeyboardInterrupt):
        chosen(small, Interrupting(2))
    assert chosen(small).facts["evaluations"] == undisturbed.facts["evaluations"]


@pytest.mark.parametrize("changes", [{"beam": 2}, {"keep_last": 0}, {"samples": 3}, {"minimum_depth": 2}], ids=str)
def test_the_table_of_another_run_is_not_gone_on_with(changes: dict[str, Any], small: ModelFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        chosen(small, Interrupting(2))
    assert same(chosen(small, resume=True, **changes), chosen(small, **changes))


def test_there_may_be_nothing_to_go_on_with(small: ModelFolder) -> None:
    assert same(chosen(small, resume=True), chosen(small))


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value.pop("column"),
        lambda value: value.update(column={"candidates": 2}),
        lambda value: value["column"].update(cells=[[["one", 1.0]]]),
        lambda value: value["column"].update(candidates="two"),
        lambda value: value.update(format="amoeba.depth-table/9"),
    ],
    ids=["no column", "no cells", "no numbers", "no count", "a newer format"],
)
def test_a_damaged_table_is_named(edit: Callable[[Any], object], small: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        chosen(small, Interrupting(2))
    (file,) = saved_tables(tmp_path)
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))
    with pytest.raises(BadInput, match=file.name):
        chosen(small, resume=True)


def test_half_a_table_is_named_in_one_sentence(small: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        chosen(small, Interrupting(2))
    (file,) = saved_tables(tmp_path)
    file.write_text(file.read_text()[:-40])
    result = run_select(small.path, tmp_path, "--min-depth", 1, "--resume")
    assert file.name in sentence(result, tmp_path)


# The command


def run_select(model: Path, tmp_path: Path, *options: object) -> Result:
    """Select on a little text, into the test's folder."""
    little = ("--calibration", TEXT, "--samples", 4, "--sequence", 24)
    return amoeba("select", model, *little, *options, "-o", tmp_path / "out" / "selection", "--quiet")


def sentence(result: Result, tmp_path: Path) -> str:
    """The one line of a refusal, after checking its exit code and that nothing was left."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("amoeba: ")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    return line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--samples", 10**6), "tokens where 24000000 are needed, 1000000 rows of 24"),
        (("--sequence", 129), "--sequence 129 exceeds the 128 positions"),
        (("--metric", "accuracy"), "--metric accuracy needs multiple-choice questions, and validation.txt is text"),
        (("--metric", "choice-loss"), "--metric choice-loss needs multiple-choice questions"),
        (("--calibration", QUESTIONS, "--metric", "loss"), "--metric loss needs a text, and questions.jsonl holds"),
        (("--calibration", "wikitex"), "wikitex: is neither a file nor a data set known by name"),
        (("--calibration", "missing.txt"), "missing.txt: cannot be read"),
        (("--width-calibration", "missing.txt"), "missing.txt: cannot be read"),
        (("--min-depth", 0), "--min-depth 0 is not within 1..4"),
        (("--min-depth", 5), "--min-depth 5 is not within 1..4"),
        (("--keep-last", 5), "--keep-last 5 is not within 0..4"),
        (("--depth-method", "first", "--beam", 2), "--beam goes with --depth-method dp only"),
        (("--depth-method", "angular", "--units", "sublayer"), "--units sublayer goes with --depth-method dp only"),
        (("--workers", "foo"), "'foo' is not known; write ray, or ray:4 for four workers"),
        (("--workers", "ray:0"), "'ray:0' is not known"),
        (("--state-memory", "4"), "'4' is not a number with one of the units"),
        (("--samples", 0), "--samples"),
        (("--beam", 0), "--beam"),
        (("--metric", "speed"), "'speed'"),
        (("--depth-method", "last"), "'last'"),
    ],
    ids=lambda value: " ".join(str(Path(str(v)).name) for v in value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_selected_is_one_sentence(
    options: tuple[object, ...], says: str, small: ModelFolder, tmp_path: Path
) -> None:
    assert says in sentence(run_select(small.path, tmp_path, *options), tmp_path)


def edited(model: ModelFolder, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model with edited weights."""
    shutil.copytree(model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("more", [(), ("--offload",), ("--depth-method", "first"), ("--units", "sublayer")], ids=str)
def test_a_model_with_a_weight_that_is_no_number_is_refused(
    more: tuple[object, ...], small: ModelFolder, tmp_path: Path
) -> None:
    path = edited(
        small, tmp_path / "model", lambda t: t["model.layers.1.self_attn.o_proj.weight"].fill(np.float32("nan"))
    )
    said = sentence(run_select(path, tmp_path, *more), tmp_path)
    assert "the full model gives logits that are not finite on the calibration data" in said


@pytest.mark.parametrize("method", ["dp", "shortened-ppl"])
def test_a_set_of_blocks_without_which_numbers_overflow_is_named(method: str, demo: Checkpoint, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "biases", "llama", vocab_size=1024, mlp_bias=True)
    shutil.copy(demo.model.path / "tokenizer.json", model.path)

    def edit(tensors: dict[str, Any]) -> None:
        # States stay within float32 as long as block 1 takes back what blocks 0 and 2 each add.
        for index, bias in enumerate((2e38, -2e38, 2e38)):
            tensors[f"model.layers.{index}.mlp.down_proj.bias"].fill(bias)

    path = edited(model, tmp_path / "model", edit)
    said = sentence(run_select(path, tmp_path, "--depth-method", method), tmp_path)
    assert "the model without blocks [1] gives logits that are not finite" in said


def test_a_selection_belongs_to_the_model_that_it_was_made_on(small: ModelFolder, tmp_path: Path) -> None:
    other = edited(small, tmp_path / "other", lambda t: t["model.norm.weight"].fill(1))
    (tmp_path / "selection").mkdir()
    write_selection(tmp_path / "selection", random_selection(small))
    create = ("checkpoint", "create", other, "--selection", tmp_path / "selection", "-o", tmp_path / "out" / "made")
    said = sentence(amoeba(*create), tmp_path)
    assert "was made for a model of digest" in said
    assert "select again for this model" in said
