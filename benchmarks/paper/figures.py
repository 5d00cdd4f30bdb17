"""Figure 1: how latency falls with depth and with width. Figure 3: accuracy against latency of Table 1's subnets.

Latencies are those that ``amoeba search`` judges shapes by on a device, with their source: measured there, interpolated
between measured shapes, or estimated from its data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from amoeba_deploy.checkpoint import open_checkpoint
from amoeba_deploy.progress import Progress
from amoeba_deploy.request import Request
from amoeba_deploy.search import Candidate
from amoeba_deploy.space import Space
from benchmarks.paper.runs import Cell

DEVICE = "epyc-zen4-2"
"""The device whose measured table ships."""
FLOWS = {"torch": "fp32", "onnx": "int8", "gguf": "q8_0", "openvino": "int8"}
"""Engines that Figure 1 compares, and a precision of each that the table has."""
FIGURE_3 = "onnx", "int8"


def judged(device: str, flow: str, precision: str) -> list[Candidate]:
    """Every shape of the embedded checkpoint on a device, with its latency."""
    options: dict[str, Any] = {
        "device": device, "flow": flow, "precision": precision, "batch": 1, "prompt": 128, "tokens": 32,
        "context": None, "metric": "tpot", "latency": 1e9, "memory": None, "table": None, "measured_only": False,
    }  # fmt: skip
    request = Request.of(Space.of_checkpoint(open_checkpoint()), options, Progress(quiet=True))
    return list(request.answer().result.found)


def print_figure_1(device: str) -> None:
    """Latency relative to the whole model along depth at full width, and along width at full depth."""
    device = DEVICE if device == "cpu" else device
    print(f"TPOT relative to the whole model on {device}, embedded checkpoint (Figure 1's form)\n")
    for axis in ("depth", "width"):
        rows = {}
        for flow, precision in FLOWS.items():
            found = judged(device, flow, precision)
            whole = max(found, key=lambda one: (one.shape.depth, one.shape.width))
            if axis == "depth":
                line = [one for one in found if one.shape.width == 1]
            else:
                line = [one for one in found if one.shape.depth == whole.shape.depth]
            share = [(_kept(one, whole, axis), one) for one in line]
            rows[f"{flow} {precision}"] = {
                kept: (one.prediction.tpot_ms / whole.prediction.tpot_ms, one.prediction.source)
                for kept, one in sorted(share, key=lambda pair: -pair[0])
            }
        _print_curves(axis, rows)


def _kept(one: Candidate, whole: Candidate, axis: str) -> float:
    return one.shape.depth / whole.shape.depth if axis == "depth" else float(one.shape.width)


def _print_curves(axis: str, rows: dict[str, dict[float, tuple[float, str]]]) -> None:
    shares = sorted({share for row in rows.values() for share in row}, reverse=True)
    shown = shares[:: max(1, len(shares) // 8)]
    print(f"| {axis} kept | " + " | ".join(f"{share:.0%}" for share in shown) + " |")
    print("|---" * (len(shown) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{row[share][0]:.2f} ({row[share][1][:4]}.)" if share in row else "" for share in shown]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nmeas.: measured, inte.: interpolated between measured shapes, esti.: estimated\n")


def print_figure_3(found: dict[float, dict[str, list[Cell]]], depth: int, device: str) -> None:
    """Accuracy over all questions, loss, and the latency of each method's subnet."""
    device = DEVICE if device == "cpu" else device
    flow, precision = FIGURE_3
    shapes = judged(device, flow, precision)
    print(f"Quality (float32) against TPOT of {flow} {precision} on {device} (Figure 3's form)\n")
    print("| remaining | method | TPOT ms | latency | loss | accuracy % |")
    print("|---|---|---|---|---|---|")
    for ratio, methods in found.items():
        for name, cells in methods.items():
            near = [_nearest(shapes, cell, depth) for cell in cells]
            latency = statistics.fmean(one.prediction.tpot_ms for one in near)
            sources = ", ".join(dict.fromkeys(one.prediction.source for one in near))
            loss = statistics.fmean(cell["loss"] for cell in cells)
            first = next(iter(cells[0]["tasks"]))
            accuracy = 100 * statistics.fmean(statistics.fmean(cell["tasks"][first]["right"]) for cell in cells)
            print(f"| {ratio:.0%} | {name} | {latency:.3f} | {sources} | {loss:.4f} | {accuracy:.1f} |")
    print(
        "\nLatency of the uniform shape of the same depth with as many parameters: engines that take blocks of "
        "different widths follow the parameters, others pad."
    )


def _nearest(shapes: Sequence[Candidate], cell: Cell, depth: int) -> Candidate:
    """The shape of the same depth whose width keeps about as many parameters."""
    own = int(str(cell["shape"]).split("x")[0])
    width = cell["share"] * depth / own
    return min((one for one in shapes if one.shape.depth == own), key=lambda one: abs(float(one.shape.width) - width))
