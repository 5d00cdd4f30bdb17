"""How heads and neurons score, against the same figures taken from stock transformers by hand; adaptive plans."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.blocks import Blocks, ResidentBlocks, StreamedBlocks
from amoeba_deploy.calibration import Batch, running_batch
from amoeba_deploy.gradients import taylor_saliences
from amoeba_deploy.importance import (
    WIDTH_METHODS,
    WidthMethod,
    activation_moments,
    block_scores,
    flap_channels,
    merge_batches,
    standardise,
)
from amoeba_deploy.lanes import Lanes
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.moments import Moments, merge, moments_of
from amoeba_deploy.plan import make_plan
from amoeba_deploy.shape import Shape

MEMORY = 10**9


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_moments_over_batches_are_those_of_all_samples(sizes: list[int], offset: float) -> None:
    rng = np.random.default_rng(0)
    batches = [torch.tensor((rng.standard_normal((size, 5)) + offset).astype(np.float32)) for size in sizes]
    found = merge(moments_of(batch) for batch in batches)
    together = torch.cat(batches).double().numpy()
    # A mean near 1e4 is rounded to 1e-3 in float32, which is all that the squares about it can be off by.
    assert found.mean == pytest.approx(together.mean(axis=0), rel=1e-6, abs=1e-5)
    assert found.variance == pytest.approx(together.var(axis=0), rel=1e-3, abs=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(together, axis=0), rel=1e-5)


def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, length).tolist() for length in (20, 20, 13, 20, 7)]


def batches() -> list[Batch]:
    """Three batches, two of them with padding."""
    return [running_batch(rows()[:2]), running_batch(rows()[2:4]), running_batch(rows()[4:])]


class ByHand:
    """Inputs of o_proj and down_proj over all real tokens, and gradients, from the stock model row by row."""

    def __init__(self, folder: ModelFolder) -> None:
        self.model = load_torch_model(folder.path)
        self.sizes = folder.architecture
        taken: dict[tuple[int, str], list[torch.Tensor]] = {}
        for i, layer in enumerate(self.model.model.layers):
            for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
                module.register_forward_pre_hook(
                    lambda _, x, key=(i, name): taken.setdefault(key, []).append(x[0][0].detach())
                )
        losses = []
        for row in rows():
            logits = self.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
        (torch.stack(losses).sum() / sum(len(row) - 1 for row in rows())).backward()
        self.inputs = {key: torch.cat(values).double().numpy() for key, values in taken.items()}

    def weight(self, index: int, name: str) -> np.ndarray[Any, Any]:
        return self._parameter(index, name).detach().double().numpy()

    def _parameter(self, index: int, name: str) -> torch.Tensor:
        layer = self.model.model.layers[index]
        return getattr(layer.self_attn if name in "qkvo" else layer.mlp, f"{name}_proj").weight

    def salience(self, index: int, name: str) -> np.ndarray[Any, Any]:
        parameter = self._parameter(index, name)
        assert parameter.grad is not None
        return (parameter * parameter.grad).abs().detach().double().numpy()

    def sums(self, value: Callable[[str], np.ndarray[Any, Any]]) -> tuple[Any, Any]:
        """Over all that belongs to each group and to each neuron."""
        groups = self.sizes.kv_heads
        heads = sum(value(n).reshape(groups, -1).sum(1) for n in "qkv") + value("o").T.reshape(groups, -1).sum(1)
        return heads, value("gate").sum(1) + value("up").sum(1) + value("down").sum(0)

    def scores(self, index: int, method: WidthMethod) -> tuple[Any, Any]:
        groups = self.sizes.kv_heads
        o, down = self.inputs[index, "o"], self.inputs[index, "down"]
        wo, wd = self.weight(index, "o"), self.weight(index, "down")
        if method == "flap":
            channels = standardise((o.var(axis=0) * (wo**2).sum(axis=0)) ** 2)
            return channels.reshape(groups, -1).mean(1), standardise(down.var(axis=0) * (wd**2).sum(axis=0))
        if method == "wanda":
            channels = np.linalg.norm(o, axis=0) * abs(wo).sum(axis=0)
            neurons = np.linalg.norm(down, axis=0) * abs(wd).sum(axis=0)
            return standardise(channels.reshape(groups, -1).sum(1)), standardise(neurons)
        if method == "magnitude":
            heads, neurons = self.sums(lambda name: self.weight(index, name) ** 2)
            return standardise(heads**0.5), standardise(neurons**0.5)
        heads, neurons = self.sums(lambda name: self.salience(index, name))
        return standardise(heads), standardise(neurons)


@pytest.mark.parametrize("method", WIDTH_METHODS)
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-multihead", "llama-biases", "qwen3"])
def test_scores_are_those_taken_by_hand(method: WidthMethod, name: str, models: Callable[[str], ModelFolder]) -> None:
    folder = models(name)
    hand = ByHand(folder)
    blocks = ResidentBlocks(load_torch_model(folder.path))
    moments = merge_batches(activation_moments(blocks, batches(), MEMORY))
    saliences = taylor_saliences(blocks, batches(), folder.architecture.kv_heads, MEMORY)
    found = block_scores(folder, method, moments, saliences)
    for index, block in enumerate(found):
        heads, neurons = hand.scores(index, method)
        # Float32 activations and gradients against float64 sums; standardising takes differences of near values.
        assert block.heads == pytest.approx(heads, rel=2e-3, abs=2e-4)
        assert block.neurons == pytest.approx(neurons, rel=2e-3, abs=2e-4)
        assert block.o_proj_mean == pytest.approx(hand.inputs[index, "o"].mean(axis=0), rel=1e-4, abs=1e-6)
        assert block.down_proj_mean == pytest.approx(hand.inputs[index, "down"].mean(axis=0), rel=1e-4, abs=1e-6)


def test_lanes_memory_and_disk_change_no_bit(models: Callable[[str], ModelFolder]) -> None:
    folder = models("llama-grouped-untied")
    ways: list[tuple[Blocks, int, int]] = [
        (ResidentBlocks(load_torch_model(folder.path)), MEMORY, 1),
        (ResidentBlocks(load_torch_model(folder.path)), 0, 2),
        (StreamedBlocks(folder), 0, 2),
        (StreamedBlocks(folder), MEMORY, 1),
    ]
    found = []
    for blocks, memory, lanes in ways:
        moments = merge_batches(activation_moments(blocks, batches(), memory, lanes=Lanes(lanes)))
        saliences = taylor_saliences(blocks, batches(), folder.architecture.kv_heads, memory)
        arrays = [a for m in moments for a in (m.attention.mean, m.attention.squares, m.feed_forward.squares)]
        found.append([*arrays, *(a for pair in saliences for a in pair)])
    for other in found[1:]:
        assert all((one == two).all() for one, two in zip(found[0], other, strict=True))


def test_a_channel_that_does_not_fluctuate_scores_lowest_in_flap() -> None:
    moments = Moments(4, np.array([9.0, 9.0, 0.0]), np.array([4.0, 0.0, 8.0]))
    assert flap_channels(moments, np.ones((4, 3), np.float32)).tolist() == [4.0, 0.0, 8.0]
    assert standardise(np.ones(4)).tolist() == [0, 0, 0, 0]


SIZES = {
    "grouped": Architecture("llama", 4, 96, 6, 3, 16, 160, 128, 128, True),
    "multi-head": Architecture("llama", 3, 64, 4, 4, 16, 96, 128, 128, True),
}


def random_scores(sizes: Architecture, seed: int, ties: bool) -> Callable[[int], tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    blocks = [(rng.standard_normal(sizes.kv_heads), rng.standard_normal(sizes.neurons)) for _ in range(sizes.depth)]
    return lambda index: tuple(np.round(a) if ties else a for a in blocks[index])  # type: ignore[return-value]


@given(
    st.sampled_from(sorted(SIZES)), st.integers(0, 2**32 - 1), st.booleans(), st.fractions(Fraction(1, 50), Fraction(1))
)
def test_adaptive_keeps_the_best_units_of_all_blocks_until_the_width_is_reached(
    name: str, seed: int, ties: bool, width: Fraction
) -> None:
    sizes = SIZES[name]
    scores = random_scores(sizes, seed, ties)
    group, neuron = 2 * (sizes.heads // sizes.kv_heads + 1) * sizes.head_dim * sizes.hidden, 3 * sizes.hidden
    units = [
        (-score, index, kind, place, (group, neuron)[kind])
        for index in range(sizes.depth)
        for kind, values in enumerate(scores(index))
        for place, score in enumerate(values)
    ]
    kept, parameters = [], 0
    for unit in sorted(units):
        if parameters >= width * sizes.depth * sizes.block_matrix_parameters:
            break
        kept.append(unit)
        parameters += unit[4]
    plan = make_plan(sizes, Shape(sizes.depth, width, "adaptive"), range(sizes.depth), scores, 1)
    for block in plan.blocks:
        for kind, found in ((0, block.kv_heads), (1, block.neurons)):
            wanted = {unit[3] for unit in kept if unit[1] == block.index and unit[2] == kind}
            # A block keeps at least one of each, its best.
            best = int(np.argmax(scores(block.index)[kind]))
            assert set(found) == (wanted or {best})


@given(st.integers(0, 2**32 - 1), st.lists(st.fractions(Fraction(1, 20), Fraction(1)), min_size=2, max_size=2))
def test_adaptive_plans_are_nested_in_width_and_in_depth(seed: int, widths: list[Fraction]) -> None:
    sizes = SIZES["grouped"]
    scores = random_scores(sizes, seed, ties=False)
    narrow, wide = (make_plan(sizes, Shape(4, w, "adaptive"), range(4), scores) for w in sorted(widths))
    shallow = make_plan(sizes, Shape(2, max(widths), "adaptive"), (0, 3), scores)
    for small, large in zip(narrow.blocks, wide.blocks, strict=True):
        assert set(small.kv_heads) <= set(large.kv_heads)
        assert set(small.neurons) <= set(large.neurons)
        assert len(small.neurons) % 32 == 0
        assert small.kv_heads
    assert shallow.blocks == (wide.blocks[0], wide.blocks[3])


def test_the_full_width_keeps_everything() -> None:
    sizes = SIZES["grouped"]
    plan = make_plan(sizes, Shape(4, Fraction(1), "adaptive"), range(4), random_scores(sizes, 0, ties=False))
    assert all(len(b.kv_heads) == 3 and len(b.neurons) == 160 for b in plan.blocks)
