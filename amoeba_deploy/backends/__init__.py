"""Backends: one module or folder an engine, all behind the small interface of ``backends.backend``.

Every module here that is not part of the interface is an engine's: it defines ``BACKEND``, and its name with hyphens
is the flow. Other packages add engines through the entry point group ``amoeba_deploy.backends``; docs/backends.md is
the recipe for both.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules

from amoeba_deploy.backends.backend import Backend
from amoeba_deploy.backends.takes import Takes
from amoeba_deploy.errors import AmoebaError, BadInput

GROUP = "amoeba_deploy.backends"
_INTERFACE = {"backend", "takes", "conformance"}


@cache
def _own_modules() -> dict[str, str]:
    names = [module.name for module in iter_modules(__path__) if module.name not in _INTERFACE]
    return {name.replace("_", "-"): name for name in sorted(names)}


def _others() -> dict[str, EntryPoint]:
    """Engines of other packages; none replaces one of our own."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _own_modules()}


ALL = "all"
"""What stands for every flow where flows are named."""


def flow_names() -> tuple[str, ...]:
    """The flows that this installation can lower to."""
    return (*_own_modules(), *sorted(_others()))


def load_backend(flow: str) -> Backend:
    """The backend of a flow; its engine's libraries are not imported yet.

    Raises:
        BadInput: no such flow is known.
        AmoebaError: another package offers the flow, and what it offers cannot be loaded or is no backend.
    """
    module = _own_modules().get(flow)
    if module is not None:
        found = import_module(f"{__name__}.{module}").BACKEND
        assert isinstance(found, Backend)
        return found
    point = _others().get(flow)
    if point is None:
        known = flow_names()
        close = difflib.get_close_matches(flow, known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        if flow == ALL:
            hint = "; 'profile' and 'export' alone take all of them by this name, and no others beside it"
        raise BadInput(f"'{flow}' is not a flow; known are {', '.join(known)}{hint}")
    return _loaded(point)


def takes_of(flow: str) -> Takes:
    """Which subnets the engine of a flow takes; raises BadInput where none of that name is known."""
    return load_backend(flow).takes


def _loaded(point: EntryPoint) -> Backend:
    package = point.dist.name if point.dist else point.value
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # whatever another package's import raises
        raise AmoebaError(f"the flow '{point.name}' of {package} cannot be loaded: {error!r:.200}") from None
    if not isinstance(found, Backend) or found.flow != point.name:
        raise AmoebaError(f"the flow '{point.name}' of {package} is no amoeba_deploy Backend of that name")
    return found
