"""Devices: what is known of each, figure by figure, with the source of every figure.

The catalogue is the folder ``devices`` beside this module, one TOML file a device. A device of your own is such a file
anywhere: its path stands wherever a device's name does. The device ``local`` is the machine that this runs on; its
architecture and memory are read from the machine, and its speed is left to ``amoeba profile``.

Files are checked whole when they are loaded: a missing or unknown key, a wrong unit, a value that makes no sense is
refused with the file's name and the key. docs/devices.md describes the format.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput, LatencyUnknown

DEVICE_FORMAT = "amoeba.device/1"
LOCAL = "local"
CONFIDENCES = ("measured", "data sheet", "derived", "secondary", "assumed")

_CATALOGUE = Path(__file__).parent / "devices"
_UNITS: dict[str, dict[str, float]] = {
    "memory": {"B": 1, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30},
    "bandwidth": {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "GiB/s": 2**30},
    "floating-point rate": {"GFLOP/s": 1e9, "TFLOP/s": 1e12},
    "integer rate": {"GOPS": 1e9, "TOPS": 1e12},
    "share": {"ratio": 1},
    "time": {"us": 1e-3, "ms": 1, "s": 1e3},
}
_FACTORS = {unit: factor for units in _UNITS.values() for unit, factor in units.items()}


@dataclass(frozen=True)
class Figure:
    """One number, its unit, where it comes from, and how far to trust it (one of ``CONFIDENCES``)."""

    value: float
    unit: str
    source: str
    confidence: str

    @property
    def base(self) -> float:
        """The value in bytes, bytes a second, operations a second, milliseconds, or as a plain ratio."""
        return self.value * _FACTORS[self.unit]


@dataclass(frozen=True)
class FlowPreference:
    """A flow that a device prefers, the precision to use there, and what each block and each step costs besides."""

    flow: str
    precision: str
    block_overhead: Figure
    fixed_overhead: Figure


@dataclass(frozen=True)
class Device:
    """One device; figures that are not known are None, or missing from ``compute``."""

    name: str
    description: str
    architecture: str
    memory_total: Figure
    memory_visible: Figure
    bandwidth: Figure | None
    compute: Mapping[str, Figure] = field(hash=False)
    efficiency_bandwidth_full: Figure | None
    efficiency_bandwidth_quantised: Figure | None
    efficiency_compute: Figure | None
    flows: tuple[FlowPreference, ...]

    def preference(self, flow: str) -> FlowPreference:
        """What the device's file says of a flow.

        Raises:
            LatencyUnknown: the file does not list the flow.
        """
        for entry in self.flows:
            if entry.flow == flow:
                return entry
        listed = ", ".join(entry.flow for entry in self.flows)
        raise LatencyUnknown(
            f"the device '{self.name}' lists no flow '{flow}', so nothing is known of its speed there; "
            f"it lists {listed}: choose one of these, or measure with amoeba profile"
        )


def device_names() -> tuple[str, ...]:
    """The names in the catalogue, sorted; no file is opened."""
    return tuple(sorted(path.stem for path in _CATALOGUE.glob("*.toml")))


def load_device(name_or_path: str) -> Device:
    """A device of the catalogue by its name, or your own by the path of its .toml file.

    Raises:
        BadInput: no device has that name, or the file is unreadable, damaged or incomplete.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.name != name_or_path:
        return _device(_read(path), str(path))
    names = device_names()
    if name_or_path not in names:
        raise BadInput(f"'{name_or_path}' is not a device; {_hint(name_or_path.lower(), names)}")
    path = _CATALOGUE / f"{name_or_path}.toml"
    table = _read(path)
    if name_or_path == LOCAL:
        table |= _this_machine()
    return _device(table, str(path))


def _hint(name: str, names: tuple[str, ...]) -> str:
    # Similarity alone would answer 'h100' with 'h200' and miss 'h100-sxm'.
    close = [known for known in names if name and name in known] or difflib.get_close_matches(name, names, 1)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"choose one of {', '.join(names)}, or give the path of your own device's .toml file"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not valid TOML ({error})") from None


def _this_machine() -> dict[str, Any]:
    import platform

    import psutil

    # The memory installed, not what is free just now: the same search must give the same shape a minute later.
    memory = {
        "value": psutil.virtual_memory().total / 2**30,
        "unit": "GiB",
        "source": "the operating system",
        "confidence": "measured",
    }
    return {"architecture": platform.machine() or "unknown", "memory": {"total": memory, "visible": memory}}


def _device(table: dict[str, Any], where: str) -> Device:
    if table.get("format") != DEVICE_FORMAT:
        raise BadInput(
            f"{where}: has format {table.get('format')!r} where {DEVICE_FORMAT!r} was expected; "
            f"this version reads no other"
        )
    texts = ("name", "description", "architecture")
    _check_keys(table, where, ("format", *texts, "memory", "flows"), ("bandwidth", "compute", "efficiency"))
    memory = _figures(table, "memory", where, {"total": "memory", "visible": "memory"})
    if memory["visible"].base > memory["total"].base:
        raise BadInput(f"{where}: memory.visible exceeds memory.total; give what programs can use, at most all of it")
    bandwidth = _figures(table, "bandwidth", where, {"peak": "bandwidth"}) if "bandwidth" in table else {}
    compute = _compute(table, where) if "compute" in table else {}
    efficiency = _efficiency(table, where, bool(bandwidth), bool(compute))
    return Device(
        **{key: _text(table, key, where) for key in texts},
        memory_total=memory["total"],
        memory_visible=memory["visible"],
        bandwidth=bandwidth.get("peak"),
        compute=compute,
        efficiency_bandwidth_full=efficiency.get("bandwidth_full"),
        efficiency_bandwidth_quantised=efficiency.get("bandwidth_quantised"),
        efficiency_compute=efficiency.get("compute"),
        flows=_flows(table["flows"], where),
    )


def _compute(table: dict[str, Any], where: str) -> dict[str, Figure]:
    optional = {"fp32": "floating-point rate", "int8": "integer rate"}
    return _figures(table, "compute", where, {"fp16": "floating-point rate"}, optional)


def _efficiency(table: dict[str, Any], where: str, bandwidth: bool, compute: bool) -> dict[str, Figure]:
    """The shares of the peaks that are reached; every peak that the file gives needs its own."""
    kinds = {"bandwidth_full": "share", "bandwidth_quantised": "share"} if bandwidth else {}
    if compute:
        kinds["compute"] = "share"
    return _figures(table, "efficiency", where, kinds)


def _flows(entries: Any, where: str) -> tuple[FlowPreference, ...]:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"{where}: flows must be one or more [[flows]] tables, in order of preference")
    found = tuple(_flow(entry, f"{where}: flows[{index}]") for index, entry in enumerate(entries))
    names = [entry.flow for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{where}: lists the flow '{name}' twice; keep the one with the precision to prefer")
    return found


def _flow(entry: dict[str, Any], where: str) -> FlowPreference:
    _check_keys(entry, where, ("flow", "precision", "block_overhead", "fixed_overhead"))
    return FlowPreference(
        _text(entry, "flow", where),
        _text(entry, "precision", where),
        _figure(entry["block_overhead"], f"{where}: block_overhead", "time"),
        _figure(entry["fixed_overhead"], f"{where}: fixed_overhead", "time"),
    )


def _figures(
    table: dict[str, Any], section: str, where: str, required: dict[str, str], optional: dict[str, str] | None = None
) -> dict[str, Figure]:
    """The figures of one section, each of the kind that is given for its key."""
    kinds = required | (optional or {})
    values = table.get(section, {})
    if not isinstance(values, dict):
        raise BadInput(f"{where}: {section} must be a table of figures")
    _check_keys(values, f"{where}: [{section}]", tuple(required), tuple(optional or ()))
    return {key: _figure(value, f"{where}: {section}.{key}", kinds[key]) for key, value in values.items()}


def _figure(table: Any, where: str, kind: str) -> Figure:
    if not isinstance(table, dict):
        raise BadInput(f"{where} must be a table with value, unit, source and confidence")
    _check_keys(table, where, ("value", "unit", "source", "confidence"))
    figure = Figure(table["value"], *(_text(table, key, where) for key in ("unit", "source", "confidence")))
    if figure.unit not in _UNITS[kind]:
        raise BadInput(f"{where} has unit '{figure.unit}', where a {kind} belongs: {', '.join(_UNITS[kind])}")
    if figure.confidence not in CONFIDENCES:
        raise BadInput(f"{where} has confidence '{figure.confidence}'; it is one of {', '.join(CONFIDENCES)}")
    _check_value(table["value"], where, kind)
    return figure


def _check_value(value: Any, where: str, kind: str) -> None:
    # The bounds also refuse inf and nan, which TOML can write, and keep every product within a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e15 < value < 1e15:
        raise BadInput(f"{where} has value {value!r}, where a number belongs")
    if value < 0 or (value == 0 and kind != "time"):
        raise BadInput(f"{where} has value {value!r}; it must be {'at least' if kind == 'time' else 'more than'} 0")
    if kind == "share" and value > 1:
        raise BadInput(f"{where} has value {value!r}; a share of the peak is at most 1")


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{where}: {key} is {value!r}, where a text belongs")
    return value


def _check_keys(table: dict[str, Any], where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    missing = [key for key in required if key not in table]
    if missing:
        raise BadInput(f"{where}: lacks {', '.join(missing)}; docs/devices.md describes the format")
    unknown = [key for key in table if key not in required and key not in optional]
    if unknown:
        raise BadInput(
            f"{where}: has unknown key {', '.join(map(repr, unknown))}; docs/devices.md describes the format"
        )
