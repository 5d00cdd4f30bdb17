"""Amoeba: derive a subnet of any depth and width from one checkpoint, and build an engine of it for a device.

Data flows one way through the modules: checkpoint -> shape -> plan -> tensors -> model folder -> engine ->
measurement -> table -> search -> bundle. A module imports only from what stands before it on that line, and heavy
libraries (torch, transformers, onnxruntime) are imported inside the functions that use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amoeba_deploy.api import OneForAll

__all__ = ["open"]
__version__ = "0.1.0"


def open(path: str | Path | None = None) -> OneForAll:  # noqa: A001 - amoeba_deploy.open, as others' open
    """Open a one-for-all checkpoint, the one that ships in the package where no path is given.

    ``amoeba_deploy.open("checkpoint").extract("24x0.75", "subnet")`` writes a subnet;
    ``amoeba_deploy.open("checkpoint").extract("24x0.75")`` gives it as a transformers model.

    Raises:
        BadInput: it is missing or damaged, or its base model is not the one that it was made for.
    """
    from amoeba_deploy.api import open_one_for_all

    return open_one_for_all(None if path is None else Path(path))
