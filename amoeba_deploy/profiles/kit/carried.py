"""The part of this package that a kit carries: what the runner and the engines' openers import, and no more."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import amoeba_deploy

PACKAGE = "amoeba_deploy"
_ROOT = Path(amoeba_deploy.__file__).parent.parent
_RUNNER = f"{PACKAGE}.profiles.kit.runner"
_WHOLE = (f"{PACKAGE}.profiles.kit.", f"{PACKAGE}.profiles.measure", f"{PACKAGE}.profiles.machine")
"""Modules of which imports inside functions are followed too: these functions run on the device."""


def carried_files(flows: Sequence[str]) -> dict[str, Path]:
    """The files to carry for some flows, by their paths in the kit's package folder, in order.

    All imports at the top of modules are followed from the runner and the flows' backends on; those inside functions
    only in what runs on the device. Lowering, whose imports stay behind, does not run there.
    """
    folders = [f"{PACKAGE}.backends.{flow.replace('-', '_')}" for flow in flows]
    found: dict[str, Path] = {}
    left = [_RUNNER, *folders]
    while left:
        module = left.pop()
        file = _file_of(module)
        if module in found or file is None:
            continue
        found[module] = file
        left.append(module.rpartition(".")[0])
        left += _imports(module, file, inside=module.startswith((*_WHOLE, *folders)))
    return {file.relative_to(_ROOT).as_posix(): file for file in sorted(found.values())}


def _file_of(module: str) -> Path | None:
    if module.partition(".")[0] != PACKAGE:
        return None
    path = _ROOT.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def _imports(module: str, file: Path, inside: bool) -> Iterator[str]:
    """Names that a module imports, some of which are no modules; of ``if TYPE_CHECKING`` none."""
    left: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"), module)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef) and not inside:
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)
        left += ast.iter_child_nodes(node)
