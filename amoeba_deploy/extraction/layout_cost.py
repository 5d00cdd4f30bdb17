"""What padding costs: a subnet whose blocks differ, padded to the widest and as it is, on a device.

Both are estimates from the device's data sheet (profiles/roofline.py). A block without attention or feed-forward still
costs the engine's whole overhead of a block there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.errors import AmoebaError, LatencyUnknown
from amoeba_deploy.extraction.ragged import Layout, plan_sizes
from amoeba_deploy.plan import Plan
from amoeba_deploy.precision import StorageFormat
from amoeba_deploy.profiles.device import LOCAL, Device
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.roofline import estimate
from amoeba_deploy.profiles.workload import DEFAULT_CONTEXT, Workload


@dataclass(frozen=True)
class LayoutCost:
    """Estimates of both layouts in one flow and precision of a device."""

    device: str
    flow: str
    precision: str
    layouts: dict[Layout, Prediction]

    def to_json(self) -> dict[str, Any]:
        """The entries of ``extract --json``."""
        times: dict[str, Any] = {
            layout: {"tpot_ms": round(found.tpot_ms, 4), "ttft_ms": round(found.ttft_ms, 4), "source": found.source}
            for layout, found in self.layouts.items()
        }
        return {"device": self.device, "flow": self.flow, "precision": self.precision, **times}


def ragged_cost(
    plan: Plan,
    architecture: Architecture,
    storage: StorageFormat,
    device: Device,
    flow: str,
    precision: str,
    workload: Workload,
    context: int,
) -> dict[Layout, Prediction]:
    """Estimates of a plan's subnet in both layouts; ``architecture`` has the sizes of the full model.

    Raises:
        LatencyUnknown: the device's bandwidth or compute rate is not known, or it does not list the flow.
    """
    padded = plan.subnet(architecture)
    parts = [sizes.of(architecture) for sizes in plan_sizes(plan)]
    return {
        "uniform": estimate(padded, storage, device, flow, precision, workload, context),
        "ragged": estimate(padded, storage, device, flow, precision, workload, context, parts),
    }


def layout_cost(plan: Plan, architecture: Architecture, device: Device) -> LayoutCost:
    """The same in the first flow and precision that the device prefers and that takes this subnet, ragged.

    The workload is a prompt of 128 tokens and 32 generated ones, or fewer where the model's context is short.

    Raises:
        LatencyUnknown: the device lists no such flow, or too little is known of it.
    """
    context = min(architecture.context, DEFAULT_CONTEXT)
    workload = Workload(1, max(min(128, context // 2), 1), max(min(32, context // 4), 1))
    for preference in device.flows:
        flow, precision = preference.flow, preference.precision
        try:
            backend = load_backend(flow)
        except AmoebaError:
            continue
        precision = backend.takes.own_name(precision)
        if precision not in backend.precisions():
            continue
        options = options_for(backend, context, 1, None if device.name == LOCAL else device.architecture)
        if "ragged" not in backend.layouts(architecture, precision, options):
            continue
        if backend.refusal(plan.subnet(architecture), precision, options) is None:
            storage = backend.storage(precision)
            found = ragged_cost(plan, architecture, storage, device, flow, precision, workload, context)
            return LayoutCost(device.name, flow, precision, found)
    listed = ", ".join(f"{p.flow} {p.precision}" for p in device.flows)
    raise LatencyUnknown(f"the device '{device.name}' lists no flow that takes blocks of different widths ({listed})")
