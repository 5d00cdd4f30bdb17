"""Extraction is exact: a dense subnet computes what the full model computes with the removed units masked.

The reference is the full model run by stock transformers on the kept blocks only, with the inputs of o_proj and
down_proj multiplied by 0/1 masks. The subnet is loaded from its folder by the stock class that its config names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, MODELS, keep_layers, random_selection, save_random_model
from transformers import AutoModelForCausalLM

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.families import families, family_of, read_architecture
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import BlockPlan, Plan, Steps, block_plan
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
    keep_layers(reference, plan.kept_blocks)
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


@pytest.mark.parametrize("name", ["llama-grouped-tied", "qwen2", "qwen3", "gemma3-capped", "phi3", "smollm3-biases"])
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


SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 8, "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize("family", families())
def test_defaults_that_configs_leave_out_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    said = {"model_type": family, **SMALL}
    stock = AutoConfig.for_model(**said)
    sizes = read_architecture(said)
    head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    found = (sizes.kv_heads, sizes.head_dim, sizes.context, sizes.tied, sizes.norm_epsilon, sizes.rope.theta)
    rope = stock.rope_parameters
    wanted = (
        stock.num_key_value_heads, head_dim, stock.max_position_embeddings, stock.tie_word_embeddings,
        stock.rms_norm_eps, rope.get("full_attention", rope)["rope_theta"],
    )  # fmt: skip
    assert found == wanted
    for key, value in family_of(said).completed(said).items():
        assert getattr(stock, key, value) == value, key


@pytest.mark.parametrize("family", sorted(set(families()) - {"gemma2", "gemma3_text"}))  # their classes refuse null
def test_null_key_value_heads_are_as_many_as_query_heads(family: str) -> None:
    said = {"model_type": family, **SMALL, "num_key_value_heads": None}
    assert read_architecture(said).kv_heads == 32


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_the_stock_class_has_them(name: str) -> None:
    from transformers import AutoConfig

    family, changes = MODELS[name]
    config = AutoConfig.for_model(family, **(BASE | changes))
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    assert read_architecture(config.to_dict()).parameters == sum(p.numel() for p in stock.parameters())


def edited_config(model: ModelFolder, folder: Path, edit: Callable[[dict[str, Any]], object]) -> ModelFolder:
    """A copy of a model with another config."""
    shutil.copytree(model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelFolder(folder)


def extracted(model: ModelFolder, folder: Path, shape: str = "2x0.67") -> tuple[dict[str, Any], Plan]:
    """The config of a subnet, which is checked against the masked model, and its plan."""
    plan = random_selection(model).plan(model.architecture, Shape.parse(shape))
    folder.mkdir()
    extract(model, plan, folder)
    assert relative_error(stock_logits(folder), masked_logits(model, plan)) < TOLERANCE
    return json.loads((folder / "config.json").read_text()), plan


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma3-capped", {"layer_types": ["sliding_attention", "sliding_attention"]}),
        ("smollm3", {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_patterns_that_configs_leave_to_the_class_become_lists_of_the_kept_blocks(
    name: str, lists: dict[str, Any], models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    for said in ("nothing", "null"):

        def edit(config: dict[str, Any], said: str = said) -> None:
            for key in lists:
                del config[key]
                config |= {key: None} if said == "null" else {}

        model = edited_config(models(name), tmp_path / said, edit)
        config, plan = extracted(model, tmp_path / f"{said}-subnet")
        assert plan.kept_blocks == (0, 3)
        assert {key: config[key] for key in lists} == lists


def test_a_sliding_window_pattern_is_counted_over_the_full_model_and_does_not_stay(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    def edit(config: dict[str, Any]) -> None:
        del config["layer_types"]
        config |= {"sliding_window_pattern": 4, "_sliding_window_pattern": 4}

    config, plan = extracted(edited_config(models("gemma3"), tmp_path / "full", edit), tmp_path / "subnet")
    assert plan.kept_blocks == (0, 3)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert not [key for key in config if "pattern" in key]


def test_gemma_3_has_two_rotary_bases_in_either_spelling(models: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config |= {"rope_theta": 50000.0, "rope_local_base_freq": 500.0}
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}

    model = models("gemma3")
    old = edited_config(model, tmp_path / "old", older)
    assert old.architecture == model.architecture
    assert "second rotary base" in model.architecture.traits
    configs = [extracted(each, tmp_path / name)[0] for each, name in ((model, "new-subnet"), (old, "old-subnet"))]
    spelled = [{key: value for key, value in config.items() if "rope" in key} for config in configs]
    assert spelled[0] == spelled[1]
    full, local = (spelled[0]["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    assert (full["rope_theta"], full["rope_type"], full["factor"]) == (50000.0, "linear", 8.0)
    assert (local["rope_theta"], local["rope_type"]) == (500.0, "default")
    assert (spelled[0]["rope_theta"], spelled[0]["rope_local_base_freq"]) == (50000.0, 500.0)
    assert spelled[0]["rope_scaling"]["factor"] == 8.0


def test_a_long_rope_is_spelled_as_transformers_4_takes_it(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    def older(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_scaling"] = {"type": "longrope"} | {key: rope[key] for key in ("short_factor", "long_factor")}

    model = models("phi3-long")
    old = edited_config(model, tmp_path / "old", older)
    assert old.architecture == model.architecture
    for each, name in ((model, "new-subnet"), (old, "old-subnet")):
        config, _ = extracted(each, tmp_path / name)
        assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
        assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "longrope"
        assert config["original_max_position_embeddings"] == 22
    # What the first releases call it, transformers 5 no longer loads; subnets have today's name.
    scaling = old.config["rope_scaling"]
    assert read_architecture(old.config | {"rope_scaling": scaling | {"type": "su"}}) == old.architecture


def test_a_cache_across_the_limit_of_a_long_rope_is_refused(models: Callable[[str], ModelFolder]) -> None:
    sizes = models("phi3-long").architecture
    assert load_backend("torch").refusal(sizes, "fp32", BuildOptions(22)) is None
    assert "ask for --context 22 or less" in str(load_backend("torch").refusal(sizes, "fp32", BuildOptions(23)))


def test_a_factor_beside_the_rotary_settings_is_read_as_one_among_them() -> None:
    said = {"model_type": "phi3", **SMALL, "head_dim": 16}
    beside = read_architecture(said | {"partial_rotary_factor": 0.75})
    among = read_architecture(said | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}})
    assert beside == among
    assert "partial rotary turn" in beside.traits
    assert "partial rotary turn" not in read_architecture(said).traits


def test_soft_capping_that_is_null_is_off_and_left_out_is_on() -> None:
    said = {"model_type": "gemma2", **SMALL}
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert "soft-capping" in read_architecture(said).traits
    assert "soft-capping" not in read_architecture(said | off).traits


@pytest.mark.parametrize(
    ("family", "window"), [("gemma2", 4096), ("gemma3_text", 4096), ("smollm3", None), ("phi3", None), ("olmo2", None)]
)
def test_a_window_counts_where_a_block_uses_one(family: str, window: int | None) -> None:
    assert read_architecture({"model_type": family, **SMALL}).sliding_window == window


def test_no_window_is_used_where_no_block_slides_or_it_spans_the_context() -> None:
    said = {"model_type": "gemma2", **SMALL}
    assert read_architecture(said | {"layer_types": ["full_attention"] * 8}).sliding_window is None
    assert read_architecture(said | {"sliding_window": 8192}).sliding_window is None
    windowed = {"model_type": "smollm3", **SMALL, "use_sliding_window": True, "sliding_window": 512}
    assert read_architecture(windowed).sliding_window == 512
    assert read_architecture(windowed | {"no_rope_layers": [1] * 8}).sliding_window is None


def test_a_list_that_is_shorter_than_the_model_is_refused() -> None:
    with pytest.raises(BadInput, match="3 entries in layer_types for 8 blocks"):
        read_architecture({"model_type": "gemma2", **SMALL, "layer_types": ["full_attention"] * 3})


def test_gemmas_keep_heads_that_divide_the_hidden_size(tmp_path: Path) -> None:
    heads = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = save_random_model(tmp_path / "full", "gemma2", **heads)
    assert Steps.of(model.architecture).groups == (1, 2, 4, 8)
    config, plan = extracted(model, tmp_path / "subnet", "3x0.6")
    assert config["num_attention_heads"] == 4
    three = Plan(plan.shape, tuple(block_plan(model.architecture, i, [0, 1, 2], range(64)) for i in range(3)))
    with pytest.raises(BadInput, match="3 heads only where they divide its hidden size 64"):
        extract(model, three, tmp_path)


@pytest.mark.parametrize("name", ["olmo2", "phi3-long"])
def test_heads_that_cannot_go_stay_whatever_the_width(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    config, plan = extracted(model, tmp_path / "subnet", "3x0.34")
    assert config["num_attention_heads"] == 6
    assert config["intermediate_size"] == 64
    adaptive = random_selection(model).plan(model.architecture, Shape.parse("3x0.5", "adaptive"))
    assert {len(block.kv_heads) for block in adaptive.blocks} == {3}
    cut = Plan(plan.shape, tuple(block_plan(model.architecture, i, [0, 2], range(64)) for i in range(3)))
    with pytest.raises(BadInput, match="keeps some of the heads of block 0; from this"):
        extract(model, cut, tmp_path)


def test_a_long_rope_with_fewer_heads_is_what_the_stock_class_refuses(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    changed = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = edited_config(models("phi3-long"), tmp_path / "changed", lambda config: config.update(changed))
    with pytest.raises(Exception, match="short_factor field must have length"):
        AutoModelForCausalLM.from_pretrained(model.path)


def test_matrices_of_a_fused_tensor_are_read_apart(models: Callable[[str], ModelFolder]) -> None:
    model = models("phi3-partial")
    whole = model.tensors.float32("model.layers.1.self_attn.qkv_proj.weight")
    for name, rows in (("q", slice(0, 96)), ("k", slice(96, 144)), ("v", slice(144, 192))):
        assert (model.block_matrix(1, f"self_attn.{name}_proj") == whole[rows]).all()
    whole = model.tensors.float32("model.layers.1.mlp.gate_up_proj.weight")
    assert (model.block_matrix(1, "mlp.gate_proj") == whole[:160]).all()
    assert (model.block_matrix(1, "mlp.up_proj") == whole[160:]).all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gemma3"}, "text and vision in one; take its text model"),
        ({"model_type": "gemma2", **SMALL, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", **SMALL, "hidden_activation": "gelu"}, "gemma2 is known with gelu_pytorch_tanh only"),
        ({"model_type": "phi3", **SMALL, "hidden_act": "gelu"}, "phi3 is known with silu only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_family_does_not_know_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_architecture(config)


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
    folder = Path(shutil.copytree(models("qwen3").path, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(BadInput, match=r"gate_proj.*config calls for \[192, 96\]"):
        ModelFolder(folder).check_shapes()


LOAD_ALL = """
import json, socket, sys
def refuse(*_): raise AssertionError("a connection was asked for")
socket.socket.connect = socket.create_connection = refuse
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.inference_mode():
        torch.save((type(model).__module__.split(".")[0], model(input_ids=ids).logits), folder + "/logits.pt")
"""


def test_every_folder_loads_in_a_process_of_its_own_without_code_or_network(
    models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    wanted = {}
    for name in MODELS:
        model, folder = models(name), tmp_path / name
        folder.mkdir()
        plan = random_selection(model).plan(model.architecture, Shape.parse("3x0.67"))
        extract(model, plan, folder)
        wanted[folder] = masked_logits(model, plan)
        # Nothing in the folder could be run.
        assert not [file.name for file in folder.iterdir() if file.suffix not in (".json", ".safetensors", ".md")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", LOAD_ALL, json.dumps(IDS.tolist()), *map(str, wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, logits in wanted.items():
        package, found = torch.load(folder / "logits.pt", weights_only=True)
        assert package == "transformers"
        assert relative_error(found, logits) < TOLERANCE, folder.name
