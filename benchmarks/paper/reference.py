"""What the paper reports of LLaMA2-7B: its Table 1, in per cent. Other figures of the paper are not at hand here."""

from __future__ import annotations

TASKS = ("mmlu", "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
MEAN_OF_7 = TASKS[1:]
"""MMLU stands beside the mean of the others."""

TABLE_1: dict[int, dict[str, tuple[float, ...]]] = {
    80: {
        "LLM-Pruner": (29.63, 58.53, 76.39, 65.80, 60.38, 64.60, 34.56, 38.40),
        "FLAP": (40.21, 73.64, 74.81, 68.27, 65.43, 66.20, 37.88, 40.60),
        "Shortened LLaMA": (26.45, 62.17, 76.01, 68.22, 58.88, 68.98, 38.40, 38.40),
        "Amoeba": (40.70, 72.70, 76.80, 70.60, 67.60, 68.30, 38.80, 41.20),
        "Amoeba tuned alone": (42.40, 72.50, 76.30, 70.80, 66.90, 70.30, 40.20, 39.60),
    },
    65: {
        "LLM-Pruner": (23.15, 60.73, 74.97, 58.57, 57.85, 55.68, 33.02, 37.80),
        "FLAP": (33.28, 65.75, 70.08, 60.57, 61.33, 62.25, 33.87, 39.00),
        "Shortened LLaMA": (24.89, 62.32, 72.03, 55.10, 52.41, 59.47, 30.63, 36.00),
        "Amoeba": (36.00, 72.10, 70.70, 59.70, 63.20, 62.20, 34.00, 36.80),
        "Amoeba tuned alone": (36.20, 70.50, 70.90, 61.50, 62.70, 63.50, 34.50, 37.20),
    },
    50: {
        "LLM-Pruner": (22.90, 61.83, 67.79, 43.31, 51.22, 46.13, 28.16, 34.20),
        "FLAP": (27.67, 59.45, 67.30, 51.33, 56.75, 55.43, 31.57, 36.00),
        "Shortened LLaMA": (24.76, 62.23, 66.00, 43.60, 51.54, 50.63, 26.45, 31.00),
        "Amoeba": (30.60, 65.70, 66.10, 51.30, 60.10, 56.60, 31.50, 34.00),
        "Amoeba tuned alone": (32.20, 64.70, 66.70, 53.00, 60.30, 58.00, 30.10, 35.60),
    },
}
"""By the share of remaining block parameters in per cent, then by method: accuracies in the order of ``TASKS``."""


def mean_of_7(row: tuple[float, ...]) -> float:
    """The mean over all tasks but MMLU, as the paper prints it.

    >>> round(mean_of_7(TABLE_1[80]["FLAP"]), 2)
    60.98
    """
    return sum(row[1:]) / len(MEAN_OF_7)


def print_table_1() -> None:
    """The paper's own figures, marked as such."""
    print("\nThe paper's own Table 1 (LLaMA2-7B, accuracy in %, AmoebaLLM arXiv 2411.10606; not measured here)\n")
    print("| remaining | method | " + " | ".join((TASKS[0], "mean of 7", *MEAN_OF_7)) + " |")
    print("|---" * (len(TASKS) + 3) + "|")
    for ratio, rows in TABLE_1.items():
        for method, row in rows.items():
            cells = (row[0], mean_of_7(row), *row[1:])
            print(f"| {ratio}% | {method} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
