"""The elastic model: one model in memory that runs as any subnet, held to masks and to extraction.

Everything is computed in float32; sums over units run in another order, so figures agree to a relative 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, random_selection
from test_adapters import WIDTHS, tuned_checkpoint
from test_families import IDS, TOLERANCE, mask, relative_error, stock_logits

from amoeba_deploy.adapters import write_adapters
from amoeba_deploy.checkpoint import open_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.compensation import block_biases
from amoeba_deploy.extraction.folder import Learnt, extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.selection import DepthChoice, Selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.elastic import ElasticModel, reorder
from amoeba_deploy.stage2.mixture import Mixture, MixtureSettings
from amoeba_deploy.stage2.result import elastic_model

Models = Callable[[str], ModelFolder]
SHAPES = ("4x1", "2x1", "4x0.67", "3x0.34")


def elastic_of(model: ModelFolder, **options: Any) -> ElasticModel:
    torch.manual_seed(0)
    return ElasticModel(load_torch_model(model.path), random_selection(model), model.architecture, **options).eval()


def logits_of(elastic: ElasticModel, shape: Shape) -> torch.Tensor:
    with elastic.shape(shape), torch.no_grad():
        return elastic(IDS)


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_extracted_subnet_computes(name: str, policy: Any, models: Models, tmp_path: Path) -> None:
    model = models(name)
    elastic, selection = elastic_of(model), random_selection(model)
    for text in SHAPES:
        shape = Shape.parse(text, policy)
        folder = tmp_path / text.replace("/", "_")
        folder.mkdir()
        extract(model, selection.plan(model.architecture, shape), folder)
        assert relative_error(logits_of(elastic, shape), stock_logits(folder)) < TOLERANCE, text


@pytest.mark.parametrize("name", ["llama-grouped-tied", "qwen2", "llama-biases", "gemma2", "phi3"])
def test_gradients_are_those_of_the_masked_model(name: str, models: Models) -> None:
    model, shape = models(name), Shape.parse("3x0.67")
    elastic, sizes = elastic_of(model).train(), model.architecture
    elastic.model.requires_grad_(True)
    with elastic.shape(shape):
        loss_of(elastic(IDS)).backward()
    gradients = ordered_back(elastic)
    masked: Any = load_torch_model(model.path).train().requires_grad_(True)
    plan = random_selection(model).plan(sizes, shape)
    layers = masked.model.layers
    for block in plan.blocks:
        for linear, units, count, size in (
            (layers[block.index].self_attn.o_proj, block.heads, sizes.heads, sizes.head_dim),
            (layers[block.index].mlp.down_proj, block.neurons, sizes.neurons, 1),
        ):
            keep = mask(units, count, size)
            linear.register_forward_pre_hook(lambda _module, inputs, keep=keep: (inputs[0] * keep,))
    for index in set(range(sizes.depth)) - set(plan.kept_blocks):
        layers[index].register_forward_hook(lambda _module, inputs, _output: inputs[0])
    loss_of(masked(input_ids=IDS, use_cache=False).logits).backward()
    for parameter_name, parameter in masked.named_parameters():
        if parameter.grad is None:
            assert gradients[parameter_name] is None or not gradients[parameter_name].any()
        else:
            assert relative_error(gradients[parameter_name], parameter.grad) < TOLERANCE, parameter_name


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def ordered_back(elastic: ElasticModel) -> dict[str, Any]:
    """Gradients by name, units where the stock model has them."""
    for parameter in elastic.model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    reorder(elastic.model, elastic.sizes, elastic.orders, back=True)
    return {name: parameter.data for name, parameter in elastic.model.named_parameters()}


@pytest.mark.parametrize("mix", ["factors", "products"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "qwen2"])
def test_a_tuned_shape_equals_its_extraction(name: str, bias: bool, mix: Any, models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models(name), tmp_path, bias=bias, mix=mix)
    elastic = elastic_model(checkpoint)
    for text in (*SHAPES, "3x0.8"):
        plan = checkpoint.plan_of(text)
        folder = tmp_path / text
        folder.mkdir()
        extract(checkpoint.model, plan, folder, learnt=checkpoint.learnt(plan))
        assert relative_error(logits_of(elastic, plan.shape), stock_logits(folder)) < TOLERANCE, text


def test_a_gate_of_another_size_is_run_as_it_is(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-tied"), tmp_path)
    assert checkpoint.adapters is not None
    tensors = {name: checkpoint.adapters.tensor(name) for name in checkpoint.adapters.infos}
    for name in ("gate.0.weight", "gate.0.bias"):
        tensors[name] = tensors[name][:1]
    tensors["gate.1.weight"] = tensors["gate.1.weight"][:, :1]
    write_adapters(checkpoint.path, tensors, rank=4, alpha=16, top_k=2, widths=WIDTHS)
    checkpoint = open_checkpoint(checkpoint.path)
    plan = checkpoint.plan_of("3x0.67")
    (tmp_path / "subnet").mkdir()
    extract(checkpoint.model, plan, tmp_path / "subnet", learnt=checkpoint.learnt(plan))
    found = logits_of(elastic_model(checkpoint), plan.shape)
    assert relative_error(found, stock_logits(tmp_path / "subnet")) < TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
def test_sublayers_that_are_gone_add_nothing_or_their_mean(bias: bool, models: Models, tmp_path: Path) -> None:
    model = models("llama-biases")
    full = random_selection(model)
    choice = DepthChoice((0, 1, 2, 3), 1.0, without_attention=(1,), without_feed_forward=(2,))
    selection = Selection(full.base_digest, full.depths | {3: choice}, full.blocks, full.facts)
    elastic = ElasticModel(load_torch_model(model.path), selection, model.architecture, bias=bias).eval()
    shape = Shape(3, Fraction(2, 3))
    plan = selection.plan(model.architecture, shape)

    def biases(block: Any) -> Any:
        return block_biases(model, selection, block)

    extract(model, plan, tmp_path, learnt=Learnt(biases=biases) if bias else Learnt())
    assert relative_error(logits_of(elastic, shape), stock_logits(tmp_path)) < TOLERANCE


def test_ordering_back_restores_every_bit(models: Models) -> None:
    for name in ("llama-grouped-tied", "phi3", "olmo2", "qwen2"):
        model = models(name)
        before = {n: p.clone() for n, p in load_torch_model(model.path).named_parameters()}
        elastic = elastic_of(model)
        assert any(not torch.equal(before[n], p) for n, p in elastic.model.named_parameters())
        reorder(elastic.model, model.architecture, elastic.orders, back=True)
        assert all(torch.equal(before[n], p) for n, p in elastic.model.named_parameters())


def test_a_known_shape_is_a_look_up(models: Models) -> None:
    elastic = elastic_of(models("llama-grouped-tied"))
    shape = Shape.parse("3x0.67")
    view = elastic.view(shape)
    assert elastic.view(shape) is view
    weights = {p.data_ptr() for p in elastic.model.parameters()}
    assert {p.data_ptr() for p in view.model.parameters()} <= weights  # no copies


def test_the_gate_draws_noise_in_training_only(models: Models) -> None:
    model = models("llama-grouped-tied")
    torch.manual_seed(0)
    mixture = Mixture(model.architecture, MixtureSettings(rank=4), WIDTHS)
    elastic = elastic_of(model, mixture=mixture)
    elastic.noise = torch.Generator().manual_seed(1)
    shape = Shape.parse("3x0.67")

    def weights() -> torch.Tensor:
        with elastic.shape(shape):
            assert elastic.mixing.shares is not None
            return elastic.mixing.shares.weights.detach().clone()

    assert torch.equal(weights(), weights())
    elastic.train()
    assert not torch.equal(weights(), weights())


def test_checkpointing_gives_the_same_gradients(models: Models) -> None:
    found = []
    for checkpointing in (False, True):
        model = models("llama-grouped-tied")
        torch.manual_seed(0)
        mixture = Mixture(model.architecture, MixtureSettings(rank=4), WIDTHS)
        for experts in mixture.modules():
            if hasattr(experts, "b"):
                torch.nn.init.normal_(experts.b, std=0.02)
        stock: Any = load_torch_model(model.path)
        if checkpointing:
            enable = getattr(stock, "activation_checkpointing_enable", None) or stock.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        elastic = ElasticModel(
            stock.requires_grad_(False), random_selection(model), model.architecture, mixture=mixture
        )
        elastic.train()
        with elastic.shape(Shape.parse("3x0.67")):
            loss_of(elastic(IDS)).backward()
        found.append({n: p.grad for n, p in mixture.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 20
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_nothing_runs_outside_of_a_shape(models: Models) -> None:
    elastic = elastic_of(models("llama-grouped-tied"))
    with pytest.raises(RuntimeError, match=r"model\.shape"):
        elastic(IDS)
    with pytest.raises(BadInput, match="depth 9"), elastic.shape(Shape.parse("9x1")):
        pass


def test_a_view_generates_like_the_extracted_model(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    elastic, shape = elastic_of(model), Shape.parse("2x0.67")
    extract(model, random_selection(model).plan(model.architecture, shape), tmp_path)
    stock: Any = load_torch_model(tmp_path)
    with elastic.shape(shape):
        found = elastic.view(shape).model.generate(IDS[:1, :5], max_new_tokens=12, do_sample=False)
    assert torch.equal(found, stock.generate(IDS[:1, :5], max_new_tokens=12, do_sample=False))
