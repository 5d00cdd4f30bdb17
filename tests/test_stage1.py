"""Stage 1: blocks by dynamic programming, heads and neurons by FLAP's statistics, against plain references."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.depth import BlockRunner, choose_blocks
from amoeba_deploy.errors import BadInput
from amoeba_deploy.importance import RunningMoments, channel_scores, group_scores, score_blocks, standardise
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.selection import read_selection, write_selection
from amoeba_deploy.stage1 import select


def naive(
    blocks: int, removals: int, keep_last: int, loss: Callable[[frozenset[int]], float]
) -> dict[int, frozenset[int]]:
    """The recurrence written down as it stands, every cell evaluated on the whole model."""
    table = {(0, 0): frozenset[int]()}
    for n in range(1, blocks - keep_last + 1):
        for m in range(min(n, removals) + 1):
            options = []
            if (n - 1, m) in table:
                options.append(table[n - 1, m])
            if m and (n - 1, m - 1) in table:
                options.append(table[n - 1, m - 1] | {blocks - keep_last - n})
            table[n, m] = min(options, key=loss)  # min keeps the first of equals: the block stays
    return {m: table[blocks - keep_last, m] for m in range(removals + 1)}


@given(st.integers(0, 2**32 - 1), st.integers(2, 7), st.integers(0, 2), st.booleans())
def test_the_recurrence_and_its_tie_rule(seed: int, blocks: int, keep_last: int, ties: bool) -> None:
    keep_last = min(keep_last, blocks - 1)
    removals = blocks - keep_last
    rng = np.random.default_rng(seed)
    values: dict[frozenset[int], float] = {}

    def loss(removed: frozenset[int]) -> float:
        if removed not in values:
            values[removed] = float(rng.integers(0, 3)) if ties else float(rng.random())
        return values[removed]

    wanted = naive(blocks, removals, keep_last, loss)
    found = choose_blocks(blocks, removals, keep_last, loss(frozenset()), lambda _, gone: loss(frozenset(gone)))
    for m, removed in wanted.items():
        assert set(found[blocks - m].kept) == set(range(blocks)) - removed
        assert found[blocks - m].metric == loss(removed)


def test_losses_of_the_runner_are_those_of_the_whole_shrunken_model(models: Callable[[str], ModelFolder]) -> None:
    folder = models("llama-grouped-tied")
    rows = torch.tensor(np.random.default_rng(0).integers(0, 128, (6, 20)))
    model = load_torch_model(folder.path)
    runner = BlockRunner(model, rows, rows_at_once=4)
    # Boundaries go from the last block to the first, as the dynamic programming walks.
    for boundary in (3, 2, 1, 0):
        for count in (1, 2):
            for removed in itertools.combinations(range(boundary, 4), count):
                found = runner.loss(boundary, removed)
                shrunken = load_torch_model(folder.path)
                kept = [layer for i, layer in enumerate(shrunken.model.layers) if i not in removed]
                shrunken.model.layers = torch.nn.ModuleList(kept)
                shrunken.config.num_hidden_layers = len(kept)
                with torch.inference_mode():
                    logits = shrunken(input_ids=rows, use_cache=False).logits[:, :-1]
                wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
                # Float32 sums over other batch sizes.
                assert found == pytest.approx(float(wanted), rel=1e-5)


def test_losses_that_are_not_finite_name_the_blocks() -> None:
    with pytest.raises(BadInput, match=r"without blocks \[1\]"):
        choose_blocks(3, 1, 1, 1.0, lambda *_: float("nan"))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_moments_over_batches_are_those_of_all_samples(sizes: list[int], offset: float) -> None:
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((size, 5)) + offset).astype(np.float32) for size in sizes]
    moments = RunningMoments()
    for batch in batches:
        moments.add(batch)
    together = np.concatenate(batches).astype(np.float64)
    assert moments.mean == pytest.approx(together.mean(axis=0), rel=1e-9, abs=1e-9)
    assert moments.variance == pytest.approx(together.var(axis=0), rel=1e-6, abs=1e-9)


def test_scores_are_those_of_flap_by_hand(models: Callable[[str], ModelFolder]) -> None:
    folder = models("llama-grouped-tied")
    sizes = folder.architecture
    rows = torch.tensor(np.random.default_rng(0).integers(0, 128, (5, 20)))
    model = load_torch_model(folder.path)
    inputs: dict[str, torch.Tensor] = {}
    layer = model.model.layers[2]
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: inputs.update(o=x[0]))
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.update(down=x[0]))
    with torch.inference_mode():
        model.model(input_ids=rows)
    found = score_blocks(load_torch_model(folder.path), sizes, rows, rows_at_once=2)[2]
    for name, weight in (("o", layer.self_attn.o_proj.weight), ("down", layer.mlp.down_proj.weight)):
        samples = inputs[name].flatten(0, 1).double()
        score = samples.var(dim=0, correction=0) * (weight.detach().double() ** 2).sum(dim=0)
        mean = found.o_proj_mean if name == "o" else found.down_proj_mean
        assert mean == pytest.approx(samples.mean(dim=0).numpy(), rel=1e-4, abs=1e-6)
        score = score**2 if name == "o" else score
        score = (score - score.mean()) / score.std(correction=0)
        wanted = score.view(sizes.kv_heads, -1).mean(dim=1) if name == "o" else score
        assert (found.heads if name == "o" else found.neurons) == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-5)


def test_a_channel_that_does_not_fluctuate_scores_lowest() -> None:
    scores = channel_scores(np.array([1.0, 0.0, 2.0]), np.ones((4, 3), np.float32))
    assert scores.tolist() == [4.0, 0.0, 8.0]
    assert standardise(np.ones(4)).tolist() == [0, 0, 0, 0]
    assert group_scores(np.array([1.0, 1.0, 5.0, 5.0]), 2)[1] > 0


def test_a_selection_is_read_back_and_is_the_same_twice(stories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. He liked to play in the park with his friend. " * 60)
    model = ModelFolder(stories)
    made = [select(model, text, samples=4, sequence=64, progress=QUIET) for _ in range(2)]
    folder = tmp_path / "selection"
    folder.mkdir()
    write_selection(folder, made[0])
    back = read_selection(folder, model.architecture)
    for other in (made[1], back):
        assert other.depths == made[0].depths
        for one, two in zip(other.blocks, made[0].blocks, strict=True):
            assert (one.heads == two.heads).all()
            assert (one.neurons == two.neurons).all()
    assert sorted(back.depths) == [3, 4, 5]
    assert all(4 in choice.kept for choice in back.depths.values()), "the last block is never a candidate"
