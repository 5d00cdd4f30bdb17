"""Table 1: five methods at three ratios, mean over seeds; and where Amoeba's difference is more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from amoeba_deploy.comparison import CRITICAL, Comparison, paired
from benchmarks.paper.methods import METHODS, reachable
from benchmarks.paper.runs import Cell, Runs

RATIOS = (0.8, 0.65, 0.5)
AMOEBA = "Amoeba"


def table_1(runs: Runs, seeds: Sequence[int], ratios: Sequence[float] = RATIOS) -> dict[float, dict[str, list[Cell]]]:
    """Compute every cell: by ratio, then by method, a cell a seed."""
    found: dict[float, dict[str, list[Cell]]] = {ratio: {one.name: [] for one in METHODS} for ratio in ratios}
    for seed in seeds:
        for method in METHODS:
            for ratio, cell in runs.cells(method, tuple(ratios), seed).items():
                found[ratio][method.name].append(cell)
    return found


def against_amoeba(amoeba: Sequence[Cell], other: Sequence[Cell]) -> Comparison:
    """How much more loss another method has, in pairs of rows of the held-out text, averaged over seeds."""
    own, others = (np.mean([cell["losses"] for cell in cells], axis=0) for cells in (amoeba, other))
    return paired(others - own)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """A mean over seeds with the standard deviation between them."""
    said = f"{statistics.fmean(values):.{digits}f}"
    return said + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(found: dict[float, dict[str, list[Cell]]], depth: int) -> None:
    """The table in Markdown."""
    first = next(iter(next(iter(found.values())).values()))[0]
    tasks = list(first["tasks"])
    head = ["remaining", "method", "shapes", "kept", "loss", "worse than Amoeba by", *(f"{task} %" for task in tasks)]
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for ratio, methods in found.items():
        _require_equal(methods, reachable(ratio, depth))
        for name, cells in methods.items():
            print("| " + " | ".join(_row(ratio, depth, name, cells, methods[AMOEBA], tasks)) + " |", flush=True)
    chance = first["tasks"][tasks[0]]["chance"]
    seeds = len(next(iter(next(iter(found.values())).values())))
    print(
        f"\nMean over {seeds} seeds ± standard deviation between them. 'kept' is the share of block parameters, "
        f"without embedding and head. 'worse than Amoeba by': loss less Amoeba's, row by row of the held-out text, "
        f"averaged over seeds, ± standard error over {len(first['losses'])} rows; * where that is more than {CRITICAL} "
        f"standard errors. Chance is {100 * chance:.0f} %."
    )


def _row(
    ratio: float, depth: int, name: str, cells: Sequence[Cell], amoeba: Sequence[Cell], tasks: Sequence[str]
) -> list[str]:
    shares = [cell["share"] for cell in cells]
    difference = ""
    if name != AMOEBA:
        compared = against_amoeba(amoeba, cells)
        star = " *" if compared.significant else ""
        difference = f"{compared.difference:+.4f} ± {compared.standard_error:.4f}{star}"
    accuracies = [[100 * statistics.fmean(cell["tasks"][task]["right"]) for cell in cells] for task in tasks]
    return [
        f"{ratio:.0%} ({reachable(ratio, depth):.1%})",
        name,
        ", ".join(dict.fromkeys(cell["shape"] for cell in cells)),
        f"{min(shares):.1%}" if max(shares) - min(shares) < 5e-4 else f"{min(shares):.1%} to {max(shares):.1%}",
        spread([cell["loss"] for cell in cells], 4),
        difference,
        *(spread(values) for values in accuracies),
    ]


def _require_equal(methods: dict[str, list[Cell]], target: float) -> None:
    """Every cell of a group keeps as many parameters, within one per cent of the target."""
    for name, cells in methods.items():
        for cell in cells:
            if abs(cell["share"] / target - 1) > 0.01:
                raise AssertionError(f"{name} keeps {cell['share']:.2%} where {target:.2%} is compared")
