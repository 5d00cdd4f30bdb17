"""Extraction is exact: a dense subnet computes what the full model computes with the removed units masked.

The reference is the full model run by stock transformers on the kept blocks only, with the inputs of o_proj and
down_proj multiplied by 0/1 masks. The subnet is loaded from its folder by the stock class that its config names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, random_selection, save_random_model
from transformers import AutoModelForCausalLM

from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction import extract
from amoeba_deploy.families import family_of, read_architecture
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan, block_plan
from amoeba_deploy.shape import Shape

IDS = torch.tensor(np.random.default_rng(1).integers(0, 128, (2, 24)))
# Both sides compute in float32; only the order of sums over kept units differs.
TOLERANCE = 1e-5


def mask(indices: tuple[int, ...], count: int, size: int = 1) -> torch.Tensor:
    """1 for each channel of the kept units, 0 for the others."""
    found = torch.zeros(count, size)
    found[list(indices)] = 1
    return found.flatten()


def masked_logits(model: ModelFolder, plan: Plan, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of the full model with everything that a plan removes masked away."""
    reference: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    sizes = model.architecture

    def silence(keep: torch.Tensor) -> Callable[..., Any]:
        return lambda _module, inputs: (inputs[0] * keep,)

    layers = reference.model.layers
    for block in plan.blocks:
        layer = layers[block.index]
        heads, neurons = mask(block.heads, sizes.heads, sizes.head_dim), mask(block.neurons, sizes.neurons)
        layer.self_attn.o_proj.register_forward_pre_hook(silence(heads))
        layer.mlp.down_proj.register_forward_pre_hook(silence(neurons))
    reference.model.layers = torch.nn.ModuleList(layers[i] for i in plan.kept_blocks)
    reference.config.num_hidden_layers = len(plan.blocks)
    with torch.inference_mode():
        logits: torch.Tensor = reference(input_ids=ids, use_cache=False).logits
    return logits


def stock_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of a folder through the stock class that its config names."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    with torch.inference_mode():
        logits: torch.Tensor = loaded(input_ids=ids).logits
    return logits


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("shape", ["4x1", "2x1", "4x0.67", "2x0.67", "3x0.34"])
@pytest.mark.parametrize("name", MODELS)
def test_subnet_equals_masked_model(
    name: str, shape: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    plan = random_selection(model).plan(model.architecture, Shape.parse(shape))
    extract(model, plan, tmp_path)
    assert relative_error(stock_logits(tmp_path), masked_logits(model, plan)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama-grouped-tied", "qwen2", "qwen3"])
def test_blocks_of_different_widths_are_padded_exactly(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    blocks = (
        block_plan(model.architecture, 0, [0, 2], range(0, 160, 2)),
        block_plan(model.architecture, 1, [1], range(100)),
        block_plan(model.architecture, 3, [1, 2], range(7, 40)),
    )
    plan = Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)
    extract(model, plan, tmp_path)
    assert relative_error(stock_logits(tmp_path), masked_logits(model, plan)) < TOLERANCE


def test_heads_that_do_not_divide_hidden_become_a_mistral_without_window(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "full", "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8)
    plan = random_selection(model).plan(model.architecture, Shape.parse("4x0.6"))
    assert plan.subnet(model.architecture).heads == 5
    (tmp_path / "subnet").mkdir()
    extract(model, plan, tmp_path / "subnet")
    config = json.loads((tmp_path / "subnet" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] is None
    assert relative_error(stock_logits(tmp_path / "subnet"), masked_logits(model, plan)) < TOLERANCE


def test_config_spells_rotary_settings_and_dtype_both_ways(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models("llama-3-rope")
    extract(model, random_selection(model).plan(model.architecture, Shape.parse("3x1")), tmp_path, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_both_rotary_spellings_read_alike() -> None:
    common = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
              "intermediate_size": 128, "vocab_size": 100}  # fmt: skip
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = common | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}}
    old = common | {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = common | {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **scaling}}
    assert read_architecture(new) == read_architecture(old) == read_architecture(older)


def test_per_layer_lists_follow_the_kept_blocks() -> None:
    config = {
        "model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 6, "intermediate_size": 128, "vocab_size": 100, "max_window_layers": 4,
        "use_sliding_window": True, "sliding_window": 32,
        "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2,
    }  # fmt: skip
    sizes = read_architecture(config)
    changed = family_of(config).subnet_config(config, (0, 2, 5), sizes.subnet(3, 2, 128), "float32")
    assert changed["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert changed["max_window_layers"] == 2


def test_defaults_that_configs_leave_out_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for family in ("llama", "mistral", "qwen2", "qwen3"):
        said = {"model_type": family, "hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 2,
                "intermediate_size": 128, "vocab_size": 100}  # fmt: skip
        stock = AutoConfig.for_model(**said)
        sizes = read_architecture(said)
        head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
        found = (sizes.kv_heads, sizes.head_dim, sizes.context, sizes.tied, sizes.norm_epsilon)
        wanted = (
            stock.num_key_value_heads, head_dim, stock.max_position_embeddings, stock.tie_word_embeddings,
            stock.rms_norm_eps,
        )  # fmt: skip
        assert found == wanted, family


def test_a_mistral_config_without_a_window_entry_has_the_class_default_of_4096() -> None:
    said = {
        "model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32768,
    }  # fmt: skip
    assert read_architecture(said).sliding_window == 4096
    assert read_architecture(said | {"sliding_window": None}).sliding_window is None
    assert read_architecture(said | {"max_position_embeddings": 2048}).sliding_window is None


def test_a_subnet_keeps_the_tokenizer_and_names_its_plan(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    plan = random_selection(model).plan(model.architecture, Shape.parse("2x0.67"))
    extract(model, plan, tmp_path, facts={"checkpoint_digest": "sha256:abc"})
    subnet = json.loads((tmp_path / "subnet.json").read_text())
    assert subnet["checkpoint_digest"] == "sha256:abc"
    kept = [BlockPlan(b["index"], *(tuple(b[k]) for k in ("kv_heads", "heads", "neurons"))) for b in subnet["blocks"]]
    assert tuple(kept) == plan.blocks
    assert "shape 2x0.67" in (tmp_path / "README.md").read_text()


def test_extracting_twice_gives_the_same_bytes(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("qwen2")
    plan = random_selection(model).plan(model.architecture, Shape.parse("3x0.67"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        extract(model, plan, tmp_path / name, dtype="bfloat16")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_tied_subnet_holds_its_embedding_once(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    extract(model, random_selection(model).plan(model.architecture, Shape.parse("2x1")), tmp_path)
    names = ModelFolder(tmp_path).tensors.infos
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="model_type 'gpt2'"):
        read_architecture({"model_type": "gpt2"})


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(models("qwen3").path, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(BadInput, match=r"gate_proj.*config calls for \[192, 96\]"):
        ModelFolder(folder).check_shapes()
