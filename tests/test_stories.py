"""The whole path on a model that nobody here wrote: a trained Llama of 260 thousand parameters with heads of size 8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHARED, STORIES, amoeba
from onnx_engines import genai_greedy
from transformers import AutoModelForCausalLM

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions
from amoeba_deploy.model_folder import ModelFolder

TEXT = SHARED / "data" / "tinystories" / "tiny_stories.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it, selected on the first and measured on the last part of a text."""
    if not (STORIES.is_dir() and TEXT.is_file()):
        pytest.skip("../shared/models/stories260K or ../shared/data/tinystories is not here")
    tmp_path = tmp_path_factory.mktemp("stories")
    stories = shutil.copytree(STORIES, tmp_path / "stories260K")
    text = TEXT.read_text(encoding="utf-8")
    (tmp_path / "calibration.txt").write_text(text[:60_000])
    (tmp_path / "held-out.txt").write_text(text[-30_000:])
    selected = amoeba("select", stories, "-o", tmp_path / "selection", "--calibration", tmp_path / "calibration.txt",
                      "--samples", 32)  # fmt: skip
    assert selected.exit_code == 0, selected.stderr
    created = amoeba("checkpoint", "create", stories, "--selection", tmp_path / "selection", "-o", tmp_path / "made",
                     "--quality-text", tmp_path / "held-out.txt")  # fmt: skip
    assert created.exit_code == 0, created.stderr
    return tmp_path / "made"


def test_from_a_model_folder_to_text_from_a_bundle(made: Path, tmp_path: Path) -> None:
    for shape, least in (("5x1", 1.2), ("4x0.75", 2.5)):
        output = tmp_path / shape
        engine = ("--flow", "onnx", "--precision", "fp32", "--shape", shape)
        exported = amoeba("export", made, "--device", "orin-nx", *engine, "-o", output, "--json")
        assert exported.exit_code == 0, exported.stderr
        verified = json.loads(exported.stdout)["verified"]
        assert verified["greedy_tokens_equal"] is True
        # Written-out attention for heads of size 8, against transformers, in absolute terms.
        assert verified["max_logit_error"] < 1e-4
        assert amoeba("bundle", "verify", output).exit_code == 0
        found = json.loads(amoeba("evaluate", output, "--text", made.parent / "held-out.txt", "--json").stdout)
        reference = json.loads(
            amoeba("evaluate", made, "--shape", shape, "--text", made.parent / "held-out.txt", "--json").stdout
        )
        assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert least < found["loss"] < 6.24  # ln 512 is chance
    text = json.loads(amoeba("run", tmp_path / "5x1", "-p", "Once upon a time", "--tokens", 24, "--json").stdout)[
        "text"
    ]
    assert text.startswith(", there was a little")


def test_search_prefers_what_was_measured_to_be_better(made: Path) -> None:
    found = json.loads(amoeba("search", made, "--device", "orin-nx", "--latency", "40ms", "--json").stdout)
    assert (found["shape"]["depth"], found["shape"]["width"]) == (5, 1.0)
    assert found["binding"] is None
    losses = [entry["quality"]["value"] for entry in found["pareto"]]
    assert losses == sorted(losses, reverse=True)
    assert ModelFolder(made.parent / "stories260K").architecture.head_dim == 8


@pytest.mark.parametrize("shape", ["4x0.75", "5x0.5"])
def test_an_extraction_gives_equal_text_in_transformers_and_onnxruntime_genai(
    shape: str, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "subnet"
    assert amoeba("extract", made, "--shape", shape, "-o", folder).exit_code == 0
    prompt = ModelFolder(folder).tokenizer().encode("Once upon a time, there was a little girl").ids
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ids = torch.tensor([prompt])
    wanted = stock.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=64, max_new_tokens=64, do_sample=False
    )
    load_backend("onnx").lower(ModelFolder(folder), folder, "fp32", BuildOptions(512))
    assert genai_greedy(folder, prompt, 64) == wanted[0, len(prompt) :].tolist()
