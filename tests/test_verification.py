"""Verification: what passes, what does not, and that nothing slips through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import amoeba

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Engine, Ids
from amoeba_deploy.bundle import ENGINE
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selftest import SelfTest, check, record
from amoeba_deploy.verification import compare

CONTEXT = 128


class Spoilt:
    """A right engine whose logits are changed on the way out."""

    def __init__(self, engine: Engine, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.engine, self.change = engine, change

    def reset(self) -> None:
        self.engine.reset()

    def feed(self, ids: Ids) -> np.ndarray:
        return self.change(self.engine.feed(ids).copy())


def torch_engine(model: ModelFolder) -> Engine:
    return load_backend("torch").open(model.path, "fp32")


def all_but_last(logits: np.ndarray) -> np.ndarray:
    logits[:, :-1] = np.nan
    return logits


@pytest.mark.parametrize(
    "change",
    [lambda x: x * np.nan, all_but_last, lambda x: x * np.inf, lambda x: x + 0.01, lambda x: np.roll(x, 1, axis=-1)],
    ids=["all NaN", "NaN but for the last", "infinite", "shifted", "off by one token"],
)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-4])
def test_a_spoilt_engine_never_passes(
    change: Callable[[np.ndarray], np.ndarray], tolerance: float, models: Callable[[str], ModelFolder]
) -> None:
    model = models("llama-grouped-tied")
    right = torch_engine(model)
    assert compare(torch_engine(model), right, model, tolerance, CONTEXT).passed
    assert not compare(Spoilt(torch_engine(model), change), right, model, tolerance, CONTEXT).passed


def test_an_engine_of_nan_does_not_pass_where_everything_else_does(models: Callable[[str], ModelFolder]) -> None:
    model = models("llama-grouped-tied")
    spoilt = Spoilt(torch_engine(model), lambda logits: logits * np.nan)
    assert not compare(spoilt, torch_engine(model), model, 1.0, CONTEXT).passed


@pytest.mark.parametrize("flow", ["torch", "onnx"])
@pytest.mark.parametrize(("prompt", "tokens", "context"), [(8, 8, 16), (1, 1, 2), (2, 30, 40)])
def test_an_engine_is_verified_within_its_own_context(
    checkpoint: Checkpoint, flow: str, prompt: int, tokens: int, context: int, tmp_path: Path
) -> None:
    options = ("--prompt", prompt, "--tokens", tokens, "--context", context)
    for extra in ((), ("--no-verify",)):
        output = tmp_path / f"out{len(extra)}"
        made = amoeba("export", checkpoint.path, "--device", "orin-nx", "--flow", flow, "--precision", "fp32",
                      "--shape", "2x1", *options, *extra, "-o", output)  # fmt: skip
        assert made.exit_code == 0, made.stderr
        assert amoeba("bundle", "verify", output).exit_code == 0


def test_a_bundle_that_was_not_verified_says_so_and_still_tolerates_rounding(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    command = ("export", checkpoint.path, "--device", "orin-nx", "--shape", "2x1", "--prompt", 16)
    made = amoeba(*command, "--no-verify", "--json", "-o", tmp_path / "out")
    assert json.loads(made.stdout)["verified"] is None
    assert json.loads((tmp_path / "out" / "selftest.json").read_text())["tolerance"] > 0


def test_a_self_test_ignores_steps_where_either_token_is_right(models: Callable[[str], ModelFolder]) -> None:
    model = models("llama-grouped-tied")
    engine = torch_engine(model)
    made = record(engine, (1, 2, 3), 12, 0.0)
    assert check(engine, made, "here") == 12
    close = int(np.argmin(made.margins))
    other = (made.tokens[close] + 1) % 128
    changed = (*made.tokens[:close], other, *made.tokens[close + 1 :])
    tolerant = SelfTest(made.prompt, changed, made.margins, made.margins[close] / 2 + 1e-3)
    assert close not in tolerant.decisive
    assert SelfTest(made.prompt, made.tokens, made.margins, 1e9).decisive == [int(np.argmax(made.margins))]


def test_a_table_of_this_machine_is_not_another_devices(demo: Checkpoint, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ("--flow", "onnx", "--precision", "int4", "--shapes", "12x1,6x0.5", "--repeats", 3, "-o", table)
    workload = ("--prompt", 16, "--tokens", 8)
    search = ("search", "--device", "orin-nx", "--latency", "40ms", "--table", table, *workload, "--json")
    assert amoeba("profile", *options, *workload).exit_code == 0
    assert "was measured on 'local'" in amoeba(*search).stderr
    assert amoeba("profile", *options, *workload, "--device", "orin-nx", "--force").exit_code == 0
    assert json.loads(amoeba(*search).stdout)["predicted"]["source"] == "measured"
    assert demo.architecture.depth == 12


def test_the_engine_of_a_bundle_lies_under_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    amoeba("export", checkpoint.path, "--device", "orin-nx", "--shape", "2x1", "--prompt", 16, "-o", tmp_path / "out")
    assert (tmp_path / "out" / ENGINE / "model.onnx").is_file()
