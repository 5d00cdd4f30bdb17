"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from amoeba_deploy.errors import BadInput
from amoeba_deploy.shape import parse_width

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
QUANTITY_NAMES = ("tpot", "ttft", "e2e", "memory", "size", "loss")
"""What a front may weigh."""
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Quantity(click.ParamType[float]):
    """A positive number with a unit."""

    units: dict[str, float]
    example = ""
    scale = 1.0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([A-Za-z]+)\s*", str(value))
        if match is None or match[2] not in self.units:
            units = ", ".join(self.units)
            self.fail(f"'{value}' is not a number with one of the units {units}; write {self.example}", param, ctx)
        # The units first: a number of milliseconds must stay what was written.
        found = float(match[1]) * (self.units[match[2]] / self.scale)
        if found <= 0:
            self.fail(f"'{value}' must be more than zero; write {self.example}", param, ctx)
        return found


class Latency(_Quantity):
    """A latency with its unit, in milliseconds."""

    name = "latency"
    units = {k: _SECONDS[k] for k in ("us", "ms", "s")}  # noqa: RUF012
    example = "40ms"
    scale = 1e-3


class DeviceLatency(click.ParamType[tuple[str, float]]):
    """A latency in milliseconds, for all devices (then the first part is empty) or, as DEVICE=LATENCY, for one."""

    name = "latency"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        device, _, latency = str(value).rpartition("=")
        return device, Latency().convert(latency, param, ctx)


class Front(click.ParamType[tuple[str, str]]):
    """Two different quantities separated by a comma."""

    name = "front"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        parts = comma_list(str(value))
        if len(set(parts)) != 2 or len(parts) != 2 or not set(parts) <= set(QUANTITY_NAMES):
            self.fail(f"'{value}' is not two of {', '.join(QUANTITY_NAMES)}; write such as size,loss", param, ctx)
        return parts[0], parts[1]


class Seconds(_Quantity):
    """A time span with its unit, in seconds."""

    name = "time"
    units = {k: _SECONDS[k] for k in ("s", "m", "h")}  # noqa: RUF012
    example = "5m"


class Days(_Quantity):
    """A long time span with its unit, in seconds."""

    name = "time"
    units = {"h": 3600.0, "d": 86400.0, "w": 604800.0}  # noqa: RUF012
    example = "30d"


class Memory(_Quantity):
    """An amount of memory with its unit, in bytes."""

    name = "size"
    units = dict(_BYTES)  # noqa: RUF012
    example = "8GB"


class Setting(click.ParamType[tuple[str, str]]):
    """A setting of an engine's own, as NAME=VALUE."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, sign, found = str(value).partition("=")
        if not sign or not name or not found:
            self.fail(f"'{value}' is not NAME=VALUE; write such as --set tp=2", param, ctx)
        return name, found


class Widths(click.ParamType[tuple[Fraction, ...]]):
    """Widths separated by commas, as exact ratios."""

    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Fraction, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_width(part) for part in comma_list(str(value)))
        except BadInput as error:
            self.fail(str(error), param, ctx)


class Workers(click.ParamType[int]):
    """``ray`` or ``ray:N``: how many workers of a Ray cluster; 0 stands for one on each of its machines."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"ray(?::([1-9]\d*))?", str(value))
        if match is None:
            self.fail(f"'{value}' is not known; write ray, or ray:4 for four workers", param, ctx)
        return int(match[1] or 0)


def comma_list(text: str | None) -> list[str]:
    """The parts of a text separated by commas; none where the option was left out."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _all(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path), required=False)

output_options = _all(
    click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object."),
    click.option("--quiet", is_flag=True, help="No remarks and no progress."),
)

base_options = _all(
    click.option("--name", help="What derived models call it.  [default: the model's name]"),
    click.option("--include-base", is_flag=True, help="Copy the base model into the checkpoint."),
)

quality_options = _all(
    click.option("--quality-text", type=click.Path(path_type=Path), help="Text to measure every shape's loss on."),
    click.option("--quality-tasks", type=click.Path(path_type=Path), help="Questions to measure accuracy on."),
)

cut_options = _all(
    click.option(
        "--policy",
        type=click.Choice(["uniform", "adaptive"]),
        default="uniform",
        show_default=True,
        help="How widths are spread over blocks: alike, or by one threshold over all.",
    ),
    click.option(
        "--bias",
        type=click.Choice(["on", "off"]),
        default="off",
        show_default=True,
        help="Whether subnets carry biases that compensate for what is removed.",
    ),
)

settings_option = click.option(
    "--set", "settings", type=Setting(), multiple=True, metavar="NAME=VALUE", help="A setting of the engine's own."
)

measured_shapes_option = click.option(
    "--shapes", default="spread", show_default=True, help="spread (a dozen), corners, grid, or shapes with commas."
)

plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Speak HTTP without TLS to a registry that is not on this machine."
)

workload_options = _all(
    click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."),
    click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens."),
    click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="Generated tokens."),
    click.option(
        "--context", type=click.IntRange(1), help="Positions to provide for.  [default: the model's, max 2048]"
    ),
)

limit_options = _all(
    click.option(
        "--metric",
        type=click.Choice(["tpot", "ttft", "e2e"]),
        default="tpot",
        show_default=True,
        help="What --latency bounds.",
    ),
    click.option("--memory", type=Memory(), help="Budget with its unit, such as 8GB; never above the device's own."),
    click.option("--tpot", type=Latency(), help="Further limit on time per output token."),
    click.option("--ttft", type=Latency(), help="Further limit on time to first token."),
    click.option("--e2e", type=Latency(), help="Further limit on the time of the whole workload."),
    click.option("--size", type=Memory(), help="Further limit on the engine's files, such as 500MB."),
    click.option(
        "--max-loss", type=click.FloatRange(min=0, min_open=True), help="Further limit on loss, where it is known."
    ),
    click.option("--flow", help="Flows, separated by commas.  [default: the device's first that works here]"),
    click.option("--precision", help="Precisions, separated by commas.  [default: the device's]"),
)

search_options = _all(
    click.option(
        "--device",
        "devices",
        required=True,
        multiple=True,
        help="A name of 'amoeba devices', or the path of your own device file.",
    ),
    click.option(
        "--latency",
        "latencies",
        type=DeviceLatency(),
        multiple=True,
        help="Budget with its unit, such as 40ms; of one of several devices NAME=40ms.",
    ),
    limit_options,
    click.option(
        "--table", type=click.Path(path_type=Path), multiple=True, help="Latency table to use; several are merged."
    ),
    click.option("--measured-only", is_flag=True, help="Refuse estimates."),
    settings_option,
)
