"""The authors' released checkpoint: what is derived from it computes what their forward pass does, and nothing else
that calls itself one is believed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import amoeba, save_random_model, sentence
from released import ALPHA, EXPERTS, KEPT, MODULES, RANK, RATIOS, ROUTER, Released, make_released, released_logits
from safetensors.numpy import load_file, save_file
from test_cli_errors import change
from test_families import IDS, relative_error, stock_logits

from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.released.checkpoint import exact_ratio
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import read_header

# Both sides compute in float32; the mixture is merged into the weights on one and runs beside them on the other.
TOLERANCE = 1e-5
KEPT_BLOCKS = {4: [0, 1, 2, 3], 3: [0, 2, 3], 2: [0, 3]}
Models = Callable[[str], ModelFolder]


@pytest.fixture
def model(models: Models) -> ModelFolder:
    return models("llama-multihead")


@pytest.fixture(scope="module")
def made(models: Models) -> Released:
    return make_released(models("llama-multihead"))


@pytest.fixture
def released(made: Released) -> Released:
    """A copy that a test may change."""
    return copy.deepcopy(made)


def imported(released: Released, model: ModelFolder, folder: Path) -> Checkpoint:
    source = released.write(folder / "released")
    result = amoeba("checkpoint", "import", source, "--base", model.path, "-o", folder / "made", "--quiet")
    assert result.exit_code == 0, result.output
    return open_checkpoint(folder / "made")


@pytest.fixture
def checkpoint(released: Released, model: ModelFolder, tmp_path: Path) -> Checkpoint:
    return imported(released, model, tmp_path)


def extracted(checkpoint: Checkpoint, shape: str, folder: Path, *more: str) -> torch.Tensor:
    result = amoeba("extract", checkpoint.path, "--shape", shape, "-o", folder, *more)
    assert result.exit_code == 0, result.output
    return stock_logits(folder)


# What it computes


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("depth", [4, 3, 2])
def test_a_subnet_computes_what_the_authors_forward_pass_does(
    depth: int, ratio: float, checkpoint: Checkpoint, released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    found = extracted(checkpoint, f"{depth}x{ratio:g}", tmp_path / "subnet")
    wanted = released_logits(model, released, KEPT_BLOCKS[depth], ratio, IDS)
    assert relative_error(found, wanted) < TOLERANCE


def test_without_biases_it_is_the_same_with_none_added(
    checkpoint: Checkpoint, released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    found = extracted(checkpoint, "3x0.75", tmp_path / "subnet", "--bias", "off")
    wanted = released_logits(model, released, KEPT_BLOCKS[3], 0.75, IDS, bias=False)
    assert relative_error(found, wanted) < TOLERANCE
    assert relative_error(found, released_logits(model, released, KEPT_BLOCKS[3], 0.75, IDS)) > 0.01
    assert json.loads((tmp_path / "subnet" / "subnet.json").read_text())["bias"] == "off"


def test_bias_off_is_said_where_the_checkpoint_has_it_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = amoeba("extract", checkpoint.path, "--shape", "3x0.75", "-o", tmp_path / "subnet", "--bias", "off")
    assert "made with bias on; this subnet has bias off" in result.stderr


def test_widths_in_another_order_belong_to_the_same_gate_inputs(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    released.config["width_choice"] = " [5/8, 1,0.75 ,7/8]"
    checkpoint = imported(released, model, tmp_path)
    assert checkpoint.adapters is not None
    assert checkpoint.adapters.widths == (1, Fraction(7, 8), Fraction(3, 4), Fraction(5, 8))
    for ratio in RATIOS:
        found = extracted(checkpoint, f"4x{ratio:g}", tmp_path / f"subnet-{ratio}")
        assert relative_error(found, released_logits(model, released, KEPT_BLOCKS[4], ratio, IDS)) < TOLERANCE


def plain_lora(released: Released) -> None:
    """One LoRA as stock PEFT saves it."""
    released.config |= {"use_moe_lora": False}
    tensors = {name: tensor for name, tensor in released.tensors.items() if ".0.weight" in name and ROUTER not in name}
    released.tensors = {name.replace(".0.weight", ".weight"): tensor for name, tensor in tensors.items()}


def test_a_plain_lora_is_merged_too(released: Released, model: ModelFolder, tmp_path: Path) -> None:
    plain_lora(released)
    checkpoint = imported(released, model, tmp_path)
    assert json.loads((checkpoint.path / "amoeba.json").read_text())["adapters"] == "lora"
    found = extracted(checkpoint, "2x0.625", tmp_path / "subnet")
    assert relative_error(found, released_logits(model, released, KEPT_BLOCKS[2], 0.625, IDS)) < TOLERANCE


def test_without_an_adapter_the_base_models_weights_are_cut(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    released.config = {}
    source = released.write(tmp_path / "released")
    result = amoeba("checkpoint", "import", source, "--base", model.path, "-o", tmp_path / "made")
    assert "holds no adapter" in result.stderr
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.adapters is None
    found = extracted(checkpoint, "3x0.875", tmp_path / "subnet")
    assert relative_error(found, released_logits(model, released, KEPT_BLOCKS[3], 0.875, IDS)) < TOLERANCE


def test_biases_of_the_base_model_stay_where_a_sublayer_is_gone(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "base", "llama", num_key_value_heads=6, attention_bias=True, mlp_bias=True)
    released = make_released(model)
    checkpoint = imported(released, model, tmp_path)
    found = extracted(checkpoint, "4x0.625", tmp_path / "subnet")
    assert relative_error(found, released_logits(model, released, KEPT_BLOCKS[4], 0.625, IDS)) < TOLERANCE


# What is kept


def test_a_checkpoint_holds_masks_and_biases_by_width(checkpoint: Checkpoint, released: Released) -> None:
    tensors = load_file(checkpoint.path / "selection.safetensors")
    assert len(tensors) == 4 * 3 * 4
    for block in range(4):
        for ratio in RATIOS[1:]:
            heads, neurons = (tensors[f"blocks.{block}.masks.{ratio:g}.{units}"] for units in ("heads", "neurons"))
            assert (heads.dtype, neurons.dtype) == (np.uint8, np.uint8)
            assert (int(heads.sum()), int(neurons.sum())) == KEPT[ratio][block]
            wanted = released.strategy["bias"][f"{MODULES}.{block}.self_attn.o_proj"][ratio]
            assert (tensors[f"blocks.{block}.bias.{ratio:g}.o_proj"] == wanted.astype(np.float32)).all()
    head = json.loads((checkpoint.path / "amoeba.json").read_text())
    assert (head["policy"], head["bias"], head["multiple"], head["adapters"]) == ("adaptive", "on", 1, "smol")
    assert head["widths"] == list(RATIOS)
    selection = json.loads((checkpoint.path / "selection.json").read_text())
    assert selection["widths"] == list(RATIOS[1:])
    assert selection["depth"]["3"] == {"kept": [0, 2, 3], "metric": 39.0}
    assert selection["depth"]["4"] == {"kept": [0, 1, 2, 3], "metric": None}


def test_adapters_are_the_same_from_a_torch_file(released: Released, model: ModelFolder, tmp_path: Path) -> None:
    for tensor in released.tensors.values():
        tensor.data = tensor.data.bfloat16()
    first = imported(released, model, tmp_path / "safetensors")
    released.binary, released.adapter_folder = True, "."
    second = imported(released, model, tmp_path / "bin")
    files = [(made.path / "smol.safetensors").read_bytes() for made in (first, second)]
    assert files[0] == files[1]
    assert first.adapters is not None
    assert {info.dtype for name, info in first.adapters.infos.items() if "lora" in name} == {"BF16"}


def test_adapters_carry_experts_gate_and_noise(checkpoint: Checkpoint, released: Released) -> None:
    tensors = load_file(checkpoint.path / "smol.safetensors")
    assert tensors["blocks.2.down_proj.lora_a"].shape == (EXPERTS, RANK, 160)
    assert (tensors["blocks.2.down_proj.lora_b"][3] == released.tensors[
        f"{MODULES}.2.mlp.down_proj.lora_B.3.weight"
    ].numpy()).all()  # fmt: skip
    assert tensors["gate.noise.weight"].shape == (EXPERTS, 8)
    assert checkpoint.adapters is not None
    assert (checkpoint.adapters.alpha, checkpoint.adapters.top_k) == (ALPHA, 2)


def test_a_mask_of_the_ratio_1_is_not_needed_and_no_biases_is_bias_off(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    for name, value in released.strategy["width_mask"].items():
        released.strategy["bias"][name] = None
        if value is not None:
            del value[1.0]
            value[np.float32(0.65)] = value.pop(0.625)
    checkpoint = imported(released, model, tmp_path)
    assert checkpoint.widths == (1, Fraction(7, 8), Fraction(3, 4), Fraction(13, 20))
    assert not checkpoint.bias
    extracted(checkpoint, "4x1", tmp_path / "full")
    said = sentence(
        amoeba("extract", checkpoint.path, "--shape", "4x0.65", "--bias", "on", "-o", tmp_path / "subnet", "--quiet"), 2
    )
    assert "without compensating biases" in said


def test_show_says_which_widths_there_are(checkpoint: Checkpoint) -> None:
    said = amoeba("checkpoint", "show", checkpoint.path).stdout
    assert "only the widths 1, 0.875, 0.75, 0.625" in said
    assert "5 experts of rank 4" in said
    value = json.loads(amoeba("checkpoint", "show", checkpoint.path, "--json").stdout)
    assert (value["masked_widths"], value["shapes"]) == (list(RATIOS), 3 * 4)


def test_verify_reads_the_base_model_and_the_adapters(checkpoint: Checkpoint) -> None:
    assert "intact" in amoeba("checkpoint", "verify", checkpoint.path).stdout
    file = checkpoint.path / "smol.safetensors"
    infos, _ = read_header(file)
    with file.open("r+b") as stream:
        stream.seek(infos["blocks.2.up_proj.lora_b"].offset)
        stream.write(np.float32(np.nan).tobytes())
    assert "blocks.2.up_proj.lora_b" in sentence(amoeba("checkpoint", "verify", checkpoint.path), 5)


def test_the_base_model_is_copied_in_if_asked(released: Released, model: ModelFolder, tmp_path: Path) -> None:
    source, output = released.write(tmp_path / "released"), tmp_path / "made"
    command = ("checkpoint", "import", source, "--base", model.path, "-o", output, "--name", "ours", "--include-base")
    value = json.loads(amoeba(*command, "--json").stdout)
    assert (value["name"], value["notes"], (output / "base" / "config.json").is_file()) == ("ours", [], True)
    assert "exists already" in sentence(amoeba(*command), 2)
    assert amoeba(*command, "--force").exit_code == 0


def test_the_same_files_give_the_same_bytes(released: Released, model: ModelFolder, tmp_path: Path) -> None:
    first = imported(released, model, tmp_path / "a")
    second = imported(released, model, tmp_path / "b")
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("key", "ratio"),
    [
        (0.875, "7/8"), (0.65, "13/20"), (0.8, "4/5"), (1, "1"), (1 / 3, "1/3"), (2 / 3, "2/3"),
        (float(np.float32(0.65)), "13/20"), (0.333, "333/1000"), (0.61803, "61803/100000"),
    ],
)  # fmt: skip
def test_a_ratio_written_as_a_float_is_the_one_that_was_meant(key: float, ratio: str) -> None:
    assert exact_ratio(key) == Fraction(ratio)


# What can be derived


def test_only_the_masked_widths_can_be_derived(checkpoint: Checkpoint, tmp_path: Path) -> None:
    command = ("extract", checkpoint.path, "-o", tmp_path / "subnet", "--quiet", "--shape")
    assert "1, 0.875, 0.75, 0.625" in sentence(amoeba(*command, "4x0.8"), 2)
    assert "scores" in sentence(amoeba(*command, "4x0.75", "--policy", "uniform"), 2)
    assert "--multiple" in sentence(amoeba(*command, "4x0.75", "--multiple", 8), 2)
    assert "2 to 4" in sentence(amoeba(*command, "1x0.75"), 2)
    assert not (tmp_path / "subnet").exists()


def test_a_plan_that_it_printed_is_taken_and_another_is_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(amoeba("extract", checkpoint.path, "--shape", "4x0.625", "--plan-only").stdout)
    assert (extracted(checkpoint, str(plan), tmp_path / "a") == extracted(checkpoint, "4x0.625", tmp_path / "b")).all()
    change(plan, lambda value: value["blocks"][0]["neurons"].pop())
    said = sentence(amoeba("extract", checkpoint.path, "--shape", plan, "-o", tmp_path / "c"), 2)
    assert "other units than the checkpoint's masks" in said


def test_a_search_knows_the_sizes_that_extraction_writes(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    for value in released.strategy["width_mask"].values():  # of a block without attention no latency is known
        if value is not None:
            del value[0.625]
    for value in released.strategy["bias"].values():
        if value is not None:
            del value[0.625]
    checkpoint = imported(released, model, tmp_path)
    asked = ("--device", "orin-nx", "--latency", "40ms", "--prompt", 16, "--flow", "torch", "--precision", "fp32")
    value = json.loads(amoeba("search", checkpoint.path, *asked, "--json", "--quiet").stdout)
    assert value["considered"] == 9
    assert {entry["policy"] for entry in value["pareto"]} == {"adaptive"}
    shape = Shape(3, Fraction(3, 4), "adaptive")
    extracted(checkpoint, str(shape), tmp_path / "subnet")
    written = ModelFolder(tmp_path / "subnet").architecture
    known = checkpoint.sized(shape)
    assert (known.depth, known.heads, known.neurons) == (written.depth, written.heads, written.neurons)
    said = sentence(amoeba("profile", checkpoint.path, "--flow", "torch", "--quiet"), 2)
    assert "latency tables hold uniform shapes" in said


def test_a_search_is_refused_where_a_block_lacks_its_attention(checkpoint: Checkpoint) -> None:
    said = sentence(amoeba("search", checkpoint.path, "--device", "orin-nx", "--latency", "40ms"), 2)
    assert "apart" in said


# What is refused when a checkpoint is opened

DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a mask is missing": (lambda t: t.pop("blocks.1.masks.0.75.heads"), "blocks.1.masks.0.75.heads"),
    "a mask is longer": (
        lambda t: t.update({"blocks.0.masks.0.75.neurons": np.ones(161, np.uint8)}),
        "blocks.0.masks.0.75.neurons",
    ),
    "a mask of floats": (lambda t: t.update({"blocks.0.masks.0.75.heads": np.ones(6, np.float32)}), "heads"),
    "a mask with a 2": (lambda t: t["blocks.0.masks.0.75.heads"].fill(2), "other numbers than 0 and 1"),
    "nothing is kept": (
        lambda t: (t["blocks.0.masks.0.75.heads"].fill(0), t["blocks.0.masks.0.75.neurons"].fill(0)),
        "neither heads nor neurons",
    ),
    "a bias is missing": (lambda t: t.pop("blocks.3.bias.0.625.down_proj"), "blocks.3.bias.0.625.down_proj"),
    "a bias is not finite": (lambda t: t["blocks.0.bias.0.75.o_proj"].fill(np.nan), "not finite"),
    "no biases at all": (lambda t: [t.pop(name) for name in list(t) if ".bias." in name], "contradicts"),
    "something else": (lambda t: t.update({"blocks.0.heads": np.ones(6, np.float32)}), "blocks.0.heads"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_masks_are_refused(damage: str, checkpoint: Checkpoint) -> None:
    edit, named = DAMAGED[damage]
    file = checkpoint.path / "selection.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    assert named in sentence(amoeba("checkpoint", "show", checkpoint.path), 2)


@pytest.mark.parametrize("widths", ["all", [1.0, 0.875], [0.75, 0.875], [0.875, 0.875], ["x"], None, [0.875, 0.75]])
def test_widths_that_are_not_those_of_the_masks_are_refused(widths: object, checkpoint: Checkpoint) -> None:
    change(checkpoint.path / "selection.json", lambda value: value.update(widths=widths))
    sentence(amoeba("checkpoint", "show", checkpoint.path), 2)


@pytest.mark.parametrize("entry", [{"policy": "uniform"}, {"widths": [1.0, 0.5]}])
def test_a_head_that_contradicts_the_masks_is_refused(entry: dict[str, Any], checkpoint: Checkpoint) -> None:
    change(checkpoint.path / "amoeba.json", lambda value: value.update(entry))
    assert "contradicts the masks" in sentence(amoeba("checkpoint", "show", checkpoint.path), 2)


# What is refused when it is imported

Q, K, O = (f"{MODULES}.1.self_attn.{name}_proj" for name in "qko")  # noqa: E741
GATE, UP, DOWN = (f"{MODULES}.2.mlp.{name}_proj" for name in ("gate", "up", "down"))


def masks(strategy: dict[str, Any], *names: str) -> list[Any]:
    return [strategy["width_mask"][name][0.75] for name in names]


STRATEGIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an entry is missing": (lambda s: s.pop("metric"), "has the entries"),
    "an entry too many": (lambda s: s.update(extra=1), "'extra'"),
    "an entry is a list": (lambda s: s.update(strategy=[1]), "'strategy' is no dict"),
    "q and k differ": (lambda s: masks(s, K)[0].fill(1), "differ at the ratio 0.75"),
    "gate and up differ": (lambda s: masks(s, UP)[0].fill(1), "differ at the ratio 0.75"),
    "half a head": (
        lambda s: [mask.__setitem__(slice(0, 8), 1 - mask[0]) for mask in masks(s, Q, K, Q.replace("q_", "v_"))],
        "whole heads of 16",
    ),
    "a short mask": (lambda s: s["width_mask"][Q].update({0.75: np.ones(95)}), "the shape [95] where 96"),
    "a matrix as a mask": (lambda s: s["width_mask"][Q].update({0.75: np.ones((1, 96))}), "the shape [1, 96]"),
    "a half in a mask": (lambda s: masks(s, GATE)[0].fill(0.5), "other numbers than 0 and 1"),
    "NaN in a mask": (lambda s: masks(s, GATE)[0].fill(np.nan), "not finite"),
    "text as a mask": (lambda s: s["width_mask"][Q].update({0.75: "1" * 96}), "is a str"),
    "no dict of ratios": (lambda s: s["width_mask"].update({Q: np.ones(96)}), "no dict of ratios"),
    "a module without a mask": (lambda s: s["width_mask"].update({Q: None}), f"lacks '{Q}'"),
    "a missing module": (lambda s: s["width_mask"].pop(GATE), f"lacks '{GATE}'"),
    "a mask on o_proj": (lambda s: s["width_mask"].update({O: {0.75: np.ones(96)}}), f"'{O}'"),
    "a mask of a block too many": (
        lambda s: s["width_mask"].update({f"{MODULES}.4.mlp.up_proj": {0.75: np.ones(160)}}),
        "layers.4.mlp.up_proj",
    ),
    "a bias on q_proj": (lambda s: s["bias"].update({Q: {0.75: np.ones(96)}}), f"'{Q}'"),
    "a missing bias": (lambda s: s["bias"].update({DOWN: None}), f"lacks '{DOWN}'"),
    "a short bias": (lambda s: s["bias"][DOWN].update({0.75: np.ones(95)}), "the shape [95]"),
    "an infinite bias": (lambda s: s["bias"][DOWN][0.75].fill(np.inf), "not finite"),
    "a bias beyond float32": (lambda s: s["bias"][DOWN][0.75].fill(1e300), "too large"),
    "a ratio too many": (lambda s: s["width_mask"][UP].update({0.5: np.ones(160)}), "the ratios"),
    "a ratio too few in a bias": (lambda s: s["bias"][O].pop(0.75), "the ratios"),
    "a ratio above 1": (lambda s: s["width_mask"][Q].update({1.5: np.ones(96)}), "the ratio 1.5"),
    "a ratio of 0": (lambda s: s["width_mask"][Q].update({0.0: np.ones(96)}), "the ratio 0.0"),
    "a tiny ratio": (lambda s: s["width_mask"][Q].update({1e-300: np.ones(96)}), "the ratio 1e-300"),
    "NaN as a ratio": (lambda s: s["width_mask"][Q].update({float("nan"): np.ones(96)}), "the ratio nan"),
    "text as a ratio": (lambda s: s["width_mask"][Q].update({"7/8": np.ones(96)}), "the ratio '7/8'"),
    "a ratio twice": (lambda s: s["width_mask"][Q].update({0.8750000001: np.ones(96)}), "stands twice"),
    "a loss at full width": (
        lambda s: [s["width_mask"][name][1.0].__setitem__(0, 0) for name in (GATE, UP)],
        "at the ratio 1",
    ),
    "a bias at full width": (lambda s: s["bias"][DOWN][1.0].fill(1), "at the ratio 1"),
    "a block that keeps nothing": (
        lambda s: [value[0.75].fill(0) for name, value in s["width_mask"].items() if ".1." in name and value],
        "neither heads nor neurons",
    ),
    "a strategy that removes another number": (lambda s: s["strategy"][2].fill(1), "for 2 removed blocks removes 0"),
    "a strategy of other blocks": (lambda s: s["strategy"].update({1: np.ones(5)}), "the shape [5]"),
    "a strategy of halves": (lambda s: s["strategy"][1].fill(0.75), "other numbers than 0 and 1"),
    "all blocks removed": (lambda s: s["strategy"].update({4: np.zeros(4)}), "has the key 4"),
    "a negative number removed": (lambda s: s["strategy"].update({-1: np.ones(4)}), "has the key -1"),
    "an infinite number removed": (lambda s: s["strategy"].update({float("inf"): np.ones(4)}), "has the key inf"),
    "half a block removed": (lambda s: s["strategy"].update({0.5: np.ones(4)}), "has the key 0.5"),
    "a metric without a strategy": (lambda s: s["metric"].update({3: 1.0}), "a metric for 3"),
    "a metric that is not finite": (lambda s: s["metric"].update({1: float("nan")}), "no finite number"),
    "a metric as text": (lambda s: s["metric"].update({1: "40%"}), "no finite number"),
    "a metric beyond floats": (lambda s: s["metric"].update({1: 10**400}), "no finite number"),
}


def refusal_of(released: Released, model: ModelFolder, folder: Path) -> str:
    """The one sentence of a refused import; nothing is left behind."""
    outputs = folder / "outputs"
    outputs.mkdir()
    source = released.write(folder / "released")
    said = sentence(amoeba("checkpoint", "import", source, "--base", model.path, "-o", outputs / "made", "--quiet"), 2)
    assert list(outputs.iterdir()) == []
    assert len(said) < 400
    return said


@pytest.mark.parametrize("case", STRATEGIES)
def test_a_strategy_that_is_not_the_models_is_refused(
    case: str, released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    edit, named = STRATEGIES[case]
    edit(released.strategy)
    said = refusal_of(released, model, tmp_path)
    assert named in said
    assert "dp_selection_strategy.npy" in said


LORA = f"{MODULES}.1.mlp.up_proj.lora_A.2.weight"
ADAPTERS: dict[str, tuple[Callable[[Released], Any], str]] = {
    "an expert is missing": (lambda r: r.tensors.pop(LORA), LORA),
    "an expert of another rank": (lambda r: r.tensors.update({LORA: torch.ones(RANK + 1, 96)}), LORA),
    "an expert of whole numbers": (lambda r: r.tensors.update({LORA: torch.ones(RANK, 96).int()}), LORA),
    "an expert of another dtype": (lambda r: r.tensors.update({LORA: torch.ones(RANK, 96).half()}), "differ in dtype"),
    "an expert that is not finite": (lambda r: r.tensors[LORA].fill_(float("nan")), "not finite"),
    "an expert too many": (
        lambda r: r.tensors.update({LORA.replace("A.2", "A.5"): torch.ones(RANK, 96)}),
        "lora_A.5",
    ),
    "an embedding": (
        lambda r: r.tensors.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}),
        "embed_tokens",
    ),
    "a gate of other widths": (lambda r: r.config.update(width_choice="[1,7/8]"), "topkroute_linear.0.weight"),
    "no noise": (lambda r: r.tensors.pop(f"{ROUTER}.noise_linear.bias"), "noise_linear.bias"),
    "a gate that is not finite": (
        lambda r: r.tensors[f"{ROUTER}.topkroute_linear.1.bias"].fill_(float("inf")),
        "not finite",
    ),
    "a rank of 0": (lambda r: r.config.update(r=0), "r = 0"),
    "another kind of adapter": (lambda r: r.config.update(peft_type="IA3"), "peft_type"),
    "rslora": (lambda r: r.config.update(use_rslora=True), "use_rslora"),
    "dora": (lambda r: r.config.update(use_dora=True), "use_dora"),
    "something new": (lambda r: r.config.update(use_something=True), "use_something"),
    "modules_to_save": (lambda r: r.config.update(modules_to_save=["lm_head"]), "modules_to_save"),
    "a rank pattern": (lambda r: r.config.update(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "an alpha pattern": (lambda r: r.config.update(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "biases": (lambda r: r.config.update(bias="all"), "bias = 'all'"),
    "an initialisation that changes the base": (lambda r: r.config.update(init_lora_weights="pissa"), "pissa"),
    "an unhashable setting": (lambda r: r.config.update(peft_type={"a": []}), "peft_type"),
    "no alpha": (lambda r: r.config.pop("lora_alpha"), "lora_alpha"),
    "an infinite alpha": (lambda r: r.config.update(lora_alpha=float("inf")), "lora_alpha"),
    "half a rank": (lambda r: r.config.update(r=4.5), "r = 4.5"),
    "billions of experts": (lambda r: r.config.update(num_experts=2_000_000_000), "holds fewer tensors"),
    "more picked than there are": (lambda r: r.config.update(top_k=6), "top_k = 6"),
    "truth in words": (lambda r: r.config.update(use_moe_lora="yes"), "use_moe_lora"),
    "code as widths": (lambda r: r.config.update(width_choice="[__import__('os').getcwd()]"), "width_choice"),
    "an endless exponent as a width": (lambda r: r.config.update(width_choice="[1e999999999]"), "width_choice"),
    "a division by zero": (lambda r: r.config.update(width_choice="[1,1/0]"), "width_choice"),
    "a width twice": (lambda r: r.config.update(width_choice="[1,3/4,0.75,5/8]"), "twice"),
    "a width above 1": (lambda r: r.config.update(width_choice="[2,1,3/4,5/8]"), "width_choice"),
    "widths as a list": (lambda r: r.config.update(width_choice=[1, 0.5]), "width_choice"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_is_not_known_is_refused(
    case: str, released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    edit, named = ADAPTERS[case]
    edit(released)
    assert named in refusal_of(released, model, tmp_path)


def test_a_pickle_in_place_of_the_adapters_tensors_is_not_run(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    import os

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    released.binary = True
    released.tensors["evil"] = Evil()  # type: ignore[assignment]
    assert "torch does not read it" in refusal_of(released, model, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_half_an_adapter_is_refused(name: str, released: Released, model: ModelFolder, tmp_path: Path) -> None:
    source = released.write(tmp_path / "released")
    (source / "adapter_model" / name).unlink()
    said = sentence(amoeba("checkpoint", "import", source, "--base", model.path, "-o", tmp_path / "made"), 2)
    assert name in said


def test_a_base_model_with_grouped_queries_is_refused(released: Released, models: Models, tmp_path: Path) -> None:
    assert "multi-head" in refusal_of(released, models("llama-grouped-tied"), tmp_path)


def test_widths_that_were_masked_or_tuned_alone_are_said(
    released: Released, model: ModelFolder, tmp_path: Path
) -> None:
    for entry in ("width_mask", "bias"):
        for value in released.strategy[entry].values():
            if value is not None:
                value[0.5] = value.pop(0.625)
    source = released.write(tmp_path / "released")
    result = amoeba("checkpoint", "import", source, "--base", model.path, "-o", tmp_path / "made")
    assert "widths 0.5 were not tuned" in result.stderr
    assert "widths 0.625 were tuned and have no masks" in result.stderr
