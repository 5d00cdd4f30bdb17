"""Shapes: how deep and how wide a subnet is, written ``24x0.75``.

A shape has a depth (blocks kept), a width (the exact ratio of heads and neurons kept in each kept block) and the
policy by which that width is spread over the blocks. It does not say *which* units are kept; that is a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from amoeba_deploy.errors import BadInput

Policy = Literal["uniform", "adaptive"]

_WIDTH = re.compile(r"\d{1,20}(\.\d{0,60})?|\.\d{1,60}|\d{1,20}/\d{1,20}|\d(\.\d{1,20})?e-\d{1,2}")
_SHAPE = re.compile(r"(\d+)x(\d*\.?\d+|\d+/\d+)")


def kept_units(units: int, ratio: Fraction, multiple: int = 1) -> int:
    """How many of ``units`` a width keeps, in multiples of ``multiple``.

    floor(ratio * units / multiple + 1/2) * multiple in exact arithmetic, clamped to [multiple, units]; all units at
    width 1 and where there are fewer than ``multiple``.

    >>> kept_units(11008, Fraction(3, 4), 32), kept_units(20, Fraction(1, 2), 32)
    (8256, 20)
    """
    if ratio == 1 or units < multiple:
        return units
    rounded = (ratio * units / multiple + Fraction(1, 2)).__floor__() * multiple
    return min(max(rounded, multiple), units)


def nearest_count(counts: Sequence[int], units: int, ratio: Fraction) -> int:
    """The legal number of units nearest to a ratio of ``units``; of two as near the larger. All counts are legal.

    >>> nearest_count((1, 2, 3, 4), 4, Fraction(5, 8))
    3
    """
    return min(counts, key=lambda count: (abs(count - ratio * units), -count))


def parse_width(text: str) -> Fraction:
    """The exact ratio written as a decimal or a fraction; it must lie in (0, 1].

    >>> parse_width("0.75"), parse_width("2/3")
    (Fraction(3, 4), Fraction(2, 3))
    """
    try:
        if _WIDTH.fullmatch(text.strip()) is None:  # Fraction itself would work for hours on an exponent
            raise ValueError
        ratio = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise BadInput(f"the width '{text}' is not a number; write a ratio such as 0.75 or 3/4") from None
    if not 0 < ratio <= 1:
        raise BadInput(f"the width {text} is not in (0, 1]; write a ratio such as 0.75")
    return ratio


def format_width(ratio: Fraction) -> str:
    """The shortest exact spelling: a decimal where one exists (``0.75``), else a fraction (``2/3``).

    >>> format_width(Fraction(3, 4)), format_width(Fraction(2, 3))
    ('0.75', '2/3')
    """
    rest = ratio.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{ratio.numerator}/{ratio.denominator}"
    digits = 0
    while (ratio * 10**digits).denominator != 1:
        digits += 1
    return f"{float(ratio):.{digits}f}" if digits else str(int(ratio))


def shape_text(shape: Mapping[str, Any]) -> str:
    """A shape that JSON holds, as users write it."""
    policy = "" if shape.get("policy", "uniform") == "uniform" else f":{shape['policy']}"
    return f"{shape['depth']}x{format_width(parse_width(str(shape['width'])))}{policy}"


def width_to_json(ratio: Fraction) -> float | str:
    """A width as JSON files hold it: a number where it has a decimal spelling, else a fraction as text."""
    text = format_width(ratio)
    return text if "/" in text else float(text)


@dataclass(frozen=True, order=True)
class Shape:
    """A depth in blocks, a width in (0, 1] as an exact ratio, and the policy that spreads the width."""

    depth: int
    width: Fraction
    policy: Policy = "uniform"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise BadInput(f"the depth {self.depth} is below 1; a subnet keeps at least one block")
        if not 0 < self.width <= 1:
            raise BadInput(f"the width {self.width} is not in (0, 1]; write a ratio such as 0.75")

    @classmethod
    def parse(cls, text: str, policy: Policy = "uniform") -> Shape:
        """Read ``DEPTHxWIDTH``, such as ``24x0.75``.

        >>> shape = Shape.parse("24x0.75")
        >>> shape.depth, shape.width, str(shape)
        (24, Fraction(3, 4), '24x0.75')

        Raises:
            BadInput: the text is not of that form, or depth or width is out of range.
        """
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            raise BadInput(f"'{text}' is not a shape; write DEPTHxWIDTH such as 24x0.75, or the path of a plan file")
        return cls(int(match[1]), parse_width(match[2]), policy)

    def to_json(self) -> dict[str, int | float | str]:
        """depth, width and policy, as all JSON files and outputs hold them."""
        return {"depth": self.depth, "width": width_to_json(self.width), "policy": self.policy}

    def __str__(self) -> str:
        return f"{self.depth}x{format_width(self.width)}"


def _shortest_decimal(low: Fraction, high: Fraction, target: Fraction) -> Fraction:
    """The decimal with the fewest digits in [low, high) and (0, 1); among equals the one closest to ``target``."""
    digits = 1
    while True:
        scale = 10**digits
        first = max(-(-low * scale // 1), 1)
        last = min(-(-high * scale // 1) - 1, scale - 1)
        if first <= last:
            nearest = min(max(int(target * scale + Fraction(1, 2)), int(first)), int(last))
            return Fraction(nearest, scale)
        digits += 1


Kept = Callable[[Fraction], tuple[int, ...]]
"""How many units of each kind a width keeps; the last kind is the one of the most units."""


def distinct_widths(kept: Kept, edges: Iterable[Fraction], minimum: Fraction) -> list[Fraction]:
    """All widths from ``minimum`` to 1 that differ in what they keep, widest first.

    ``edges`` are the widths at which ``kept`` may change. Widths that keep the same numbers are one; it is named by
    its shortest decimal that keeps those numbers.
    """
    borders = sorted(edge for edge in {minimum, Fraction(1), *edges} if minimum <= edge <= 1)
    whole = kept(Fraction(1))
    named: dict[tuple[int, ...], Fraction] = {whole: Fraction(1)}
    for low, high in zip(borders, borders[1:]):  # noqa: B905, RUF007 - for kits' Python 3.9
        numbers = kept(low)
        if numbers not in named:
            named[numbers] = _shortest_decimal(low, high, Fraction(numbers[-1], whole[-1]))
    return sorted(named.values(), reverse=True)
