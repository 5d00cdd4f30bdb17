"""Bias compensation: a subnet with it computes what the full model does with removed activations at their means.

The reference is the full model run by stock transformers on the kept blocks, in which hooks put the calibration means
in the place of the removed channels that o_proj and down_proj read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import keep_layers, random_selection
from test_families import IDS, mask, relative_error

from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.compensation import block_biases, compensate, removed_mean
from amoeba_deploy.extraction.folder import Learnt, extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import Plan, make_plan
from amoeba_deploy.selection import Selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage1.blocks import ResidentBlocks
from amoeba_deploy.stage1.calibration import running_batch
from amoeba_deploy.stage1.importance import activation_moments, block_scores, merge_batches

# Both sides compute in float32; the mean's contribution is summed once here and at every token there.
TOLERANCE = 1e-5
Models = Callable[[str], ModelFolder]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def logits_at_means(model: ModelFolder, selection: Selection, plan: Plan) -> torch.Tensor:
    """Logits of the full model with the means in place of everything that a plan removes from its blocks."""
    reference: Any = load_torch_model(model.path)
    sizes = model.architecture

    def replace(keep: torch.Tensor, mean: np.ndarray[Any, Any]) -> Callable[..., Any]:
        return lambda _, inputs: (torch.where(keep.bool(), inputs[0], torch.from_numpy(mean)),)

    layers = reference.model.layers
    for block in plan.blocks:
        layer, scores = layers[block.index], selection.blocks[block.index]
        heads, neurons = mask(block.heads, sizes.heads, sizes.head_dim), mask(block.neurons, sizes.neurons)
        layer.self_attn.o_proj.register_forward_pre_hook(replace(heads, scores.o_proj_mean))
        layer.mlp.down_proj.register_forward_pre_hook(replace(neurons, scores.down_proj_mean))
    keep_layers(reference, plan.kept_blocks)
    return logits_of(reference, IDS)


HELD = (
    "llama-grouped-tied", "llama-biases", "mistral", "qwen2", "granite", "granite-biases", "smollm3", "smollm3-biases",
)  # fmt: skip
"""A model of each family of whose subnets a stock class holds with biases on o_proj and down_proj."""


def learnt_of(model: ModelFolder, selection: Selection) -> Learnt:
    return Learnt(biases=lambda block: block_biases(model, selection, block))


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", HELD)
def test_a_subnet_with_the_biases_written_is_the_full_model_at_the_means(
    name: str, policy: Any, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    selection = random_selection(model)
    plan = selection.plan(model.architecture, Shape(3, Fraction(2, 3), policy))
    written = extract(model, plan, tmp_path, learnt=learnt_of(model, selection))
    found = logits_of(load_torch_model(tmp_path), IDS)
    assert relative_error(found, logits_at_means(model, selection, plan)) < TOLERANCE
    tensors = ModelFolder(tmp_path).tensors.infos.values()
    assert written.subnet.parameters == sum(math.prod(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize("name", ["granite-biases", "smollm3-biases"])
def test_a_whole_sublayer_that_is_gone_leaves_its_mean_in_its_own_family(
    name: str, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    selection = random_selection(model)

    def scores(index: int) -> tuple[Any, Any]:
        return selection.blocks[index].heads, selection.blocks[index].neurons

    shape = Shape(3, Fraction(2, 3))
    plan = make_plan(model.architecture, shape, (0, 1, 2, 3), scores, without_attention=(1,), without_feed_forward=(2,))
    extract(model, plan, tmp_path, learnt=learnt_of(model, selection))
    found = logits_of(load_torch_model(tmp_path), IDS)
    assert relative_error(found, logits_at_means(model, selection, plan)) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3", "olmo2-biases"])
def test_biases_that_no_class_holds_are_refused_with_the_way_out(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    selection = random_selection(model)
    plan = selection.plan(model.architecture, Shape(3, Fraction(2, 3)))
    family = model.architecture.family
    with pytest.raises(BadInput, match=f"no stock class holds a {family} with biases on .*; derive it with --bias off"):
        extract(model, plan, tmp_path, learnt=learnt_of(model, selection))
    assert list(tmp_path.iterdir()) == []


def compensated(model: ModelFolder, selection: Selection, plan: Plan, folder: Path) -> Any:
    extract(model, plan, folder)
    subnet = load_torch_model(folder)
    compensate(subnet, plan, partial(block_biases, model, selection))
    return subnet


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-multihead", "llama-biases", "qwen2", "qwen3"])
def test_a_compensated_subnet_is_the_full_model_at_the_means(
    name: str, policy: Any, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    selection = random_selection(model)
    plan = selection.plan(model.architecture, Shape(3, Fraction(2, 3), policy))
    found = logits_of(compensated(model, selection, plan, tmp_path), IDS)
    assert relative_error(found, logits_at_means(model, selection, plan)) < TOLERANCE
    # The random means are far from zero, so that a subnet without compensation is something else.
    assert relative_error(logits_of(load_torch_model(tmp_path), IDS), found) > 0.01


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "qwen2"])
def test_a_sublayer_that_is_gone_leaves_its_mean(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    selection = random_selection(model)

    def scores(index: int) -> tuple[Any, Any]:
        return selection.blocks[index].heads, selection.blocks[index].neurons

    shape = Shape(3, Fraction(2, 3))
    plan = make_plan(model.architecture, shape, (0, 1, 2, 3), scores, without_attention=(1,), without_feed_forward=(2,))
    found = logits_of(compensated(model, selection, plan, tmp_path), IDS)
    assert relative_error(found, logits_at_means(model, selection, plan)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases"])
def test_it_is_exact_where_activations_are_constant(name: str, models: Models, tmp_path: Path) -> None:
    # One token repeated: attention over equal values gives that value, so every activation is the same at each place.
    model, rows = models(name), [[7] * 20, [7] * 12]
    moments = merge_batches(activation_moments(ResidentBlocks(load_torch_model(model.path)), [running_batch(rows)], 0))
    selection = Selection(model.digest, random_selection(model).depths, block_scores(model, "flap", moments), {})
    plan = selection.plan(model.architecture, Shape(4, Fraction(1, 3)))
    ids = torch.tensor([rows[0]])
    found = logits_of(compensated(model, selection, plan, tmp_path), ids)
    # The tolerance above, four blocks deep, with means that are themselves taken in float32.
    assert relative_error(found, logits_of(load_torch_model(model.path), ids)) < 5 * TOLERANCE
    assert relative_error(logits_of(load_torch_model(tmp_path), ids), found) > 0.01


def test_nothing_removed_adds_nothing(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    selection = random_selection(model)
    subnet = compensated(model, selection, selection.plan(model.architecture, Shape(4, Fraction(1))), tmp_path)
    for layer in subnet.model.layers:
        assert not layer.self_attn.o_proj.bias.any()
        assert not layer.mlp.down_proj.bias.any()


def test_only_removed_channels_keep_their_means() -> None:
    mean = np.array([10.0, 100, 1000, 1, 2, 3], np.float32)
    assert removed_mean(mean, (1, 4), 1).tolist() == [10, 0, 1000, 1, 0, 3]
    assert removed_mean(mean, (0, 2), 2).tolist() == [0, 0, 1000, 1, 0, 0]
