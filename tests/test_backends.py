"""Every backend passes the suite of the package; flows of other packages are found by their entry points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chatting import build_bundle
from conftest import amoeba, sentence
from fake_backends import Fake, offer, offer_fake, point

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.conformance import Conformance
from amoeba_deploy.checkpoint import Checkpoint


class TestTorch(Conformance):
    flow = "torch"


class TestOnnx(Conformance):
    flow = "onnx"


# Flows of other packages


def test_a_flow_of_another_package_is_found_lowered_and_run(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = offer_fake(monkeypatch, "acme")
    assert flow_names() == ("onnx", "torch", "acme")
    assert load_backend("acme") is made
    bundle = build_bundle(checkpoint, "acme", tmp_path / "bundle")
    assert amoeba("bundle", "verify", bundle, "--quiet").exit_code == 0


def test_a_flow_of_another_package_stands_in_hints_and_in_searches(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_fake(monkeypatch, "tensorrt-llm")
    target = ("--device", "orin-nx", "--memory", "8GB", "--prompt", 64, "--quiet")
    found = amoeba("search", checkpoint.path, *target, "--flow", "tensorrt-llm", "--precision", "bf16", "--json")
    assert json.loads(found.stdout)["flow"] == "tensorrt-llm"
    assert "did you mean 'tensorrt-llm'?" in sentence(
        amoeba("search", checkpoint.path, *target, "--flow", "tensort-llm"), 2
    )


def _broken_import() -> Any:
    raise ImportError("libacme.so.7: cannot open shared object file")


def _exits() -> Any:
    raise SystemExit(3)


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a broken import": (_broken_import, "libacme.so.7: cannot open shared object file"),
    "an import that ends the interpreter": (_exits, "SystemExit"),
    "a class": (lambda: Fake, "is no amoeba_deploy Backend"),
    "something else": (lambda: "backend", "is no amoeba_deploy Backend"),
    "a backend of another name": (lambda: Fake("other"), "is no amoeba_deploy Backend of that name"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_another_package_offers_and_is_no_backend_is_named_with_its_package(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    load, said = UNUSABLE[what]
    offer(monkeypatch, point("acme", load))
    target = ("--device", "orin-nx", "--memory", "8GB", "--prompt", 64, "--quiet")
    found = sentence(amoeba("search", checkpoint.path, *target, "--flow", "acme"), 1)
    assert "the flow 'acme' of acme_package:BACKEND" in found
    assert said in found


def test_a_flow_that_cannot_be_loaded_leaves_the_others_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, point("acme", _broken_import))
    target = ("--device", "orin-nx", "--memory", "8GB", "--prompt", 64, "--quiet")
    assert amoeba("search", checkpoint.path, *target).exit_code == 0
    profiled = (
        "--flow",
        "torch",
        "--precision",
        "fp32",
        "--shapes",
        "2x0.5",
        "--repeats",
        3,
        "--prompt",
        16,
        "--quiet",
    )
    assert amoeba("profile", checkpoint.path, *profiled).exit_code == 0


def test_a_flow_of_another_package_does_not_replace_one_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_backend("onnx")
    offer(monkeypatch, point("onnx", lambda: Fake("onnx")))
    assert flow_names() == ("onnx", "torch")
    assert load_backend("onnx") is own
