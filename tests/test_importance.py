"""Scores of key/value groups and neurons, against plain computations on the stock model.

The references run every row by itself through stock transformers, unpadded and with hooks, or differentiate the whole
model at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET
from hypothesis import given
from hypothesis import strategies as st

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.evaluation import Question
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.selection import BlockScores
from amoeba_deploy.stage1.blocks import ResidentBlocks, StreamedBlocks
from amoeba_deploy.stage1.calibration import Batch, Calibration, question_calibration, running_batch
from amoeba_deploy.stage1.gradients import taylor_saliences
from amoeba_deploy.stage1.importance import (
    MATRICES,
    WIDTH_METHODS,
    BlockMoments,
    WidthMethod,
    activation_moments,
    activation_scores,
    block_scores,
    merge_batches,
    standardise,
)
from amoeba_deploy.stage1.lanes import Lanes
from amoeba_deploy.stage1.moments import Moments, Vector, merge, moments_of
from amoeba_deploy.stage1.pipeline import Settings, Stage1

MEMORY = 10**9
FAMILIES = (
    "llama-grouped-tied", "granite-biases", "gemma2", "gemma3-capped", "phi3-partial", "smollm3-biases", "olmo2",
)  # fmt: skip
"""Models that differ in what a block is."""
Models = Callable[[str], ModelFolder]
RNG = np.random.default_rng(7)
ROWS = [RNG.integers(2, 128, length).tolist() for length in (20, 20, 20, 20, 5, 17, 11)]
BATCHES = [running_batch(ROWS[:2]), running_batch(ROWS[2:4]), running_batch(ROWS[4:])]
"""Batches with padding and without."""


@cache
def stock_model(path: Path) -> Any:
    """The stock model of a folder, read once; nothing here changes it."""
    return load_torch_model(path).requires_grad_(False)


def resident(model: ModelFolder) -> ResidentBlocks:
    return ResidentBlocks(stock_model(model.path))


def samples_of(model: ModelFolder, rows: Sequence[Sequence[int]] = ROWS) -> list[dict[str, torch.Tensor]]:
    """Of every block the inputs of o_proj and of down_proj at every token of every row, float64 [tokens, n]."""
    stock = stock_model(model.path)
    taken: list[dict[str, list[torch.Tensor]]] = []
    hooks = []
    for layer in stock.model.layers:
        inputs: dict[str, list[torch.Tensor]] = {"o": [], "down": []}
        for name, linear in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            hooks.append(linear.register_forward_pre_hook(lambda _, x, to=inputs[name]: to.append(x[0][0])))
        taken.append(inputs)
    for row in rows:
        stock(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [{name: torch.cat(parts).double() for name, parts in inputs.items()} for inputs in taken]


def matrices_of(layer: Any, value: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """A number for each weight of a layer by the matrix's name, in float64; fused matrices are taken apart."""
    found = {name: value(p).double() for name, p in layer.named_parameters() if p.ndim == 2}
    if "self_attn.qkv_proj.weight" in found:
        fused, (query, key_value) = found.pop("self_attn.qkv_proj.weight"), (96, 48)
        parts = fused.split([query, key_value, key_value])
        found |= {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        gate, up = found.pop("mlp.gate_up_proj.weight").chunk(2)
        found |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    return {name: found[f"{name}.weight"] for name in MATRICES}


def weights_of(model: ModelFolder, block: int) -> dict[str, torch.Tensor]:
    """A block's matrices by name, in float64."""
    return matrices_of(stock_model(model.path).model.layers[block], lambda weight: weight)


def scores_of(model: ModelFolder, method: WidthMethod) -> tuple[BlockScores, ...]:
    blocks = resident(model)
    saliences = None
    if method == "taylor":
        saliences = taylor_saliences(blocks, BATCHES, model.architecture, MEMORY)
    return block_scores(model, method, merge_batches(activation_moments(blocks, BATCHES, MEMORY)), saliences)


def standard(values: torch.Tensor) -> torch.Tensor:
    return (values - values.mean()) / values.std(correction=0)


def unit_parts(values: dict[str, torch.Tensor], sizes: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [groups] and [neurons] over all numbers that go with each unit, each cut out of the matrices by itself."""
    head, query = sizes.head_dim, sizes.group * sizes.head_dim
    groups = []
    for g in range(sizes.kv_heads):
        own, shared = slice(g * query, (g + 1) * query), slice(g * head, (g + 1) * head)
        parts = (
            values["self_attn.q_proj"][own],
            values["self_attn.k_proj"][shared],
            values["self_attn.v_proj"][shared],
            values["self_attn.o_proj"][:, own],
        )
        groups.append(torch.stack([part.sum() for part in parts]).sum())
    neurons = [
        values["mlp.gate_proj"][n].sum() + values["mlp.up_proj"][n].sum() + values["mlp.down_proj"][:, n].sum()
        for n in range(sizes.neurons)
    ]
    return torch.stack(groups), torch.stack(neurons)


def same(one: Sequence[BlockMoments], two: Sequence[BlockMoments]) -> bool:
    """Whether moments are equal bit for bit."""
    pairs = [
        (getattr(a, part), getattr(b, part))
        for a, b in zip(one, two, strict=True)
        for part in ("attention", "feed_forward")
    ]
    return all(a.count == b.count and (a.mean == b.mean).all() and (a.squares == b.squares).all() for a, b in pairs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 2**32 - 1))
def test_moments_over_batches_are_those_of_all_samples(sizes: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [(rng.standard_normal((size, 5)) + offset).astype(np.float32) for size in sizes]
    found = merge(moments_of(torch.from_numpy(batch)) for batch in batches)
    together = np.concatenate(batches).astype(np.float64)
    assert found.count == len(together)
    # A batch's mean is rounded to float32, a few parts in ten million of the offset. That error stands beside
    # differences of about 1 when batches are merged. Sums of squares in float32 would be off by 6 at the far offsets.
    scale = 1 + abs(offset)
    assert found.mean == pytest.approx(together.mean(axis=0), rel=0, abs=5e-7 * scale)
    assert found.variance == pytest.approx(together.var(axis=0), rel=1e-5, abs=2e-6 * scale)
    assert found.norm == pytest.approx(np.linalg.norm(together, axis=0), rel=1e-5, abs=1e-6)


def test_padding_of_question_rows_does_not_count(models: Models) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(128)}, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    asked = [Question("w5 w9 w7", ("w3", "w4 w6"), 1), Question("w8 w11 w12 w13 w14 w15 w16", ("w3", "w17"), 0)]
    data = question_calibration(asked, tokenizer, 128, {"source": "asked"})
    (batch,) = data.text
    assert batch.lengths == (5, 8)
    rows = [[5, 9, 7, 4, 6], [8, 11, 12, 13, 14, 15, 16, 3]]
    model = models("llama-grouped-tied")
    found = merge_batches(activation_moments(resident(model), data.text, MEMORY))
    for block, samples in zip(found, samples_of(model, rows), strict=True):
        for moments, wanted in ((block.attention, samples["o"]), (block.feed_forward, samples["down"])):
            assert moments.count == 13
            # Float32 activations of a row inside a batch and of the row alone.
            assert moments.mean == pytest.approx(wanted.mean(dim=0).numpy(), rel=1e-4, abs=1e-6)
            assert moments.variance == pytest.approx(wanted.var(dim=0, correction=0).numpy(), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", [*FAMILIES, "llama-multihead", "qwen3"])
def test_flap_by_hand(name: str, models: Models) -> None:
    model = models(name)
    found = scores_of(model, "flap")
    for index, samples in enumerate(samples_of(model)):
        weights = weights_of(model, index)
        output = samples["o"].var(dim=0, correction=0) * (weights["self_attn.o_proj"] ** 2).sum(dim=0)
        down = samples["down"].var(dim=0, correction=0) * (weights["mlp.down_proj"] ** 2).sum(dim=0)
        groups = standard(output**2).view(model.architecture.kv_heads, -1).mean(dim=1)
        # Float32 activations, squared twice; standardising takes the mean off, hence the absolute part.
        assert found[index].heads == pytest.approx(groups.numpy(), rel=1e-3, abs=1e-4)
        assert found[index].neurons == pytest.approx(standard(down).numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", WIDTH_METHODS)
def test_every_method_keeps_the_means_of_activations(method: WidthMethod, models: Models) -> None:
    model = models("llama-grouped-tied")
    for scores, samples in zip(scores_of(model, method), samples_of(model), strict=True):
        # Float32 activations.
        assert scores.o_proj_mean == pytest.approx(samples["o"].mean(dim=0).numpy(), rel=1e-4, abs=1e-6)
        assert scores.down_proj_mean == pytest.approx(samples["down"].mean(dim=0).numpy(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["llama-grouped-tied", "gemma3", "phi3"])
def test_wanda_by_hand(name: str, models: Models) -> None:
    model = models(name)
    found = scores_of(model, "wanda")
    for index, samples in enumerate(samples_of(model)):
        weights = weights_of(model, index)
        output = weights["self_attn.o_proj"].abs().sum(dim=0) * samples["o"].norm(dim=0)
        down = weights["mlp.down_proj"].abs().sum(dim=0) * samples["down"].norm(dim=0)
        groups = standard(output.view(model.architecture.kv_heads, -1).sum(dim=1))
        # Float32 activations; standardising takes the mean off, hence the absolute part.
        assert found[index].heads == pytest.approx(groups.numpy(), rel=1e-3, abs=1e-4)
        assert found[index].neurons == pytest.approx(standard(down).numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["llama-grouped-tied", "phi3"])
def test_magnitude_by_hand(name: str, models: Models) -> None:
    model = models(name)
    for index, found in enumerate(scores_of(model, "magnitude")):
        squares = {name: weight**2 for name, weight in weights_of(model, index).items()}
        groups, neurons = unit_parts(squares, model.architecture)
        # Squares in float32, sums in float64.
        assert found.heads == pytest.approx(standard(groups.sqrt()).numpy(), rel=1e-4, abs=1e-5)
        assert found.neurons == pytest.approx(standard(neurons.sqrt()).numpy(), rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def saliences(models: Models) -> list[tuple[Vector, Vector]]:
    """Taylor saliences of the grouped-query Llama, all in memory."""
    model = models("llama-grouped-tied")
    return taylor_saliences(resident(model), BATCHES, model.architecture, MEMORY)


def whole_model_saliences(model: ModelFolder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same from the gradient of the whole model's mean loss over all predictions of all rows."""
    stock: Any = load_torch_model(model.path)
    losses = []
    for row in ROWS:
        logits = stock(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
    torch.autograd.backward(torch.stack(losses).sum() / sum(len(row) - 1 for row in ROWS))
    found = []
    for layer in stock.model.layers:
        values = matrices_of(layer, lambda weight: (weight.detach() * weight.grad).abs())
        found.append(unit_parts(values, model.architecture))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_by_the_gradient_of_the_whole_model(name: str, models: Models) -> None:
    model = models(name)
    saliences = taylor_saliences(resident(model), BATCHES, model.architecture, MEMORY)
    for found, wanted in zip(saliences, whole_model_saliences(model), strict=True):
        for sums, reference in zip(found, wanted, strict=True):
            # Float32 gradients through four blocks, added up over other batches: small entries of a gradient keep
            # fewer digits than large ones.
            assert sums == pytest.approx(reference.numpy(), rel=1e-3, abs=1e-4 * float(reference.max()))


def test_taylor_scores_are_standardised_within_a_block(models: Models, saliences: list[tuple[Vector, Vector]]) -> None:
    for scores, (groups, neurons) in zip(scores_of(models("llama-grouped-tied"), "taylor"), saliences, strict=True):
        # Rounded to float32.
        assert scores.heads == pytest.approx((groups - groups.mean()) / groups.std(), rel=1e-5, abs=1e-6)
        assert scores.neurons == pytest.approx((neurons - neurons.mean()) / neurons.std(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("memory", [0, MEMORY])
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_taylor_is_the_same_from_memory_and_from_disk_and_when_states_are_made_again(
    kind: str, memory: int, models: Models, saliences: list[tuple[Vector, Vector]]
) -> None:
    model = models("llama-grouped-tied")
    blocks = StreamedBlocks(model) if kind == "streamed" else resident(model)
    found = taylor_saliences(blocks, BATCHES, model.architecture, memory)
    for (groups, neurons), (wanted_groups, wanted_neurons) in zip(found, saliences, strict=True):
        assert groups.tolist() == wanted_groups.tolist()
        assert neurons.tolist() == wanted_neurons.tolist()


@pytest.mark.parametrize("memory", [0, MEMORY])
def test_moments_of_blocks_from_disk_are_those_of_blocks_in_memory(memory: int, models: Models) -> None:
    model = models("llama-grouped-tied")
    in_memory = activation_moments(resident(model), BATCHES, MEMORY)
    streamed = activation_moments(StreamedBlocks(model), BATCHES, memory)
    assert same(merge_batches(in_memory), merge_batches(streamed))


def test_moments_do_not_depend_on_the_number_of_lanes(models: Models) -> None:
    blocks = resident(models("llama-grouped-tied"))
    one, two = (merge_batches(activation_moments(blocks, BATCHES, MEMORY, lanes=Lanes(count))) for count in (1, 2))
    assert same(one, two)


def test_every_batch_is_one_step_and_no_hook_stays(models: Models) -> None:
    blocks = resident(models("llama-grouped-tied"))
    steps: list[None] = []
    activation_moments(blocks, BATCHES, MEMORY, lambda: steps.append(None))
    assert len(steps) == len(BATCHES)
    assert not any(module._forward_pre_hooks for module in blocks.model.modules())


def test_a_constant_neuron_scores_lowest_in_flap_however_large_it_is(models: Models) -> None:
    folder = models("llama-biases")
    model: Any = load_torch_model(folder.path)
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            linear.weight[7] = 0
            linear.bias[7] = 10
    found = merge_batches(activation_moments(ResidentBlocks(model), BATCHES, MEMORY))
    assert block_scores(folder, "flap", found)[1].neurons.argmin() == 7
    assert block_scores(folder, "wanda", found)[1].neurons.argmax() == 7


def test_a_constant_group_scores_lowest_in_flap() -> None:
    attention = Moments(10, np.array([0.0, 0, 50, 50, 0, 0]), np.array([9.0, 8, 0, 0, 7, 9]))
    ones = {"self_attn.o_proj": np.ones((4, 6), np.float32), "mlp.down_proj": np.ones((4, 6), np.float32)}
    groups, _ = activation_scores("flap", BlockMoments(attention, attention), ones.__getitem__, 3)
    assert groups.argmin() == 1


def test_units_that_are_all_alike_score_zero() -> None:
    assert standardise(np.full(4, 3.0)).tolist() == [0, 0, 0, 0]


def test_heads_and_neurons_are_scored_on_the_data_of_the_width(models: Models) -> None:
    def data(batch: Batch) -> Calibration:
        return Calibration("text", (batch,), (batch,), {"source": str(batch.lengths)})

    model = models("llama-grouped-tied")
    depth, width = data(BATCHES[0]), data(BATCHES[2])
    stage = Stage1(model, depth, width, Settings(width_method="taylor"), QUIET)
    other = Stage1(model, width, width, Settings(width_method="taylor"), QUIET)
    for found, wanted in zip(stage.widths(), other.widths(), strict=True):
        assert found.heads.tolist() == wanted.heads.tolist()
        assert found.o_proj_mean.tolist() == wanted.o_proj_mean.tolist()
