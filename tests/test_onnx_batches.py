"""The ONNX backend with batches: rows of different lengths, prompts in pieces, and padding on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import save_random_model
from onnx_engines import CONTEXT, ONNX, fed, fed_in_rows, lowered

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Ids
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder

FUSED_AND_WRITTEN = ["llama-grouped-tied", "llama-small-heads", "qwen3"]


def chunks(seed: int = 3) -> Iterator[tuple[Ids, list[int]]]:
    """A prompt of three lengths, tokens one by one, pieces of other lengths, and tokens again."""
    rng = np.random.default_rng(seed)
    for lengths in ([40, 17, 1], [1] * 3, [1] * 3, [1] * 3, [2, 9, 5], [1] * 3, [1] * 3, [30, 1, 7]):
        yield rng.integers(0, 128, (3, max(lengths))), lengths


@pytest.mark.parametrize("name", FUSED_AND_WRITTEN)
def test_batches_and_chunked_prefill_agree_with_transformers(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    ids = np.random.default_rng(3).integers(0, 128, (3, 40))
    reference = load_backend("torch").open(model.path, "fp32")
    wanted = fed(reference, ids, 40)
    engine = ONNX.open(lowered(model, tmp_path / "engine"), "fp32")
    for first in (40, 17, 1):
        # Float32 on both sides; logits here are of size 10.
        assert np.abs(fed(engine, ids, first) - wanted).max() < 1e-4


@pytest.mark.parametrize("name", FUSED_AND_WRITTEN)
def test_rows_of_different_lengths_agree_with_transformers(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    wanted = fed_in_rows(load_backend("torch").open(model.path, "fp32"), list(chunks()))
    engine = ONNX.open(lowered(model, tmp_path / "engine"), "fp32")
    for seed in (4, 3):
        # What another batch left behind must not matter.
        found = fed_in_rows(engine, list(chunks(seed)))
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() < 1e-4


@pytest.mark.parametrize("name", FUSED_AND_WRITTEN)
def test_a_row_is_what_it_is_alone_whatever_fills_up_the_others(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    engine = ONNX.open(lowered(models(name), tmp_path / "engine"), "fp32")
    batch = list(chunks())
    together = fed_in_rows(engine, batch)
    for row in range(3):
        alone = fed_in_rows(engine, [(ids[row : row + 1, : lengths[row]], [lengths[row]]) for ids, lengths in batch])
        for one, other in zip(together[row::3], alone, strict=True):
            assert np.abs(one - other).max() < 1e-4


@pytest.mark.parametrize("name", FUSED_AND_WRITTEN)
def test_a_row_may_fill_the_context_while_others_go_on_and_not_exceed_it(
    name: str, models: Callable[[str], ModelFolder], tmp_path: Path
) -> None:
    model = models(name)
    engine = ONNX.open(lowered(model, tmp_path / "engine"), "fp32")
    rng = np.random.default_rng(5)
    first, then = rng.integers(0, 128, (2, CONTEXT - 3)), rng.integers(0, 128, (2, 6))
    pieces = [(first, [CONTEXT - 3, 4]), (then, [3, 6])]
    wanted = fed_in_rows(load_backend("torch").open(model.path, "fp32"), pieces)
    for one, other in zip(fed_in_rows(engine, pieces), wanted, strict=True):
        assert np.abs(one - other).max() < 1e-4
    with pytest.raises(BadInput, match=f"a row of {CONTEXT + 1} tokens exceeds the context of {CONTEXT}"):
        engine.feed(then, np.array([1, 1]))


def masked_logits(folder: Path, ids: Ids, mask: Ids, steps: int) -> list[np.ndarray]:
    """Logits of the plain graph for a padded batch, then of its last ids one by one, as onnxruntime-genai feeds it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    cache = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found, begin = [], 0
    for end in range(ids.shape[1] - steps, ids.shape[1] + 1):
        inputs = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], **cache}
        logits, *present = session.run(None, inputs)
        cache, begin = dict(zip(cache, present, strict=True)), end
        found.append(logits)
    return found


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("head_dim", [16, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_attention_mask_with_zeros_on_either_side_is_obeyed(
    side: str, head_dim: int, window: int | None, tmp_path: Path
) -> None:
    model = save_random_model(tmp_path / "model", "mistral", head_dim=head_dim, sliding_window=window)
    folder, lengths, steps = lowered(model, tmp_path / "engine"), (20, 13, 1), 5
    rng = np.random.default_rng(7)
    ids, mask = rng.integers(0, 128, (3, 20 + steps)), np.ones((3, 20 + steps), np.int64)
    rows = []
    for row, length in enumerate(lengths):
        gap = slice(0, 20 - length) if side == "left" else slice(length, 20)
        mask[row, gap] = 0
        rows.append(np.delete(ids[row], np.arange(20)[gap]))
    found = np.concatenate(masked_logits(folder, ids, mask, steps), axis=1)
    reference = load_backend("torch").open(model.path, "fp32")
    for row, real in enumerate(rows):
        reference.reset()
        wanted = reference.feed(real[None])[0]
        assert np.abs(found[row][mask[row] == 1] - wanted).max() < 1e-4
