"""TensorRT-LLM's checkpoints: what can be proven of them without a GPU.

Three proofs stand in for running it. Every checkpoint is read back and is the dense folder's, bit for bit. Its forward
pass, from config and rank files alone, rank by rank, gives transformers' logits. And mistakes that writers make are
planted and caught. The writer was held once against NVIDIA ModelOpt 0.47's own: all tensors are equal but for the
embedding, which that splits over GPUs.
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
from conftest import LLAMA3_ROPE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tensorrt_models import (  # noqa: F401
    CONTEXT,
    MODELS,
    SPREADS,
    TENSORRT,
    Made,
    config_of,
    deci,
    error_of,
    made,
    options,
    rank_of,
    written,
)

from amoeba_deploy.architecture import Rope
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import EXACT_TOLERANCE
from amoeba_deploy.backends.tensorrt_llm import checkpoint as checkpoints
from amoeba_deploy.backends.tensorrt_llm.checkpoint import rotary_scaling
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping, key_value_heads
from amoeba_deploy.backends.tensorrt_llm.reader import RankFiles, require_same
from amoeba_deploy.backends.tensorrt_llm.reference import RankEngine
from amoeba_deploy.errors import BadInput, VerificationFailed
from amoeba_deploy.extraction.folder import copy_model, extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import compare

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
