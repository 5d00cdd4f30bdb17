"""What the means of ``quality.json`` are of: ``quality.safetensors``, so that shapes can be compared in pairs.

``losses`` is f32 [rows of quality.json, rows of text], ``right`` u8 [rows of quality.json, questions]. Both keep the
order of ``quality.json``; a checkpoint without the file has means and no comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amoeba_deploy.errors import BadInput
from amoeba_deploy.tensors import NUMPY_OF, Array, array_source, read_header, write_tensors

PAIRS = "quality.safetensors"
LOSSES, RIGHT = "losses", "right"
_ROUNDING = 1e-5
"""quality.json holds six decimals of a mean."""

Losses = NDArray[np.float32]
Right = NDArray[np.uint8]


def write_pairs(folder: Path, losses: Sequence[Losses | None], right: Sequence[Right | None]) -> None:
    """Write the file where the losses of every row are known, with the answers where all of those are."""
    if any(each is None for each in losses):
        return
    tensors = {LOSSES: array_source(np.stack([each for each in losses if each is not None]), "F32")}
    answers = [each for each in right if each is not None and len(each)]
    if len(answers) == len(losses):
        tensors[RIGHT] = array_source(np.stack(answers), "U8")
    write_tensors(folder / PAIRS, tensors)


def read_pairs(
    folder: Path, means: Sequence[float], questions: Sequence[int]
) -> tuple[list[Losses | None], list[Right | None]]:
    """Losses and answers of every row, None where the folder does not hold them.

    ``means`` and ``questions`` are the losses and the numbers of questions of quality.json.

    Raises:
        BadInput: the file is damaged, or belongs to another quality.json.
    """
    file, nothing = folder / PAIRS, [None] * len(means)
    if not file.exists():
        return list(nothing), list(nothing)
    arrays = _arrays(file, len(means))
    losses, right = arrays.get(LOSSES), arrays.get(RIGHT)
    own = losses is not None and np.allclose(losses.mean(axis=1, dtype=np.float64), means, rtol=0, atol=_ROUNDING)
    if losses is None or not own or (right is not None and set(questions) != {right.shape[1]}):
        raise BadInput(f"{file}: does not belong to the quality.json beside it; measure quality again, or remove it")
    return list(losses), list(nothing) if right is None else list(right)


def _arrays(file: Path, count: int) -> dict[str, Array]:
    """The tensors of the file that have a row for each of ``count``; none where one has another form."""
    infos, _ = read_header(file)
    data = file.read_bytes()  # not mapped: a file that is cut short later would end the process; it is small
    wanted = {LOSSES: "F32", RIGHT: "U8"}
    found: dict[str, Array] = {}
    for name, info in infos.items():
        if wanted.get(name) != info.dtype or len(info.shape) != 2 or info.shape[0] != count or not info.shape[1]:
            return {}
        found[name] = np.frombuffer(data[info.offset : info.offset + info.length], NUMPY_OF[info.dtype]).reshape(
            info.shape
        )
    return found
