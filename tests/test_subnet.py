"""Subnets as users ask for them: for an engine, with compensation or without, from Python, in shards, on the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import amoeba, random_selection, save_random_model
from test_compensation import logits_at_means
from test_families import IDS, TOLERANCE, masked_logits, relative_error, stock_logits

import amoeba_deploy
from amoeba_deploy.backends import takes_of
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.families import compensated, held_by
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Steps, sized
from amoeba_deploy.selection import write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.subnet import Subnet, Wishes, derive_folder

Models = Callable[[str], ModelFolder]
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(models: Models, tmp_path: Path) -> Make:
    """Makes a checkpoint of a random model, given by its name in ``MODELS`` or as it is."""

    def made(model: str | ModelFolder, **choices: Any) -> Checkpoint:
        opened = models(model) if isinstance(model, str) else model
        selection, folder = tmp_path / "made-selection", tmp_path / "made"
        selection.mkdir()
        folder.mkdir()
        write_selection(selection, random_selection(opened))
        return create_checkpoint(str(opened.path), selection, folder, **choices)

    return made


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "qwen2", "mistral", "granite"])
def test_compensation_is_exact_in_the_folder(name: str, policy: Any, make: Make, tmp_path: Path) -> None:
    checkpoint = make(name, bias=True, policy=policy)
    for shape in ("3x0.67", "4x0.4"):
        output = tmp_path / shape
        derive_folder(checkpoint, Wishes(shape), output)
        plan = checkpoint.plan_of(shape)
        wanted = logits_at_means(checkpoint.model, checkpoint.selection, plan)
        assert relative_error(stock_logits(output), wanted) < TOLERANCE
        assert json.loads((output / "subnet.json").read_text())["bias"] == "on"


def test_unused_biases_are_zeros(make: Make, tmp_path: Path) -> None:
    derive_folder(make("mistral"), Wishes("3x0.67", bias=True), tmp_path / "out")
    subnet = ModelFolder(tmp_path / "out")
    assert subnet.config["model_type"] == "llama"
    assert subnet.architecture.qkv_bias and subnet.architecture.mlp_bias
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert not subnet.tensors.float32(f"model.layers.1.{part}.bias").any()
    assert subnet.tensors.float32("model.layers.1.mlp.down_proj.bias").any()


def test_heads_that_do_not_divide_hidden_with_biases_are_a_granite_and_it_is_said(make: Make, tmp_path: Path) -> None:
    model = save_random_model(
        tmp_path / "full", "llama", hidden_size=256, head_dim=32, num_attention_heads=8, num_key_value_heads=8
    )
    checkpoint = make(model, bias=True)
    subnet = Subnet(checkpoint, Wishes("4x0.6"))
    assert subnet.sizes.heads == 5
    assert "written as a Granite" in " ".join(subnet.notes)
    derive_folder(checkpoint, Wishes("4x0.6"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["attention_multiplier"]) == (["GraniteForCausalLM"], 32**-0.5)
    wanted = logits_at_means(model, checkpoint.selection, checkpoint.plan_of("4x0.6"))
    assert relative_error(stock_logits(tmp_path / "out"), wanted) < TOLERANCE
    # An engine without that class gets the nearest number of heads that a Llama takes.
    assert Subnet(checkpoint, Wishes("4x0.6", flow="tensorrt-llm")).sizes.heads == 4
    # A plan by hand cannot be rounded: it is refused before any work, with the choices.
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps(checkpoint.plan_of("4x0.6").to_json()))
    with pytest.raises(BadInput, match=r"no class but a granite.*heads divide the hidden size 256, or --bias off"):
        Subnet(checkpoint, Wishes(str(plan_file), flow="tensorrt-llm", precision="fp16"))
    # llama.cpp runs a Granite.
    assert Subnet(checkpoint, Wishes(str(plan_file), flow="gguf", precision="fp16")).sizes.heads == 5


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_family_without_such_a_class_refuses_compensation(name: str, make: Make, models: Models) -> None:
    with pytest.raises(BadInput, match=r"no stock class holds a qwen3 with biases.*--bias off"):
        compensated(models(name).architecture)
    with pytest.raises(BadInput, match="--bias off"):
        Subnet(make(name), Wishes("3x1", bias=True))


def test_a_windowed_mistral_refuses_compensation(models: Models) -> None:
    with pytest.raises(BadInput, match="sliding window and biases"):
        compensated(replace(models("mistral").architecture, sliding_window=8))


def test_what_compensation_changes_is_measured_and_written(demo: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    lines = (demo.path.parent / "validation.txt").read_text().splitlines()
    text.write_text("\n".join(lines[:200]))
    found = {}
    for bias in ("off", "on"):
        output = tmp_path / bias
        done = amoeba("extract", "--shape", "9x0.7", "--bias", bias, "--quality-text", text, "-o", output)
        assert done.exit_code == 0, done.stderr
        found[bias] = json.loads((output / "subnet.json").read_text())["quality"]
        evaluated = json.loads(amoeba("evaluate", output, "--text", text, "--json").stdout)
        assert evaluated["loss"] == pytest.approx(found[bias]["after"], abs=1e-4)
    # The checkpoint's weights are bfloat16, in which the biases are rounded: three digits.
    assert found["off"]["after_with_bias_on"] == pytest.approx(found["on"]["after"], rel=2e-3)
    assert found["on"]["after_with_bias_off"] == pytest.approx(found["off"]["after"], rel=2e-3)
    assert found["off"]["before"] == found["on"]["before"] < found["off"]["after"]
    assert f"| {found['off']['after_with_bias_on']:.4f} |" in (tmp_path / "off/README.md").read_text()


def test_without_a_text_quality_is_the_checkpoints(demo: Checkpoint, tmp_path: Path) -> None:
    derive_folder(demo, Wishes("9x0.75"), tmp_path / "own")
    assert demo.quality is not None
    quality = json.loads((tmp_path / "own/subnet.json").read_text())["quality"]
    assert quality["after"] == round(demo.quality.loss(Shape.parse("9x0.75"), "fp32").value, 4)
    for name, wishes in (("adaptive", {"policy": "adaptive"}), ("finer", {"multiple": 8}), ("on", {"bias": True})):
        derive_folder(demo, Wishes("9x0.7", **wishes), tmp_path / name)
        assert json.loads((tmp_path / name / "subnet.json").read_text())["quality"] is None


def test_choices_against_the_checkpoints_are_said(demo: Checkpoint, tmp_path: Path) -> None:
    said = amoeba("extract", "--shape", "9x0.7", "--bias", "on", "--policy", "adaptive", "-o", tmp_path / "out").stderr
    assert "made with bias off; this subnet has bias on" in said
    assert "made for the policy uniform; this subnet is adaptive" in said
    assert Subnet(demo, Wishes("9x0.7")).notes == []


def test_a_checkpoint_made_so_is_followed(models: Models, tmp_path: Path) -> None:
    model, selection = models("llama-grouped-tied"), tmp_path / "selection"
    selection.mkdir()
    write_selection(selection, random_selection(model))
    done = amoeba("checkpoint", "create", model.path, "--selection", selection, "-o", tmp_path / "made",
                  "--policy", "adaptive", "--bias", "on")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert amoeba("extract", tmp_path / "made", "--shape", "3x0.5", "-o", tmp_path / "out").exit_code == 0
    facts = json.loads((tmp_path / "out/subnet.json").read_text())
    assert (facts["bias"], facts["shape"]["policy"]) == ("on", "adaptive")


@pytest.mark.parametrize(
    ("flow", "precision", "asked", "groups", "neurons"),
    [
        ("gguf", "", "4x0.6", 8, 512),  # 256 channels are 4 heads, and 8 of 16 is nearest to 9.6
        ("gguf", "q8_0", "4x0.6", 10, 608),
        ("gguf", "fp16", "4x0.6", 10, 608),
        ("mlc-llm", "q4f16_1", "4x0.6", 8, 608),  # heads must divide 1024: 8 or 16, of which 8 is nearer
        ("mlc-llm", "q4f16_1", "4x0.9", 16, 928),
        ("tensorrt-llm", "int4", "4x0.6", 10, 640),
        ("onnx", "int4", "4x0.6", 10, 608),
        ("torch", "bf16", "4x0.6", 10, 608),
    ],
)
def test_shapes_are_rounded_to_what_an_engine_takes(
    flow: str, precision: str, asked: str, groups: int, neurons: int
) -> None:
    sizes = replace(LARGE, depth=4)
    steps = takes_of(flow).steps(sizes, 32, precision)
    found = sized(sizes, Shape.parse(asked), steps)
    assert (found.kv_heads, found.neurons) == (groups, neurons)
    assert takes_of(flow).refusal(found, precision) is None


LARGE = amoeba_deploy.architecture.Architecture(  # type: ignore[attr-defined]
    family="llama", depth=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, neurons=1024, vocabulary=512, context=256,
    tied=True,
)  # fmt: skip


def test_every_legal_number_is_taken_and_all_units_always_are() -> None:
    for flow in ("torch", "onnx", "openvino", "executorch", "gguf", "mlc-llm", "tensorrt-llm"):
        for precision in ("", "fp16", "int4"):
            steps = takes_of(flow).steps(LARGE, 32, precision)
            assert steps.groups[-1] == LARGE.kv_heads
            for groups in steps.groups:
                assert takes_of(flow).refusal(LARGE.subnet(8, groups, 512), precision) is None
            assert sized(LARGE, Shape(8, Fraction(1)), steps) == LARGE


def test_steps_are_the_contracts_where_an_engine_asks_for_nothing() -> None:
    assert takes_of("onnx").steps(LARGE, 32, "fp32") == Steps.of(LARGE, 32)


@pytest.mark.parametrize(
    ("flow", "change", "reason"),
    [
        ("mlc-llm", {"heads": 12, "kv_heads": 12}, "is a mistral|do not divide the hidden size"),
        ("mlc-llm", {"output_bias": True, "mlp_bias": True, "qkv_bias": True}, "mlc-llm does not run"),
        ("tensorrt-llm", {"head_dim": 40}, "head size 40 is none of"),
        ("mlc-llm", {"traits": ("soft-capping",)}, "soft-capping is not something that mlc-llm computes"),
        ("tensorrt-llm", {"family": "granite"}, "is a granite, which tensorrt-llm does not run"),
        ("onnx", {"head_dim": 15}, "odd"),
    ],
)
def test_engines_refuse_in_a_sentence(flow: str, change: dict[str, Any], reason: str) -> None:
    import re

    refused = takes_of(flow).refusal(replace(LARGE, **change), "fp16")
    assert refused is not None
    assert re.search(reason, refused)


def test_extracting_for_an_engine_rounds_and_says_so(demo: Checkpoint, tmp_path: Path) -> None:
    done = amoeba("extract", "--shape", "8x0.7", "--for", "gguf", "--precision", "q4_k_m", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "for gguf blocks keep up to" in done.stderr
    sizes = ModelFolder(tmp_path / "out").architecture
    assert sizes.neurons % 256 == 0
    assert sizes.heads * sizes.head_dim % 256 == 0
    assert json.loads((tmp_path / "out/subnet.json").read_text())["flow"] == "gguf"
    wrong = amoeba("extract", "--shape", "8x0.7", "--for", "guff", "-o", tmp_path / "other")
    assert (wrong.exit_code, "did you mean 'gguf'" in wrong.stderr) == (2, True)
    assert demo.architecture.neurons == 512


def test_python_gives_a_folder_or_a_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    opened = amoeba_deploy.open(checkpoint.path)
    folder = opened.extract("3x0.67", tmp_path / "subnet")
    assert folder == tmp_path / "subnet"
    model = opened.extract("3x0.67")
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits
    assert torch.equal(logits, stock_logits(folder))
    assert relative_error(logits, masked_logits(opened.model, opened.plan_of("3x0.67"))) < TOLERANCE
    half: Any = opened.extract("3x0.67", dtype="bf16", policy="adaptive")
    assert half.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="exists already"):
        opened.extract("2x1", folder)


def test_importing_the_package_is_light() -> None:
    heavy = "import sys, amoeba_deploy; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_subnet_is_made_again_by_its_own_command(demo: Checkpoint, tmp_path: Path) -> None:
    wishes = {"policy": "adaptive", "bias": True, "multiple": 16, "dtype": "fp16"}
    derive_folder(demo, Wishes("7x0.6", **wishes), tmp_path / "first")
    facts = json.loads((tmp_path / "first/subnet.json").read_text())
    words = facts["command"].split()
    assert words[:3] == ["amoeba", "extract", "CHECKPOINT"]
    words = [str(demo.path) if word == "CHECKPOINT" else word for word in words[1:]]
    done = amoeba(*[str(tmp_path / "again") if word == "DIR" else word for word in words])
    assert done.exit_code == 0, done.stderr
    by_plan = amoeba("extract", demo.path, "--shape", tmp_path / "first/subnet.json", "--bias", "on", "--dtype", "fp16",
                     "-o", tmp_path / "by-plan")  # fmt: skip
    assert by_plan.exit_code == 0, by_plan.stderr
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    weights = (tmp_path / "first/model.safetensors").read_bytes()
    assert weights == (tmp_path / "by-plan/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama-grouped-untied", "qwen2"])
def test_shards_hold_what_one_file_holds(name: str, models: Models, tmp_path: Path) -> None:
    model = models(name)
    plan = random_selection(model).plan(model.architecture, Shape.parse("3x0.67"))
    for folder, limit in (("one", 10**9), ("many", 100_000), ("again", 100_000)):
        (tmp_path / folder).mkdir()
        extract(model, plan, tmp_path / folder, shard_bytes=limit)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    one, many = ModelFolder(tmp_path / "one"), ModelFolder(tmp_path / "many")
    assert set(index["weight_map"]) == set(one.tensors.infos)
    assert index["metadata"]["total_size"] == sum(info.length for info in one.tensors.infos.values())
    for tensor in one.tensors.infos:
        assert (one.tensors.raw(tensor) == many.tensors.raw(tensor)).all(), tensor
    for file in (tmp_path / "many").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
        largest = max(info.length for info in many.tensors.infos.values())
        assert file.suffix != ".safetensors" or file.stat().st_size < max(100_000, largest) + 10_000
    assert torch.equal(stock_logits(tmp_path / "one"), stock_logits(tmp_path / "many"))
    # A subnet of a sharded model is that of the model in one file.
    whole = random_selection(many).plan(many.architecture, Shape.parse("2x0.5"))
    for source in ("one", "many"):
        (tmp_path / f"{source}-cut").mkdir()
        extract(ModelFolder(tmp_path / source), whole, tmp_path / f"{source}-cut")
    cuts = [(tmp_path / f"{source}-cut/model.safetensors").read_bytes() for source in ("one", "many")]
    assert cuts[0] == cuts[1]


def test_the_card_has_the_hubs_metadata(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    named = replace(checkpoint, base_name="somebody/some-model")
    (named.model.path / "README.md").write_text("---\nlicense: mit\n---\n# Some model\n")
    derive_folder(named, Wishes("3x0.5"), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == (
        "somebody/some-model",
        "mit",
        "transformers",
    )
    assert {"amoeba", "pruned"} <= set(card.data.tags or [])
    for said in (
        "Removed blocks (counted from 0): 1",
        "amoeba extract CHECKPOINT --shape 3x0.5 -o DIR",
        "Not measured",
    ):
        assert said in card.content
    (named.model.path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    derive_folder(named, Wishes("3x0.5"), tmp_path / "out", force=True)
    assert held_by(named.architecture) == "llama"


def test_what_an_engine_does_not_take_is_refused_whoever_says_it(demo: Checkpoint, tmp_path: Path) -> None:
    plan = demo.plan_of("9x0.7").to_json()
    plan["blocks"][0]["neurons"] = plan["blocks"][0]["neurons"][:101]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadInput, match="keeps 101 neurons, where gguf takes multiples of 32 in q8_0"):
        Subnet(demo, Wishes(str(tmp_path / "plan.json"), flow="gguf", precision="q8_0"))
    with pytest.raises(BadInput, match="neurons, where gguf takes multiples of 256"):
        Subnet(demo, Wishes("9x0.7", flow="gguf", multiple=33))
    with pytest.raises(BadInput, match="'gguf' has no precision 'q4_K_M'; it has"):
        Subnet(demo, Wishes("9x0.7", flow="gguf", precision="q4_K_M"))
    with pytest.raises(BadInput, match="name it with --for"):
        Subnet(demo, Wishes("9x0.7", precision="int4"))
    with pytest.raises(BadInput, match="leave out --policy"):
        Subnet(demo, Wishes(str(tmp_path / "plan.json"), policy="adaptive"))


def test_the_plan_of_another_base_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    derive_folder(checkpoint, Wishes("3x0.67"), tmp_path / "out")
    facts = json.loads((tmp_path / "out/subnet.json").read_text())
    (tmp_path / "subnet.json").write_text(json.dumps(facts | {"base_digest": "sha256:" + "0" * 64}))
    Subnet(checkpoint, Wishes(str(tmp_path / "out/subnet.json")))
    with pytest.raises(BadInput, match="of another base model"):
        Subnet(checkpoint, Wishes(str(tmp_path / "subnet.json")))


def test_adaptive_shapes_are_searched_by_what_their_blocks_really_keep(demo: Checkpoint) -> None:
    from amoeba_deploy.request import Space

    adaptive = replace(demo, policy="adaptive", quality=None)
    space = Space.of_checkpoint(adaptive)
    steps = space.steps("onnx", "int4")
    for shape in space.shapes(steps)[:12]:
        sizes, plan = space.sized(shape, steps), adaptive.plan(shape, steps)
        own = [(len(block.kv_heads), len(block.neurons)) for block in plan.blocks]
        assert [(part.kv_heads, part.neurons) for part in sizes.parts] == own
        assert (sizes.padded.kv_heads, sizes.padded.neurons) == plan.widest
        parts = [demo.architecture.subnet(1, *widths) for widths in own]
        assert sizes.kept == sum(part.block_parameters for part in parts)
        padded = demo.architecture.subnet(shape.depth, *plan.widest)
        assert sizes.built(ragged=False).parts == (padded,)


def test_every_adaptive_shape_of_a_large_model_is_sized_in_moments() -> None:
    import numpy as np

    from amoeba_deploy.selection import BlockScores, DepthChoice, Selection

    rng, sizes = np.random.default_rng(0), replace(LARGE, depth=32, heads=32, kv_heads=32, neurons=11008)
    blocks = tuple(
        BlockScores(*(rng.standard_normal(n).astype(np.float32) for n in (32, 11008, 2048, 11008))) for _ in range(32)
    )
    depths = {depth: DepthChoice(tuple(range(depth)), 1.0) for depth in range(16, 33)}
    selection, steps = Selection("", depths, blocks, {}), Steps.of(sizes)
    counted = [
        selection.parts(sizes, Shape(depth, Fraction(width, 200), "adaptive"), steps)
        for depth in depths
        for width in range(100, 201)
    ]
    assert len(counted) == 17 * 101
    assert len(selection._counts) == 101  # once a width, whatever the depth


def test_numbers_beyond_float16_are_refused_by_the_tensors_name(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "full", "llama")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    changed = ModelFolder(model.path)
    plan = random_selection(changed).plan(changed.architecture, Shape.parse("4x1"))
    with pytest.raises(BadInput, match=r"up_proj.weight: holds numbers beyond those of float16"):
        extract(changed, plan, tmp_path, dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_do_not_depend_on_how_many_tensors_are_made_at_once(dtype: str, make: Make, tmp_path: Path) -> None:
    from amoeba_deploy.extraction.folder import subnet_tensors
    from amoeba_deploy.tensors import CONFIG_DTYPES, write_tensors

    checkpoint = make("llama-grouped-untied", bias=True)
    plan = checkpoint.plan_of("3x0.67")
    for threads in (1, 3):
        sources = subnet_tensors(checkpoint.model, plan, CONFIG_DTYPES[dtype], "uniform", checkpoint.learnt(plan))
        write_tensors(tmp_path / str(threads), sources, threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"policy": "adaptve"}, "policy 'adaptve' is none of"),
        ({"layout": "raged"}, "layout 'raged' is none of"),
        ({"bias": "of"}, "bias 'of' is none of"),
        ({"dtype": "float16"}, "dtype 'float16' is none of None, fp32, fp16, bf16"),
        ({"multiple": 0}, "multiple 0 is no whole number"),
        ({"multiple": "8"}, "multiple '8' is no whole number"),
    ],
)
def test_python_options_are_checked(wishes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        amoeba_deploy.open().extract("8x0.75", tmp_path / "out", **wishes)
    assert not (tmp_path / "out").exists()
    assert len(repr(amoeba_deploy.open())) < 300


def test_quality_beyond_what_was_measured_is_not_guessed(tmp_path: Path) -> None:
    done = amoeba("extract", "--shape", "9x0.3", "-o", tmp_path / "out", "--json", "--quiet")
    assert json.loads(done.stdout)["quality"] is None
    inside = amoeba("extract", "--shape", "9x0.75", "-o", tmp_path / "inside")
    assert "full model 0." in inside.stdout
