"""Positions in the ONNX backend: rotary scalings, and sliding windows of all or some blocks, beyond their edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import YARN_ROPES, random_selection, save_random_model
from onnx_engines import ONNX, OPTIONS, fed, fed_in_rows, lowered

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.onnx.windows import block_windows
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan, block_plan
from amoeba_deploy.shape import Shape
from amoeba_deploy.verification import verify_artefact


@pytest.mark.parametrize("name", YARN_ROPES)
@pytest.mark.parametrize("head_dim", [16, 8])
def test_a_model_with_yarn_verifies(name: str, head_dim: int, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, **YARN_ROPES[name]}
    model = save_random_model(tmp_path / "model", "llama", head_dim=head_dim, rope_parameters=rope)
    for precision in ("fp32", "int8"):
        artefact = lowered(model, tmp_path / precision, precision)
        assert verify_artefact(ONNX, model, artefact, precision, OPTIONS).passed


def test_scalings_that_it_does_not_compute_are_refused_by_name(models: Callable[[str], ModelFolder]) -> None:
    sizes = models("llama-grouped-tied").architecture
    for kind in ("dynamic", "longrope", "proportional"):
        refused = ONNX.refusal(replace(sizes, rope=replace(sizes.rope, kind=kind)), "fp32", OPTIONS)
        assert refused == f"its rotary scaling '{kind}' is none of default, linear, llama3, yarn"


WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 16}),
    "mistral, small heads": ("mistral", {"sliding_window": 16, "head_dim": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen2, small heads": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "head_dim": 8},
    ),
    "qwen3": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    root, made = tmp_path_factory.mktemp("windowed"), {}

    def get(name: str) -> ModelFolder:
        if name not in made:
            family, changes = WINDOWED[name]
            made[name] = save_random_model(root / name.replace(" ", "-"), family, **changes)
        return made[name]

    return get


@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window_is_exact_beyond_its_edge(
    name: str, windowed: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = windowed(name)
    engine = ONNX.open(lowered(model, tmp_path / "engine"), "fp32")
    reference = load_backend("torch").open(model.path, "fp32")
    ids = np.random.default_rng(3).integers(0, 128, (1, 100))
    wanted = fed(reference, ids, 100)
    for first in (100, 40, 10, 1):
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-5 * np.abs(wanted).max()
    pieces = [(ids[:, :7], [7]), (ids[:, 7:37], [30]), (ids[:, 37:], [63])]
    assert np.abs(np.concatenate(fed_in_rows(engine, pieces)) - wanted[0]).max() < 1e-5 * np.abs(wanted).max()
    rng = np.random.default_rng(4)
    batch = [
        (rng.integers(0, 128, (3, max(lengths))), lengths)
        for lengths in ([50, 17, 1], *[[1] * 3] * 5, [20, 3, 30], *[[1] * 3] * 5)
    ]
    found = fed_in_rows(engine, batch)
    for row in range(3):
        # Each row alone: transformers counts fillings in a batch as positions of the window.
        alone = [(ids[row : row + 1, : lengths[row]], [lengths[row]]) for ids, lengths in batch]
        for one, other in zip(found[row::3], fed_in_rows(reference, alone), strict=True):
            assert np.abs(one - other).max() < 1e-4


def test_an_engine_without_the_window_would_have_been_caught(
    windowed: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = windowed("mistral")
    folder = lowered(model, tmp_path / "engine")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                assert attribute.i == 16
                attribute.i = -1
    onnx.save(graph, folder / "model.onnx")
    ids = np.random.default_rng(3).integers(0, 128, (1, 30))
    difference = np.abs(
        fed(ONNX.open(folder, "fp32"), ids, 30) - fed(load_backend("torch").open(model.path, "fp32"), ids, 30)
    )
    assert difference[:, :16].max() < 1e-4
    assert difference[:, 16:].max() > 1e-2


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_follow_the_kept_blocks(name: str, windowed: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = windowed(name)
    whole = block_windows(model)
    assert set(whole) == ({16} if model.architecture.family == "mistral" else {16, None})
    plan = random_selection(model).plan(model.architecture, Shape.parse("3x0.7"))
    extract(model, plan, tmp_path)
    subnet = ModelFolder(tmp_path)
    assert block_windows(subnet) == tuple(whole[index] for index in plan.kept_blocks)
    artefact = lowered(subnet, tmp_path)
    assert verify_artefact(ONNX, subnet, artefact, "fp32", OPTIONS).passed


def test_blocks_of_different_widths_have_their_windows(windowed: Callable[[str], ModelFolder], tmp_path: Path) -> None:
    model = windowed("qwen3")
    blocks = (
        block_plan(model.architecture, 0, [0, 2], range(0, 160, 2)),
        block_plan(model.architecture, 2, [1], range(100)),
        block_plan(model.architecture, 3, [1, 2], range(7, 40)),
    )
    extract(model, Plan(Shape.parse("3x0.5", "adaptive"), blocks), tmp_path, layout="ragged")
    subnet = ModelFolder(tmp_path)
    assert block_windows(subnet) == (16, None, 16)
    assert verify_artefact(ONNX, subnet, lowered(subnet, tmp_path), "fp32", OPTIONS).passed
