"""TensorRT-LLM: what can be proven of its folders and checkpoints without a GPU.

Three proofs stand in for running it. Every checkpoint is read back and is the dense folder's, bit for bit. Its forward
pass, from config and rank files alone, rank by rank, gives transformers' logits. And mistakes that writers make are
planted and caught. The writer was held once against NVIDIA ModelOpt 0.47's own: all tensors are equal but for the
embedding, which that splits over GPUs.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from conftest import LLAMA3_ROPE, amoeba, random_selection, save_random_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from amoeba_deploy.architecture import Architecture, Rope
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import EXACT_TOLERANCE, BuildOptions, options_for
from amoeba_deploy.backends.conformance import Conformance
from amoeba_deploy.backends.tensorrt_llm import checkpoint as checkpoints
from amoeba_deploy.backends.tensorrt_llm import engine as engines
from amoeba_deploy.backends.tensorrt_llm.checkpoint import rotary_scaling, write_checkpoint
from amoeba_deploy.backends.tensorrt_llm.fp8 import e4m3
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping, key_value_heads
from amoeba_deploy.backends.tensorrt_llm.reader import RankFiles, require_same
from amoeba_deploy.backends.tensorrt_llm.reference import RankEngine
from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.extraction.folder import copy_model, extract
from amoeba_deploy.extraction.native_layouts import deci_blocks
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.request import Space
from amoeba_deploy.selection import write_selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.tensors import as_float32, from_float32
from amoeba_deploy.verification import compare

TENSORRT = load_backend("tensorrt-llm")
CONTEXT = 64
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "mistral-wide-heads": ("mistral", {"sliding_window": None, "head_dim": 48}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}
SPREADS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2)]
Made = Callable[[str], ModelFolder]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Random models in float16, each made once."""
    root, found = tmp_path_factory.mktemp("tensorrt"), {}

    def get(name: str) -> ModelFolder:
        if name not in found:
            family, changes = MODELS[name]
            plain = save_random_model(root / f"{name}-float32", family, **(SIZES | changes))
            found[name] = in_float16(plain, root / name)
        return found[name]

    return get


def in_float16(model: ModelFolder, folder: Path) -> ModelFolder:
    folder.mkdir()
    copy_model(model, folder, "float16")
    return ModelFolder(folder)


@pytest.fixture(scope="module")
def deci(made: Made, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A ragged subnet as DeciLM takes it: other widths in each block, one without attention, one without neurons."""
    model = made("llama")
    sizes = model.architecture
    blocks = (
        block_plan(sizes, 0, [0, 1], range(192)),
        block_plan(sizes, 1, [1], range(0, 192, 2)),
        block_plan(sizes, 2, [], range(64)),
        block_plan(sizes, 3, [0], []),
    )
    plan = Plan(Shape(4, Fraction(1, 2), "adaptive"), blocks)
    folder = tmp_path_factory.mktemp("deci")
    extract(model, plan, folder, layout="ragged", blocks=deci_blocks(plan, sizes, 64).blocks)
    return ModelFolder(folder)


def options(chip: str | None = None, context: int = CONTEXT, batch: int = 1, **settings: object) -> BuildOptions:
    return options_for(TENSORRT, context, batch, chip, {name: str(value) for name, value in settings.items()})


def written(model: ModelFolder, folder: Path, tp: int = 1, pp: int = 1, precision: str = "fp16") -> Path:
    folder.mkdir(exist_ok=True)
    write_checkpoint(model, folder, precision, Mapping(tp, pp))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def rank_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(load_file(folder / f"rank{rank}.safetensors"))


def error_of(folder: Path, model: ModelFolder) -> float:
    """The largest difference of a checkpoint's logits from transformers', as a share of the largest logit."""
    ids = np.random.default_rng(3).integers(0, model.architecture.vocabulary, (2, 24))
    wanted = load_backend("torch").open(model.path, "fp32").feed(ids)
    return float(np.abs(RankEngine(folder).feed(ids) - wanted).max() / np.abs(wanted).max())


class TestTensorrtLlm(Conformance):
    flow = "tensorrt-llm"


# Ranks and stages


def test_ranks_count_the_places_of_a_stage_first() -> None:
    found = [(rank.number, rank.stage, rank.place, rank.file) for rank in Mapping(2, 3).ranks()]
    assert found[:3] == [(0, 0, 0, "rank0.safetensors"), (1, 0, 1, "rank1.safetensors"), (2, 1, 0, "rank2.safetensors")]
    assert all(number == stage * 2 + place for number, stage, place, _ in found)


@given(st.integers(1, 40), st.integers(1, 9))
def test_stages_have_the_sizes_of_torch_tensor_split(depth: int, pp: int) -> None:
    wanted = torch.tensor_split(torch.arange(depth), pp)
    assert [list(Mapping(1, pp).layers(depth, stage)) for stage in range(pp)] == [part.tolist() for part in wanted]


@given(st.integers(0, 4), st.integers(0, 4))
def test_key_heads_are_shared_out_or_repeated(kv_power: int, tp_power: int) -> None:
    kv_heads, tp = 2**kv_power, 2**tp_power
    repeated = np.repeat(np.arange(kv_heads), max(tp // kv_heads, 1))
    wanted = np.array_split(repeated, tp)
    assert [list(key_value_heads(kv_heads, tp, place)) for place in range(tp)] == [part.tolist() for part in wanted]


# What a writer gets wrong


def test_a_checkpoint_has_exactly_the_names_of_tensorrt_llm(made: Made, tmp_path: Path) -> None:
    block = (
        "input_layernorm.weight",
        "attention.qkv.weight",
        "attention.dense.weight",
        "post_layernorm.weight",
        "mlp.fc.weight",
        "mlp.gate.weight",
        "mlp.proj.weight",
    )
    wanted = {f"transformer.layers.{index}.{name}" for index in range(5) for name in block}
    wanted |= {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert set(rank_of(written(made("llama"), tmp_path / "a"))) == wanted
    biased = set(rank_of(written(made("llama-biases"), tmp_path / "b"))) - wanted
    assert {name.removeprefix("transformer.layers.0.") for name in biased if ".0." in name} == {
        *("attention.qkv.bias", "attention.dense.bias", "mlp.fc.bias", "mlp.gate.bias", "mlp.proj.bias")
    }
    normed = set(rank_of(written(made("qwen3"), tmp_path / "c"))) - wanted
    assert {name.removeprefix("transformer.layers.4.") for name in normed if ".4." in name} == {
        *("attention.q_layernorm.weight", "attention.k_layernorm.weight")
    }


def test_fc_is_gate_proj_and_gate_is_up_proj(made: Made, tmp_path: Path) -> None:
    model, found = made("llama"), rank_of(written(made("llama"), tmp_path / "a"))
    for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj"), ("proj", "down_proj")):
        wanted = model.tensors.raw(f"model.layers.1.mlp.{theirs}.weight")
        assert np.array_equal(found[f"transformer.layers.1.mlp.{ours}.weight"], wanted)


def test_qkv_is_this_ranks_queries_then_keys_then_values(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    q, k, v = (model.tensors.raw(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv")
    folder = written(model, tmp_path / "a", tp=2)
    for place in range(2):
        wanted = np.concatenate([q[64 * place :][:64], k[32 * place :][:32], v[32 * place :][:32]])
        assert np.array_equal(rank_of(folder, place)["transformer.layers.0.attention.qkv.weight"], wanted)


def test_rows_are_split_of_qkv_fc_gate_and_head_and_columns_of_dense_and_proj(made: Made, tmp_path: Path) -> None:
    found = rank_of(written(made("llama"), tmp_path / "a", tp=2), 1)
    shapes = {name.removeprefix("transformer.layers.0."): values.shape for name, values in found.items()}
    assert shapes["attention.qkv.weight"] == (128, 128)
    assert shapes["mlp.fc.weight"] == shapes["mlp.gate.weight"] == (96, 128)
    assert shapes["attention.dense.weight"] == (128, 64)
    assert shapes["mlp.proj.weight"] == (128, 96)
    assert shapes["lm_head.weight"] == (66, 128)
    assert shapes["transformer.vocab_embedding.weight"] == (131, 128), "the embedding is whole on every GPU"


def test_fewer_key_heads_than_gpus_are_repeated(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    k = model.tensors.raw("model.layers.0.self_attn.k_proj.weight")
    folder = written(model, tmp_path / "a", tp=4)
    for place in range(4):
        head = place // 2
        rows = rank_of(folder, place)["transformer.layers.0.attention.qkv.weight"][32:64]
        assert np.array_equal(rows, k[32 * head :][:32])


def test_blocks_are_numbered_within_their_stage_and_ends_lie_on_the_outer_stages(made: Made, tmp_path: Path) -> None:
    model, folder = made("llama"), written(made("llama"), tmp_path / "a", pp=3)
    names = [set(rank_of(folder, rank)) for rank in range(3)]
    counts = [len({name.split(".")[2] for name in found if ".layers." in name}) for found in names]
    assert counts == [2, 2, 1]
    assert ["transformer.vocab_embedding.weight" in found for found in names] == [True, False, False]
    assert ["lm_head.weight" in found for found in names] == [False, False, True]
    assert ["transformer.ln_f.weight" in found for found in names] == [False, False, True]
    last = rank_of(folder, 2)["transformer.layers.0.attention.dense.weight"]
    assert np.array_equal(last, model.tensors.raw("model.layers.4.self_attn.o_proj.weight"))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_head_is_always_written_and_padded_with_zeros(name: str, made: Made, tmp_path: Path) -> None:
    model, folder = made(name), written(made(name), tmp_path / "a", tp=4)
    whole = np.concatenate([rank_of(folder, rank)["lm_head.weight"] for rank in range(4)])
    assert whole.shape == (132, 128)
    source = "model.embed_tokens.weight" if name == "llama-tied" else "lm_head.weight"
    assert np.array_equal(whole[:131], model.tensors.raw(source))
    assert not whole[131:].any()
    assert config_of(folder)["vocab_size"] == 131, "the config states the vocabulary without padding"


def test_biases_of_row_parallel_products_are_whole_on_every_gpu(made: Made, tmp_path: Path) -> None:
    model, folder = made("llama-biases"), written(made("llama-biases"), tmp_path / "a", tp=2)
    for place in range(2):
        found = rank_of(folder, place)
        for ours, theirs in (("attention.dense", "self_attn.o_proj"), ("mlp.proj", "mlp.down_proj")):
            wanted = model.tensors.raw(f"model.layers.0.{theirs}.bias")
            assert np.array_equal(found[f"transformer.layers.0.{ours}.bias"], wanted)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "w8a16", "w4a16"])
def test_the_dtype_of_every_tensor_is_the_configs(precision: str, made: Made, tmp_path: Path) -> None:
    folder = written(made("llama"), tmp_path / "a", precision=precision)
    wanted = {"bf16": "bfloat16"}.get(precision, "float16")
    assert config_of(folder)["dtype"] == wanted
    names = {"float16": "F16", "bfloat16": "BF16"}
    header = json.loads((folder / "rank0.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {names[wanted]}
    assert RankFiles(folder).dtype == names[wanted]


def test_the_config_states_every_key(made: Made, tmp_path: Path) -> None:
    assert config_of(written(made("llama"), tmp_path / "a", tp=2, pp=2, precision="w4a16")) == {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 32,
        "intermediate_size": 192,
        "vocab_size": 131,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "norm_epsilon": 1e-4,
        "max_position_embeddings": 128,
        "rotary_base": 5000.0,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
        "qk_layernorm": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {"quant_algo": "W4A16", "kv_cache_quant_algo": None},
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama-biases", {"architecture": "LlamaForCausalLM", "attn_bias": True, "mlp_bias": True}),
        ("mistral-wide-heads", {"architecture": "MistralForCausalLM", "attn_bias": False, "head_size": 48}),
        ("qwen2", {"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "attn_bias": True, "qk_layernorm": False}),
        ("qwen3", {"architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3", "attn_bias": False, "qk_layernorm": True}),
    ],
)
def test_a_family_is_named_with_its_biases_and_norms(
    name: str, wanted: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    found = config_of(written(made(name), tmp_path / "a"))
    assert {key: found.get(key) for key in wanted} == wanted
    assert ("qwen_type" in found) == ("qwen_type" in wanted)


def test_rotary_scaling_is_null_or_has_its_kind_under_both_names() -> None:
    assert rotary_scaling(Rope()) is None
    settings = tuple(sorted((key, value) for key, value in LLAMA3_ROPE.items() if not key.startswith("rope_")))
    found = rotary_scaling(Rope(50000.0, "llama3", settings))
    assert found == {"type": "llama3", "rope_type": "llama3", **dict(settings)}


@pytest.mark.parametrize("part", ["mapping", "quantization"])
def test_unknown_keys_in_mapping_and_quantization_are_what_tensorrt_llm_raises_at(
    part: str, made: Made, tmp_path: Path
) -> None:
    folder = written(made("llama"), tmp_path / "a")
    assert RankEngine(folder)
    config = config_of(folder)
    config[part]["rank"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f"{part} has the key 'rank'"):
        RankEngine(folder)


# The round trip, and the forward pass


@pytest.mark.parametrize(("tp", "pp"), SPREADS)
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_reads_back_bit_for_bit_and_computes_what_transformers_computes(
    name: str, tp: int, pp: int, made: Made, tmp_path: Path
) -> None:
    model = made(name)
    folder = written(model, tmp_path / "a", tp, pp)
    found = RankFiles(folder).assembled()
    assert set(found) == set(model.tensors.infos) | {"lm_head.weight"}
    for tensor, values in found.items():
        dense = "model.embed_tokens.weight" if tensor not in model.tensors.infos else tensor
        wanted = model.tensors.raw(dense)
        assert values.dtype == wanted.dtype
        assert values.tobytes() == wanted.tobytes(), tensor
    assert require_same(model, folder) == len(found)
    assert error_of(folder, model) < EXACT_TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_blocks_of_different_sizes_are_a_deci_that_computes_what_transformers_computes(
    tp: int, pp: int, deci: ModelFolder, tmp_path: Path
) -> None:
    folder = written(deci, tmp_path / "a", tp, pp)
    config = config_of(folder)
    assert config["architecture"] == "DeciLMForCausalLM"
    assert config["layer_configs"] == [
        {
            "attention": {"impl": "attention", "num_key_value_heads": 2},
            "ffn": {"impl": "mlp", "intermediate_size": 192},
        },
        {
            "attention": {"impl": "attention", "num_key_value_heads": 1},
            "ffn": {"impl": "mlp", "intermediate_size": 128},
        },
        {"attention": {"impl": "no_op", "num_key_value_heads": None}, "ffn": {"impl": "mlp", "intermediate_size": 64}},
        {
            "attention": {"impl": "attention", "num_key_value_heads": 1},
            "ffn": {"impl": "no_op", "intermediate_size": None},
        },
    ]
    assert {block.heads for block in deci.blocks or () if block.heads} == {config["num_attention_heads"]}
    names = [name for rank in range(tp * pp) for name in rank_of(folder, rank)]
    assert any(".ffn.fc." in name for name in names)
    assert not any(".mlp." in name for name in names), "its feed-forward is called ffn"
    found = RankFiles(folder).assembled()
    assert set(found) == set(deci.tensors.infos)
    assert all(values.tobytes() == deci.tensors.raw(name).tobytes() for name, values in found.items())
    assert require_same(deci, folder) == len(found)
    assert error_of(folder, deci) < EXACT_TOLERANCE


def test_a_sublayer_that_a_block_lacks_has_no_norm_either(deci: ModelFolder, tmp_path: Path) -> None:
    names = set(rank_of(written(deci, tmp_path / "a")))
    assert "transformer.layers.2.input_layernorm.weight" not in names
    assert "transformer.layers.2.post_layernorm.weight" in names
    assert "transformer.layers.3.post_layernorm.weight" not in names


def test_a_deci_with_other_query_heads_or_biases_is_refused(made: Made, tmp_path: Path) -> None:
    for name, counts, reason in (
        ("llama", [[0, 1], [1]], "2 and 4 query heads, where DeciLM takes one number"),
        ("llama-biases", [[0, 1], [0, 1]], "neither biases nor norms of query and key"),
    ):
        sizes = made(name).architecture
        blocks = tuple(block_plan(sizes, i, kept, range(64 * (i + 1))) for i, kept in enumerate(counts))
        plan = Plan(Shape(2, Fraction(1, 2), "adaptive"), blocks)
        (tmp_path / name).mkdir()
        extract(made(name), plan, tmp_path / name, layout="ragged")
        with pytest.raises(BadInput, match=reason):
            written(ModelFolder(tmp_path / name), tmp_path / "out")


def test_the_forward_pass_takes_prompts_in_pieces(made: Made, tmp_path: Path) -> None:
    engine = RankEngine(written(made("qwen3"), tmp_path / "a", 2, 2))
    reference = load_backend("torch").open(made("qwen3").path, "fp32")
    result = compare(engine, reference, made("qwen3"), EXACT_TOLERANCE, CONTEXT, steps=4)
    assert result.passed
    assert result.greedy_tokens > 0


def test_weights_beyond_float16_are_refused_by_name(made: Made, tmp_path: Path) -> None:
    wild = tmp_path / "wild"
    wild.mkdir()
    model = made("llama")

    def values(name: str, _: Any) -> Any:
        found = model.tensors.float32(name)
        return found * 1e6 if name == "model.layers.1.mlp.up_proj.weight" else found

    copy_model(model, wild, "float32", values)
    with pytest.raises(BadInput, match=r"layers.1.mlp.gate.weight: holds numbers beyond those of float16"):
        TENSORRT.lower(ModelFolder(wild), tmp_path, "fp16", options(form="B"))
    assert not (tmp_path / "checkpoint").exists()
    TENSORRT.lower(ModelFolder(wild), tmp_path, "bf16", options(form="B"))


# Planted mistakes

Tensors = dict[str, Any]


def _swap_fc_and_gate(ranks: list[Tensors], _: dict[str, Any]) -> None:
    for rank in ranks:
        for name in [name for name in rank if ".mlp.fc." in name]:
            other = name.replace(".fc.", ".gate.")
            rank[name], rank[other] = rank[other], rank[name]


def _heads_off_by_one(ranks: list[Tensors], config: dict[str, Any]) -> None:
    size = config["head_size"]
    for rank in ranks:
        for name in [name for name in rank if "qkv.weight" in name]:
            queries = rank[name][: 2 * size]
            rank[name] = np.concatenate([np.roll(queries, size, axis=0), rank[name][2 * size :]])


def _columns_of_the_other_rank(ranks: list[Tensors], _: dict[str, Any]) -> None:
    for name in [name for name in ranks[0] if "dense.weight" in name]:
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]


def _stage_off_by_one(ranks: list[Tensors], _: dict[str, Any]) -> None:
    """The first stage's last block goes to the front of the second stage."""
    for rank in range(2):
        first, second = ranks[rank], ranks[2 + rank]
        moved = {name: first[name] for name in first if ".layers.0." in name}
        taken = {name: second[name] for name in second if ".layers.0." in name}
        first |= taken
        second |= moved


def _bias_on_each_rank_a_share(ranks: list[Tensors], _: dict[str, Any]) -> None:
    for rank in ranks:
        for name in [name for name in rank if name.endswith(("dense.bias", "proj.bias"))]:
            rank[name] = rank[name] / np.float16(2)


def _keys_and_values_swapped(ranks: list[Tensors], config: dict[str, Any]) -> None:
    size = config["head_size"]
    for rank in ranks:
        for name in [name for name in rank if "qkv.weight" in name]:
            q, k, v = np.split(rank[name], [2 * size, 3 * size])
            rank[name] = np.concatenate([q, v, k])


MISTAKES: dict[str, Callable[[list[Tensors], dict[str, Any]], None]] = {
    "fc and gate swapped": _swap_fc_and_gate,
    "heads off by one": _heads_off_by_one,
    "columns of the other rank": _columns_of_the_other_rank,
    "stage off by one": _stage_off_by_one,
    "a share of the bias on each rank": _bias_on_each_rank_a_share,
    "keys and values swapped": _keys_and_values_swapped,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_in_the_tensors_is_caught_by_both_proofs(mistake: str, made: Made, tmp_path: Path) -> None:
    model = made("llama-biases")
    folder = written(model, tmp_path / "a", 2, 2)
    ranks = [rank_of(folder, rank) for rank in range(4)]
    MISTAKES[mistake](ranks, config_of(folder))
    for number, rank in enumerate(ranks):
        save_file(
            {name: np.ascontiguousarray(values) for name, values in rank.items()}, folder / f"rank{number}.safetensors"
        )
    assert error_of(folder, model) > 100 * EXACT_TOLERANCE
    with pytest.raises(VerificationFailed, match="differs from the dense subnet's"):
        require_same(model, folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rotary_base": 10000.0}),
        ("llama", {"rotary_base": None}),
        ("llama", {"norm_epsilon": None}),
        ("llama", {"hidden_act": None}),
        ("llama", {"position_embedding_type": None}),
        ("llama-3-rope", {"rotary_scaling": None}),
        ("llama-linear-rope", {"rotary_scaling": None}),
        ("llama-biases", {"mlp_bias": None}),
        ("llama-biases", {"attn_bias": None}),
        ("qwen3", {"qk_layernorm": None}),
    ],
)
def test_a_wrong_or_missing_key_of_the_config_is_caught_by_the_forward_pass(
    name: str, change: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    """None takes the key away: TensorRT-LLM's default is then another model's."""
    folder = written(made(name), tmp_path / "a")
    config = {key: value for key, value in (config_of(folder) | change).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    assert error_of(folder, made(name)) > 20 * EXACT_TOLERANCE


@pytest.mark.parametrize(("name", "key"), [("qwen3", "attn_bias"), ("mistral-wide-heads", "head_size")])
def test_a_missing_key_whose_default_calls_for_other_tensors_is_caught(
    name: str, key: str, made: Made, tmp_path: Path
) -> None:
    folder = written(made(name), tmp_path / "a")
    config = config_of(folder)
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"qkv"):
        error_of(folder, made(name))


def test_lowering_compares_what_it_wrote_and_leaves_nothing_wrong_behind(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "key_value_heads", lambda _kv, _tp, _place: range(1))
    with pytest.raises(VerificationFailed, match=r"k_proj.weight' differs from the dense subnet's"):
        TENSORRT.lower(made("llama"), tmp_path, "fp16", options(form="B", tp=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["transformer.layers.1.mlp.fc.weight", "transformer.ln_f.weight"])
def test_a_missing_or_foreign_tensor_is_found(name: str, made: Made, tmp_path: Path) -> None:
    folder = written(made("llama"), tmp_path / "a")
    found = rank_of(folder)
    taken = found.pop(name)
    save_file(found, folder / "rank0.safetensors")
    with pytest.raises(VerificationFailed, match=f"has no tensor '{name}'"):
        require_same(made("llama"), folder)
    save_file(found | {name: taken, "extra": taken}, folder / "rank0.safetensors")
    with pytest.raises(VerificationFailed, match=r"holds 'extra', which its config.json does not call for"):
        require_same(made("llama"), folder)


# What is refused

LEGAL = Architecture(
    family="llama", depth=4, hidden=256, heads=4, kv_heads=4, head_dim=64, neurons=512, vocabulary=512, context=2048,
    tied=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "precision", "asked", "reason"),
    [
        ({"head_dim": 40}, "fp16", {}, "head size 40 is none of 32, 48, 64"),
        ({"family": "granite"}, "fp16", {}, "it is a granite, which tensorrt-llm does not run"),
        ({"rope": Rope(1e4, "yarn")}, "fp16", {}, "rotary scaling 'yarn'"),
        ({"sliding_window": 32}, "fp16", {}, "sliding window of 32 positions is shorter than the context of 64"),
        ({"family": "qwen3", "qk_norm": True, "output_bias": True}, "fp16", {}, "qwen3 with biases on o_proj"),
        ({}, "fp16", {"chip": "adreno-750"}, "TensorRT-LLM runs on NVIDIA GPUs only"),
        ({}, "bf16", {"chip": "sm_75"}, "bf16 needs an NVIDIA GPU of sm_80 or newer, and the device is sm_75"),
        ({}, "fp8", {"chip": "sm_86"}, "fp8 needs an NVIDIA GPU of sm_89 or newer, and the device is sm_86"),
        ({}, "fp8", {"form": "B"}, "needs scales of activations, from calibration; choose form A"),
        ({}, "w4a16", {"form": "A"}, "form A does not quantise weights to w4a16"),
        ({}, "w4a16", {"release": "1.3"}, "release 1.3 has no trtllm-build.*fp16, bf16 or fp8"),
        ({}, "fp16", {"form": "B", "release": "1.3"}, "release 1.3 has no trtllm-build.*--set form=A"),
        ({}, "fp16", {"form": "A", "release": "0.12"}, "release 0.12 loads no Hugging Face folder"),
        ({"family": "qwen3", "qk_norm": True}, "fp16", {"release": "0.12"}, "release 0.12 has no Qwen3"),
        ({}, "fp16", {"pp": 5}, "4 blocks do not fill pp=5 stages"),
        ({"heads": 6, "kv_heads": 6, "hidden": 384}, "fp16", {"tp": 4}, "6 query heads.*tp=4; the nearest.*4 and 8"),
        ({"neurons": 510}, "fp16", {"tp": 4}, "510 neurons do not spread over tp=4; the nearest.* 508 and 512"),
        ({"heads": 6, "kv_heads": 3, "hidden": 384}, "fp16", {"tp": 2}, "3 key/value heads neither divide tp=2"),
        ({"neurons": 576}, "w4a16", {"tp": 2}, "576 neurons are no multiple of 128.*nearest that it takes are 512 and"),
        ({"hidden": 320, "heads": 5, "kv_heads": 5}, "w8a16", {"tp": 5}, "rows of|hidden|neurons"),
        ({"neurons": 520}, "fp8", {"tp": 1}, "520 neurons are no multiple of 16.*takes are 512 and 528"),
        ({}, "bf16", {"chip": "sm_87"}, "TensorRT Edge-LLM has no bf16 on sm_87"),
        ({}, "w8a16", {"chip": "sm_87"}, "TensorRT Edge-LLM has no w8a16"),
        ({}, "fp8", {"chip": "sm_87"}, "TensorRT Edge-LLM has no fp8"),
        ({}, "fp16", {"chip": "sm_87", "form": "B"}, "a Jetson takes neither form A nor B"),
        ({}, "fp16", {"chip": "sm_87", "tp": 2}, "a Jetson has one GPU"),
        ({"head_dim": 32}, "w4a16", {"chip": "sm_87"}, "head size 32 is neither 64 nor 128"),
        ({"neurons": 448}, "w4a16", {"chip": "sm_87"}, "448 neurons are no multiple of 128.*384 and 512"),
        ({"kv_heads": 1}, "w4a16", {"chip": "sm_87"}, "64 channels of key heads.*the nearest that it takes is 128"),
        ({"hidden": 192, "heads": 6, "kv_heads": 6}, "fp16", {"chip": "sm_87"}, "192 hidden channels.*128 and 256"),
        ({"rope": Rope(1e4, "linear", (("factor", 2.0),))}, "fp16", {"chip": "sm_87"}, "linear rotary scaling"),
        ({"mlp_bias": True, "qkv_bias": True, "output_bias": True}, "fp16", {"chip": "sm_87"}, "--bias off"),
        ({"heads": 6, "kv_heads": 6}, "fp16", {"chip": "sm_87", "jetpack": "6.2"}, "0.6 does not know; .*jetpack=7.2"),
    ],
)  # fmt: skip
def test_what_it_would_get_wrong_is_refused_with_the_way(
    change: dict[str, Any], precision: str, asked: dict[str, Any], reason: str
) -> None:
    import re

    refused = TENSORRT.refusal(replace(LEGAL, **change), precision, options(**asked))
    assert refused is not None
    assert re.search(reason, refused), refused


@pytest.mark.parametrize(
    ("change", "precision", "asked"),
    [
        ({}, "fp16", {"tp": 4, "pp": 4}),
        ({}, "fp8", {"chip": "sm_89"}),
        ({}, "bf16", {"chip": "sm_90", "release": "1.3"}),
        ({"kv_heads": 1}, "fp16", {"tp": 4, "form": "B"}),
        ({}, "w4a16", {"tp": 2}),
        ({"sliding_window": 64}, "fp16", {}),
        ({}, "w4a16", {"chip": "sm_87"}),
        ({"heads": 6, "kv_heads": 6}, "w4a16", {"chip": "sm_87"}),
    ],
)
def test_what_it_takes_is_not_refused(change: dict[str, Any], precision: str, asked: dict[str, Any]) -> None:
    assert TENSORRT.refusal(replace(LEGAL, **change), precision, options(**asked)) is None


@pytest.mark.parametrize("name", ["orin-nx", "agx-orin-64", "orin-nano-super"])
def test_every_orin_of_the_catalogue_is_a_jetson(name: str) -> None:
    chip = load_device(name).architecture
    refused = TENSORRT.refusal(LEGAL, "fp8", options(chip=chip))
    assert refused is not None
    assert "TensorRT Edge-LLM" in refused


def test_a_release_or_form_that_there_is_not_is_refused() -> None:
    for name, value in (("release", "2.0"), ("form", "C"), ("tp", "0"), ("jetpack", "5")):
        with pytest.raises(BadInput, match=f"no {name}={value}"):
            options(**{name: value})


# Form A


@pytest.fixture
def dense(tmp_path: Path) -> ModelFolder:
    """A dense subnet of legal sizes, as extraction writes it."""
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "rope_parameters": LLAMA3_ROPE}
    model = save_random_model(tmp_path / "plain", "llama", **sizes)
    folder = tmp_path / "dense"
    folder.mkdir()
    blocks = tuple(block_plan(model.architecture, i, [0, 1], range(512)) for i in range(4))
    extract(model, Plan(Shape(4, Fraction(1)), blocks), folder, dtype="float16")
    return ModelFolder(folder)


def test_form_a_is_the_dense_folder_itself_with_both_rotary_spellings(dense: ModelFolder) -> None:
    before = {file.name: file.read_bytes() for file in dense.path.iterdir()}
    artefact = TENSORRT.lower(dense, dense.path, "fp16", options(tp=2))
    assert artefact.facts["form"] == "A"
    after = {file.name: file.read_bytes() for file in dense.path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"serve.yaml", "bench.yaml"}
    config = config_of(dense.path)
    # transformers 4.57, which TensorRT-LLM 1.2 pins, reads the older keys only, and says nothing where they lack.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "float16"


def test_the_yaml_has_the_arguments_of_the_llm_interface(dense: ModelFolder) -> None:
    TENSORRT.lower(dense, dense.path, "fp16", options(tp=2, pp=2, batch=8, context=2048))
    served, measured = (yaml.safe_load((dense.path / f"{name}.yaml").read_text()) for name in ("serve", "bench"))
    assert served == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "max_batch_size": 8,
        "max_num_tokens": 8192,
        "max_seq_len": 2048,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": True},
        "cuda_graph_config": {"max_batch_size": 8, "enable_padding": True},
    }
    assert measured["kv_cache_config"]["enable_block_reuse"] is False, "a cached prompt has no time to its first token"


@pytest.mark.parametrize(("release", "flag"), [("1.3", "--config"), ("1.2", "--extra_llm_api_options")])
def test_the_steps_of_form_a_are_the_releases_commands(release: str, flag: str, dense: ModelFolder) -> None:
    steps = TENSORRT.lower(dense, dense.path, "fp16", options("sm_90", tp=2, release=release, batch=4)).steps
    lines = [step.to_json()["command"] for step in steps]
    assert lines == [
        "trtllm-bench --model engine --model_path engine prepare-dataset --output requests.json token-norm-dist "
        "--num-requests 64 --input-mean 32 --input-stdev 0 --output-mean 32 --output-stdev 0",
        "trtllm-bench --model engine --model_path engine throughput --dataset requests.json --backend pytorch "
        f"{flag} engine/bench.yaml --max_seq_len 64 --tp 2 --pp 1 --streaming --concurrency 4 "
        "--report_json report.json",
        f"trtllm-serve engine --port 8000 {flag} engine/serve.yaml",
    ]
    assert all(step.needs.startswith(f"2 NVIDIA GPUs of sm_90 and TensorRT-LLM {release}") for step in steps)


def test_a_folder_in_another_dtype_is_not_used_in_place(dense: ModelFolder) -> None:
    with pytest.raises(BadInput, match="its weights are F16, where bf16 takes BF16; extract in bfloat16"):
        TENSORRT.lower(dense, dense.path, "bf16", options())


def test_form_a_elsewhere_is_a_copy_in_its_dtype(dense: ModelFolder, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    TENSORRT.lower(dense, output, "bf16", options())
    copied = ModelFolder(output)
    assert {info.dtype for info in copied.tensors.infos.values()} == {"BF16"}
    assert copied.architecture == dense.architecture


def test_form_a_refuses_blocks_of_different_sizes(deci: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="its blocks differ, which only form B without quantisation holds"):
        TENSORRT.lower(deci, tmp_path, "fp16", options())
    assert list(tmp_path.iterdir()) == []


# FP8


def test_e4m3_rounds_as_torch_does() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].numpy()
    between = np.sort(finite)
    numbers = np.concatenate(
        [finite, (between[1:] + between[:-1]) / 2, np.random.default_rng(0).uniform(-448, 448, 999)]
    )
    wanted = torch.from_numpy(numbers.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(e4m3(numbers.astype(np.float32)), wanted)


def test_fp8_is_a_folder_whose_activations_are_scaled_as_it_runs(dense: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch

    output = tmp_path / "out"
    output.mkdir()
    artefact = TENSORRT.lower(dense, output, "fp8", options("sm_90", tp=2))
    assert artefact.facts["form"] == "A"
    assert json.loads((output / "hf_quant_config.json").read_text())["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    assert config_of(output)["torch_dtype"] == "bfloat16"
    found = load_torch(output / "model.safetensors")
    assert not any("input_scale" in name for name in found), "a scale that no data gave would be invented"
    assert {str(values.dtype) for name, values in found.items() if "norm" in name or "embed" in name} == {
        "torch.bfloat16"
    }
    for name in (name for name in found if name.endswith("_proj.weight")):
        assert found[name].dtype == torch.float8_e4m3fn
        scale = found[f"{name}_scale"]
        assert scale.dtype == torch.float32
        own = torch.from_numpy(dense.tensors.float32(name))
        # Half a step of 3 bits of fraction, relative; of the smallest numbers half of a step of 2^-9.
        assert ((found[name].float() * scale - own).abs() <= own.abs() / 16 + scale * 2**-10).all()
    together = [found[f"model.layers.0.self_attn.{part}_proj.weight_scale"] for part in "qkv"]
    assert len({float(scale) for scale in together}) == 1, "TensorRT-LLM rescales parts of one matrix to one scale"


# Form B: compiling

TOOL = """#!/usr/bin/env python3
import os, sys, signal
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.path.isfile(os.path.join(arguments["--checkpoint_dir"], "config.json"))
engines = arguments["--output_dir"]
os.makedirs(engines)
{body}
"""
ALL = """
for name in ("config.json", "rank0.engine", "rank1.engine"):
    open(os.path.join(engines, name), "w").write(name)
"""


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A stand-in for trtllm-build on the PATH: the real one needs a GPU. What is tested is how it is driven."""
    folder.mkdir()
    file = folder / "trtllm-build"
    file.write_text(TOOL.format(body=body))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr("amoeba_deploy.profiles.machine.own_chips", lambda: ("x86_64", "sm_90"))


def test_the_build_command_states_every_limit() -> None:
    line = " ".join(engines.build_command("c", "e", "bf16", options(context=2048, batch=4)))
    assert line == (
        "trtllm-build --checkpoint_dir c --output_dir e --max_batch_size 4 --max_input_len 2048 --max_seq_len 2048 "
        "--max_num_tokens 8192 --max_beam_width 1 --gemm_plugin bfloat16 --gpt_attention_plugin bfloat16 "
        "--remove_input_padding enable --kv_cache_type paged --logits_dtype float32"
    )
    old = engines.build_command("c", "e", "w8a16", options(release="0.12"))
    assert old[old.index("--paged_kv_cache") :][:2] == ("--paged_kv_cache", "enable")
    assert old[old.index("--gemm_plugin") + 1] == "float16"


def test_without_the_tool_compiling_is_a_step_for_the_device(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    artefact = TENSORRT.lower(made("llama"), tmp_path, "fp16", options("sm_90", form="B", tp=2, pp=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    files = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert files == ["config.json", *(f"rank{rank}.safetensors" for rank in range(4))]
    first = artefact.steps[0].to_json()
    assert first["command"].startswith(
        "trtllm-build --checkpoint_dir engine/checkpoint --output_dir engine/engines --max_batch_size 1 "
    )
    assert first["needs"].startswith("4 NVIDIA GPUs of sm_90 and TensorRT-LLM 1.2")
    assert "--backend tensorrt --engine_dir engine/engines" in artefact.steps[2].to_json()["command"]
    assert "compiled on the device" in artefact.notes[0]
    old = TENSORRT.lower(made("llama"), Path(shutil.copytree(tmp_path / "checkpoint", tmp_path / "b")), "fp16",
                         options(release="0.12"))  # fmt: skip
    assert [step.command[0] for step in old.steps] == ["trtllm-build", "gptManagerBenchmark"]


def test_with_the_tool_and_the_devices_gpu_here_engines_are_compiled(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "bin", monkeypatch, ALL)
    output = tmp_path / "out"
    output.mkdir()
    asked = options("sm_90", form="B", tp=2)
    artefact = TENSORRT.lower(made("llama"), output, "fp16", asked)
    assert sorted(path.name for path in (output / "engines").iterdir()) == [
        "config.json",
        "rank0.engine",
        "rank1.engine",
    ]
    assert not any(step.command[0] == "trtllm-build" for step in artefact.steps)
    assert engines.builds_here("fp16", options(form="B"))
    assert not engines.builds_here("fp16", options("sm_86", form="B")), "the GPU here is another one"
    assert not engines.builds_here("fp16", options("sm_90"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('out of tactics', file=sys.stderr); sys.exit(3)", r"failed with exit code 3: out of tactics"),
        ("sys.exit(3)", r"failed with exit code 3: it said nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by SIGKILL, often for want of memory"),
        ("open(os.path.join(engines, 'config.json'), 'w').write('x')", r"ended well but left no rank0.engine"),
        (ALL + "open(os.path.join(engines, 'rank1.engine'), 'w')", r"ended well but left no rank1.engine"),
    ],
)
def test_a_build_that_fails_is_one_sentence_and_leaves_no_engine(
    body: str, reason: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "bin", monkeypatch, body)
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(AmoebaError, match=f"trtllm-build {reason}.*; build on the device"):
        TENSORRT.lower(made("llama"), output, "fp16", options(form="B", tp=2))
    assert not (output / "engines").exists()


# Jetson


@pytest.mark.parametrize(
    ("jetpack", "lines"),
    [
        (
            "7.2",
            [
                "tensorrt-edgellm-quantize llm --model_dir engine --output_dir quantized --quantization int4_awq",
                "tensorrt-edgellm-export quantized onnx",
                "llm_build --onnxDir onnx/llm --engineDir engines "
                "--maxBatchSize 1 --maxInputLen 64 --maxKVCacheCapacity 64",
            ],
        ),
        (
            "6.2",
            [
                "tensorrt-edgellm-quantize-llm --model_dir engine --output_dir quantized --quantization int4_awq",
                "tensorrt-edgellm-export-llm --model_dir quantized --output_dir onnx",
                "llm_build --onnxDir onnx --engineDir engines "
                "--maxBatchSize 1 --maxInputLen 64 --maxKVCacheCapacity 64",
            ],
        ),
    ],
)  # fmt: skip
def test_a_jetson_gets_the_folder_and_the_steps_of_edge_llm(jetpack: str, lines: list[str], dense: ModelFolder) -> None:
    asked = options("sm_87", jetpack=jetpack)
    artefact = TENSORRT.lower(dense, dense.path, "w4a16", asked)
    assert [step.to_json()["command"] for step in artefact.steps] == lines
    assert artefact.facts == {"form": "edge", "jetpack": jetpack}
    assert ["x86-64" in step.needs for step in artefact.steps] == [True, True, False]
    assert f"JetPack {jetpack}" in artefact.steps[-1].needs
    assert not (dense.path / "serve.yaml").exists()
    assert [step.command[0] for step in TENSORRT.lower(dense, dense.path, "fp16", asked).steps][-1] == "llm_build"
    assert len(TENSORRT.lower(dense, dense.path, "fp16", asked).steps) == 2
    assert TENSORRT.identity("w4a16", asked).to_json()["more"]["jetpack"] == jetpack


def test_a_mistral_on_a_jetson_is_noted(tmp_path: Path) -> None:
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "sliding_window": None}
    model = save_random_model(tmp_path / "plain", "mistral", **sizes)
    (tmp_path / "out").mkdir()
    artefact = TENSORRT.lower(model, tmp_path / "out", "fp16", options("sm_87"))
    assert "does not list Mistral" in artefact.notes[0]


def test_a_default_flow_that_takes_no_shape_of_the_model_is_passed_over(tmp_path: Path) -> None:
    """The model that ships has heads of 32, which no Jetson's engine takes."""
    done = amoeba("export", "--device", "orin-nx", "--latency", "40ms", "-o", tmp_path / "out", "--no-verify", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["flow"], found["precision"]) == ("onnx", "int4")
    assert found["remarks"][0].startswith("passed over tensorrt-llm int4: its head size 32 is neither 64 nor 128")


def test_a_default_flow_that_takes_some_shapes_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}))  # fmt: skip
    done = amoeba("search", "--config", file, "--device", "orin-nx", "--latency", "40ms", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["flow"], found["precision"], found["remarks"]) == ("tensorrt-llm", "w4a16", [])
    space = Space.of_config(file)
    steps = space.steps("tensorrt-llm", "w4a16")
    legal = [
        shape
        for shape in space.shapes(steps)
        if TENSORRT.refusal(space.sized(shape, steps).padded, "w4a16", options("sm_87")) is None
    ]
    assert found["considered"] == len(legal) > 0
    assert len(legal) < len(space.shapes(steps))
    assert all(space.sized(shape, steps).padded.neurons % 128 == 0 for shape in legal)


def test_where_every_preference_refuses_the_model_the_first_reason_is_said(tmp_path: Path) -> None:
    text = (Path(load_device.__code__.co_filename).parent / "devices" / "orin-nx.toml").read_text()
    alone = text[: text.index('[[flows]]\nflow = "onnx"')].replace('"orin-nx"', '"alone"')
    (tmp_path / "alone.toml").write_text(alone)
    done = amoeba("export", "--device", tmp_path / "alone.toml", "--latency", "40ms", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "nothing that 'alone' lists takes this model (tensorrt-llm int4)" in done.stderr
    assert "head size 32" in done.stderr


# Identity, storage, running


def test_the_identity_names_release_form_spread_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options("sm_90", context=2048, batch=4, tp=2, pp=2, form="B")
    found = TENSORRT.identity("fp16", asked).to_json()
    assert (found["chip"], found["batch"], found["context"], found["bound"]) == ("sm_90", 4, 2048, [])
    assert found["more"] == {"form": "B", "release": "1.2", "tp": "2", "pp": "2", "max_num_tokens": "8192"}
    tool(tmp_path / "bin", monkeypatch, ALL)
    monkeypatch.setattr(
        "amoeba_deploy.backends.tensorrt_llm.installed_versions",
        lambda _: ({"tensorrt_llm": "1.2.1", "tensorrt": "10"}, ()),
    )
    assert TENSORRT.identity("fp16", asked).bound == ("tensorrt_llm", "tensorrt"), "a compiled engine is of one version"


def test_neither_the_head_nor_the_embedding_is_quantised() -> None:
    storage = TENSORRT.storage("w4a16")
    assert storage.head_bytes(LEGAL) == LEGAL.vocabulary * LEGAL.hidden * 2 + LEGAL.hidden * 2
    assert storage.embedding_bytes(replace(LEGAL, tied=False)) == LEGAL.vocabulary * LEGAL.hidden * 2
    assert storage.block_bytes(LEGAL) < TENSORRT.storage("fp16").block_bytes(LEGAL) / 3


def test_an_engine_is_not_opened_here_and_it_is_said_where(tmp_path: Path) -> None:
    assert "run on NVIDIA GPUs" in str(TENSORRT.cannot_run("fp16", options()))
    with pytest.raises(ToolchainMissing, match="run the steps of the bundle's manifest on the device"):
        TENSORRT.open(tmp_path, "fp16")


def test_the_dense_weights_are_used_in_place_in_form_a_only() -> None:
    assert TENSORRT.folder_dtype("fp16", options()) == "float16"
    assert TENSORRT.folder_dtype("bf16", options()) == "bfloat16"
    assert TENSORRT.folder_dtype("fp16", options(form="B")) is None
    assert TENSORRT.folder_dtype("fp8", options()) is None
    assert TENSORRT.folder_dtype("w4a16", options()) is None
    assert TENSORRT.folder_dtype("w4a16", options("sm_87")) == "float16"
    assert TENSORRT.weight_dtype("fp16") == "float16"


def test_weights_are_compared_with_the_subnets_only_where_they_are_those(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    assert TENSORRT.reference_folder(model, tmp_path, "bf16", tmp_path) == model.path
    assert TENSORRT.reference_folder(model, tmp_path, "w4a16", tmp_path) is None


def test_the_same_subnet_gives_the_same_bytes(made: Made, dense: ModelFolder, tmp_path: Path) -> None:
    for precision, model, asked in (
        ("bf16", made("qwen2"), options(form="B", tp=2, pp=2)),
        ("fp8", dense, options()),
        ("w4a16", dense, options("sm_87")),
    ):
        folders = [tmp_path / f"{precision}-{i}" for i in range(2)]
        for folder in folders:
            folder.mkdir()
            TENSORRT.lower(model, folder, precision, asked)
        files = [{f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in folders]
        assert files[0] == files[1]
        assert files[0]


def test_a_bfloat16_checkpoint_rounds_once(made: Made, tmp_path: Path) -> None:
    model = made("llama")
    folder = written(model, tmp_path / "a", 2, 1, "bf16")
    name = "model.layers.3.mlp.down_proj.weight"
    wanted = from_float32(as_float32(np.ascontiguousarray(model.tensors.raw(name)), "F16"), "BF16")
    assert np.array_equal(RankFiles(folder).assembled()[name], wanted)
    assert require_same(model, folder) > 0


# From a checkpoint to a bundle


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of a random Llama of legal sizes, whose subnets may have blocks of different widths."""
    root = tmp_path_factory.mktemp("source")
    sizes = SIZES | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    model = save_random_model(root / "model", "llama", **sizes)
    for name in ("selection", "checkpoint"):
        (root / name).mkdir()
    write_selection(root / "selection", random_selection(model))
    return create_checkpoint(str(model.path), root / "selection", root / "checkpoint", policy="adaptive")


def exported(source: Checkpoint, output: Path, *asked: object) -> dict[str, Any]:
    command = ("export", source.path, "--flow", "tensorrt-llm", "--context", 64, "--prompt", 16, "--tokens", 8)
    done = amoeba(*command, "-o", output, "--json", *asked)
    assert done.exit_code == 0, done.stderr
    return {"printed": json.loads(done.stdout), "manifest": json.loads((output / "manifest.json").read_text())}


def test_form_b_is_exported_to_a_bundle_with_steps_and_a_self_test(source: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    spread = ("--set", "form=B", "--set", "tp=2", "--set", "pp=2")
    found = exported(source, output, "--device", "h100-sxm", "--precision", "fp16", "--shape", "4x0.75", *spread)
    manifest = found["manifest"]
    assert found["printed"]["verified"] is manifest["verified"] is None
    assert "NVIDIA GPUs" in found["printed"]["cannot_run"]
    assert manifest["steps"][0]["command"].startswith("trtllm-build --checkpoint_dir engine/checkpoint")
    assert manifest["identity"]["chip"] == "sm_90"
    assert manifest["identity"]["more"]["tp"] == "2"
    assert manifest["engine"]["form"] == "B"
    schema = json.loads((Path(__file__).parent.parent / "docs/schemas/manifest.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    assert manifest["settings"] == {"form": "B", "tp": "2", "pp": "2", "release": "1.2", "jetpack": "7.2"}
    files = set(manifest["files"])
    assert {f"engine/checkpoint/rank{rank}.safetensors" for rank in range(4)} | {
        "config.json",
        "selftest.json",
    } <= files
    assert not any(name.endswith("model.safetensors") for name in files), "the weights are in it once"
    # An adaptive shape's blocks differ, and so it is a DeciLM; what it computes is what the self-test records.
    config = config_of(output / "engine" / "checkpoint")
    assert config["architecture"] == "DeciLMForCausalLM"
    test = json.loads((output / "selftest.json").read_text())
    ids, engine = np.array([test["prompt"]]), RankEngine(output / "engine" / "checkpoint")
    for token, margin in zip(test["tokens"], test["margins"], strict=True):
        chosen = int(engine.feed(ids)[0, -1].argmax())
        if margin < 0.05:  # random weights in float16 may choose otherwise here
            break
        assert chosen == token
        ids = np.array([[token]])
    refused = amoeba("bundle", "verify", output, "--quiet")
    assert refused.exit_code == 6
    assert "compile the checkpoint to engines" in refused.stderr


def test_form_a_pads_blocks_of_different_widths(source: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    found = exported(source, output, "--device", "h100-sxm", "--precision", "bf16", "--shape", "4x0.5")
    config = config_of(output / "engine")
    assert config["model_type"] in ("llama", "mistral")
    assert {info.dtype for info in ModelFolder(output / "engine").tensors.infos.values()} == {"BF16"}
    assert found["manifest"]["steps"][-1]["command"].startswith("trtllm-serve engine")


def test_the_best_shape_for_a_jetson_is_one_that_edge_llm_takes(source: Checkpoint, tmp_path: Path) -> None:
    found = exported(source, tmp_path / "bundle", "--device", "orin-nx", "--precision", "int4", "--latency", "40ms")
    sizes = ModelFolder(tmp_path / "bundle" / "engine").architecture
    assert (sizes.neurons % 128, sizes.heads * 64 % 128, sizes.kv_heads * 64 % 128) == (0, 0, 0)
    assert found["printed"]["precision"] == "w4a16"
    assert [step["command"].split()[0] for step in found["manifest"]["steps"]][-1] == "llm_build"


def test_a_profile_of_it_is_refused_here(source: Checkpoint, tmp_path: Path) -> None:
    done = amoeba(
        "profile", source.path, "--flow", "tensorrt-llm", "--prompt", 16, "--tokens", 8, "-o", tmp_path / "t.json"
    )
    assert done.exit_code != 0
    assert "NVIDIA GPUs" in done.stderr
