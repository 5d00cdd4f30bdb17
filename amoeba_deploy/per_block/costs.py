"""What a block costs: latency that is a fixed part and a sum over blocks, and bytes likewise.

TPOT = fixed_ms + sum over kept blocks of block_ms(kv_heads, neurons). A dropped block costs nothing. Two costs are
made here: a linear one from fitted coefficients, and one from the roofline of a device's data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import BadInput
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.device import Device
from amoeba_deploy.profiles.factors import UNCALIBRATED, Factors
from amoeba_deploy.profiles.roofline import QUANTISED_BITS, SMALL_BYTES, estimate, memory_bytes
from amoeba_deploy.profiles.workload import Workload


@runtime_checkable
class BlockCosts(Protocol):
    """An additive latency model of one engine on one device, in milliseconds a token."""

    @property
    def fixed_ms(self) -> float:
        """What every token costs whatever the blocks: embedding, head, sampling."""
        ...

    def block_ms(self, kv_heads: int, neurons: int) -> float:
        """What one kept block of so many key/value heads and neurons costs a token."""
        ...


@dataclass(frozen=True)
class LinearCosts:
    """TPOT = fixed + sum over blocks of (block + kv_head x kv_heads + neuron x neurons), all in milliseconds."""

    fixed_ms: float
    per_block_ms: float
    per_kv_head_ms: float
    per_neuron_ms: float

    def block_ms(self, kv_heads: int, neurons: int) -> float:
        """One block."""
        return self.per_block_ms + self.per_kv_head_ms * kv_heads + self.per_neuron_ms * neurons


@dataclass(frozen=True)
class RooflineCosts:
    """The estimate of profiles/roofline.py, taken apart by blocks.

    It is linear in the bytes that a step reads, and so the same as ``estimate`` of the whole plan, for quantised
    weights, and for others where the whole model reads at most 2 GB. Beyond that the roofline bends. There the chord
    between 2 GB and the whole model is taken, or where that is flat the line through the origin: neither is ever below
    the roofline, so a plan that fits by them fits by it.
    """

    architecture: Architecture
    storage: StorageFormat
    positions: float
    """Tokens in the key/value cache of a step: prompt + tokens / 2."""
    batch: int
    ms_per_byte: float
    base_ms: float
    """Where the line begins, fixed overheads included."""
    block_overhead_ms: float

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        device: Device,
        flow: str,
        precision: str,
        workload: Workload,
        factors: Factors = UNCALIBRATED,
    ) -> RooflineCosts:
        """The costs on a device; ``factors`` are what was learnt of the engine there or elsewhere.

        Raises:
            LatencyUnknown: the device's figures are not known, or it does not list the flow.
        """
        storage, preference = load_backend(flow).storage(precision), device.preference(flow)
        positions = workload.prompt + workload.tokens / 2
        work, of_blocks, of_steps = factors.decode.values
        block_ms, fixed_ms = of_blocks * preference.block_overhead.base, of_steps * preference.fixed_overhead.base
        context = workload.context_for(architecture.context)
        whole = estimate(architecture, storage, device, flow, precision, workload, context, factors=factors).tpot_ms
        whole -= architecture.depth * block_ms + fixed_ms
        reads = storage.read_bytes(architecture) + storage.cache_bytes_at(architecture, positions, workload.batch)
        assert device.bandwidth is not None and device.efficiency_bandwidth_quantised is not None
        slope = work * 1e3 / (device.bandwidth.base * device.efficiency_bandwidth_quantised.base)
        start = 0.0
        if storage.matrix_bits >= QUANTISED_BITS and reads > SMALL_BYTES and whole > slope * SMALL_BYTES:
            chord = (whole - slope * SMALL_BYTES) / (reads - SMALL_BYTES)
            start, slope = whole - chord * reads, chord
        return cls(architecture, storage, positions, workload.batch, slope, start + fixed_ms, block_ms)

    @property
    def fixed_ms(self) -> float:
        """The head's bytes, and the fixed overhead."""
        return self.base_ms + self.ms_per_byte * self.storage.head_bytes(self.architecture)

    def block_ms(self, kv_heads: int, neurons: int) -> float:
        """The block's weights and its cache, and its overhead."""
        block = self.architecture.subnet(1, kv_heads, neurons)
        reads = self.storage.block_bytes(block) + self.storage.cache_bytes_at(block, self.positions, self.batch)
        return self.ms_per_byte * reads + self.block_overhead_ms


@dataclass(frozen=True)
class BlockMemory:
    """The memory of profiles/roofline.py, taken apart by blocks; the largest activation is the whole model's."""

    architecture: Architecture
    storage: StorageFormat
    workload: Workload
    context: int

    @property
    def fixed_bytes(self) -> float:
        """Embedding, head, activations and what the engine itself takes."""
        full, workload = self.architecture, self.workload
        whole = memory_bytes(full, self.storage, workload, self.context)
        return whole - full.depth * self.block_bytes(full.kv_heads, full.neurons)

    def block_bytes(self, kv_heads: int, neurons: int) -> float:
        """One block's weights, and its cache at the context."""
        block = self.architecture.subnet(1, kv_heads, neurons)
        cache = self.storage.cache_bytes_at(block, self.context, self.workload.batch)
        return self.storage.block_bytes(block) + cache


def check_costs(costs: BlockCosts, kv_heads: int, neurons: int) -> float:
    """What a block costs; raises BadInput where that is negative or no number."""
    found = float(costs.block_ms(kv_heads, neurons))
    if not 0 <= found < float("inf"):
        raise BadInput(
            f"the latency model gives a block of {kv_heads} key/value heads and {neurons} neurons {found:g} ms, "
            f"where at least 0 belongs; profile again, with more shapes"
        )
    return found
