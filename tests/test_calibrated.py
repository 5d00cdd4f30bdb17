"""Estimates with intervals, and calibrated by tables: against arithmetic by hand, synthetic devices and real rows."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from statistics import mean, median

import numpy as np
import pytest
from conftest import BASE, MODELS
from measured_rows import MEASURED_BANDWIDTH, MEASURED_MODELS, MEASURED_RATE, MEASURED_ROWS

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import LatencyUnknown
from amoeba_deploy.families import read_architecture
from amoeba_deploy.plan import NEURON_MULTIPLE, sized
from amoeba_deploy.profiles import factors as assumed
from amoeba_deploy.profiles.calibration import PRECISIONS, Estimator, estimator
from amoeba_deploy.profiles.device import Device, Figure, FlowPreference, load_device
from amoeba_deploy.profiles.fitting import Sample, fitted, non_negative
from amoeba_deploy.profiles.prediction import Interval, Prediction
from amoeba_deploy.profiles.roofline import Terms, estimate, terms
from amoeba_deploy.profiles.row import Row, make_row
from amoeba_deploy.profiles.sizes import sizes_of_table, sizes_to_json
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

LARGE = Architecture(
    family="llama", depth=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, neurons=11008, vocabulary=32000,
    context=4096, tied=False,
)  # fmt: skip
SMALL = Architecture(
    family="llama", depth=22, hidden=2048, heads=32, kv_heads=4, head_dim=64, neurons=5632, vocabulary=32000,
    context=2048, tied=False,
)  # fmt: skip
WORKLOAD = Workload(1, 128, 32)
FLOW, PRECISION = "onnx", "int4"
STORAGE = load_backend(FLOW).storage(PRECISION)
JETSONS = ("orin-nx", "orin-nano", "agx-orin-64")


@dataclass(frozen=True)
class Truth:
    """A device as it is: what share of its file's efficiencies it reaches, and how many times the overheads."""

    reading: float
    computing: float
    block: float = 1.0
    fixed: float = 1.0

    def times(self, found: Terms) -> tuple[float, float]:
        """TPOT and TTFT in milliseconds."""
        overheads = self.block * found.blocks + self.fixed * found.fixed
        prompt = max(found.computing / self.computing, found.prompt_reading / self.reading)
        return found.reading / self.reading + overheads, prompt + overheads


known_device = cache(load_device)
SLOW = Truth(reading=0.75, computing=0.6, block=2.0, fixed=1.5)


@cache
def subnet(architecture: Architecture, shape: Shape, precision: str = PRECISION) -> Architecture:
    """The sizes that the engine has of a shape."""
    return sized(architecture, shape, load_backend(FLOW).takes.steps(architecture, NEURON_MULTIPLE, precision))


@cache
def on(device: Device, architecture: Architecture, precision: str = PRECISION, workload: Workload = WORKLOAD) -> Terms:
    """The terms of a model on a device."""
    return terms(architecture, load_backend(FLOW).storage(precision), device, FLOW, precision, workload)


def grid(architecture: Architecture) -> list[Shape]:
    """Three depths, each at three widths."""
    depths = (architecture.depth, architecture.depth * 3 // 4, architecture.depth // 2)
    return [Shape(depth, Fraction(eighths, 8)) for depth in depths for eighths in (8, 6, 4)]


def table(
    device: Device,
    architecture: Architecture,
    truth: Truth,
    noise: Callable[[], float] = lambda: 1.0,
    precision: str = PRECISION,
    workload: Workload = WORKLOAD,
    **changes: object,
) -> Table:
    """What profiling a device would have measured of a model."""
    rows = []
    for shape in grid(architecture):
        tpot, ttft = truth.times(on(device, subnet(architecture, shape, precision), precision, workload))
        times = ttft * noise(), tpot * noise(), 1.0, 1.0, 9
        rows.append(replace(make_row(FLOW, precision, shape, workload, times, (1, 1)), **changes))
    return Table(device.name, architecture.digest, {"sizes": sizes_to_json(architecture)}, tuple(rows))


@dataclass(frozen=True)
class Sizes:
    """A subnet whose blocks are all alike."""

    padded: Architecture

    @property
    def parts(self) -> tuple[Architecture, ...]:
        return (self.padded,)


def estimates(device: str, tables: Sequence[Table], architecture: Architecture = LARGE, **more: object) -> Estimator:
    return estimator(
        known_device(device), FLOW, PRECISION, STORAGE, WORKLOAD, 2048, tables, architecture=architecture, **more
    )


def width(interval: Interval | None) -> float:
    assert interval is not None
    return math.log(interval[1] / interval[0])


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(mean(value * value for value in values))


# Without any table


def test_what_is_assumed_follows_from_what_is_known_of_engines_and_devices() -> None:
    # The shares of the bandwidth in docs/engines.md: torch, torch-compile, onnx fp32, int8, int4, gguf q8_0, q4_k_m,
    # openvino fp32, bf16, int8, int4 and executorch, with one thread and with two.
    one = [0.41, 0.46, 0.75, 0.54, 0.36, 0.49, 0.43, 0.75, 0.53, 0.41, 0.33, 0.93]
    two = [0.31, 0.33, 0.72, 0.50, 0.34, 0.51, 0.40, 0.73, 0.52, 0.37, 0.28, 0.78]
    assert root_mean_square([math.log(share / 0.70) for share in one + two]) == pytest.approx(assumed.ENGINES, abs=0.01)
    pairs = [(3, 4), (5, 6), (7, 8), (9, 10)]
    apart = [math.log(shares[first] / shares[second]) for shares in (one, two) for first, second in pairs]
    assert root_mean_square(apart) == pytest.approx(PRECISIONS, abs=0.01)
    assert math.log(0.89 / 0.67) / 2 == pytest.approx(assumed.DEVICES, abs=0.005)
    assert math.exp(assumed.NINE_IN_TEN * assumed.OVERHEADS) == pytest.approx(3)


def test_an_estimate_is_the_middle_of_its_interval_in_logarithm() -> None:
    small = estimate(replace(SMALL, depth=4), STORAGE, load_device("orin-nx"), FLOW, PRECISION, WORKLOAD, 2048)
    for value, interval in ((small.tpot_ms, small.tpot_interval), (small.ttft_ms, small.ttft_interval)):
        assert interval is not None
        low, high = interval
        assert value / low == pytest.approx(high / value)
        assert 1.8 < high / value < 2.6


def test_the_low_end_of_a_large_models_interval_is_reading_at_the_whole_bandwidth() -> None:
    found = estimate(LARGE, STORAGE, load_device("orin-nx"), FLOW, PRECISION, WORKLOAD, 2048)
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    count = blocks * STORAGE.matrix_bits / 8 + (32 * 2 * 4096 + 4096) * 4 + 2 * 32 * 32 * 128 * 4 * (128 + 16)
    assert found.tpot_interval is not None
    assert found.tpot_interval[0] == pytest.approx(1e3 * count / 102.4e9, rel=1e-6)


def test_without_tables_an_estimator_is_the_estimate_and_says_so() -> None:
    made = estimates("orin-nx", [])
    assert made(Sizes(LARGE)) == estimate(LARGE, STORAGE, load_device("orin-nx"), FLOW, PRECISION, WORKLOAD, 2048)
    assert made.rows == 0
    assert "'orin-nx' is estimated from the device's data sheet alone" in made.remark


def test_a_calibration_does_not_replace_what_a_device_does_not_tell() -> None:
    made = estimates("local", [table(known_device("orin-nx"), LARGE, SLOW)])
    with pytest.raises(LatencyUnknown, match="bandwidth of the device 'local' is not known"):
        made(Sizes(LARGE))


# Fitting


def test_the_non_negative_solution_is_that_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(5)
    active = 0
    for _ in range(200):
        matrix, target = rng.standard_normal((8, 3)), rng.standard_normal(8)
        reference, _ = optimize.nnls(matrix, target)
        active += int((reference == 0).any())
        assert non_negative(matrix, target) == pytest.approx(reference, abs=1e-10)
    assert 50 < active < 200  # both kinds of solution were met


def test_no_row_leaves_what_was_assumed() -> None:
    found = fitted([], assumed.PRIOR)
    assert found.values == pytest.approx(assumed.PRIOR.values)
    assert np.array(found.covariance) == pytest.approx(np.array(assumed.PRIOR.covariance))
    assert found.spread == pytest.approx(assumed.SPREAD)


def test_rows_that_say_nothing_of_a_factor_leave_it_as_uncertain_as_it_was() -> None:
    found = fitted([Sample(work, 0.0, 0.0, 1.5 * work) for work in (1.0, 2.0, 4.0)], assumed.PRIOR)
    assert found.values == pytest.approx((1.5, 1.0, 1.0), abs=0.01)
    assert found.covariance[1][1] == pytest.approx(assumed.OVERHEADS**2)
    assert found.covariance[0][0] < 0.05**2


# Synthetic devices


@pytest.mark.parametrize("device", ["orin-nx", "raspberry-pi-5", "snapdragon-8-elite"])
def test_the_shares_of_a_measured_device_are_recovered(device: str) -> None:
    measured, truth = load_device(device), Truth(reading=0.76, computing=0.6)
    made = estimates(device, [table(measured, LARGE, truth)])
    factors = made.factors
    assert 1 / factors.decode.values[0] == pytest.approx(truth.reading, rel=0.005)
    assert 1 / factors.prefill.values[0] == pytest.approx(truth.computing, rel=0.005)
    assert measured.efficiency_bandwidth_quantised is not None
    share = measured.efficiency_bandwidth_quantised.value * truth.reading
    assert f"{share:.0%} of the bandwidth and 36% of the compute rate are reached" in made.remark


def test_overheads_are_recovered_where_they_are_what_takes_the_time() -> None:
    tiny = replace(SMALL, hidden=256, heads=4, neurons=1024, vocabulary=512)
    made = estimates("orin-nx", [table(known_device("orin-nx"), tiny, SLOW)], tiny)
    assert made.factors.decode.values[1] == pytest.approx(SLOW.block, rel=0.1)
    assert made.factors.decode.values[2] == pytest.approx(SLOW.fixed, rel=0.1)


def test_held_out_shapes_of_a_measured_device_are_met() -> None:
    device = load_device("orin-nx")
    made = estimates("orin-nx", [table(device, LARGE, SLOW)])
    for depth, eighths in ((30, 7), (20, 5), (10, 8)):
        sizes = subnet(LARGE, Shape(depth, Fraction(eighths, 8)))
        tpot, ttft = SLOW.times(on(device, sizes))
        found = made(Sizes(sizes))
        assert (found.tpot_ms, found.ttft_ms) == pytest.approx((tpot, ttft), rel=0.02)
        assert found.source == "estimated"


def test_another_workload_of_the_same_device_is_met() -> None:
    device, longer = load_device("orin-nx"), Workload(2, 512, 64)
    made = estimates("orin-nx", [table(device, LARGE, SLOW, workload=longer)])
    tpot, ttft = SLOW.times(on(device, LARGE))
    found = made(Sizes(LARGE))
    assert (found.tpot_ms, found.ttft_ms) == pytest.approx((tpot, ttft), rel=0.03)


def test_a_short_prompt_tells_nothing_of_computing() -> None:
    device, short = load_device("orin-nx"), Workload(1, 2, 32)
    made = estimates("orin-nx", [table(device, LARGE, SLOW, workload=short)])
    assert made.factors.prefill.values[0] == pytest.approx(1.0, rel=0.01)
    assert made.factors.prefill.covariance[0][0] == pytest.approx(assumed.PRIOR.covariance[0][0], rel=0.01)
    # The overheads are 4 % of these times: what rows cannot tell from reading stays near what was assumed.
    assert 1 / made.factors.short_prefill.values[0] == pytest.approx(SLOW.reading, rel=0.04)


def test_another_device_has_its_own_bandwidth_rate_and_overheads() -> None:
    source, target = load_device("orin-nx"), load_device("orin-nano")
    made = estimates("orin-nano", [table(source, LARGE, SLOW)])
    decode, prefill = made.factors.decode.values, made.factors.prefill.values
    learnt = estimates("orin-nx", [table(source, LARGE, SLOW)]).factors
    assert decode == pytest.approx(learnt.decode.values)
    own = on(target, LARGE)
    by_hand = own.reading * decode[0] + own.blocks * decode[1] + own.fixed * decode[2]
    found = made(Sizes(LARGE))
    assert found.tpot_ms == pytest.approx(by_hand)
    assert found.tpot_ms == pytest.approx(SLOW.times(own)[0], rel=0.03)
    assert found.ttft_ms == pytest.approx(own.computing * prefill[0] + own.blocks * prefill[1] + own.fixed * prefill[2])


def test_overheads_differ_between_devices_as_their_files_assume() -> None:
    tiny = replace(SMALL, hidden=256, heads=4, neurons=1024, vocabulary=512)
    source = load_device("orin-nx")
    flows = tuple(
        replace(entry, block_overhead=replace(entry.block_overhead, value=3 * entry.block_overhead.value))
        for entry in source.flows
    )
    target = replace(source, name="slower-host", flows=flows)
    fixed = FLOW, PRECISION, STORAGE, WORKLOAD, 2048, [table(source, tiny, SLOW)]
    slow, fast = (estimator(d, *fixed, architecture=tiny)(Sizes(tiny)) for d in (target, source))
    expected = 2 * SLOW.block * on(source, tiny).blocks
    assert slow.tpot_ms - fast.tpot_ms == pytest.approx(expected, rel=0.15)


# What is used


def kinds() -> dict[str, Table]:
    """A table of each kind of evidence on LARGE on orin-nx."""
    here, there = load_device("orin-nx"), load_device("orin-nano")
    return {
        "this device": table(here, SMALL, SLOW),
        "this model": table(there, LARGE, SLOW),
        "this engine": table(there, SMALL, SLOW),
    }


def test_the_device_itself_comes_before_the_model_and_that_before_the_engine() -> None:
    tables = kinds()
    found = [estimates("orin-nx", list(tables.values())[first:]).remark for first in range(4)]
    assert "9 measurements in int4 of other models on this device" in found[0]
    assert "9 measurements in int4 of this model on orin-nano" in found[1]
    assert "9 measurements in int4 of other models on orin-nano" in found[2]
    assert "data sheet alone" in found[3]


def test_the_order_of_tables_does_not_matter() -> None:
    tables = list(kinds().values())
    assert estimates("orin-nx", tables)(Sizes(LARGE)) == estimates("orin-nx", tables[::-1])(Sizes(LARGE))


def test_the_less_alike_the_wider_the_interval() -> None:
    tables = kinds()
    own = table(known_device("orin-nx"), LARGE, SLOW)
    order = [[own], [tables["this device"]], [tables["this model"]], [tables["this engine"]], []]
    found = [estimates("orin-nx", each)(Sizes(replace(LARGE, depth=8))) for each in order]
    for near, far in pairwise(found):
        assert width(near.tpot_interval) < width(far.tpot_interval)
        assert width(near.ttft_interval) < width(far.ttft_interval)


def test_what_noisy_rows_say_is_as_uncertain_as_they_are() -> None:
    steady = table(load_device("orin-nano"), LARGE, SLOW)

    def swinging(row: Row) -> Row:
        times = {"tpot": row.tpot_ms, "ttft": row.ttft_ms}
        more = {
            f"{name}_{end}": value * by for name, value in times.items() for end, by in (("least", 0.5), ("most", 2))
        }
        tenths = {"p10": row.tpot_ms, "p90": row.tpot_ms, "ttft_p10": row.ttft_ms, "ttft_p90": row.ttft_ms}
        return replace(row, **tenths, **more, tpot_error=0.2, ttft_error=0.2, noisy=True)

    noisy = replace(steady, rows=tuple(swinging(row) for row in steady.rows))
    sizes = Sizes(replace(LARGE, depth=8))
    near, far = (estimates("orin-nx", [each])(sizes) for each in (steady, noisy))
    assert far.tpot_ms == pytest.approx(near.tpot_ms)
    for one, other in ((near.tpot_interval, far.tpot_interval), (near.ttft_interval, far.ttft_interval)):
        # Between half and twice as fast at another time; the widths of what is uncertain add up in squares.
        assert width(other) == pytest.approx(math.hypot(width(one), 2 * math.log(2)), rel=0.01)


def test_what_says_nothing_of_it_is_passed_over() -> None:
    device = load_device("orin-nano")
    good = table(device, LARGE, SLOW)
    nothing = {
        "another kind of device": table(known_device("raspberry-pi-5"), LARGE, SLOW),
        "a device that nobody knows": replace(good, device="unheard-of"),
        "this machine, of unknown bandwidth": replace(good, device="local"),
        "full precision": table(device, LARGE, SLOW, precision="fp32"),
        "another engine": replace(good, rows=tuple(replace(row, flow="torch") for row in good.rows)),
        "another model, whose sizes it does not tell": replace(table(device, SMALL, SLOW), facts={}),
        "no rows": replace(good, rows=()),
    }
    for name, each in nothing.items():
        assert estimates("orin-nx", [each]).rows == 0, name
    assert estimates("orin-nx", [good, *nothing.values()]).rows == 9


def test_a_device_of_ones_own_is_found_by_the_name_in_the_table() -> None:
    board = replace(load_device("orin-nano"), name="my-board")
    made = estimates("orin-nx", [table(board, LARGE, SLOW)], devices={"my-board": board})
    assert "of this model on my-board" in made.remark


def test_another_precision_of_the_class_counts_where_the_own_was_not_measured() -> None:
    device = load_device("orin-nx")
    other, own = table(device, LARGE, SLOW, precision="int8"), table(device, LARGE, SLOW)
    assert "in int8 of this model" in estimates("orin-nx", [other]).remark
    both = replace(own, rows=(*own.rows, *other.rows))
    assert "9 measurements in int4 of this model" in estimates("orin-nx", [both]).remark
    apart, alike = (estimates("orin-nx", [each])(Sizes(LARGE)) for each in (other, own))
    assert width(apart.ttft_interval) > 2 * width(alike.ttft_interval)


def test_rows_with_the_wanted_settings_come_before_others_and_quiet_ones_before_noisy() -> None:
    device = load_device("orin-nx")
    other = table(device, LARGE, Truth(0.2, 0.2), settings={"threads": "4"})
    own = table(device, LARGE, SLOW)
    both = replace(own, rows=(*other.rows, *own.rows))
    assert estimates("orin-nx", [both]).factors == estimates("orin-nx", [own]).factors
    assert estimates("orin-nx", [both], settings={"threads": "4"}).factors == estimates("orin-nx", [other]).factors
    noisy = table(device, LARGE, Truth(0.2, 0.2), noisy=True)
    loud = replace(own, rows=(*noisy.rows, *own.rows))
    assert estimates("orin-nx", [loud]).factors == estimates("orin-nx", [own]).factors
    assert estimates("orin-nx", [noisy]).rows == 9


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_sizes_of_every_family_are_read_back_from_a_header(name: str) -> None:
    family, changes = MODELS[name]
    sizes = read_architecture({"model_type": family, "rms_norm_eps": 1e-6} | BASE | changes)
    header = json.loads(json.dumps({"sizes": sizes_to_json(sizes)}))
    assert sizes_of_table(Table("orin-nx", sizes.digest, header, ())) == sizes


@pytest.mark.parametrize("damage", [None, 3, [], {}, {"depth": 1}, "depth", "rope"])
def test_sizes_that_are_damaged_or_of_another_model_are_none(damage: object) -> None:
    whole = sizes_to_json(SMALL)
    if damage == "depth":
        damage = whole | {"depth": 23}
    elif damage == "rope":
        damage = whole | {"rope": {"theta": 1.0}}
    assert sizes_of_table(Table("orin-nx", SMALL.digest, {"sizes": damage}, ())) is None


# Whether intervals hold what they promise


def random_truth(rng: random.Random, flow: Truth) -> Truth:
    """A device of a flow: its shares differ from the flow's as devices do, its overheads by up to a factor of two."""
    return Truth(
        flow.reading * math.exp(rng.gauss(0, assumed.DEVICES)),
        flow.computing * math.exp(rng.gauss(0, assumed.DEVICES)),
        flow.block * math.exp(rng.gauss(0, 0.42)),
        flow.fixed * math.exp(rng.gauss(0, 0.42)),
    )


def random_flow(rng: random.Random) -> Truth:
    """An engine: how well it does is as little known as the assumed spread says."""
    return Truth(*(math.exp(rng.gauss(0, spread)) for spread in (0.5, 0.5, 0.5, 0.5)))


def covered(found: Prediction, truth: tuple[float, float]) -> list[bool]:
    """Whether TPOT and TTFT lie within their intervals."""
    intervals = found.tpot_interval, found.ttft_interval
    return [
        interval is not None and interval[0] <= value <= interval[1]
        for value, interval in zip(truth, intervals, strict=True)
    ]


Trial = tuple[list[bool], float]


def left_out_devices(calibrated: bool) -> list[Trial]:
    """Of 40 random engines: each of three measured devices is estimated from the others, or from nothing."""
    rng = random.Random(11)
    trials: list[Trial] = []
    for _ in range(40):
        flow = random_flow(rng)
        truths = {name: random_truth(rng, flow) for name in JETSONS}
        tables = {
            name: table(known_device(name), LARGE, truth, lambda: math.exp(rng.gauss(0, 0.05)))
            for name, truth in truths.items()
        }
        for name, truth in truths.items():
            used = [each for other, each in tables.items() if other != name] if calibrated else []
            found = estimates(name, used)(Sizes(LARGE))
            told = truth.times(on(known_device(name), LARGE))
            hits = covered(found, told)
            # What cannot be is not counted: no device reads faster than its peak.
            possible = told[0] >= on(known_device(name), LARGE).floor
            trials.append((hits if possible else hits[1:], width(found.ttft_interval)))
    return trials


def test_the_interval_of_a_device_left_out_covers_its_truth() -> None:
    trials = left_out_devices(calibrated=True)
    hits = [hit for each, _ in trials for hit in each]
    assert len(hits) > 200
    assert 0.85 <= mean(hits) <= 0.99
    alone = left_out_devices(calibrated=False)
    assert mean([hit for each, _ in alone for hit in each]) >= 0.85
    # It promises more than the data sheet alone, and keeps it.
    assert median(size for _, size in trials) < 0.7 * median(size for _, size in alone)


def test_the_interval_of_a_model_left_out_covers_its_truth() -> None:
    rng = random.Random(12)
    hits = []
    for _ in range(100):
        truth = random_truth(rng, random_flow(rng))
        device = load_device(rng.choice(JETSONS))
        measured = table(device, SMALL, truth, lambda: math.exp(rng.gauss(0, 0.05)))
        own = replace(truth, reading=truth.reading * math.exp(rng.gauss(0, 0.05)))
        hits += covered(estimates(device.name, [measured])(Sizes(LARGE)), own.times(on(device, LARGE)))
    assert 0.85 <= mean(hits) <= 0.99


# Measured rows


def measured_device() -> Device:
    """The machine of the rows, with the efficiencies that the catalogue assumes."""

    def figure(value: float, unit: str) -> Figure:
        return Figure(value, unit, "measured beside the rows", "measured")

    overheads = (("onnx", "fp32", 0.05, 0.5), ("torch", "fp32", 0.2, 1.0))
    flows = tuple(
        FlowPreference(flow, precision, figure(block, "ms"), figure(fixed, "ms"))
        for flow, precision, block, fixed in overheads
    )
    rate = {name: figure(MEASURED_RATE, "GFLOP/s") for name in ("fp16", "fp32")}
    bandwidth = figure(MEASURED_BANDWIDTH, "GB/s")
    made = replace(known_device("rtx-4090"), name="shared-epyc", architecture="x86_64", bandwidth=bandwidth)
    return replace(made, compute=rate, flows=flows)


def measured_table(model: str) -> Table:
    architecture = MEASURED_MODELS[model]
    rows = tuple(
        make_row(flow, precision, Shape.parse(shape), WORKLOAD, (ttft, tpot, tpot, tpot, 5), (1, 1))
        for name, flow, precision, shape, ttft, tpot in MEASURED_ROWS
        if name == model
    )
    return Table("shared-epyc", architecture.digest, {"sizes": sizes_to_json(architecture)}, rows)


def errors_on(wanted: str, known: Sequence[str]) -> tuple[list[bool], list[float], list[float]]:
    """Of every row of a model estimated from tables of others: hits, errors and widths in logarithm."""
    hits, errors, widths = [], [], []
    full, device = MEASURED_MODELS[wanted], measured_device()
    tables = [measured_table(name) for name in known]
    for row in measured_table(wanted).rows:
        backend = load_backend(row.flow)
        storage = backend.storage(row.precision)
        made = estimator(device, row.flow, row.precision, storage, WORKLOAD, 2048, tables, architecture=full)
        sizes = sized(full, row.shape, backend.takes.steps(full, NEURON_MULTIPLE, row.precision))
        found = made(Sizes(sizes))
        hits += covered(found, (row.tpot_ms, row.ttft_ms))
        errors += [abs(math.log(found.tpot_ms / row.tpot_ms)), abs(math.log(found.ttft_ms / row.ttft_ms))]
        widths += [width(found.tpot_interval), width(found.ttft_interval)]
    return hits, errors, widths


@pytest.mark.parametrize("known", ["a", "b", "ab"])
def test_a_third_model_measured_on_the_same_machine_lies_within_the_interval(known: str) -> None:
    """The spread between models was taken from a and b; c took no part in it."""
    hits, errors, widths = errors_on("c", known)
    _, guessed, wide = errors_on("c", "")
    assert len(hits) == 30
    assert mean(hits) >= 0.85
    assert median(errors) < 0.6 * median(guessed)
    assert median(widths) < 0.5 * median(wide)


def test_the_data_sheet_alone_covers_what_was_measured() -> None:
    hits = [hit for name in MEASURED_MODELS for hit in errors_on(name, "")[0]]
    assert len(hits) == 90
    assert mean(hits) >= 0.85
