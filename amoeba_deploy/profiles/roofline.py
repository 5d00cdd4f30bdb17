"""Estimates: how fast a model can be on a device that nobody has measured, from the device's data sheet.

A decoding step reads every weight of the blocks and the head once, so its time is bytes over bandwidth; a prefill
multiplies each weight with every token of the prompt, so its time is operations over the compute rate, or again bytes
over bandwidth where the prompt is short. Beside that stands what the engine spends on each block and each step. These
are the ``Terms``; by what factors the truth may differ from them is told by ``factors``, and learnt from tables by
``calibration``. An estimate ranks shapes well, and is no substitute for ``amoeba profile``.

A search asks for thousands of estimates, so all is plain arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import LatencyUnknown
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.device import Device, Figure
from amoeba_deploy.profiles.factors import UNCALIBRATED, Factors
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.workload import Workload

RUNTIME_BYTES = 256 * 2**20
"""What an engine takes beside weights, cache and activations: its libraries, its context on the device and its
workspaces. A process with ONNX Runtime takes about 50 MB before it loads a model, a CUDA context 200 to 500 MB."""

SMALL_BYTES = 2e9
"""A step that reads less than this reaches only the bandwidth share of quantised weights, whatever its precision."""

QUANTISED_BITS = 16
"""Weights of fewer bits are quantised: unpacking them keeps decoding further from the peak bandwidth."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an estimate adds up, in milliseconds, as the device's file has it."""

    reading: float
    """Weights and the cache at the middle of the generated tokens, over the bandwidth that is reached."""
    prompt_reading: float
    """Weights and the cache at the end of the prompt, over the same."""
    computing: float
    """The prompt's operations over the compute rate that is reached."""
    blocks: float
    """The overhead of all blocks."""
    fixed: float
    """The overhead of a step."""
    floor: float
    """The time to read weights and cache at the whole peak bandwidth; 0 where caches of the chip may hold them."""


def terms(
    architecture: Architecture,
    storage: StorageFormat,
    device: Device,
    flow: str,
    precision: str,
    workload: Workload,
    parts: Sequence[Architecture] = (),
) -> Terms:
    """The terms of an estimate; arguments and errors as in ``estimate``."""
    preference = device.preference(flow)
    parts = parts or (architecture,)
    weights = sum(part.depth * storage.block_bytes(part) for part in parts) + storage.head_bytes(architecture)
    quantised = is_quantised(storage)
    middle = weights + _cache_bytes(parts, storage, workload.prompt + workload.tokens / 2, workload.batch)
    prompt = weights + _cache_bytes(parts, storage, workload.prompt, workload.batch)
    return Terms(
        _reading_ms(middle, quantised, device),
        _reading_ms(prompt, quantised, device),
        _computing_ms(prefill_flops(architecture, workload, parts), precision, device),
        sum(part.depth for part in parts) * preference.block_overhead.base,
        preference.fixed_overhead.base,
        1e3 * middle / _known(device.bandwidth, "memory bandwidth", device) if middle >= SMALL_BYTES else 0.0,
    )


def estimate(
    architecture: Architecture,
    storage: StorageFormat,
    device: Device,
    flow: str,
    precision: str,
    workload: Workload,
    context: int,
    parts: Sequence[Architecture] = (),
    factors: Factors = UNCALIBRATED,
) -> Prediction:
    """TPOT, TTFT and memory of a model on a device, from the device's figures.

    Where blocks differ, ``parts`` are runs of blocks that are alike, each with its own depth; embedding and head are
    those of ``architecture``, which is also the only part where none is given.

    TPOT = (block and head weights + KV cache at prompt + tokens / 2) / (bandwidth x efficiency) + overheads

    TTFT = max(FLOPs / (FLOP/s x efficiency), (block and head weights + KV cache at prompt) / (bandwidth x efficiency))
    + overheads

    with overheads = depth x block overhead + fixed overhead of the flow, and
    FLOPs = 2 x (block and head matrix parameters) x batch x prompt + 2 x depth x heads x head_dim x batch x prompt x
    (prompt + 1), the latter for causal attention. fp32 computes at the device's fp32 rate, or half its fp16 rate where
    none is given; every other precision at the fp16 rate. Each term is multiplied by its factor, which is one where
    nothing was learnt from measurements; the intervals are those of ``factors``.

    Raises:
        LatencyUnknown: the device's bandwidth or compute rate is not known, or it does not list the flow.
    """
    found = terms(architecture, storage, device, flow, precision, workload, parts)
    decode, prefill = factors.decode, factors.prefill
    reading, computing = decode.values[0] * found.prompt_reading, prefill.values[0] * found.computing
    bound_by_reading = reading > computing
    first = factors.short_prefill if bound_by_reading else prefill
    first_work = found.prompt_reading if bound_by_reading else found.computing
    tpot, tpot_interval = decode.time(found.reading, found.blocks, found.fixed, found.floor)
    ttft, ttft_interval = first.time(first_work, found.blocks, found.fixed)
    return Prediction(
        tpot_ms=tpot,
        ttft_ms=ttft,
        memory_bytes=memory_bytes(architecture, storage, workload, context, parts),
        source="estimated",
        tpot_interval=tpot_interval,
        ttft_interval=ttft_interval,
    )


def is_quantised(storage: StorageFormat) -> bool:
    """The class of a precision: whether its weights have fewer bits than ``QUANTISED_BITS``."""
    return storage.matrix_bits < QUANTISED_BITS


def _cache_bytes(parts: Sequence[Architecture], storage: StorageFormat, positions: float, batch: int) -> float:
    return sum(storage.cache_bytes_at(part, positions, batch) for part in parts)


def memory_bytes(
    architecture: Architecture,
    storage: StorageFormat,
    workload: Workload,
    context: int,
    parts: Sequence[Architecture] = (),
) -> int:
    """All weights, the KV cache at ``context`` for every sequence, the largest activation, and ``RUNTIME_BYTES``.

    The largest activation is the prompt's logits [batch, prompt, vocabulary] or the gate and up projections of one
    block [batch, prompt, 2 x neurons], whichever is larger.
    """
    parts = parts or (architecture,)
    widest = max(architecture.vocabulary, *(2 * part.neurons for part in parts))
    activation = workload.batch * workload.prompt * widest * storage.activation_bytes
    blocks = sum(part.depth * storage.block_bytes(part) for part in parts)
    weights = blocks + storage.head_bytes(architecture) + storage.embedding_bytes(architecture)
    return math.ceil(weights + _cache_bytes(parts, storage, context, workload.batch) + activation + RUNTIME_BYTES)


def prefill_flops(architecture: Architecture, workload: Workload, parts: Sequence[Architecture] = ()) -> int:
    """Floating-point operations of the prompt: two a weight and token, and causal attention."""
    parts = parts or (architecture,)
    matrices = sum(part.depth * part.block_matrix_parameters for part in parts) + architecture.embedding_parameters
    # Token i attends to i positions: prompt x (prompt + 1) / 2 pairs, each with two products of head_dim, two
    # operations a term.
    attention = sum(part.depth * part.heads * part.head_dim for part in parts) * (workload.prompt + 1)
    return 2 * (matrices + attention) * workload.batch * workload.prompt


def _reading_ms(count: float, quantised: bool, device: Device) -> float:
    peak = _known(device.bandwidth, "memory bandwidth", device)
    low = _known(device.efficiency_bandwidth_quantised, "bandwidth efficiency", device)
    if quantised:
        return 1e3 * count / (peak * low)
    full = _known(device.efficiency_bandwidth_full, "bandwidth efficiency", device)
    # The first term holds for small models. Past SMALL_BYTES it stands still until the second overtakes it: were the
    # efficiency to jump there instead, a model of 2.1 GB would look faster than one of 1.9 GB.
    return 1e3 * max(min(count, SMALL_BYTES) / (peak * low), count / (peak * full))


def _computing_ms(flops: int, precision: str, device: Device) -> float:
    rate = _known(device.compute.get("fp16"), "compute rate", device)
    if precision == "fp32":
        own = device.compute.get("fp32")
        rate = own.base if own else rate / 2
    return 1e3 * flops / (rate * _known(device.efficiency_compute, "compute efficiency", device))


def _known(figure: Figure | None, what: str, device: Device) -> float:
    if figure is None:
        raise LatencyUnknown(
            f"the {what} of the device '{device.name}' is not known, so its latency cannot be estimated; "
            f"measure it with amoeba profile"
        )
    return figure.base
