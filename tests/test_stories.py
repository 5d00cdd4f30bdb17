"""The whole path on a model that nobody here wrote: a trained Llama of 260 thousand parameters with heads of size 8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHARED, amoeba

from amoeba_deploy.model_folder import ModelFolder

TEXT = SHARED / "data" / "tinystories" / "tiny_stories.txt"


@pytest.fixture
def made(stories: Path, tmp_path: Path) -> Path:
    """A checkpoint of it, selected on the first and measured on the last part of a text."""
    if not TEXT.is_file():
        pytest.skip("../shared/data/tinystories is not here")
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
        found = json.loads(amoeba("evaluate", output, "--text", tmp_path / "held-out.txt", "--json").stdout)
        reference = json.loads(
            amoeba("evaluate", made, "--shape", shape, "--text", tmp_path / "held-out.txt", "--json").stdout
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
