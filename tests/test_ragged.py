"""Ragged subnets: blocks of their own sizes compute what the padded and the masked model do, everywhere they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, amoeba, random_selection, save_random_model
from hypothesis import given
from hypothesis import strategies as st
from onnx_engines import ON_CPU, fed, genai_greedy, with_tokenizer
from test_compensation import logits_at_means, logits_of
from test_families import IDS, TOLERANCE, masked_logits, relative_error, stock_logits
from test_shapes import GROUPED, silenced_logits
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.extraction.compensation import block_biases
from amoeba_deploy.extraction.folder import DTYPES, NOTHING, Extraction, Learnt, extract
from amoeba_deploy.extraction.layout_cost import layout_cost, ragged_cost
from amoeba_deploy.extraction.native_layouts import common_heads, deci_blocks, gguf_arrays
from amoeba_deploy.extraction.ragged import MODELLING_FILE, BlockSizes, plan_sizes
from amoeba_deploy.lowering import lower_plan
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import BlockPlan, Plan, block_plan
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.profiles.roofline import estimate
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact

Models = Callable[[str], ModelFolder]
ONNX = load_backend("onnx")
SOME = ["llama-grouped-tied", "llama-biases", "qwen3", "granite"]
"""One model of each kind of block."""
EACH_FAMILY = list({family: name for name, (family, _) in reversed(MODELS.items())}.values())
"""One model of each family."""


def uneven_plan(sizes: Architecture) -> Plan:
    """Three of four blocks, each of another width."""
    whole = range(sizes.kv_heads)
    kept = [whole] * 3 if sizes.head_rule == "all" else [[0, 2], [1], [0, 1, 2]]
    blocks = (
        block_plan(sizes, 0, kept[0], range(0, 160, 2)),
        block_plan(sizes, 1, kept[1], range(100)),
        block_plan(sizes, 3, kept[2], range(7, 40)),
    )
    return Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)


def gappy_plan(sizes: Architecture) -> Plan:
    """All four blocks: the first and the last without attention, the third without feed-forward."""
    some = range(sizes.kv_heads) if sizes.head_rule == "all" else [0, 2]
    blocks = (
        block_plan(sizes, 0, [], range(64)),
        block_plan(sizes, 1, some, range(32, 64)),
        block_plan(sizes, 2, range(sizes.kv_heads) if sizes.head_rule == "all" else [1], []),
        block_plan(sizes, 3, [], range(5, 69)),
    )
    return Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)


PLANS = {"uneven": uneven_plan, "gappy": gappy_plan}


def biased(model: ModelFolder) -> Learnt:
    """Compensating biases from random means."""
    selection = random_selection(model)
    return Learnt(biases=lambda block: block_biases(model, selection, block))


def ragged(model: ModelFolder, plan: Plan, folder: Path, **options: Any) -> Extraction:
    folder.mkdir(exist_ok=True)
    done = extract(model, plan, folder, layout="ragged", **options)
    ModelFolder(folder).check_shapes()
    return done


def reference_logits(model: ModelFolder, plan: Plan) -> torch.Tensor:
    """Logits of the full model in which everything that a plan lacks gives zero."""
    return masked_logits(model, plan) if plan.whole_blocks else silenced_logits(model, plan)


def ragged_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    return logits_of(load_torch_model(folder), ids)


# The loss between forms is zero


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", MODELS)
def test_ragged_padded_and_masked_models_are_equal(name: str, policy: Any, models: Models, tmp_path: Path) -> None:
    model = models(name)
    plan = random_selection(model).plan(model.architecture, Shape(3, Fraction(1, 2), policy))
    ragged(model, plan, tmp_path / "ragged")
    (tmp_path / "padded").mkdir()
    extract(model, plan, tmp_path / "padded")
    found, wanted = ragged_logits(tmp_path / "ragged"), masked_logits(model, plan)
    assert relative_error(found, wanted) < TOLERANCE
    assert relative_error(stock_logits(tmp_path / "padded"), found) < TOLERANCE


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_any_sizes_equal_the_model_in_which_the_rest_gives_zero(
    name: str, plan_name: str, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    plan = PLANS[plan_name](model.architecture)
    ragged(model, plan, tmp_path)
    assert relative_error(ragged_logits(tmp_path), reference_logits(model, plan)) < TOLERANCE


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_biases_compensate_in_every_family(name: str, plan_name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    plan, learnt = PLANS[plan_name](model.architecture), biased(model)
    ragged(model, plan, tmp_path / "ragged", learnt=learnt)
    found = ragged_logits(tmp_path / "ragged")
    assert relative_error(found, logits_at_means(model, random_selection(model), plan)) < TOLERANCE
    if families.family_of(model.config).compensated:
        (tmp_path / "padded").mkdir()
        extract(model, plan, tmp_path / "padded", learnt=learnt)
        assert relative_error(stock_logits(tmp_path / "padded"), found) < TOLERANCE


@pytest.mark.parametrize("name", SOME)
def test_a_missing_sublayer_has_no_tensors(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    ragged(model, gappy_plan(model.architecture), tmp_path)
    names = ModelFolder(tmp_path).tensors.infos
    for index, sublayer, norm in (
        (0, "self_attn", "input_layernorm"),
        (2, "mlp", "post_attention_layernorm"),
        (3, "self_attn", "input_layernorm"),
    ):
        gone = (f"model.layers.{index}.{sublayer}.", f"model.layers.{index}.{norm}.")
        assert not [name for name in names if name.startswith(gone)]
    loaded: Any = load_torch_model(tmp_path)
    assert {key for key, _ in loaded.named_parameters()} == set(names)


# transformers


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    found: torch.Tensor = model.generate(ids, max_new_tokens=20, do_sample=False, **options)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_greedy_tokens_are_equal_with_any_cache_and_none(
    name: str, plan_name: str, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    ragged(model, PLANS[plan_name](model.architecture), tmp_path)
    loaded, ids = load_torch_model(tmp_path), IDS[:, :9]
    wanted = greedy(loaded, ids, use_cache=False)
    assert torch.equal(greedy(loaded, ids), wanted)
    assert torch.equal(greedy(loaded, ids, cache_implementation="static"), wanted)
    own = StaticCache(config=loaded.config, max_cache_len=40)
    assert torch.equal(greedy(loaded, ids, past_key_values=own), wanted)


@pytest.mark.parametrize("name", SOME)
def test_a_cache_has_a_layer_for_each_block_with_attention(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    ragged(model, gappy_plan(model.architecture), tmp_path)
    loaded: Any = load_torch_model(tmp_path)
    for cache in (None, DynamicCache(), DynamicCache(config=loaded.config), StaticCache(loaded.config, 64)):
        with torch.inference_mode():
            found = loaded(input_ids=IDS[:, :10], past_key_values=cache, use_cache=True).past_key_values
            assert (len(found.layers), found.get_seq_length(0)) == (2, 10)
            logits = loaded(input_ids=IDS[:, 10:], past_key_values=found, use_cache=True).logits
        assert relative_error(logits, logits_of(loaded, IDS)[:, 10:]) < TOLERANCE


@pytest.mark.parametrize("name", SOME)
def test_rows_padded_on_the_left_give_the_tokens_of_their_own(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    ragged(model, gappy_plan(model.architecture), tmp_path)
    loaded, short, long = load_torch_model(tmp_path), IDS[:1, :5], IDS[1:, :11]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1)
    seen = torch.ones(2, 11, dtype=torch.long)
    seen[0, :6] = 0
    found = greedy(loaded, torch.cat([padded, long]), attention_mask=seen)
    assert torch.equal(found[:1], greedy(loaded, short))
    assert torch.equal(found[1:], greedy(loaded, long))


@pytest.mark.parametrize(("name", "bias"), [("llama-grouped-tied", True), ("qwen2-untied", False), ("qwen3", True)])
def test_transformers_loads_saves_and_loads_again_the_same_bits(
    name: str, bias: bool, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    plan = gappy_plan(model.architecture)
    ragged(model, plan, tmp_path / "a", learnt=biased(model) if bias else NOTHING)
    first, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(first.eval(), IDS), ragged_logits(tmp_path / "a"))
    first.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / MODELLING_FILE.name).read_bytes() == MODELLING_FILE.read_bytes()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=True).eval()
    assert dict(first.named_parameters()).keys() == dict(second.named_parameters()).keys()
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(logits_of(first, IDS), logits_of(second, IDS))
    # What transformers saved is still ours.
    ModelFolder(tmp_path / "b").check_shapes()
    assert torch.equal(ragged_logits(tmp_path / "b"), ragged_logits(tmp_path / "a"))


def test_attention_can_be_changed_in_all_blocks(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, gappy_plan(model.architecture), tmp_path)
    loaded: Any = load_torch_model(tmp_path)
    wanted = logits_of(loaded, IDS)
    loaded.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in loaded.model.layers[1:3]} == {"eager"}
    assert relative_error(logits_of(loaded, IDS), wanted) < TOLERANCE


def test_it_is_never_loaded_without_its_code(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, uneven_plan(model.architecture), tmp_path)
    for opened in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            opened.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises((RuntimeError, ValueError)):
        LlamaForCausalLM.from_pretrained(tmp_path)


# Our own readers


def test_another_modelling_file_is_refused_and_never_run(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, uneven_plan(model.architecture), tmp_path / "a")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    changes: list[Callable[[Path], object]] = [
        lambda folder: (folder / MODELLING_FILE.name).write_text(evil + MODELLING_FILE.read_text()),
        lambda folder: (folder / MODELLING_FILE.name).unlink(),
        lambda folder: rewrite(folder, auto_map={"AutoModelForCausalLM": "other.Model"}),
    ]
    for number, change in enumerate(changes):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / str(number)))
        (folder / "other.py").write_text(evil)
        change(folder)
        with pytest.raises(BadInput, match=r"modeling_amoeba\.py is not the one of this version"):
            load_torch_model(folder)
    assert not (tmp_path / "ran").exists()


def rewrite(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda blocks: blocks[1:], "3 entries in block_sizes"),
        (lambda blocks: [[4, 2, 80], *blocks[1:]], r"block_sizes\[0\] must have whole"),
        (lambda blocks: [blocks[0] | {"intermediate_size": -1}, *blocks[1:]], r"block_sizes\[0\] must have whole"),
        (lambda blocks: [blocks[0] | {"num_key_value_heads": 3}, *blocks[1:]], "which no block can have"),
        (lambda blocks: [dict.fromkeys(blocks[0], 0), *blocks[1:]], "which no block can have"),
        (lambda blocks: [b | {"num_attention_heads": 0, "num_key_value_heads": 0} for b in blocks], "with attention"),
        (lambda blocks: [blocks[0] | {"intermediate_size": 96}, *blocks[1:]], "its config calls for"),
    ],
)
def test_a_damaged_config_is_refused(change: Callable[[Any], Any], says: str, models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, uneven_plan(model.architecture), tmp_path)
    rewrite(tmp_path, block_sizes=change(json.loads((tmp_path / "config.json").read_text())["block_sizes"]))
    with pytest.raises(BadInput, match=says):
        ModelFolder(tmp_path).check_shapes()


def test_the_folder_says_what_it_is(models: Models, tmp_path: Path) -> None:
    model = models("qwen2")
    plan = uneven_plan(model.architecture)
    ragged(model, plan, tmp_path)
    folder = ModelFolder(tmp_path)
    assert (folder.family.model_type, folder.architecture.depth) == ("qwen2", 3)
    assert folder.blocks == plan_sizes(plan) == (BlockSizes(4, 2, 80), BlockSizes(2, 1, 100), BlockSizes(6, 3, 33))
    assert json.loads((tmp_path / "subnet.json").read_text())["layout"] == "ragged"
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in card


def test_extracting_twice_gives_the_same_bytes(models: Models, tmp_path: Path) -> None:
    model = models("qwen3")
    for name in ("a", "b"):
        ragged(model, uneven_plan(model.architecture), tmp_path / name, dtype="bfloat16")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_it_is_not_cut_again(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, uneven_plan(model.architecture), tmp_path / "ragged")
    (tmp_path / "text.txt").write_text("text")
    for command in (
        ("select", tmp_path / "ragged", "-o", tmp_path / "out", "--calibration", tmp_path / "text.txt"),
        ("checkpoint", "create", tmp_path / "ragged", "--selection", tmp_path, "-o", tmp_path / "out"),
        ("search", "--config", tmp_path / "ragged", "--device", "orin-nx", "--latency", "40ms"),
    ):
        result = amoeba(*command)
        assert result.exit_code == 2
        assert "is a ragged subnet, whose blocks differ" in result.stderr
    plan = uneven_plan(model.architecture)
    with pytest.raises(BadInput, match="ragged subnet"):
        extract(ModelFolder(tmp_path / "ragged"), plan, tmp_path / "out")


def test_a_ragged_folder_is_run_and_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "subnet"
    done = amoeba("extract", "--shape", "8x0.75", "--policy", "adaptive", "--layout", "ragged", "-o", folder)
    assert done.exit_code == 0, done.output
    padded = amoeba("extract", "--shape", "8x0.75", "--policy", "adaptive", "-o", tmp_path / "padded")
    assert padded.exit_code == 0
    text = " ".join(["Once upon a time there was a teacher who lived in a town."] * 30)
    (tmp_path / "text.txt").write_text(text)
    losses = [
        json.loads(amoeba("evaluate", path, "--text", tmp_path / "text.txt", "--sequence", 64, "--json").stdout)["loss"]
        for path in (folder, tmp_path / "padded")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    run = amoeba("run", folder, "-p", "Once upon a time", "--tokens", 4, "--quiet")
    assert run.exit_code == 0, run.output


# What padding costs


def data_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder, without the file's header."""
    return sum(info.length for info in ModelFolder(folder).tensors.infos.values())


def test_bytes_of_both_layouts_are_reported_where_blocks_differ(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    plan = gappy_plan(model.architecture)
    (tmp_path / "padded").mkdir()
    one, two = extract(model, plan, tmp_path / "padded"), ragged(model, plan, tmp_path / "ragged")
    assert one.layout_bytes == two.layout_bytes
    assert one.layout_bytes == {"uniform": data_bytes(one.path), "ragged": data_bytes(two.path)}
    assert two.bytes < one.bytes
    assert json.loads((tmp_path / "padded" / "subnet.json").read_text())["layout_bytes"] == one.layout_bytes
    alike = Plan(Shape(2, Fraction(1)), (block_plan(GROUPED, 0, [1], [3, 4]), block_plan(GROUPED, 1, [2], [0, 9])))
    assert ragged(model, alike, tmp_path / "alike").layout_bytes is None


def test_a_padded_form_without_a_class_has_no_bytes(models: Models, tmp_path: Path) -> None:
    model = models("qwen3")
    done = ragged(model, uneven_plan(model.architecture), tmp_path, learnt=biased(model))
    assert done.layout_bytes == {"uniform": None, "ragged": data_bytes(done.path)}


def test_parts_that_are_alike_are_estimated_like_the_whole() -> None:
    device, workload = load_device("orin-nx"), Workload(2, 40, 8)
    storage = StorageFormat(4.5, 8, 32, 2, 2)
    arguments = (storage, device, "onnx", "int4", workload, 128)
    whole = estimate(GROUPED, *arguments)
    parts = estimate(GROUPED, *arguments, [replace(GROUPED, depth=1), replace(GROUPED, depth=3)])
    assert parts.tpot_ms == pytest.approx(whole.tpot_ms)
    assert parts.ttft_ms == pytest.approx(whole.ttft_ms)
    assert parts.memory_bytes == pytest.approx(whole.memory_bytes, abs=1)


def test_a_ragged_subnet_is_estimated_by_its_own_blocks() -> None:
    sizes = replace(GROUPED, hidden=4096, heads=24, kv_heads=12, head_dim=128, neurons=11008, vocabulary=32000)
    plan = Plan(
        Shape(2, Fraction(1, 2), "adaptive"),
        (block_plan(sizes, 0, range(12), range(11008)), block_plan(sizes, 1, range(6), [])),
    )
    storage, device = StorageFormat(16, 16, 16, 2, 2), load_device("orin-nx")
    found = ragged_cost(plan, sizes, storage, device, "onnx", "int4", Workload(), 128)
    block, half = sizes.block_matrix_parameters, 2 * (12 + 6) * 128 * 4096
    saved = 2 * (block - half)
    assert found["uniform"].memory_bytes - found["ragged"].memory_bytes == pytest.approx(saved, rel=0.01)
    assert found["ragged"].tpot_ms < found["uniform"].tpot_ms
    assert found["ragged"].source == "estimated"


def test_the_command_reports_what_padding_costs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    asked = ("--shape", "3x0.5", "--policy", "adaptive", "--layout", "ragged", "--device", "orin-nx")
    said = amoeba("extract", checkpoint.path, *asked, "-o", tmp_path / "a").stdout.splitlines()
    assert "0.6 MB of weights padded, 0.5 MB ragged" in said[1]
    assert "onnx int4: TPOT" in said[2]
    assert said[2].endswith("ragged (estimated)")
    value = json.loads(amoeba("extract", checkpoint.path, *asked, "-o", tmp_path / "b", "--json").stdout)
    assert value["layout"] == "ragged"
    assert value["layout_bytes"]["ragged"] == data_bytes(tmp_path / "b")
    assert value["predicted"]["ragged"]["tpot_ms"] < value["predicted"]["uniform"]["tpot_ms"]
    assert value["predicted"]["uniform"]["source"] == "estimated"


def test_an_unknown_latency_is_said_before_anything_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(LatencyUnknown):
        layout_cost(checkpoint.plan(Shape.parse("3x0.5", "adaptive")), checkpoint.architecture, load_device("local"))
    result = amoeba("extract", checkpoint.path, "--shape", "3x0.5", "--device", "local", "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert not (tmp_path / "out").exists()


# Engines


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize(
    ("name", "plan_name", "bias"),
    [
        ("llama-grouped-tied", "gappy", False),
        ("llama-small-heads", "gappy", True),
        ("qwen3", "uneven", True),
        ("granite-biases", "gappy", True),
    ],
)
def test_onnx_takes_missing_sublayers_and_biases(
    name: str, plan_name: str, bias: bool, precision: str, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    ragged(model, PLANS[plan_name](model.architecture), tmp_path, learnt=biased(model) if bias else NOTHING)
    subnet, engine = ModelFolder(tmp_path), tmp_path / "engine"
    engine.mkdir()
    ONNX.lower(subnet, engine, precision, BuildOptions(128))
    assert verify_artefact(ONNX, subnet, engine, precision, BuildOptions(128)).passed


def test_onnx_agrees_with_transformers_in_batches_and_pieces(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    ragged(model, gappy_plan(model.architecture), tmp_path)
    ONNX.lower(ModelFolder(tmp_path), tmp_path, "fp32", BuildOptions(128))
    ids = np.random.default_rng(3).integers(0, 128, (3, 40))
    wanted = fed(load_backend("torch").open(tmp_path, "fp32"), ids, 40)
    for first in (40, 17, 1):
        assert np.abs(fed(ONNX.open(tmp_path, "fp32"), ids, first) - wanted).max() < 1e-4


@pytest.mark.parametrize("plan_name", PLANS)
def test_onnxruntime_genai_takes_layers_of_different_heads(plan_name: str, models: Models, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = models("llama-grouped-tied")
    ragged(model, PLANS[plan_name](model.architecture), tmp_path)
    with_tokenizer(tmp_path)
    ONNX.lower(ModelFolder(tmp_path), tmp_path, "fp32", BuildOptions(128))
    prompt = [5, 40, 17, 99]
    wanted = greedy(load_torch_model(tmp_path), torch.tensor([prompt]))[0].tolist()
    assert genai_greedy(tmp_path, prompt, 20) == wanted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_takes_a_ragged_folder(precision: str, models: Models, tmp_path: Path) -> None:
    model, backend = models("qwen3"), load_backend("torch")
    ragged(model, gappy_plan(model.architecture), tmp_path / "subnet")
    (tmp_path / "engine").mkdir()
    backend.lower(ModelFolder(tmp_path / "subnet"), tmp_path / "engine", precision, BuildOptions(128))
    opened = ModelFolder(tmp_path / "engine")
    assert verify_artefact(backend, opened, tmp_path / "engine", precision, BuildOptions(128)).passed
    assert opened.config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]


@pytest.mark.parametrize(("policy", "layout"), [("uniform", "uniform"), ("adaptive", "ragged")])
def test_a_backend_gets_the_layout_that_it_takes(
    policy: Any, layout: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowered_to(name: str) -> str:
        output, work = tmp_path / name, tmp_path / f"{name}-work"
        output.mkdir()
        work.mkdir()
        lower_plan(
            checkpoint, checkpoint.plan(Shape.parse("3x0.5", policy)), ONNX, "fp32", BuildOptions(64), output, work
        )
        return str(json.loads((output / "subnet.json").read_text())["layout"])

    assert lowered_to("both") == layout
    monkeypatch.setattr(type(ONNX), "layouts", lambda *_: ("uniform",))
    assert lowered_to("one") == "uniform"


# Engines' own forms


def wide_plan(sizes: Architecture, counts: list[int], neurons: list[int]) -> Plan:
    """One block for each count of key/value heads; the best-known units do not matter here."""
    blocks: list[BlockPlan] = [
        block_plan(sizes, index, range(count), range(width))
        for index, (count, width) in enumerate(zip(counts, neurons, strict=True))
    ]
    return Plan(Shape(len(blocks), Fraction(1, 2), "adaptive"), tuple(blocks))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_padded_heads_are_the_fewest_that_deci_can_hold(counts: list[int], group: int) -> None:
    def fitting(heads: int, own: int) -> list[int]:
        """The key/value heads that a block of ``own`` can be padded to under so many query heads."""
        return [p for p in range(own, heads + 1) if heads % p == 0 and heads // p >= group]

    heads, padded = common_heads(counts, group)
    assert all(p in fitting(heads, own) for p, own in zip(padded, counts, strict=True))
    least = [
        len(counts) * other + sum(min(fitting(other, own)) for own in counts)
        for other in range(1, 2 * max(counts) * (group + 1))
        if all(fitting(other, own) for own in counts)
    ]
    assert len(counts) * heads + sum(padded) == min(least)


@pytest.mark.parametrize("name", ["llama-multihead", "llama-biases", "qwen2", "qwen3"])
def test_blocks_padded_for_deci_are_exact(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    sizes = model.architecture
    some = [0, 2, 4, 5] if sizes.kv_heads == 6 else [0, 2]
    blocks = (
        block_plan(sizes, 0, some, range(0, 160, 2)),
        block_plan(sizes, 1, [1], range(100)),
        block_plan(sizes, 2, [], range(30)),
        block_plan(sizes, 3, range(sizes.kv_heads - 1) if sizes.kv_heads == 6 else [0, 1, 2], []),
    )
    plan = Plan(Shape(3, Fraction(1, 2), "adaptive"), blocks)
    found = deci_blocks(plan, sizes, multiple=32)
    present = [block for block in found.blocks if block.heads]
    assert {block.heads for block in present} == {found.heads}
    assert all(found.heads % block.kv_heads == 0 for block in present)
    assert len({block.heads // block.kv_heads for block in present}) > 1
    ragged(model, plan, tmp_path, blocks=found.blocks)
    assert relative_error(ragged_logits(tmp_path), reference_logits(model, plan)) < TOLERANCE


def test_deci_configs_are_spelled_as_their_readers_do() -> None:
    sizes = replace(GROUPED, depth=3, heads=12, kv_heads=6, neurons=1024)
    plan = wide_plan(sizes, [4, 0, 2], [1000, 256, 0])
    found = deci_blocks(plan, sizes)
    assert found.heads == 8
    attention, ffn = ([config[part] for config in found.layer_configs()] for part in ("attention", "ffn"))
    assert [entry["impl"] for entry in attention] == ["attention", "no_op", "attention"]
    assert [entry["num_key_value_heads"] for entry in attention] == [4, None, 2]
    assert [entry["impl"] for entry in ffn] == ["mlp", "mlp", "no_op"]
    assert [entry["intermediate_size"] for entry in ffn] == [1000, 256, None]
    with pytest.raises(BadInput, match="multiples of 256 only, and a block has 1000"):
        found.block_configs(96)
    configs = deci_blocks(plan, sizes, 256).block_configs(96)
    assert [config["attention"]["no_op"] for config in configs] == [False, True, False]
    assert [config["attention"]["n_heads_in_group"] for config in configs] == [2, None, 4]
    assert [config["ffn"]["no_op"] for config in configs] == [False, False, True]


@given(st.integers(1, 64), st.integers(1, 130))
def test_a_reader_of_block_configs_finds_the_neurons_again(width: int, hidden: int) -> None:
    sizes = replace(GROUPED, depth=1, hidden=hidden * 128, neurons=width * 256)
    (config,) = deci_blocks(wide_plan(sizes, [1], [width * 256]), sizes).block_configs(sizes.hidden)
    rounded = int(2 * config["ffn"]["ffn_mult"] * sizes.hidden / 3)
    assert -(-rounded // 256) * 256 == width * 256


@pytest.mark.parametrize("name", ["llama-grouped-tied", "qwen2"])
def test_blocks_padded_for_gguf_are_exact_and_never_without_neurons(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    plan = gappy_plan(model.architecture)
    found = gguf_arrays(plan, multiple=32)
    assert found.arrays() == {
        "attention.head_count": [0, 4, 2, 0],
        "attention.head_count_kv": [0, 2, 1, 0],
        "feed_forward_length": [64, 32, 32, 64],
    }
    assert gguf_arrays(plan).arrays()["feed_forward_length"] == [256] * 4
    ragged(model, plan, tmp_path, blocks=found.blocks)
    assert relative_error(ragged_logits(tmp_path), reference_logits(model, plan)) < TOLERANCE


def test_a_ragged_checkpoint_with_biases_is_extracted_by_the_command(models: Models, tmp_path: Path) -> None:
    from amoeba_deploy.selection import write_selection

    model = models("llama-grouped-tied")
    for name in ("selection", "checkpoint"):
        (tmp_path / name).mkdir()
    write_selection(tmp_path / "selection", random_selection(model))
    create_checkpoint(str(model.path), tmp_path / "selection", tmp_path / "checkpoint", policy="adaptive", bias=True)
    asked = ("--shape", "3x0.5", "--layout", "ragged", "--dtype", "fp32")
    assert amoeba("extract", tmp_path / "checkpoint", *asked, "-o", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_bias"]
    plan = random_selection(model).plan(model.architecture, Shape(3, Fraction(1, 2), "adaptive"))
    wanted = logits_at_means(model, random_selection(model), plan)
    assert relative_error(ragged_logits(tmp_path / "out"), wanted) < TOLERANCE
    assert DTYPES["fp32"] == ModelFolder(tmp_path / "out").config["dtype"]


def test_a_sliding_window_follows_the_blocks_with_attention(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    settings = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    model = save_random_model(tmp_path / "model", "qwen3", **settings)
    ragged(model, gappy_plan(model.architecture), tmp_path / "ragged")
    loaded: Any = load_torch_model(tmp_path / "ragged")
    assert DynamicCache(config=loaded.config).is_sliding == [False, True]
    assert relative_error(logits_of(loaded, IDS), reference_logits(model, gappy_plan(model.architecture))) < TOLERANCE
    wanted = greedy(loaded, IDS[:, :9], use_cache=False)
    assert torch.equal(greedy(loaded, IDS[:, :9]), wanted)
    assert torch.equal(greedy(loaded, IDS[:, :9], cache_implementation="static"), wanted)
