"""The ``executorch`` flow: traces of all families, real programs in all precisions, ragged subnets, and refusals."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.backends.conformance import CONTEXT, Conformance, fed, random_llama
from amoeba_deploy.backends.torch import torch_reference
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.static_cache import fix_rotary
from amoeba_deploy.verification import verify_artefact

pytest.importorskip("executorch")

Models = Callable[[str], ModelFolder]
BACKEND = load_backend("executorch")
QUICK = ("llama-grouped-tied", "gemma2", "phi3-long", "smollm3-biases")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A Llama of one block, whose export takes seconds."""
    return random_llama(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=1, num_key_value_heads=1)


@pytest.fixture(scope="module")
def built(small: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its program in fp32, with prompts in pieces of 16."""
    folder = tmp_path_factory.mktemp("built")
    BACKEND.lower(small, folder, "fp32", options_for(BACKEND, CONTEXT, settings={"prefill": "16"}))
    return folder


@pytest.mark.slow
class TestExecutorch(Conformance):
    flow = "executorch"
    architecture_changes = {"num_hidden_layers": 1}  # noqa: RUF012


def traced_error(folder: Path, context: int) -> float:
    """The largest error of a trace that is fed in pieces of several lengths, as a share of the largest logit."""
    from amoeba_deploy.backends.executorch.program import Decoder

    ids = torch.arange(context)[None] * 7 % 128
    with torch.no_grad():
        wanted = load_torch_model(folder)(ids).logits
        model: Any = load_torch_model(folder)
        fix_rotary(model)
        decoder = Decoder(model.requires_grad_(False), context).eval()
        count = torch.export.Dim("count", min=1, max=context)
        example = (torch.zeros(1, 7, dtype=torch.int64), torch.arange(7))
        traced = torch.export.export(decoder, example, dynamic_shapes=({1: count}, {0: count}), strict=False).module()
        parts, at = [], 0
        for size in (13, 1, 1, context - 15):
            parts.append(traced(ids[:, at : at + size], torch.arange(at, at + size)))
            at += size
    return float((torch.cat(parts, 1) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_family_is_traced_to_what_transformers_computes(name: str, models: Models) -> None:
    # Past the edge of the windows, which are of 16; as far as the longest text that long rotary scaling leaves alone.
    assert traced_error(models(name).path, 22 if name == "phi3-long" else 40) < 1e-5


def ragged(model: ModelFolder, folder: Path) -> ModelFolder:
    """A subnet with a block without attention, one without feed-forward, and two of different widths."""
    sizes = model.architecture
    blocks = (
        block_plan(sizes, 0, [], range(64)),
        block_plan(sizes, 1, [0, 2], range(32, 64)),
        block_plan(sizes, 2, [1], []),
        block_plan(sizes, 3, [0, 1, 2], range(5, 70)),
    )
    folder.mkdir()
    extract(model, Plan(Shape(4, Fraction(1, 2), "adaptive"), blocks), folder, layout="ragged")
    return ModelFolder(folder)


@pytest.mark.parametrize("name", ["llama-grouped-tied", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_ragged_subnet_is_traced_to_what_transformers_computes(name: str, models: Models, tmp_path: Path) -> None:
    subnet = ragged(models(name), tmp_path / "dense")
    assert "ragged" in BACKEND.layouts(subnet.architecture, "fp32", options_for(BACKEND, CONTEXT))
    assert traced_error(subnet.path, 40) < 1e-5


def test_a_program_computes_what_transformers_computes(small: ModelFolder, built: Path) -> None:
    result = verify_artefact(BACKEND, small, built, "fp32", options_for(BACKEND, CONTEXT))
    assert result.passed
    assert result.greedy_tokens > 10


def test_prompts_longer_than_one_call_go_in_pieces_and_a_reset_forgets(small: ModelFolder, built: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 128, (1, CONTEXT))
    wanted = fed(torch_reference(small.path), ids, CONTEXT)
    engine = BACKEND.open(built, "fp32")
    limit = 1e-5 * np.abs(wanted).max()
    for first in (CONTEXT, 33, 1):
        assert np.abs(fed(engine, ids, first) - wanted).max() < limit
    fed(engine, ids[:, ::-1].copy(), 60)
    assert np.abs(fed(engine, ids[:, :20], 20) - wanted[:, :20]).max() < limit


def test_what_does_not_fit_a_program_is_refused_when_it_is_fed(built: Path) -> None:
    engine = BACKEND.open(built, "fp32")
    engine.feed(np.zeros((1, CONTEXT), np.int64))
    with pytest.raises(BadInput, match=f"holds {CONTEXT} positions, and {CONTEXT + 1} were fed"):
        engine.feed(np.zeros((1, 1), np.int64))
    engine.reset()
    with pytest.raises(BadInput, match="one sequence at a time, and 2 were fed"):
        engine.feed(np.zeros((2, 1), np.int64))
    with pytest.raises(BadInput, match="rows of one length only"):
        engine.feed(np.zeros((1, 3), np.int64), np.array([2]))
    with pytest.raises(BadInput, match=f"built for a context of {CONTEXT}, and {CONTEXT + 1} is asked for"):
        BACKEND.open(built, "fp32", context=CONTEXT + 1)


def test_a_damaged_program_is_refused(built: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes((built / "model.pte").read_bytes()[:4000])
    with pytest.raises(BadInput, match=r"model\.pte: is no program of this flow"):
        BACKEND.open(tmp_path, "fp32")
    (tmp_path / "model.pte").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"model\.pte: is no program of this flow"):
        BACKEND.open(tmp_path, "fp32")


def test_the_same_model_gives_the_same_program_in_another_process(
    small: ModelFolder, built: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from amoeba_deploy.backends import load_backend;"
        "from amoeba_deploy.backends.backend import options_for; from amoeba_deploy.model_folder import ModelFolder;"
        "b = load_backend('executorch'); o = options_for(b, int(sys.argv[3]), settings={'prefill': '16'});"
        "b.lower(ModelFolder(Path(sys.argv[1])), Path(sys.argv[2]), 'fp32', o)"
    )
    command = [sys.executable, "-c", program, str(small.path), str(tmp_path), str(CONTEXT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    digests = [hashlib.sha256((folder / "model.pte").read_bytes()).hexdigest() for folder in (built, tmp_path)]
    assert digests[0] == digests[1]
    assert "torchao" not in done.stderr
    assert "register_constant" not in done.stderr


def test_threads_are_set_before_a_program_is_loaded_and_refused_where_another_engine_has_others(built: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from amoeba_deploy.backends import load_backend;"
        "from amoeba_deploy.errors import BadInput; import numpy as np;"
        "b = load_backend('executorch'); f = Path(sys.argv[1]); e = b.open(f, 'fp32', 1);"
        "from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count as c;"
        "print(c(), e.feed(np.zeros((1, 40), np.int64)).shape); b.open(f, 'fp32', 1); b.open(f, 'fp32');\n"
        "try: b.open(f, 'fp32', 7)\n"
        "except BadInput as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == "1 (1, 40, 128)"
    assert second.startswith("ExecuTorch has one pool of threads a process, which an engine uses already with 1")
    assert done.stderr == ""


@pytest.mark.parametrize("precision", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_every_matrix_and_the_embedding_are_quantised(
    precision: str, small: ModelFolder, built: Path, tmp_path: Path
) -> None:
    options = options_for(BACKEND, CONTEXT)
    BACKEND.lower(small, tmp_path, precision, options)
    result = verify_artefact(BACKEND, small, tmp_path, precision, options)
    assert result.passed
    assert result.weight_error is not None
    assert result.weight_error > 0
    # Weights left in float32 would show in the size: two tables of 128x128 and a block of 139,264 numbers.
    weights = BACKEND.storage(precision).weight_bytes(replace(small.architecture, tied=False))
    assert weights < (tmp_path / "model.pte").stat().st_size < weights + 60_000
    assert (tmp_path / "model.pte").stat().st_size < (built / "model.pte").stat().st_size / 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_ragged_subnet_is_lowered_as_it_is(precision: str, models: Models, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    model, options = ragged(models("llama-grouped-tied"), tmp_path / "dense"), options_for(BACKEND, CONTEXT)
    BACKEND.lower(model, engine, precision, options)
    assert verify_artefact(BACKEND, model, engine, precision, options).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gemma2", "fp32"),
        ("gemma3-capped", "int8"),
        ("phi3-long", "fp32"),
        ("smollm3-biases", "int4"),
        ("olmo2", "fp32"),
    ],
)
def test_programs_of_families_with_something_of_their_own(
    name: str, precision: str, models: Models, tmp_path: Path
) -> None:
    options = options_for(BACKEND, 22 if name == "phi3-long" else 64)
    BACKEND.lower(models(name), tmp_path, precision, options)
    assert verify_artefact(BACKEND, models(name), tmp_path, precision, options).passed


@pytest.mark.slow
def test_a_trained_model_writes_the_same_64_tokens(stories: Path, tmp_path: Path) -> None:
    BACKEND.lower(ModelFolder(stories), tmp_path, "fp32", options_for(BACKEND, CONTEXT))
    written = []
    for engine in (BACKEND.open(tmp_path, "fp32"), torch_reference(stories)):
        tokens, ids = [], np.array([[1, 403, 407, 261, 378]])
        for _ in range(64):
            ids = engine.feed(ids)[:, -1:].argmax(-1)
            tokens.append(int(ids[0, 0]))
        written.append(tokens)
    assert written[0] == written[1]


def test_refusals_name_what_was_found(models: Models) -> None:
    options, sizes = options_for(BACKEND, 64), models("llama-grouped-tied").architecture
    assert BACKEND.refusal(sizes, "int4", options) is None
    refused = BACKEND.refusal(sizes, "fp32", replace(options, batch=4))
    assert refused == "its programs run one sequence at a time, and a batch of 4 is asked for; use --batch 1"
    grows = replace(sizes, rope=replace(sizes.rope, kind="dynamic"))
    assert "changes with the length of the text" in str(BACKEND.refusal(grows, "fp32", options))
    assert "ask for --context 22 or less" in str(BACKEND.refusal(models("phi3-long").architecture, "fp32", options))


def test_a_program_is_bound_to_its_version_of_executorch() -> None:
    identity = BACKEND.identity("int4", options_for(BACKEND, 64)).to_json()
    assert identity["bound"] == ["executorch"]
    assert identity["chip"] is None


def test_running_a_model_says_nothing_of_torchao(stories: Path) -> None:
    command = [sys.executable, "-m", "amoeba_deploy", "run", str(stories), "-p", "Once", "--tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    for noise in ("torchao", ".so", "pytree", "Warning", "W1"):
        assert noise not in done.stderr
