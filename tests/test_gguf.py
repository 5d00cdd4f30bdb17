"""The GGUF backend: llama.cpp computes what transformers does, and says what it really stored."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import GEMMA, GRANITE_SCALES, LLAMA3_ROPE, MODELS, PHI3_LONG_ROPE, amoeba, save_random_model

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Artefact, options_for
from amoeba_deploy.backends.conformance import Conformance, fed, random_llama
from amoeba_deploy.backends.gguf import arches, quantiser
from amoeba_deploy.backends.gguf.file import GgufFile
from amoeba_deploy.backends.gguf.weights import Held, held_tensors
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.extraction.folder import NOTHING, Learnt, extract
from amoeba_deploy.generation import Timings, chosen_tokens, greedy
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import Verification, allowed_weight_error, verify_artefact

pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

GGUF = load_backend("gguf")
CONTEXT = 64
OPTIONS = options_for(GGUF, CONTEXT)
Models = Callable[[str], ModelFolder]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
    "beta_fast": 8,
}
LONG_PARTIAL = PHI3_LONG_ROPE | {
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
}
OWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2-untied": ("olmo2", {"tie_word_embeddings": False}),
    "smollm3-stock": ("smollm3", {}),
    "smollm3-rotating": ("smollm3", {"no_rope_layers": [1] * 4, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "phi3-half": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "phi3-long-partial": (
        "phi3",
        {
            "rope_parameters": LONG_PARTIAL,
            "original_max_position_embeddings": CONTEXT,
            "partial_rotary_factor": 0.75,
            "sliding_window": None,
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "attention_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen3-linear": ("qwen3", {"rope_parameters": LINEAR}),
    "granite-wide": ("granite", GRANITE_SCALES | {"num_attention_heads": 5, "num_key_value_heads": 5}),
    "gemma3-pattern": ("gemma3_text", GEMMA | {"final_logit_softcapping": 5.0, "sliding_window_pattern": 2}),
}
EXACT = {
    "llama-grouped-tied": "llama",
    "llama-grouped-untied": "llama",
    "llama-biases": "llama",
    "llama-3-rope": "llama",
    "llama-small-heads": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "qwen3",
    "granite-biases": "granite",
    "granite-wide": "granite",
    "phi3": "llama",
    "phi3-half": "llama",
    "phi3-long-partial": "llama",
    "smollm3-stock": "smollm3",
    "smollm3-rotating": "llama",
    "olmo2-untied": "olmo2",
    "llama-yarn": "llama",
    "llama-linear": "llama",
    "qwen3-linear": "qwen3",
}
"""Models that llama.cpp computes exactly, and its architecture for each."""
REFUSED = {
    "gemma3-capped": "biases on o_proj or the feed-forward are not something that llama.cpp's 'gemma3' adds",
    "phi3-partial": "sliding window of 16 positions is shorter than the context of 64",
    "phi3-long": "'longrope' changes with the length of the text beyond 22 positions",
    "smollm3": "rotary scaling 'llama3' is not something that llama.cpp's 'smollm3' computes",
    "smollm3-biases": "biases on o_proj or the feed-forward are not something that llama.cpp's 'smollm3' adds",
    "olmo2": "output head is the embedding, which llama.cpp's 'olmo2' does not take",
    "olmo2-biases": "biases on o_proj or the feed-forward are not something that llama.cpp's 'olmo2' adds",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's threads wait by spinning, which on a busy machine takes a hundred times as long."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def any_model(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Models of conftest and of this file, by name."""
    root, made = tmp_path_factory.mktemp("gguf-models"), {}

    def get(name: str) -> ModelFolder:
        if name not in OWN_MODELS:
            return models(name)
        if name not in made:
            family, changes = OWN_MODELS[name]
            made[name] = save_random_model(root / name, family, **changes)
        return made[name]

    return get


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model whose rows all are multiples of 256."""
    changes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return random_llama(tmp_path_factory.mktemp("wide") / "model", **changes)


def lowered(model: ModelFolder, folder: Path, precision: str = "fp32", context: int = CONTEXT) -> Artefact:
    folder.mkdir(exist_ok=True)
    return GGUF.lower(model, folder, precision, options_for(GGUF, context))


def verified(model: ModelFolder, folder: Path, precision: str = "fp32") -> tuple[Artefact, Verification]:
    artefact = lowered(model, folder, precision)
    return artefact, verify_artefact(GGUF, model, folder, precision, OPTIONS)


class TestGguf(Conformance):
    flow = "gguf"
    run_precisions = ("fp32", "fp16", "q8_0", "q4_k_m")
    architecture_changes: ClassVar[dict[str, Any]] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }


@pytest.mark.parametrize("name", EXACT)
def test_every_family_that_llama_cpp_computes_is_exact_in_fp32(name: str, any_model: Models, tmp_path: Path) -> None:
    artefact, result = verified(any_model(name), tmp_path / "engine")
    assert result.passed
    assert artefact.facts["architecture"] == EXACT[name]
    assert set(artefact.facts["tensor_types"]) == {"F32"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_get_wrong_is_refused_before_anything_is_written(
    name: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=REFUSED[name]):
        lowered(models(name), tmp_path, "fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma2", "gemma2-uncapped", "gemma3", "gemma3-pattern"])
def test_gemma_is_refused_in_fp32_and_near_in_fp16(name: str, any_model: Models, tmp_path: Path) -> None:
    """llama.cpp reads GELU from a table of 16-bit numbers; windows, caps, scales and rotary bases must be right."""
    with pytest.raises(BadInput, match="table of 16-bit numbers on CPUs, so that fp32 would not be exact; choose fp16"):
        lowered(any_model(name), tmp_path / "engine")
    _, result = verified(any_model(name), tmp_path / "engine", "fp16")
    assert result.passed
    assert result.exact_logit_error is None
    assert result.max_logit_error < 0.5 * result.tolerance


@pytest.mark.parametrize("precision", ["q4_0", "bf16"])
@pytest.mark.parametrize("name", ["llama-grouped-untied", "qwen2", "qwen3", "granite", "phi3-long-partial"])
def test_quantised_files_compute_with_just_the_weights_that_they_hold(
    name: str, precision: str, any_model: Models, tmp_path: Path
) -> None:
    _, result = verified(any_model(name), tmp_path / "engine", precision)
    assert result.passed
    assert result.exact_logit_error is not None
    assert result.weight_error is not None
    assert 0 < result.weight_error < 0.8 * allowed_weight_error(GGUF, precision)


def test_rows_of_a_multiple_of_256_get_the_types_that_were_asked_for(wide: ModelFolder, tmp_path: Path) -> None:
    for precision, kinds in quantiser.PLANNED.items():
        artefact, result = verified(wide, tmp_path / precision, precision)
        assert artefact.notes == ("the model's folder has no tokenizer.json, so the file holds no tokenizer and is fed "
                                  "token ids",)  # fmt: skip
        assert set(artefact.facts["tensor_types"]) <= set(kinds)
        assert result.passed
        # Mixtures of as few layers as here hold more in the wider type.
        assert artefact.facts["bits_per_weight"] < GGUF.storage(precision).matrix_bits + 0.6


def test_the_silent_fallback_to_wider_types_is_reported_by_name(models: Models, tmp_path: Path) -> None:
    artefact = lowered(models("llama-grouped-tied"), tmp_path / "engine", "q4_k_m")
    assert artefact.facts["tensor_types"] == {"Q5_0": 24, "Q8_0": 5}
    assert artefact.facts["bits_per_weight"] > 6
    said = " ".join(artefact.notes)
    assert "24 of 29 matrices are in Q5_0 instead of Q4_K or Q6_K" in said
    assert "rows of 96 or 160 are no multiple of 256: attn_k, attn_output, attn_q" in said
    stored = GgufFile(tmp_path / "engine" / "model-q4_k_m.gguf")
    assert stored.types() == artefact.facts["tensor_types"]
    odd = save_random_model(tmp_path / "odd", "llama", intermediate_size=172)
    (note,) = (n for n in lowered(odd, tmp_path / "odd-engine", "q8_0").notes if "F16" in n)
    assert note.endswith("rows of 172 are no multiple of 32: ffn_down")


def test_the_bits_of_a_mixture_are_those_that_estimates_count_with(tmp_path: Path) -> None:
    changes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 16}
    model = random_llama(tmp_path / "model", **changes, intermediate_size=768)
    for precision in ("q4_k_m", "q5_k_m"):
        lowered(model, tmp_path / precision, precision)
        stored = GgufFile(tmp_path / precision / f"model-{precision}.gguf")
        blocks = [t for name, t in stored.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
        bits = 8 * sum(t.data.nbytes for t in blocks) / sum(np.prod(t.shape) for t in blocks)
        assert bits == pytest.approx(GGUF.storage(precision).matrix_bits, abs=0.02)
        assert stored.tensors["output.weight"].kind == "Q6_K"
        assert GGUF.storage(precision).head_bits == 6.5625


def test_the_quantiser_gives_the_same_bytes_on_any_number_of_threads(wide: ModelFolder, tmp_path: Path) -> None:
    lowered(wide, tmp_path / "float")
    digests = set()
    for threads in (1, 2, 3):
        quantiser.quantise(tmp_path / "float" / "model-fp32.gguf", tmp_path / "out.gguf", "q4_k_m", threads)
        digests.add(hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def gappy_plan(model: ModelFolder) -> Plan:
    """Four blocks: without attention, of two widths, and one without feed-forward; 6 query heads on 3 groups."""
    sizes = model.architecture
    blocks = (
        block_plan(sizes, 0, [], range(100)),
        block_plan(sizes, 1, [0, 2], range(0, 160, 2)),
        block_plan(sizes, 2, [1], []),
        block_plan(sizes, 3, [], range(60)),
    )
    return Plan(Shape(4, Fraction(1, 2), "adaptive"), blocks)


def random_biases(model: ModelFolder) -> Learnt:
    rng = np.random.default_rng(1)
    hidden = model.architecture.hidden
    made = [rng.standard_normal((2, hidden)).astype(np.float32) for _ in range(4)]
    return Learnt(biases=lambda block: (made[block.index][0], made[block.index][1]))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", ["llama-grouped-tied", "llama-biases", "llama-3-rope", "qwen2", "phi3", "qwen3"])
def test_a_ragged_subnet_computes_what_transformers_computes(
    name: str, compensated: bool, models: Models, tmp_path: Path
) -> None:
    """Attention is missing in the first block, from which llama.cpp's deci takes whether there is any."""
    model = models(name)
    plan = gappy_plan(model)
    blocks = GGUF.block_sizes(plan, model.architecture, 32)
    assert blocks is not None
    assert min(block.neurons for block in blocks) >= 32
    learnt = random_biases(model) if compensated else NOTHING
    (tmp_path / "dense").mkdir()
    extract(model, plan, tmp_path / "dense", layout="ragged", blocks=blocks, learnt=learnt)
    subnet = ModelFolder(tmp_path / "dense")
    if name == "qwen3" and compensated:
        with pytest.raises(BadInput, match=r"biases on o_proj and down_proj.*'qwen3' adds; choose --bias off"):
            lowered(subnet, tmp_path / "engine")
        return
    artefact, result = verified(subnet, tmp_path / "engine")
    assert result.passed
    assert artefact.facts["architecture"] == ("qwen3" if name == "qwen3" else "deci")
    ids = np.random.default_rng(3).integers(0, 128, (1, 40))
    wanted = fed(load_backend("torch").open(subnet.path, "fp32"), ids, 40)
    engine = GGUF.open(tmp_path / "engine", "fp32")
    for first in (40, 13, 1):
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_no_block_of_a_ragged_file_is_without_neurons_and_arrays_say_each_size(models: Models, tmp_path: Path) -> None:
    model = models("llama-grouped-tied")
    plan = gappy_plan(model)
    blocks = GGUF.block_sizes(plan, model.architecture, 32)
    (tmp_path / "dense").mkdir()
    extract(model, plan, tmp_path / "dense", layout="ragged", blocks=blocks)
    lowered(ModelFolder(tmp_path / "dense"), tmp_path / "engine")
    fields = gguf.GGUFReader(tmp_path / "engine" / "model-fp32.gguf").fields
    assert fields["deci.attention.head_count"].contents() == [1, 4, 2, 0]
    assert fields["deci.attention.head_count_kv"].contents() == [1, 2, 1, 0]
    assert fields["deci.feed_forward_length"].contents() == [128, 96, 32, 64]
    for key in ("key_length", "value_length"):
        assert fields[f"deci.attention.{key}"].contents() == model.architecture.head_dim


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama-grouped-tied", "its block 2 has no neurons, for which llama.cpp leaves out its attention too"),
        ("granite", "blocks differ, and llama.cpp's 'deci', which takes such, does not compute a granite"),
    ],
)
def test_a_ragged_folder_that_is_not_padded_for_llama_cpp_is_refused(
    name: str, said: str, models: Models, tmp_path: Path
) -> None:
    model = models(name)
    plan = gappy_plan(model)
    if name == "granite":
        blocks = (replace(plan.blocks[2], neurons=tuple(range(40))), *plan.blocks[1:2])
        plan = Plan(Shape(2, Fraction(1, 2), "adaptive"), (replace(blocks[0], index=0), replace(blocks[1], index=1)))
    (tmp_path / "dense").mkdir()
    (tmp_path / "engine").mkdir()
    extract(model, plan, tmp_path / "dense", layout="ragged")
    with pytest.raises(BadInput, match=said):
        lowered(ModelFolder(tmp_path / "dense"), tmp_path / "engine")
    assert list((tmp_path / "engine").iterdir()) == []


def test_rows_of_different_lengths_and_several_sequences_agree_with_transformers(
    models: Models, tmp_path: Path
) -> None:
    model = models("llama-grouped-tied")
    lowered(model, tmp_path / "engine")
    engine = GGUF.open(tmp_path / "engine", "fp32", batch=3)
    reference = load_backend("torch").open(model.path, "fp32")
    ids = np.random.default_rng(3).integers(0, 128, (3, 30))
    wanted = fed(reference, ids, 30)
    limit = 1e-5 * np.abs(wanted).max()
    for first in (30, 11, 1):
        assert np.abs(fed(engine, ids, first) - wanted).max() < limit
    engine.reset()
    lengths = np.array([12, 5, 20])
    found = engine.feed(ids[:, :20], lengths)
    for row, length in enumerate(lengths):
        assert np.abs(found[row, :length] - wanted[row, :length]).max() < limit
    following = np.stack([ids[row, length : length + 1] for row, length in enumerate(lengths)])
    found = engine.feed(following)
    for row, length in enumerate(lengths):
        assert np.abs(found[row, 0] - wanted[row, length]).max() < limit


def test_a_prompt_longer_than_one_batch_is_fed_in_pieces(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "llama", max_position_embeddings=1024, num_hidden_layers=1)
    lowered(model, tmp_path / "engine", context=1024)
    ids = np.random.default_rng(3).integers(0, 128, (1, 700))
    wanted = fed(load_backend("torch").open(model.path, "fp32"), ids, 700)
    assert np.abs(fed(GGUF.open(tmp_path / "engine", "fp32"), ids, 700) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_what_the_engine_was_not_opened_for_is_refused(models: Models, tmp_path: Path) -> None:
    lowered(models("llama-grouped-tied"), tmp_path)
    engine = GGUF.open(tmp_path, "fp32")
    with pytest.raises(BadInput, match="opened for 64 positions, and 65 are fed"):
        engine.feed(np.zeros((1, 65), np.int64))
    with pytest.raises(BadInput, match="opened for 1 sequences at once, and 2 are fed"):
        engine.feed(np.zeros((2, 1), np.int64))
    with pytest.raises(BadInput, match="ids 0 to 127 only"):
        engine.feed(np.array([[128]]))
    assert engine.feed(np.zeros((1, 64), np.int64)).shape == (1, 64, 128)


def test_nothing_is_printed(models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lowered(models("llama-grouped-tied"), tmp_path, "q4_k_m")
    engine = GGUF.open(tmp_path, "q4_k_m")
    engine.feed(np.array([[1, 2, 3]]))
    del engine
    assert capfd.readouterr() == ("", "")


PLANTED: dict[str, Callable[[Held], Held]] = {
    "rows in transformers' own order": lambda held: replace(held, order=None),
    "queries off by two percent": lambda held: replace(held, scale=1.02) if "attn_q." in held.name else held,
    "norms off by a tenth": lambda held: replace(held, plus=0.1) if "ffn_norm" in held.name else held,
}


@pytest.mark.parametrize("precision", ["fp32", "q8_0"])
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_in_what_the_file_holds_is_caught(
    mistake: str, precision: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("qwen2")

    def spoilt(*arguments: Any) -> list[Held]:
        return [PLANTED[mistake](held) for held in held_tensors(*arguments)]

    with monkeypatch.context() as patched:
        patched.setattr("amoeba_deploy.backends.gguf.held_tensors", spoilt)
        lowered(model, tmp_path, precision)
    with pytest.raises(VerificationFailed, match="is wrong"):
        verify_artefact(GGUF, model, tmp_path, precision, OPTIONS)


def test_what_is_held_can_be_undone(any_model: Models) -> None:
    model = any_model("phi3-long-partial")
    for held in held_tensors(model):
        if held.source is None:
            continue
        own = model.tensors.float32(held.source)[held.first : held.first + held.shape[0]]
        made = np.concatenate(list(held.parts(model)))
        assert made.shape == held.shape
        np.testing.assert_allclose(held.undone(made), own, rtol=1e-6)


def test_a_smollm3_whose_pattern_llama_cpp_does_not_know_is_refused_by_its_blocks(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "smollm3", no_rope_layers=[1, 0, 1, 1])
    (tmp_path / "engine").mkdir()
    with pytest.raises(
        BadInput, match=r"without rotary positions are 1, where llama.cpp's 'smollm3' takes every fourth"
    ):
        lowered(model, tmp_path / "engine")
    assert list((tmp_path / "engine").iterdir()) == []


def test_gemma_scales_scores_by_the_number_of_blocks_and_that_is_made_up_for(models: Models) -> None:
    sizes = models("gemma2").architecture
    assert arches.adjustments(sizes)[0] == pytest.approx((16 / 24) ** 0.5)
    sizes = replace(sizes, depth=46, heads=2, kv_heads=1)
    assert arches.adjustments(sizes)[0] == pytest.approx((48 / 24) ** 0.5)


def test_a_sliding_window_within_the_context_is_exact(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "mistral", sliding_window=32)
    assert "sliding window of 32" in str(GGUF.refusal(model.architecture, "fp32", OPTIONS))
    lowered(model, tmp_path / "engine", context=32)
    ids = np.random.default_rng(3).integers(0, 128, (1, 32))
    wanted = fed(load_backend("torch").open(model.path, "fp32"), ids, 32)
    assert np.abs(fed(GGUF.open(tmp_path / "engine", "fp32"), ids, 20) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_quantiser_that_is_killed_or_fails_leaves_one_sentence_and_no_file(
    wide: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {
        "import os; os.kill(os.getpid(), 9)": "was killed by signal 9; see whether memory was short",
        "import sys; sys.exit('quantiser: no such thing')": r"failed \(no such thing\)",
    }
    for script, said in scripts.items():
        monkeypatch.setattr(quantiser, "_SCRIPT", script)
        with pytest.raises(AmoebaError, match=f"llama.cpp's quantiser {said}"):
            lowered(wide, tmp_path, "q4_k_m")
        assert list(tmp_path.iterdir()) == []


def test_the_quantisers_own_words_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"nothing")
    with pytest.raises(AmoebaError, match=r"quantiser failed .*failed to"):
        quantiser.quantise(tmp_path / "not.gguf", tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 300 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("precision", ["fp32", "q8_0"])
def test_a_full_disk_leaves_one_sentence_and_no_file(precision: str, wide: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(AmoebaError, match=r"\.gguf: cannot be written \(File too large\); make room"):
        lowered(wide, tmp_path, precision)
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_float16_are_refused_by_their_tensor(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = save_random_model(tmp_path / "model", "llama")
    stock = AutoModelForCausalLM.from_pretrained(model.path)
    with torch.no_grad():
        stock.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    stock.save_pretrained(model.path)
    (tmp_path / "engine").mkdir()
    with pytest.raises(BadInput, match=r"model.layers.0.mlp.up_proj.weight: holds numbers beyond those of float16"):
        lowered(ModelFolder(model.path), tmp_path / "engine", "fp16")
    assert list((tmp_path / "engine").iterdir()) == []


@pytest.mark.parametrize("kept", [0, 20, 2000, -1])
def test_a_truncated_file_is_refused(kept: int, models: Models, tmp_path: Path) -> None:
    lowered(models("llama-grouped-tied"), tmp_path, "q8_0")
    file = tmp_path / "model-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:kept])
    for opened in (GGUF.open, GGUF.open_exact):
        with pytest.raises(BadInput, match=str(file)):
            opened(tmp_path, "q8_0")


def test_float_files_need_no_llama_cpp_and_quantised_ones_say_what_to_install(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoeba_deploy.backends.gguf._RUNNER", "no-such-package")
    assert GGUF.toolchain().missing == ()
    assert "no-such-package" in str(GGUF.cannot_run("fp32", OPTIONS))
    lowered(models("mistral"), tmp_path)
    install = r"no-such-package is not installed; run pip install 'amoeba-deploy\[gguf\]'"
    with pytest.raises(ToolchainMissing, match=install):
        lowered(models("mistral"), tmp_path, "q8_0")
    with pytest.raises(ToolchainMissing, match=install):
        GGUF.open(tmp_path, "fp32")
    assert [file.name for file in tmp_path.iterdir()] == ["model-fp32.gguf"]
    monkeypatch.setattr("amoeba_deploy.backends.gguf._WRITER", "no-such-writer")
    with pytest.raises(ToolchainMissing, match="no-such-writer"):
        lowered(models("mistral"), tmp_path)


def test_nothing_binds_a_file_to_a_machine_or_a_version() -> None:
    identity = GGUF.identity("q8_0", OPTIONS)
    assert (identity.bound, identity.chip) == ((), None)
    assert {"gguf", "llama-cpp-python"} <= set(identity.versions)


def test_every_model_of_the_tests_is_lowered_or_refused() -> None:
    gemma = {"gemma2", "gemma2-uncapped", "gemma3"}
    others = {"llama-multihead", "qwen2-untied", "qwen3-multihead", "granite"}
    assert set(MODELS) - set(EXACT) - set(REFUSED) == gemma | others


@pytest.mark.parametrize("shape", ["12x1", "10x0.6"])
def test_the_shipped_checkpoint_becomes_a_bundle_that_runs_and_writes_what_torch_does(
    shape: str, demo: Checkpoint, tmp_path: Path
) -> None:
    """The narrower one adaptive: a plan whose blocks differ."""
    given = shape
    if shape != "12x1":
        asked = ("--shape", shape, "--policy", "adaptive", "--for", "gguf", "--precision", "fp32", "--plan-only")
        planned = amoeba("extract", *asked)
        assert planned.exit_code == 0, planned.stderr
        given = str(tmp_path / "plan.json")
        Path(given).write_text(planned.stdout)
    bundle = tmp_path / "bundle"
    engine = ("--flow", "gguf", "--precision", "fp32", "--shape", given, "--device", "raspberry-pi-5")
    exported = amoeba("export", *engine, "-o", bundle, "--json")
    assert exported.exit_code == 0, exported.stderr
    verification = json.loads(exported.stdout)["verified"]
    assert verification["greedy_tokens_equal"] is True
    assert verification["max_logit_error"] < 1e-4
    assert amoeba("bundle", "verify", bundle).exit_code == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["engine"]["architecture"] == ("llama" if shape == "12x1" else "deci")
    assert (bundle / "engine" / "model-fp32.gguf").is_file()
    asked = ("-p", "Question: What is the job of Faiven? Answer:", "--tokens", 64, "--json")
    plan = demo.plan_of(given)
    (tmp_path / "dense").mkdir()
    extract(demo.model, plan, tmp_path / "dense", dtype="float32", learnt=demo.learnt(plan))
    found, wanted = (json.loads(amoeba("run", path, *asked).stdout)["text"] for path in (bundle, tmp_path / "dense"))
    assert found == wanted
    assert found.strip()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_trained_llama_with_heads_of_size_8_is_lowered_and_what_falls_back_is_said(
    precision: str, stories: Path, tmp_path: Path
) -> None:
    model = ModelFolder(stories)
    own = GGUF.takes.own_name(precision)
    artefact, result = verified(model, tmp_path / "engine", own)
    assert result.passed
    assert any("their rows of 172 are no multiple of 32: ffn_down" in note for note in artefact.notes) == (
        own != "fp32"
    )
    if own == "fp32":
        assert artefact.notes == ()
        prompt = model.tokenizer().encode("Once upon a time").ids
        texts = [
            list(chosen_tokens(engine, prompt, 64, set(), Timings(), greedy))
            for engine in (
                GGUF.open(tmp_path / "engine", own, context=256),
                load_backend("torch").open(stories, "fp32"),
            )
        ]
        assert texts[0] == texts[1]
