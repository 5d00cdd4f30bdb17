"""Calibrated estimates: what measured tables of a flow say of a device or an architecture that nobody measured.

A measured time is the sum of the roofline's terms, each multiplied by a factor (``factors``). The factors of a flow in
a class of precisions, full or quantised, are fitted to the rows of each measured device: non-negative least squares of
the relative errors, beside what is assumed before any measurement, so that few rows move the factors only as far as
they must and rows that say nothing of a factor leave it as uncertain as it was.

Another device then has its own bandwidth, compute rate, efficiencies and assumed overheads, multiplied by the learnt
factors. Overheads are spent by the host that launches or dispatches, so they are taken to differ between devices as
their files assume: twice the assumed overhead on one device is twice the assumed one on the other.

What is used, the first that there is: tables of the device itself, under another workload or of other models; tables
of the same model on other devices; tables of other models there. The less alike, the wider the interval. Tables of
devices of another kind, such as a CPU's for a GPU, are not used: an engine runs other code there.

What comes out is an estimate and is called one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Backend
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.plan import NEURON_MULTIPLE, sized
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.curve import COVERED
from amoeba_deploy.profiles.device import Device, load_device
from amoeba_deploy.profiles.factors import (
    DEVICES,
    NINE_IN_TEN,
    PRIOR,
    SPREAD,
    UNCALIBRATED,
    Factors,
    Phase,
    Three,
    diagonal,
)
from amoeba_deploy.profiles.fitting import Sample, fitted
from amoeba_deploy.profiles.prediction import Interval, Prediction, reach
from amoeba_deploy.profiles.roofline import Terms, estimate, is_quantised, terms
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.sizes import sizes_of_table
from amoeba_deploy.profiles.statistics import percentile
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload

MODELS = 0.15
"""Spread that another architecture adds on the same device: larger matrices run nearer to the peak. The factors of two
Llamas of 27 and 50 million parameters, in three engines and precisions on one machine, differ by that much in logarithm
(root mean square, docs/devices.md)."""
PRECISIONS = 0.30
"""Spread that another precision of the class adds: the shares of the bandwidth that an engine reaches in int8 and int4,
in Q8_0 and Q4_K_M, in fp32 and bf16 differ by that much in logarithm (docs/engines.md, root mean square)."""
DEVICE_OVERHEADS = 0.42
"""Spread of an overhead between devices beyond what their files assume: nine in ten within a factor of two."""
PRIOR_DEVICES = 4
"""How many devices' worth of evidence the assumed spread between devices is."""


class Sizes(Protocol):
    """The sizes of a subnet: with every block as wide as the widest, and in runs of blocks that are alike."""

    @property
    def padded(self) -> Architecture: ...

    @property
    def parts(self) -> Sequence[Architecture]: ...


@dataclass(frozen=True)
class Estimator:
    """Gives the sizes of a subnet their estimate, with intervals; ``remark`` says by what it was calibrated."""

    device: Device
    flow: str
    precision: str
    storage: StorageFormat
    workload: Workload
    context: int
    factors: Factors
    remark: str
    rows: int = 0
    """Measurements that the factors were learnt from."""

    def __call__(self, sizes: Sizes) -> Prediction:
        """TPOT, TTFT and memory, all estimated."""
        device, workload, context = self.device, self.workload, self.context
        fixed = device, self.flow, self.precision, workload, context
        return estimate(sizes.padded, self.storage, *fixed, parts=tuple(sizes.parts), factors=self.factors)


def estimator(
    device: Device,
    flow: str,
    precision: str,
    storage: StorageFormat,
    workload: Workload,
    context: int,
    tables: Iterable[Table] = (),
    *,
    architecture: Architecture | None = None,
    devices: Mapping[str, Device] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Estimator:
    """What estimates a flow and precision on a device, calibrated by whatever tables say of it.

    Args:
        device: whose latencies are wanted.
        flow: the engine family.
        precision: one of its precisions.
        storage: how that stores weights.
        workload: batch, prompt and tokens.
        context: positions that the engine provides for, which memory is counted for.
        tables: measured ones, of any device and architecture; those that say nothing of this are passed over.
        architecture: the full model that is estimated; tables without sizes in their header are of use only for it.
        devices: devices by the names that tables give them, beside those of the catalogue.
        settings: of the engine's own that are not at their defaults; rows with others count only where none has these.

    Raises:
        LatencyUnknown: when called, where the device's bandwidth or compute rate is not known or it does not list the
            flow; a calibration does not help there.
    """
    made = Estimator(device, flow, precision, storage, workload, context, UNCALIBRATED, "")
    known = {device.name: device, **(devices or {})}
    evidence = [each for table in tables for each in _evidence(table, made, architecture, known, dict(settings or {}))]
    for level in _LEVELS:
        found = [each for each in evidence if level.takes(each, device.name)]
        if found:
            factors = _learnt(found, level)
            return replace(made, factors=factors, remark=_remark(made, found, level, factors), rows=_count(found))
    return replace(made, remark=_uncalibrated_remark(made))


@dataclass(frozen=True)
class _Evidence:
    """The rows of one table that say something, as terms of the roofline."""

    device: Device
    same_model: bool
    same_precision: bool
    rows: tuple[tuple[Terms, Row], ...]


@dataclass(frozen=True)
class _Level:
    """Which tables are used together, and what the estimate differs from them by."""

    same_device: bool
    same_model: bool | None
    """None: of any model."""
    words: str

    def takes(self, evidence: _Evidence, device: str) -> bool:
        alike = evidence.device.name == device
        return alike == self.same_device and self.same_model in (None, evidence.same_model)


_LEVELS = (
    _Level(True, None, "on this device"),
    _Level(False, True, "of this model on"),
    _Level(False, None, "of other models on"),
)


@cache
def _catalogued(name: str) -> Device | None:
    try:
        return load_device(name)
    except AmoebaError:
        return None


def device_kind(device: Device) -> str:
    """What runs the engines: ``sm`` of NVIDIA's GPUs, ``metal``, ``adreno``, or ``cpu``."""
    name = device.architecture.replace("_", "-").split("-")[0]
    return name if name in ("sm", "metal", "adreno") else "cpu"


def _evidence(
    table: Table, wanted: Estimator, architecture: Architecture | None, devices: Mapping[str, Device], settings: Any
) -> list[_Evidence]:
    """What a table says of a flow in the precision's class, by precision; nothing where it says nothing."""
    device = devices.get(table.device) or _catalogued(table.device)
    full = sizes_of_table(table, architecture)
    if device is None or full is None or wanted.flow not in {entry.flow for entry in device.flows}:
        return []
    if device.bandwidth is None or "fp16" not in device.compute or device_kind(device) != device_kind(wanted.device):
        return []
    rows = [row for row in table.rows if row.flow == wanted.flow and _of_class(row, wanted)]
    rows = [row for row in rows if dict(row.settings) == settings] or rows
    rows = [row for row in rows if not row.noisy] or rows
    exact = [row for row in rows if row.precision == wanted.precision]
    used = tuple((_terms(row, full, device, wanted), row) for row in exact or rows)
    same = architecture is not None and table.architecture_digest == architecture.digest
    return [_Evidence(device, same, bool(exact), used)] if used else []


@cache
def _backend(flow: str) -> Backend | None:
    try:
        return load_backend(flow)
    except AmoebaError:
        return None


def _storage(row: Row, wanted: Estimator) -> StorageFormat | None:
    if row.precision == wanted.precision:
        return wanted.storage
    backend = _backend(row.flow)
    return backend.storage(row.precision) if backend and row.precision in backend.precisions() else None


def _of_class(row: Row, wanted: Estimator) -> bool:
    storage = _storage(row, wanted)
    return storage is not None and is_quantised(storage) == is_quantised(wanted.storage)


def _terms(row: Row, full: Architecture, device: Device, wanted: Estimator) -> Terms:
    storage = _storage(row, wanted)
    assert storage is not None, "rows of other classes are left out before"
    backend = _backend(row.flow)
    steps = backend.takes.steps(full, NEURON_MULTIPLE, row.precision) if backend else None
    return terms(sized(full, row.shape, steps), storage, device, row.flow, row.precision, row.workload)


def _learnt(evidence: Sequence[_Evidence], level: _Level) -> Factors:
    """The factors that a device has, from those of the devices that were measured."""
    measured = {each.device.name: [other for other in evidence if other.device == each.device] for each in evidence}
    own = [_device_factors(tables) for tables in measured.values()]
    extra = 0.0 if all(each.same_precision for each in evidence) else PRECISIONS**2
    if not (level.same_model or all(each.same_model for each in evidence)):
        extra += MODELS**2
    noise = {"decode": _noise(evidence, lambda row: (row.tpot_ms, row.tpot_interval, row.tpot_confident))}
    noise["prefill"] = _noise(evidence, lambda row: (row.ttft_ms, row.ttft_interval, row.ttft_confident))
    phases = [_together([getattr(each, name) for each in own], level) for name in noise]
    phases = [_widened(phase, extra + noise[name]) for phase, name in zip(phases, noise, strict=True)]
    return Factors.of(*phases)


def _noise(evidence: Sequence[_Evidence], of: Callable[[Row], tuple[float, Interval | None, bool]]) -> float:
    """The variance, in logarithm, of what is measured another time, from rows whose medians are not known well.

    Such a machine's speed changes as a whole, which no number of rows averages out. Its spread is that which nine in
    ten of the rows' intervals stay within.
    """
    found = [of(row) for each in evidence for _, row in each.rows]
    spreads = [
        max(reach(value, interval)) for value, interval, confident in found if interval is not None and not confident
    ]
    return (percentile(spreads, COVERED) / NINE_IN_TEN) ** 2 if spreads else 0.0


def _widened(phase: Phase, variance: float) -> Phase:
    return replace(phase, spread=math.sqrt(phase.spread**2 + variance))


def _device_factors(tables: Sequence[_Evidence]) -> Factors:
    """The factors of one device, from all its rows."""
    rows = [pair for each in tables for pair in each.rows]
    decode = fitted([Sample(t.reading, t.blocks, t.fixed, row.tpot_ms) for t, row in rows], PRIOR)
    computed = [(Sample(t.computing, t.blocks, t.fixed, row.ttft_ms), t.prompt_reading) for t, row in rows]
    # A prompt too short to be bound by computing says nothing of it, only of overheads: its reading is known.
    prefill, before = PRIOR, None
    for _ in range(len(rows) + 1):
        bound = [prefill.values[0] * sample.work < decode.values[0] * reading for sample, reading in computed]
        if bound == before:
            break
        before = bound
        samples = [
            replace(sample, work=0.0, known=decode.values[0] * reading) if short else sample
            for (sample, reading), short in zip(computed, bound, strict=True)
        ]
        prefill = fitted(samples, PRIOR)
    return Factors.of(decode, prefill)


def _together(phases: Sequence[Phase], level: _Level) -> Phase:
    """What a device is expected to have: its own factors, or the mean of other devices' and how they differ."""
    if level.same_device:
        return phases[0]
    columns = [_mean([p.values[i] for p in phases], [p.covariance[i][i] for p in phases], i) for i in range(3)]
    values: Three = columns[0][0], columns[1][0], columns[2][0]
    variances: Three = columns[0][1], columns[1][1], columns[2][1]
    return Phase(values, diagonal(variances), max(SPREAD, *(phase.spread for phase in phases)))


def _mean(values: Sequence[float], variances: Sequence[float], index: int) -> tuple[float, float]:
    """The mean of devices' factors, and the variance of one device's around it (a random-effects model).

    Between devices a factor varies by its assumed share, and as much more or less as the devices at hand show.
    """
    assumed = DEVICES if index == 0 else DEVICE_OVERHEADS
    middle = sum(values) / len(values)
    scale = max(middle, 1e-3) ** 2
    shown = sum(max((v - middle) ** 2 - s, 0.0) for v, s in zip(values, variances, strict=True)) / scale
    between = scale * (PRIOR_DEVICES * assumed**2 + shown) / (PRIOR_DEVICES + len(values) - 1)
    weights = [1 / (variance + between) for variance in variances]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return mean, 1 / sum(weights) + between


def _count(evidence: Sequence[_Evidence]) -> int:
    return sum(len(each.rows) for each in evidence)


def _remark(wanted: Estimator, evidence: Sequence[_Evidence], level: _Level, factors: Factors) -> str:
    """By what an estimate was calibrated, and what was learnt."""
    names = sorted({each.device.name for each in evidence})
    precisions = sorted({row.precision for each in evidence for _, row in each.rows})
    where = level.words if level.same_device else f"{level.words} {', '.join(names)}"
    if level.same_device:
        models = {each.same_model for each in evidence}
        of = "this model" if models == {True} else "other models" if models == {False} else "this and other models"
        where = f"of {of} {where}"
    count = _count(evidence)
    device = wanted.device
    quantised = is_quantised(wanted.storage)
    reached = device.efficiency_bandwidth_quantised if quantised else device.efficiency_bandwidth_full
    learnt = ""
    if reached is not None and device.efficiency_compute is not None:
        shares = _share(reached.base, factors.decode), _share(device.efficiency_compute.base, factors.prefill)
        learnt = f": {shares[0]} of the bandwidth and {shares[1]} of the compute rate are reached"
    return (
        f"{wanted.flow} {wanted.precision} on '{device.name}' is estimated, calibrated by {count} "
        f"measurement{'s' if count != 1 else ''} in {'/'.join(precisions)} {where}{learnt}"
    )


def _share(efficiency: float, phase: Phase) -> str:
    return "all" if phase.values[0] <= efficiency else f"{efficiency / phase.values[0]:.0%}"


def _uncalibrated_remark(wanted: Estimator) -> str:
    return (
        f"{wanted.flow} {wanted.precision} on '{wanted.device.name}' is estimated from the device's data sheet alone: "
        f"no table of {wanted.flow} on it or on a device of its kind is at hand"
    )
