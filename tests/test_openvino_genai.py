"""The folder of an OpenVINO engine in openvino-genai: the same text, streamed; and its tokenizer."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino_engines import OPENVINO, OPTIONS, Models, lowered, transformers

from amoeba_deploy.backends.backend import Engine, options_for
from amoeba_deploy.backends.openvino.runtime import load
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape


def greedy(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    engine.reset()
    logits, found = engine.feed(np.array([prompt]))[0, -1], []
    for _ in range(tokens):
        found.append(int(logits.argmax()))
        logits = engine.feed(np.array([[found[-1]]]))[0, -1]
    return found


def genai_text(folder: Path, prompt: str, tokens: int, **chosen: str) -> tuple[str, list[str]]:
    """What ``LLMPipeline`` writes, whole and as it was streamed."""
    package: Any = load("openvino_genai")
    pipeline = package.LLMPipeline(str(folder), "CPU", **chosen)
    wanted = package.GenerationConfig()
    wanted.max_new_tokens, wanted.do_sample, wanted.ignore_eos = tokens, False, True
    streamed: list[str] = []

    def stream(part: str) -> None:
        streamed.append(part)

    return str(pipeline.generate(prompt, wanted, stream)), streamed


@pytest.fixture
def genai() -> None:
    for package in ("openvino_tokenizers", "openvino_genai"):
        try:
            load(package)
        except ImportError:
            pytest.skip(f"{package} is not installed")


@pytest.mark.usefixtures("genai")
@pytest.mark.parametrize("attention", ["PA", "SDPA"])
def test_openvino_genai_writes_the_text_that_transformers_writes(attention: str, stories: Path, tmp_path: Path) -> None:
    model = ModelFolder(stories)
    artefact = lowered(model, tmp_path / "engine", "fp32", options_for(OPENVINO, 256))
    tokenizer, prompt = model.tokenizer(), "Once upon a time"
    ids = tokenizer.encode(prompt).ids
    wanted = greedy(transformers(model), ids, 64)
    assert greedy(OPENVINO.open(artefact, "fp32"), ids, 64) == wanted
    chosen = json.loads((artefact / "openvino_properties.json").read_text())["properties"]
    text, streamed = genai_text(artefact, prompt, 64, ATTENTION_BACKEND=attention, **chosen)
    assert text == "".join(streamed) == tokenizer.decode(wanted)
    assert len(streamed) > 10


@pytest.mark.usefixtures("genai")
def test_openvino_genai_runs_a_ragged_subnet_with_nothing_said(stories: Path, tmp_path: Path) -> None:
    model = ModelFolder(stories)
    blocks = [block_plan(model.architecture, i, [0, 1, 2, 3][: 4 - i % 3], range(172 - 20 * i)) for i in range(5)]
    (tmp_path / "model").mkdir()
    extract(model, Plan(Shape(5, Fraction(3, 4), "adaptive"), tuple(blocks)), tmp_path / "model", layout="ragged")
    subnet = ModelFolder(tmp_path / "model")
    artefact = lowered(subnet, tmp_path / "engine")
    chosen = json.loads((artefact / "openvino_properties.json").read_text())["properties"]
    ids = subnet.tokenizer().encode("Once upon a time").ids
    wanted = subnet.tokenizer().decode(greedy(transformers(subnet), ids, 24))
    assert genai_text(artefact, "Once upon a time", 24, **chosen)[0] == wanted
    # OpenVINO's own choices: on some CPUs bfloat16 and a cache of 8 bits, so the text may differ, and must be there.
    assert len(genai_text(artefact, "Once upon a time", 24)[0]) > 10


def test_a_tokenizer_that_cannot_be_converted_is_noted_and_ids_still_work(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama-grouped-tied").path, tmp_path / "model"))
    (tmp_path / "engine").mkdir()
    artefact = OPENVINO.lower(ModelFolder(source), tmp_path / "engine", "fp32", OPTIONS)
    assert artefact.notes == (
        "openvino-genai cannot read text with this folder: the subnet has no tokenizer.json; ids work",
    )
    assert not list(artefact.folder.glob("openvino_*tokenizer.*"))
    assert OPENVINO.open(artefact.folder, "fp32").feed(np.array([[3, 4]])).shape == (1, 2, 128)


@pytest.mark.usefixtures("genai")
def test_a_tokenizer_that_is_converted_to_another_one_is_not_written(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers: Any = load("openvino_tokenizers")
    convert = tokenizers.convert_tokenizer
    monkeypatch.setattr(tokenizers, "convert_tokenizer", lambda t, **kw: convert(t, add_special_tokens=False, **kw))
    (tmp_path / "engine").mkdir()
    artefact = OPENVINO.lower(ModelFolder(stories), tmp_path / "engine", "fp32", OPTIONS)
    assert "as other ids" in artefact.notes[0]
    assert not list(artefact.folder.glob("openvino_*tokenizer.*"))
