"""Tuned adapters: the gate, the mixture of experts, and the merge on the way of extraction.

The reference is the method as it is written down: every linear layer of the full model computes
W x + alpha/r (sum g_k B_k) (sum g_k A_k) x, or W x + alpha/r sum g_k B_k A_k x, in its forward pass, with removed
units masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_adapters, random_selection
from test_compensation import logits_at_means
from test_families import TOLERANCE, masked_logits, relative_error, stock_logits

from amoeba_deploy.adapters import (
    ADAPTERS,
    GATE,
    Adapters,
    Mix,
    matrices,
    read_adapters,
    tensor_names,
    width_code,
    write_adapters,
)
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint, finish_checkpoint, open_checkpoint
from amoeba_deploy.console import checkpoint_json
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.files import read_json_object, write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan
from amoeba_deploy.selection import write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import TensorSource, array_source, as_float32, from_float32, read_header, write_tensors

Models = Callable[[str], ModelFolder]
WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))


def tuned_checkpoint(model: ModelFolder, folder: Path, bias: bool = False, mix: Mix = "factors") -> Checkpoint:
    """A checkpoint of a model with random scores and random adapters."""
    selection = folder / "selection"
    (made := folder / "checkpoint").mkdir(parents=True)
    selection.mkdir()
    write_selection(selection, random_selection(model))
    create_checkpoint(str(model.path), selection, made, bias=bias)
    random_adapters(model, made, WIDTHS, mix=mix)
    write_json(made / "amoeba.json", read_json_object(made / "amoeba.json") | {"adapters": "smol"})
    return open_checkpoint(made)


def shares_by_torch(adapters: Adapters, kept: tuple[int, ...], code: list[float]) -> torch.Tensor:
    """The gate as the method describes it."""
    gate = {name: torch.from_numpy(values.copy()).double() for name, values in adapters.gate.items()}
    seen = torch.zeros(adapters.depth, dtype=torch.float64)
    seen[list(kept)] = 1
    seen = torch.cat([seen, torch.tensor(code, dtype=torch.float64)])
    inner = torch.nn.functional.linear(seen, gate["gate.0.weight"], gate["gate.0.bias"])
    logits = torch.nn.functional.linear(inner, gate["gate.1.weight"], gate["gate.1.bias"])
    best = torch.topk(logits, adapters.top_k)
    return torch.zeros_like(logits).scatter(0, best.indices, torch.softmax(best.values, 0))


def full_tuned_model(checkpoint: Checkpoint, plan: Plan, folder: Path) -> ModelFolder:
    """The whole base model with a plan's mixture merged by torch, saved by transformers."""
    from transformers import AutoModelForCausalLM

    model, adapters = checkpoint.model, checkpoint.adapters
    assert adapters is not None
    stock: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    shares = torch.from_numpy(adapters.mixture(plan.kept_blocks, plan.shape.width)).double()
    experts = {name: expert_tensors(adapters, name).double() for name in adapters.infos if name.startswith("blocks.")}
    for block, layer in enumerate(stock.model.layers):
        for matrix in matrices(model.architecture):
            name_a, name_b = tensor_names(block, matrix)
            a, b = experts[name_a], experts[name_b]
            if adapters.mix == "factors":
                mixed = torch.einsum("e,eor->or", shares, b) @ torch.einsum("e,eri->ri", shares, a)
            else:
                mixed = torch.einsum("e,eor,eri->oi", shares, b, a)
            linear = layer.get_submodule(matrix)
            change = adapters.alpha / adapters.rank * mixed
            linear.weight.data = (linear.weight.data.double() + change).float()
    stock.save_pretrained(folder)
    return ModelFolder(folder)


def expert_tensors(adapters: Adapters, name: str) -> torch.Tensor:
    info = adapters.infos[name]
    values = np.empty(info.shape, np.float32)
    adapters.file.read_into(values, info.offset)
    return torch.from_numpy(values)


@pytest.mark.parametrize("mix", ["factors", "products"])
@pytest.mark.parametrize("shape", ["4x1", "3x0.8", "2x0.5"])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "qwen2", "qwen3", "mistral"])
def test_a_tuned_subnet_is_the_merged_model_masked(
    name: str, shape: str, mix: Mix, models: Models, tmp_path: Path
) -> None:
    checkpoint = tuned_checkpoint(models(name), tmp_path, mix=mix)
    plan = checkpoint.plan_of(shape)
    (tmp_path / "subnet").mkdir()
    extract(checkpoint.model, plan, tmp_path / "subnet", learnt=checkpoint.learnt(plan))
    merged = full_tuned_model(checkpoint, plan, tmp_path / "merged")
    found = stock_logits(tmp_path / "subnet")
    assert relative_error(found, masked_logits(merged, plan)) < TOLERANCE
    assert relative_error(found, masked_logits(checkpoint.model, plan)) > 0.01  # the adapters are not small


@pytest.mark.parametrize("mix", ["factors", "products"])
def test_compensation_is_of_the_tuned_weights(mix: Mix, models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-tied"), tmp_path, bias=True, mix=mix)
    plan = checkpoint.plan_of("3x0.5")
    (tmp_path / "subnet").mkdir()
    extract(checkpoint.model, plan, tmp_path / "subnet", learnt=checkpoint.learnt(plan))
    merged = full_tuned_model(checkpoint, plan, tmp_path / "merged")
    wanted = logits_at_means(merged, checkpoint.selection, plan)
    assert relative_error(stock_logits(tmp_path / "subnet"), wanted) < TOLERANCE


def test_a_merge_rounds_once(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-untied"), tmp_path)
    plan = checkpoint.plan_of("3x0.8")
    folders = {dtype: tmp_path / dtype for dtype in ("float32", "bfloat16")}
    for dtype, folder in folders.items():
        folder.mkdir()
        extract(checkpoint.model, plan, folder, dtype=dtype, learnt=checkpoint.learnt(plan))
    exact, rounded = (ModelFolder(folder).tensors for folder in folders.values())
    for name in exact.infos:
        assert np.array_equal(rounded.raw(name), from_float32(exact.float32(name), "BF16")), name


def test_the_gate_is_that_of_the_method(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-tied"), tmp_path)
    assert checkpoint.adapters is not None
    for kept, width, code in (
        ((0, 1, 2, 3), "1", [1, 0, 0, 0]),
        ((0, 2), "0.75", [0, 0, 1, 0]),
        ((0, 1, 3), "0.8", [0, 0.4, 0.6, 0]),
        ((1, 2), "0.3", [0, 0, 0, 1]),
    ):
        wanted = shares_by_torch(checkpoint.adapters, kept, code)
        found = checkpoint.adapters.mixture(kept, Fraction(width))
        assert np.allclose(found, wanted, atol=1e-7)
        assert np.count_nonzero(found) == 2


@pytest.mark.parametrize(
    ("width", "code"),
    [
        ("1", [1, 0, 0, 0]),
        ("15/16", [0.5, 0.5, 0, 0]),
        ("7/8", [0, 1, 0, 0]),
        ("0.55", [0, 0, 0.2, 0.8]),
        ("1/2", [0, 0, 0, 1]),
        ("1/10", [0, 0, 0, 1]),
    ],
)
def test_a_width_is_coded_between_its_tuned_neighbours(width: str, code: list[float]) -> None:
    assert np.allclose(width_code(Fraction(width), WIDTHS), code)


def test_equal_logits_take_the_lower_experts(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-tied"), tmp_path)
    assert checkpoint.adapters is not None
    silent = {name: np.zeros_like(values) for name, values in checkpoint.adapters.gate.items()}
    shares = replace(checkpoint.adapters, gate=silent).mixture((0, 1), Fraction(1))
    assert shares.tolist() == [0.5, 0.5, 0, 0, 0]


def test_the_same_shape_gives_the_same_bytes(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("qwen2"), tmp_path)
    plan = checkpoint.plan_of("3x0.8")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        extract(checkpoint.model, plan, tmp_path / name, dtype="bfloat16", learnt=checkpoint.learnt(plan))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_single_expert_needs_no_gate(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    random_adapters(model, tmp_path, WIDTHS, experts=1, gated=False)
    adapters = read_adapters(tmp_path, model.architecture)
    assert adapters.mixture((0,), Fraction(1, 2)).tolist() == [1]


def test_the_mixes_differ_where_several_experts_are_kept(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    random_adapters(model, tmp_path, WIDTHS)
    factors = read_adapters(tmp_path, model.architecture)
    products = replace(factors, mix="products")
    shares = factors.mixture((0, 2), Fraction(3, 4))
    one, several = (each.low_rank(shares, 1, "mlp.up_proj") for each in (factors, products))
    assert one is not None
    assert several is not None
    assert (one.a.shape[0], several.a.shape[0], several.b.shape[1]) == (4, 8, 8)
    assert relative_error(torch.from_numpy(several.b @ several.a), torch.from_numpy(one.b @ one.a)) > 0.1
    alone = np.eye(5, dtype=np.float32)[3]
    one, several = (each.low_rank(alone, 1, "mlp.up_proj") for each in (factors, products))
    assert one is not None
    assert several is not None
    assert np.array_equal(one.a, several.a)
    assert np.array_equal(one.b, several.b)


def test_a_file_that_names_no_mix_mixes_factors(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    tensors = random_adapters(model, tmp_path, WIDTHS, mix="products")
    _, metadata = read_header(tmp_path / ADAPTERS)
    assert metadata["mix"] == read_adapters(tmp_path, model.architecture).mix == "products"
    sources: dict[str, TensorSource] = {name: array_source(values, "F32") for name, values in tensors.items()}
    write_tensors(tmp_path / ADAPTERS, sources, {key: value for key, value in metadata.items() if key != "mix"})
    assert read_adapters(tmp_path, model.architecture).mix == "factors"
    write_tensors(tmp_path / ADAPTERS, sources, metadata | {"mix": "sums"})
    with pytest.raises(BadInput, match="'sums' where this version knows factors and products"):
        read_adapters(tmp_path, model.architecture)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_experts_are_rounded_once_and_the_gate_is_not(dtype: Any, models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    tensors = random_adapters(model, tmp_path, WIDTHS)
    write_adapters(tmp_path, tensors, rank=4, alpha=16, top_k=2, widths=WIDTHS, dtype=dtype)
    adapters = read_adapters(tmp_path, model.architecture)
    assert {info.dtype for name, info in adapters.infos.items() if name not in GATE} == {dtype}
    assert all(np.array_equal(adapters.gate[name], tensors[name]) for name in GATE)
    rounded = as_float32(from_float32(tensors["blocks.1.q_proj.lora_a"][2], dtype), dtype)
    found = adapters.low_rank(np.eye(5, dtype=np.float32)[2], 1, "self_attn.q_proj")
    assert found is not None
    assert np.array_equal(found.a, rounded)


def test_numbers_beyond_float16_are_refused_by_name(models: Models, tmp_path: Path) -> None:
    tensors = random_adapters(models("llama-grouped-tied"), tmp_path, WIDTHS)
    tensors["blocks.1.q_proj.lora_a"][0, 0, 0] = 1e5
    with pytest.raises(BadInput, match=r"blocks\.1\.q_proj\.lora_a: holds numbers beyond those of float16"):
        write_adapters(tmp_path, tensors, rank=4, alpha=16, top_k=2, widths=WIDTHS, dtype="F16")


def test_a_checkpoint_says_how_it_was_tuned(models: Models, tmp_path: Path) -> None:
    made = tuned_checkpoint(models("llama-grouped-tied"), tmp_path)
    assert made.tuning == {}
    assert checkpoint_json(made)["tuning"] is None
    tuning = {"steps": 10000, "lr": 2e-4, "data": {"source": "alpaca-gpt4", "rows": 52002}}
    told = finish_checkpoint(
        made.path, made.model, "tuned", include_base=False, policy="uniform", bias=False, adapters="smol", tuning=tuning
    )
    assert told.tuning == checkpoint_json(told)["tuning"] == tuning
    write_json(made.path / "amoeba.json", read_json_object(made.path / "amoeba.json") | {"tuning": [1]})
    with pytest.raises(BadInput, match="its entry tuning is not a JSON object"):
        open_checkpoint(made.path)


def test_files_that_do_not_fit_are_refused(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    tensors = random_adapters(model, tmp_path, WIDTHS)
    settings: dict[str, Any] = {"rank": 4, "alpha": 16.0, "top_k": 2, "widths": WIDTHS}

    def refused(match: str, changed: dict[str, Any], **other: Any) -> None:
        write_adapters(tmp_path, changed, **(settings | other))
        with pytest.raises(BadInput, match=match):
            read_adapters(tmp_path, model.architecture)

    name = "blocks.2.up_proj.lora_b"
    refused(name, {key: value for key, value in tensors.items() if key != name})
    refused(name, tensors | {name: tensors[name][:, :-1]})
    refused("top_k is 6", tensors, top_k=6)
    refused("top_k is 0", tensors, top_k=0)
    refused("lora_a", tensors, rank=3)
    refused("gate.0.weight", tensors, widths=WIDTHS[:2])
    refused("not finite", tensors | {"gate.1.bias": np.full(5, np.nan, np.float32)})
    (tmp_path / ADAPTERS).write_bytes((tmp_path / ADAPTERS).read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"truncated|ends at byte"):
        read_adapters(tmp_path, model.architecture)


def test_a_masked_zero_stays_zero_whatever_was_tuned(models: Models, tmp_path: Path) -> None:
    checkpoint = tuned_checkpoint(models("llama-grouped-tied"), tmp_path)
    plan = checkpoint.plan(Shape(3, Fraction(1, 2), "adaptive"))
    assert plan.is_ragged
    (tmp_path / "subnet").mkdir()
    extract(checkpoint.model, plan, tmp_path / "subnet", learnt=checkpoint.learnt(plan))
    merged = full_tuned_model(checkpoint, plan, tmp_path / "merged")
    assert relative_error(stock_logits(tmp_path / "subnet"), masked_logits(merged, plan)) < TOLERANCE
    subnet, (_, widest) = ModelFolder(tmp_path / "subnet"), plan.widest
    for position, block in enumerate(plan.blocks):
        gate = subnet.tensors.float32(f"model.layers.{position}.mlp.gate_proj.weight")
        assert gate.shape[0] == widest
        assert not gate[len(block.neurons) :].any()


def test_random_bits_survive_both_ways() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 16, 1 << 16).astype(np.uint16)
    finite = words[np.isfinite(as_float32(words, "BF16"))]
    assert np.array_equal(from_float32(as_float32(finite, "BF16"), "BF16"), finite)
    numbers = np.random.default_rng(1).standard_normal(1 << 16).astype(np.float32)
    wanted = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(from_float32(numbers, "BF16"), wanted)
