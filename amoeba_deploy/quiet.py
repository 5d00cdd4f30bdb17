"""Imports that keep standard error for what the user is to read.

Where torchao is installed (ExecuTorch brings it), transformers imports it with every model, although no dense folder
needs it: that takes more than a second, and warns of libraries for other machines. And what imports torchao with reason
need not repeat those warnings.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_NOISE = {
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("Calling register_constant() on Enum subclasses is deprecated",),
}
"""Loggers, and parts of the messages of theirs that no user can act on."""


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _NOISE[record.name])


@cache
def quiet_imports() -> None:
    """Import transformers' models without torchao; call it before a model is loaded, or torchao is imported."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_of_use)
    if "torchao" in sys.modules or "transformers.quantizers" in sys.modules:
        return
    from transformers import utils
    from transformers.utils import import_utils

    asked = import_utils.is_torchao_available
    places = (utils, import_utils)
    for module in places:
        module.is_torchao_available = lambda *_, **__: False
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        for module in places:
            module.is_torchao_available = asked


@contextmanager
def quiet_data(*loggers: str) -> Iterator[None]:
    """While data sets are read, the library's bars and remarks, and those of other ``loggers``, stay off the terminal.

    Raises:
        ImportError: the library ``datasets`` is not installed.
    """
    import datasets.utils as library
    import huggingface_hub.utils as hub

    found = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", *loggers)]
    levels = [logger.level for logger in found]
    bars = [each for each in (library, hub) if not each.are_progress_bars_disabled()]
    try:
        for logger in found:
            logger.setLevel(logging.CRITICAL)
        for each in bars:
            each.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
        for each in bars:
            each.enable_progress_bars()
