"""The tasks that the paper reports, by name: what the harness calls them, and how the paper asks.

Every other task of lm-evaluation-harness that is scored by likelihoods can be named too; it is asked as the harness
has it. Shots: five for MMLU, as in the released recipe (AmoebaLLM, arXiv 2411.10606), and none for the others, as in
the works that the paper compares with. Metric: the share of right answers by log-likelihood per byte where the harness
has it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTask:
    """One task: its name here and in the harness, worked examples before each question, and its main metric.

    ``shots`` and ``metric`` are None where the harness's own are taken. ``local`` names the folder of files that may
    stand in for the hub's dataset, ``defined`` the folder among the harness's tasks that defines it: reading that one
    takes a moment, reading all of them ten seconds.
    """

    name: str
    harness: str
    shots: int | None = None
    metric: str | None = None
    local: str | None = None
    defined: str | None = None


def _by_name(*tasks: NamedTask) -> dict[str, NamedTask]:
    return {task.name: task for task in tasks}


TASKS: dict[str, NamedTask] = _by_name(
    NamedTask("mmlu", "mmlu", 5, "acc", "mmlu", "mmlu/default"),
    NamedTask("boolq", "boolq", 0, "acc", "boolq", "super_glue/boolq"),
    NamedTask("piqa", "piqa", 0, "acc_norm", "piqa", "piqa"),
    NamedTask("hellaswag", "hellaswag", 0, "acc_norm", "hellaswag", "hellaswag"),
    NamedTask("winogrande", "winogrande", 0, "acc", "winogrande", "winogrande"),
    NamedTask("arc_easy", "arc_easy", 0, "acc_norm", "arc_easy", "arc"),
    NamedTask("arc_challenge", "arc_challenge", 0, "acc_norm", "arc_challenge", "arc"),
    NamedTask("openbookqa", "openbookqa", 0, "acc_norm", "openbookqa", "openbookqa"),
    NamedTask("wikitext", "wikitext", 0, "word_perplexity", "wikitext2", "wikitext"),
)
"""The nine of the paper."""

ALIASES = {
    "arc-e": "arc_easy",
    "arc_e": "arc_easy",
    "arc-c": "arc_challenge",
    "arc_c": "arc_challenge",
    "obqa": "openbookqa",
    "wikitext2": "wikitext",
    "wikitext-2": "wikitext",
}
"""Other names that people use."""


def named_task(name: str) -> NamedTask:
    """The task of a name or alias; one that is not among the paper's goes by its name in the harness."""
    known = ALIASES.get(name, name)
    return TASKS.get(known) or NamedTask(known, known)
