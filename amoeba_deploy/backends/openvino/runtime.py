"""OpenVINO's packages, imported without their telemetry.

``import openvino`` by itself builds a client id, writes it to ``~/intel`` and sends an event over the network (2026.4,
openvino/tools/ovc/__init__.py); NNCF does the same. Where ``openvino_telemetry`` cannot be imported both fall back on
stubs that do nothing, so it is hidden while they are imported.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

_TELEMETRY = "openvino_telemetry"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """What is imported meanwhile finds no ``openvino_telemetry``."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before


def load(package: str) -> ModuleType:
    """One of OpenVINO's packages, or NNCF."""
    with without_telemetry():
        return import_module(package)


@cache
def core() -> Any:
    """The one ``openvino.Core`` of this process."""
    return load("openvino").Core()


@contextmanager
def silenced() -> Iterator[None]:
    """NNCF logs tables and draws progress bars on standard output; results alone belong there."""
    import logging

    logger = logging.getLogger("nncf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
