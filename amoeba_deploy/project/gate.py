"""Gates: conditions such as ``tpot > 1.05 * baseline`` that let a build fail.

A condition compares quantities of a target (``tpot``, ``ttft``, ``e2e``, ``memory``, ``size``, ``loss``,
``perplexity``) with numbers and with ``baseline``, the same quantity of the stored figures. A latency is looked at
twice: as it was predicted, and as it was measured where it was. Measured latencies, and those interpolated from
measurements, are compared with a baseline only where both come from the same machines; estimates, sizes and quality
always are.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from amoeba_deploy.errors import BadInput

LATENCIES = ("tpot", "ttft", "e2e")
QUANTITIES = (*LATENCIES, "memory", "size", "loss", "perplexity")
BASELINE = "baseline"
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
"""To milliseconds and bytes."""
_NUMBER = re.compile(rf"(?<![\w.])(\d*\.?\d+)({'|'.join(sorted(_UNITS, key=len, reverse=True))})\b")
_TIME, _BYTES, _PLAIN = "a time, such as 40ms", "bytes, such as 8MB", "a plain number"
_KINDS = (
    dict.fromkeys(LATENCIES, _TIME) | dict.fromkeys(("memory", "size"), _BYTES) | {"loss": _PLAIN, "perplexity": _PLAIN}
)
_KINDS |= {unit: _TIME if unit.endswith("s") else _BYTES for unit in _UNITS}
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
LONGEST = 500
"""Characters of a condition."""


class _Unknown(Exception):
    """A value that is not known, or cannot be compared, and why."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a target: ``broken`` is None where there was nothing to compare."""

    target: str
    condition: str
    broken: bool | None
    said: str
    against_baseline: bool = False
    """Whether the condition compares with a baseline."""

    def to_json(self) -> dict[str, Any]:
        """The entry of ``build --json``."""
        return {"target": self.target, "condition": self.condition, "broken": self.broken, "said": self.said}


@dataclass(frozen=True)
class Gate:
    """A condition that lets a build fail where it holds."""

    condition: str

    @cached_property
    def _tree(self) -> ast.expr:
        text = _NUMBER.sub(lambda found: f"({found[1]} * {found[2]})", self.condition.strip())
        try:
            if len(self.condition) > LONGEST:
                raise SyntaxError
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._refused("cannot be read") from None
        self._check(tree)
        return tree

    def check(self) -> Gate:
        """The gate itself; raises BadInput where its condition cannot be read."""
        _ = self._tree
        return self

    def _refused(self, why: str) -> BadInput:
        return BadInput(
            f"the gate '{self.condition[:80]}' {why}; compare {', '.join(QUANTITIES)} with numbers or with baseline, "
            f"such as 'tpot > 1.05 * baseline'"
        )

    def _check(self, tree: ast.expr) -> None:
        """Only comparisons of sums and products, joined by and, or, not."""
        if isinstance(tree, ast.BoolOp):
            for part in tree.values:
                self._check(part)
        elif isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
            self._check(tree.operand)
        elif isinstance(tree, ast.Compare):
            names = self._terms(tree.left) | {name for part in tree.comparators for name in self._terms(part)}
            if any(type(op) not in _COMPARE for op in tree.ops):
                raise self._refused("compares by something else than >, >=, <, <=")
            quantities = names - {BASELINE, *_UNITS}
            if not quantities:
                raise self._refused("compares no quantity")
            if BASELINE in names and len(quantities) != 1:
                raise self._refused("does not say whose baseline it means, as it compares several quantities")
            of_baseline = _KINDS[min(quantities)]
            kinds = [self._kind(side, of_baseline) for side in (tree.left, *tree.comparators)]
            for first, second in itertools.pairwise(kinds):
                if first != second:
                    raise self._refused(f"compares {first} with {second}")
        else:
            raise self._refused("is no comparison")

    def _terms(self, tree: ast.expr) -> set[str]:
        """The names in a sum or product."""
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            return self._terms(tree.left) | self._terms(tree.right)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub | ast.UAdd):
            return self._terms(tree.operand)
        if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
            return set()
        if isinstance(tree, ast.Name) and tree.id in (*QUANTITIES, BASELINE, *_UNITS):
            return {tree.id}
        named = f"'{tree.id}'" if isinstance(tree, ast.Name) else "something"
        raise self._refused(f"has {named} that is no quantity")

    def _kind(self, tree: ast.expr, of_baseline: str) -> str:
        """What a sum or product is: a time, bytes, or a plain number."""
        if isinstance(tree, ast.UnaryOp):
            return self._kind(tree.operand, of_baseline)
        if isinstance(tree, ast.Constant):
            return _PLAIN
        if isinstance(tree, ast.Name):
            return of_baseline if tree.id == BASELINE else _KINDS[tree.id]
        assert isinstance(tree, ast.BinOp)
        left, right = self._kind(tree.left, of_baseline), self._kind(tree.right, of_baseline)
        if isinstance(tree.op, ast.Add | ast.Sub):
            if left != right:
                raise self._refused(f"adds {left} and {right}")
            return left
        if isinstance(tree.op, ast.Div) and left == right:
            return _PLAIN
        if right != _PLAIN and (left != _PLAIN or isinstance(tree.op, ast.Div)):
            raise self._refused(f"multiplies or divides {left} by {right}")
        return left if right == _PLAIN else right

    @property
    def needs_baseline(self) -> bool:
        """Whether it compares with a baseline."""
        return any(isinstance(node, ast.Name) and node.id == BASELINE for node in ast.walk(self._tree))

    def judge(self, target: str, figures: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Verdict:
        """Hold a target's figures against the condition, and against its stored figures where it speaks of them."""
        names = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        views = ("predicted", "measured") if names & set(LATENCIES) else ("predicted",)
        reasons, looked = [], []
        for view in views:
            if view == "measured" and figures.get("measured") is None:
                continue
            try:
                broken, values = _Judge(figures, baseline, view).holds(self._tree)
            except _Unknown as unknown:
                reasons.append(str(unknown))
                continue
            looked.append(values)
            if broken:
                return Verdict(target, self.condition, True, values, self.needs_baseline)
        why = list(dict.fromkeys(reasons))
        said = "; ".join([*looked, *why]) if looked else f"not compared: {'; '.join(why)}"
        return Verdict(target, self.condition, False if looked else None, said, self.needs_baseline)


class _Judge:
    """Evaluates a condition on one view of the figures: predicted latencies, or measured ones."""

    def __init__(self, figures: Mapping[str, Any], baseline: Mapping[str, Any] | None, view: str) -> None:
        self._figures, self._baseline, self._view = figures, baseline, view
        self._said: dict[str, str] = {}

    def holds(self, tree: ast.expr) -> tuple[bool, str]:
        """Whether the condition holds, and the values that it looked at."""
        found = self._truth(tree)
        return found, ", ".join(f"{name} {said}" for name, said in self._said.items())

    def _truth(self, tree: ast.expr) -> bool:
        if isinstance(tree, ast.BoolOp):
            return self._joined(tree)
        if isinstance(tree, ast.UnaryOp):
            return not self._truth(tree.operand)
        assert isinstance(tree, ast.Compare)
        sides = [tree.left, *tree.comparators]
        used = {node.id for side in sides for node in ast.walk(side) if isinstance(node, ast.Name)}
        names = used - {BASELINE, *_UNITS}
        values = [self._number(side, names) for side in sides]
        return all(_COMPARE[type(op)](*pair) for op, pair in zip(tree.ops, itertools.pairwise(values), strict=True))

    def _joined(self, tree: ast.BoolOp) -> bool:
        """Several conditions; one that is not known counts only where the others do not decide."""
        decides, unknown = isinstance(tree.op, ast.Or), None
        for part in tree.values:
            try:
                if self._truth(part) == decides:
                    return decides
            except _Unknown as error:
                unknown = error
        if unknown is not None:
            raise unknown
        return not decides

    def _number(self, tree: ast.expr, names: set[str]) -> float:
        if isinstance(tree, ast.BinOp):
            left, right = self._number(tree.left, names), self._number(tree.right, names)
            try:
                return _ARITHMETIC[type(tree.op)](left, right)
            except ZeroDivisionError:
                raise _Unknown("it divides by zero") from None
        if isinstance(tree, ast.UnaryOp):
            value = self._number(tree.operand, names)
            return -value if isinstance(tree.op, ast.USub) else value
        if isinstance(tree, ast.Constant):
            return float(tree.value)  # type: ignore[arg-type]  # a number, as was checked
        assert isinstance(tree, ast.Name)
        if tree.id in _UNITS:
            return _UNITS[tree.id]
        if tree.id != BASELINE:
            return self._value(tree.id, self._figures, "", note=tree.id)
        (name,) = names
        if self._baseline is None:
            raise _Unknown("no baseline is stored of this target")
        if name in LATENCIES:
            self._require_same_machines(name)
        return self._value(name, self._baseline, "the baseline's ", note="baseline")

    def _require_same_machines(self, name: str) -> None:
        new, old = self._figures.get(self._view) or {}, (self._baseline or {}).get(self._view) or {}
        if not old:
            raise _Unknown(f"the baseline has no {self._view} {name}")
        if new.get("machines") != old.get("machines"):
            raise _Unknown(f"the {self._view} {name} of the baseline is of another machine, or an estimate")

    def _value(self, name: str, figures: Mapping[str, Any], whose: str, note: str) -> float:
        found = _lookup(name, figures, self._view)
        if found is None:
            raise _Unknown(f"{whose}{name} is not known")
        view = f" ({self._view})" if name in LATENCIES else ""
        self._said[note] = f"{_text(name, found)}{view}"
        return found


def _lookup(name: str, figures: Mapping[str, Any], view: str) -> float | None:
    """A quantity of a target's figures: milliseconds, bytes, nats."""
    if name in LATENCIES:
        value = (figures.get(view) or {}).get(f"{name}_ms")
    elif name == "memory":
        value = (figures.get("predicted") or {}).get("memory_bytes")
    elif name == "size":
        value = figures.get("bytes")
    elif name == "loss":
        quality = figures.get("quality") or {}
        value = quality.get("value") if quality.get("metric") == "loss" else None
    else:
        value = figures.get("perplexity")
    return float(value) if isinstance(value, int | float) else None


def _text(name: str, value: float) -> str:
    if name in LATENCIES:
        return f"{value:.4g} ms"
    return f"{value / 1e6:.2f} MB" if name in ("memory", "size") else f"{value:.4f}"
