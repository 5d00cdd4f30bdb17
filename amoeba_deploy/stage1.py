"""Stage 1 as one step: from a model and a calibration text to a selection."""

from __future__ import annotations

import time
from pathlib import Path

from amoeba_deploy import __version__
from amoeba_deploy.depth import BlockRunner, cells, choose_blocks
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import SEQUENCE, file_digest, text_rows
from amoeba_deploy.importance import score_blocks
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import Selection

SAMPLES = 64


def default_minimum_depth(depth: int) -> int:
    """Half of the blocks, rounded up."""
    return -(-depth // 2)


def select(
    model: ModelFolder,
    calibration: Path,
    *,
    samples: int = SAMPLES,
    sequence: int = SEQUENCE,
    minimum_depth: int | None = None,
    keep_last: int = 1,
    progress: Progress,
) -> Selection:
    """Choose blocks by dynamic programming on loss, and score heads and neurons by FLAP, on one text.

    Args:
        model: the base model.
        calibration: a text file; its first ``samples * sequence`` tokens are used, in rows of ``sequence``.
        samples: rows of calibration text.
        sequence: tokens a row.
        minimum_depth: the smallest depth that subnets may have; half of the blocks where left out.
        keep_last: blocks at the end that are never removed.
        progress: told of every measurement.

    Raises:
        BadInput: the text is too short, or the depths asked for are impossible.
    """
    import torch

    began = time.perf_counter()
    sizes = model.architecture
    lowest = default_minimum_depth(sizes.depth) if minimum_depth is None else minimum_depth
    if not 1 <= lowest <= sizes.depth:
        raise BadInput(f"--min-depth {lowest} is not within 1..{sizes.depth}, the blocks of this model")
    removals = min(sizes.depth - lowest, sizes.depth - keep_last)
    if sequence > sizes.context or (sizes.sliding_window is not None and sequence > sizes.sliding_window):
        limit = min(sizes.context, sizes.sliding_window or sizes.context)
        raise BadInput(f"--sequence {sequence} exceeds the {limit} positions that the model attends to; ask for fewer")
    rows = torch.from_numpy(text_rows(calibration, model.tokenizer(), sequence, samples))
    loaded = load_torch_model(model.path)
    runner = BlockRunner(loaded, rows)
    full_loss = runner.loss(0, ())
    with progress.bar("depth", len(cells(sizes.depth, removals, keep_last))) as step:
        depths = choose_blocks(sizes.depth, removals, keep_last, full_loss, runner.loss, step)
    with progress.bar("width", -(-samples // 8)) as step:
        blocks = score_blocks(loaded, sizes, rows, step)
    facts = {
        "tool": f"amoeba-deploy {__version__}",
        "depth_method": "dp",
        "width_method": "flap",
        "metric": "loss",
        "keep_last": keep_last,
        "calibration": {
            "source": calibration.name,
            "digest": file_digest(calibration),
            "samples": samples,
            "sequence": sequence,
        },
        "evaluations": len(cells(sizes.depth, removals, keep_last)) + 1,
        "block_evaluations": runner.evaluations,
        "seconds": round(time.perf_counter() - began, 2),
    }
    return Selection(model.digest, depths, blocks, facts)
