"""Stage 1 as a whole: the choices of evaluating every cell on the whole stock model, by every way of running it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET, amoeba
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.selection import Selection, read_selection, write_selection
from amoeba_deploy.stage1.blocks import ResidentBlocks, StreamedBlocks
from amoeba_deploy.stage1.calibration import Batch, Calibration, Metric, batch_cost, metric_value, read_calibration
from amoeba_deploy.stage1.depth import choose, naive_evaluations, prefix_evaluations
from amoeba_deploy.stage1.interrupted import SavedTable
from amoeba_deploy.stage1.pipeline import Settings, Stage1, select
from amoeba_deploy.stage1.removal import LocalRemover, Removed, Trial, Work, total

DEMO = EMBEDDED.parent
MEMORY = 10**9
SMALL = Settings(samples=16, sequence=32, minimum_depth=10, keep_last=1)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions that the embedded model answers well."""
    file = tmp_path_factory.mktemp("questions") / "few.jsonl"
    lines = (DEMO / "questions.jsonl").read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    return file


def calibration(model: ModelFolder, metric: Metric, questions: Path) -> Calibration:
    source = DEMO / "validation.txt" if metric == "loss" else questions
    samples = 8 if metric == "loss" else None
    return read_calibration(str(source), model.tokenizer(), 512, samples=samples, sequence=48)


def whole_model_cost(model: Any, layers: Any, removed: Removed, metric: Metric, batch: Batch) -> float:
    """A batch's sum with the stock model's own forward pass over the blocks that stay."""
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in removed)
    model.config.num_hidden_layers = len(model.model.layers)
    with torch.no_grad():
        logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)[batch.places]
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    return batch_cost(metric, batch, torch.log_softmax(logits, -1).gather(1, batch.wanted[:, None])[:, 0])


def plain_table(depth: int, removals: int, keep_last: int, cost: Callable[[Removed], float]) -> list[Any]:
    """METHOD's recurrence as it stands."""
    best: dict[tuple[int, int], tuple[Removed, float]] = {(0, 0): ((), cost(()))}
    for n in range(1, depth - keep_last + 1):
        best[n, 0] = best[0, 0]
        for m in range(1, min(n, removals) + 1):
            removed = (depth - keep_last - n, *best[n - 1, m - 1][0])
            entry = removed, cost(removed)
            kept = best.get((n - 1, m))
            best[n, m] = kept if kept is not None and kept[1] <= entry[1] else entry
    return [best[depth - keep_last, m] for m in range(removals + 1)]


@pytest.mark.parametrize("metric", ["loss", "accuracy", "choice-loss"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_blocks_and_metrics_are_those_of_every_cell_on_the_whole_model(
    metric: Metric, keep_last: int, demo: Checkpoint, questions: Path
) -> None:
    data = calibration(demo.model, metric, questions)
    settings = replace(SMALL, metric=metric, keep_last=keep_last, minimum_depth=9)
    found, facts = Stage1(demo.model, data, data, settings, QUIET).depths()
    model = load_torch_model(demo.model.path)
    layers = model.model.layers

    def cost(removed: Removed) -> float:
        return sum(whole_model_cost(model, layers, removed, metric, batch) for batch in data.batches)

    for m, (removed, wanted) in enumerate(plain_table(12, 3, keep_last, cost)):
        choice = found[12 - m]
        assert choice.kept == tuple(i for i in range(12) if i not in removed)
        # Float32 sums: the head runs here over the wanted places only.
        assert choice.metric == pytest.approx(metric_value(metric, wanted, data.count), rel=1e-5, abs=1e-6)
    work = facts["block_evaluations"]
    assert work["measured"] <= work["prefix"] < work["naive"]
    assert work["untouched"] == 12
    assert work["repeated"] == 0


@pytest.mark.parametrize(
    "name", ["llama-multihead", "llama-biases", "llama-3-rope", "llama-small-heads", "mistral", "qwen2", "qwen3"]
)
def test_every_family_gives_the_losses_of_the_whole_model_in_memory_and_from_disk(
    name: str, models: Callable[[str], ModelFolder]
) -> None:
    from amoeba_deploy.stage1.calibration import running_batch

    folder = models(name)
    batches = [running_batch(np.random.default_rng(i).integers(0, 128, (3, 20)).tolist()) for i in range(3)]
    trials = [Trial(()), Trial((1,)), Trial((0, 2)), Trial((1, 2, 3))]
    model = load_torch_model(folder.path)
    layers = model.model.layers
    resident = LocalRemover(ResidentBlocks(load_torch_model(folder.path)), batches, "loss", "block", MEMORY)
    found = resident.costs(0, trials)
    for trial, costs in zip(trials, found, strict=True):
        wanted = [whole_model_cost(model, layers, trial.removed, "loss", batch) for batch in batches]
        assert costs == pytest.approx(wanted, rel=1e-5)  # float32 sums
    streamed = LocalRemover(StreamedBlocks(folder), batches, "loss", "block", 0)
    assert streamed.costs(0, trials) == found


def test_sublayers_are_removed_as_if_they_added_nothing(models: Callable[[str], ModelFolder]) -> None:
    from amoeba_deploy.stage1.calibration import running_batch

    folder = models("llama-biases")
    batch = running_batch(np.random.default_rng(0).integers(0, 128, (3, 20)).tolist())
    model = load_torch_model(folder.path)
    remover = LocalRemover(ResidentBlocks(load_torch_model(folder.path)), [batch], "loss", "sublayer", MEMORY)
    (found,) = remover.costs(0, [Trial((0, 5, 6))])  # attention of 0, feed-forward of 2, attention of 3
    for index in (0, 3):
        model.model.layers[index].self_attn.register_forward_hook(lambda *a: (torch.zeros_like(a[2][0]), None))
    model.model.layers[2].mlp.register_forward_hook(lambda *a: torch.zeros_like(a[2]))
    wanted = whole_model_cost(model, model.model.layers, (), "loss", batch)
    assert total(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("states", [0, 1, 3])
def test_less_memory_costs_work_and_changes_nothing(states: int, demo: Checkpoint, questions: Path) -> None:
    data = calibration(demo.model, "loss", questions)
    size = sum(4 * batch.tokens * 256 for batch in data.batches)
    full, _ = Stage1(demo.model, data, data, SMALL, QUIET).depths()
    bounded, facts = Stage1(demo.model, data, data, replace(SMALL, state_memory=states * size), QUIET).depths()
    assert bounded == full
    assert facts["block_evaluations"]["repeated"] > 0


def chosen(demo: Checkpoint, **changes: Any) -> Selection:
    return select(demo.model, DEMO / "validation.txt", replace(SMALL, **changes), progress=QUIET)


@pytest.fixture(scope="module")
def plain(demo: Checkpoint) -> Selection:
    """What is chosen where nothing is changed."""
    return chosen(demo)


def same(one: Selection, two: Selection) -> bool:
    pairs = zip(one.blocks, two.blocks, strict=True)
    arrays = all((a.tensors(0)[key] == b.tensors(0)[key]).all() for a, b in pairs for key in a.tensors(0))
    return arrays and one.depths == two.depths


def test_blocks_from_disk_give_the_same_selection_bit_for_bit(demo: Checkpoint) -> None:
    for method in ("flap", "taylor"):
        here = chosen(demo, width_method=method)
        assert same(here, chosen(demo, width_method=method, offload=True, state_memory=10**6))


def test_two_workers_give_the_same_selection_bit_for_bit(demo: Checkpoint, plain: Selection) -> None:
    pytest.importorskip("ray")
    spread = chosen(demo, workers=2)
    assert same(plain, spread)
    work = spread.facts["block_evaluations"]
    assert work["measured"] <= work["prefix"]


def test_more_workers_than_processors_are_refused(demo: Checkpoint) -> None:
    pytest.importorskip("ray")
    with pytest.raises(BadInput, match=r"ray:999 asks for more workers than"):
        chosen(demo, workers=999)


def test_an_interrupted_run_goes_on_and_ends_the_same(
    demo: Checkpoint, plain: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SavedTable.write

    def interrupted(self: SavedTable, column: Any) -> None:
        write(self, column)
        if column.candidates == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedTable, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen(demo)
    monkeypatch.setattr(SavedTable, "write", write)
    resumed = chosen(demo, resume=True)
    assert same(resumed, plain)
    assert resumed.facts["evaluations"] < plain.facts["evaluations"]
    # The table is gone once it is complete: nothing is there to go on from.
    assert chosen(demo, resume=True).facts["evaluations"] == plain.facts["evaluations"]


@pytest.mark.parametrize(
    "change",
    [
        {"cells": None},
        {"cells": []},
        {"candidates": 99},
        {"candidates": -5},
        {"cells": [[[[], 1.0]], [[[77], 0.0]]]},
        {"cells": [[[[], 1.0]], [[[10], float("nan")]]]},
    ],
)
def test_a_damaged_table_is_named(change: dict[str, Any], demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SavedTable.write

    def damaged(self: SavedTable, column: Any) -> None:
        write(self, column)
        value = json.loads(self.file.read_text())
        value["column"] |= change
        self.file.write_text(json.dumps(value))
        raise KeyboardInterrupt

    monkeypatch.setattr(SavedTable, "write", damaged)
    with pytest.raises(KeyboardInterrupt):
        chosen(demo)
    with pytest.raises(BadInput, match=r"is damaged; remove it, or select without --resume"):
        chosen(demo, resume=True)


@pytest.mark.parametrize("method", ["shortened-ppl", "shortened-taylor", "angular", "first"])
def test_one_shot_methods_report_the_metric_of_what_they_keep(method: Any, demo: Checkpoint) -> None:
    found = chosen(demo, depth_method=method)
    data = read_calibration(
        str(DEMO / "validation.txt"), demo.model.tokenizer(), 512, samples=SMALL.samples, sequence=SMALL.sequence
    )
    remover = LocalRemover(ResidentBlocks(load_torch_model(demo.model.path)), data.batches, "loss", "block", MEMORY)
    for depth, choice in found.depths.items():
        assert len(choice.kept) == depth
        assert 11 in choice.kept, "the last block is never a candidate"
        removed = tuple(i for i in range(12) if i not in choice.kept)
        assert choice.metric == pytest.approx(total(remover.costs(0, [Trial(removed)])[0]) / data.count, rel=1e-6)


def test_a_wider_beam_and_finer_units_cover_the_same_depths(demo: Checkpoint, plain: Selection) -> None:
    beam, finer = (chosen(demo, **change) for change in ({"beam": 3}, {"units": "sublayer"}))
    assert sorted(plain.depths) == sorted(beam.depths) == sorted(finer.depths) == [10, 11, 12]
    # With one block removed a beam sees what one set sees; finer units have every whole block among their choices.
    assert beam.depths[11] == plain.depths[11]
    assert not finer.whole_blocks
    for depth, choice in finer.depths.items():
        assert 2 * len(choice.kept) - len(choice.without_attention) - len(choice.without_feed_forward) == 2 * depth


def test_a_selection_is_read_back_and_is_the_same_twice(demo: Checkpoint, tmp_path: Path) -> None:
    for number, changes in enumerate(({}, {"units": "sublayer"})):
        made = [chosen(demo, **changes) for _ in range(2)]
        folder = tmp_path / str(number)
        folder.mkdir()
        write_selection(folder, made[0])
        assert same(made[0], made[1])
        assert same(made[0], read_selection(folder, demo.architecture))


class Table:
    """A remover that knows what sets cost."""

    units = 3
    work = Work()

    def __init__(self, costs: dict[Removed, float]) -> None:
        self.known = costs

    def costs(self, boundary: int, trials: Sequence[Trial]) -> list[tuple[float, ...]]:
        assert all(unit >= boundary for trial in trials for unit in trial.removed)
        return [(self.known.get(trial.removed, 1.0),) for trial in trials]


@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.integers(0, 2), st.booleans())
def test_the_recurrence_and_its_tie_rule(seed: int, depth: int, keep_last: int, ties: bool) -> None:
    keep_last = min(keep_last, depth - 1)
    rng = np.random.default_rng(seed)
    sets = [s for m in range(depth + 1) for s in itertools.combinations(range(depth), m)]
    table = Table({s: float(rng.integers(0, 3)) if ties else float(rng.random()) for s in sets})
    table.units = depth
    found = choose(table, depth - keep_last, keep_last, table.known[()])
    assert found == plain_table(depth, depth - keep_last, keep_last, table.known.__getitem__)


def test_block_evaluations_of_the_plain_ways_are_those_counted_by_hand() -> None:
    assert (naive_evaluations(16, 8, 0), prefix_evaluations(16, 8, 0)) == (1192, 596)
    assert (naive_evaluations(32, 16, 0), prefix_evaluations(32, 16, 0)) == (9552, 4776)


def test_a_set_whose_logits_are_not_finite_is_named() -> None:
    with pytest.raises(BadInput, match=r"the model without blocks \[1\] gives logits that are not finite"):
        choose(Table({(1,): float("nan")}), 1, 1, 1.0)


def test_a_full_model_whose_logits_are_not_finite_is_named(tmp_path: Path) -> None:
    from conftest import save_random_model
    from safetensors.numpy import load_file, save_file

    from amoeba_deploy.stage1.calibration import text_calibration

    folder = save_random_model(tmp_path / "model", "llama")
    tensors = load_file(folder.path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = np.nan
    save_file(tensors, folder.path / "model.safetensors", {"format": "pt"})
    data = text_calibration(np.random.default_rng(0).integers(0, 128, 64).tolist(), 2, 32, {"source": "text"})
    with pytest.raises(BadInput, match=r"the full model gives logits that are not finite"):
        Stage1(ModelFolder(folder.path), data, data, Settings(), QUIET).depths()


REFUSED = [
    (("--metric", "accuracy"), "--metric accuracy needs multiple-choice questions"),
    (("--min-depth", 0), "--min-depth 0 is not within 1..12"),
    (("--min-depth", 13), "--min-depth 13 is not within 1..12"),
    (("--keep-last", 13), "--keep-last 13 is not within 0..12"),
    (("--depth-method", "first", "--beam", 2), "--beam goes with --depth-method dp only"),
    (("--depth-method", "angular", "--units", "sublayer"), "--units sublayer goes with --depth-method dp only"),
    (("--workers", "many"), "write ray, or ray:4 for four workers"),
    (("--sequence", 600), "--sequence 600 exceeds the 512 positions"),
    (("--calibration", "wikitex"), "is neither a file nor a data set known by name"),
    (("--calibration", "missing.txt"), "cannot be read"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_cannot_be_selected_is_one_sentence(
    options: tuple[object, ...], says: str, demo: Checkpoint, tmp_path: Path
) -> None:
    text = ("--calibration", DEMO / "validation.txt")
    result = amoeba("select", demo.model.path, *text, *options, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*out*"))


def test_loss_needs_a_text(demo: Checkpoint, questions: Path, tmp_path: Path) -> None:
    result = amoeba("select", demo.model.path, "--calibration", questions, "--metric", "loss", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--metric loss needs a text" in result.stderr
