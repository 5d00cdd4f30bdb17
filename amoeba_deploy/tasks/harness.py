"""One run of lm-evaluation-harness: a task's questions put to a logits function, and what came of it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.evaluation import LogitsFunction
from amoeba_deploy.progress import Progress
from amoeba_deploy.quiet import quiet_data
from amoeba_deploy.tasks.answering import answering
from amoeba_deploy.tasks.local_rows import examples_missing, local_folder, local_spec
from amoeba_deploy.tasks.names import TASKS, NamedTask, named_task
from amoeba_deploy.tasks.result import TaskResult

GROUP = "asked"
"""The group that the harness is handed: tasks inside a group may be changed, those at the top may not."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "shots": 1234}
"""The harness's own (``lm_eval.evaluator.simple_evaluate``): they choose worked examples."""
_LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
_PLACES = ("dataset_path", "dataset_kwargs", "metadata")
"""Of a task's configuration: where its data lie, which is no part of what they are."""
_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity")
"""Main metrics in order of preference where a task names none."""

Remember = Callable[[Mapping[str, Any], Callable[[], TaskResult]], TaskResult]
"""Gives a result that was found before under the same facts, or finds it."""


@dataclass(frozen=True)
class TaskRequest:
    """How tasks are asked: worked examples (the paper's or the task's own where None), the first so many questions
    only, and the folder of files that stand in for the hub's datasets."""

    shots: int | None = None
    limit: int | None = None
    data: Path | None = None


def task_results(
    names: Sequence[str],
    logits: LogitsFunction,
    folder: Path,
    context: int,
    *,
    shots: int | None = None,
    limit: int | None = None,
    data: Path | None = None,
    rows: int = 1,
    remember: Remember | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """The results of tasks by name, in the harness's own rules.

    Args:
        names: of ``TASKS``, their aliases, or any task of the harness that is scored by likelihoods.
        logits: from ids [rows, length] to logits [rows, length, vocabulary].
        folder: where the tokenizer and ``config.json`` of what answers lie.
        context: the most tokens that it takes at once.
        shots: worked examples before each question; the paper's, or the task's own, where left out.
        limit: ask the first so many questions of every task (or part of it) only.
        data: a folder that holds a folder a task; ``$AMOEBA_DATA`` where left out, else the hub is asked.
        rows: requests that are fed together.
        remember: looks results up by what decides them; nothing is remembered where it is left out.
        progress: where bars go.

    Raises:
        BadInput: a name is unknown, a task is not scored by likelihoods, or its data cannot be had.
        ToolchainMissing: the extra ``evaluate`` is not installed.
    """
    asked = TaskRequest(shots, limit, data)
    shown = progress or Progress(quiet=True)
    return {name: _one(named_task(name), asked, logits, folder, context, rows, remember, shown) for name in names}


def check_names(names: Sequence[str]) -> None:
    """Raise BadInput, or ToolchainMissing, where a name is no task that can be asked."""
    for name in names:
        if (task := named_task(name)).name not in TASKS:
            _require_known(task)
        else:
            _manager(task.defined)


def _one(
    task: NamedTask,
    asked: TaskRequest,
    logits: LogitsFunction,
    folder: Path,
    context: int,
    rows: int,
    remember: Remember | None,
    progress: Progress,
) -> TaskResult:
    with tempfile.TemporaryDirectory(prefix="amoeba-task-") as work, _quiet():
        loaded = _loaded(task, asked, Path(work))
        found = loaded["tasks"]

        def answer() -> TaskResult:
            with progress.bar(task.name, sum(_questions(each, asked.limit) for each in found.values())) as step:
                # A question has several requests; the bar counts questions, near enough.
                ahead = [0.0]

                def advance(count: int) -> None:
                    ahead[0] += count / max(_choices_of(found), 1)
                    while ahead[0] >= 1:
                        step()
                        ahead[0] -= 1

                return _evaluated(task, asked, loaded, answering(logits, folder, context, rows, advance))

        return remember(_facts(task, asked, found, context), answer) if remember else answer()


def _evaluated(task: NamedTask, asked: TaskRequest, loaded: dict[str, Any], model: Any) -> TaskResult:
    from lm_eval.evaluator import evaluate

    found = evaluate(lm=model, task_dict=loaded, limit=asked.limit, bootstrap_iters=0, log_samples=True)
    names = list(loaded["tasks"])
    results = [found["results"][name] for name in names]
    samples = [found["samples"][name] for name in names]
    metric = _main_metric(task, results[0])
    shots = int(found["n-shot"].get(names[0], 0))
    parts = [_result(metric, own, asked_of, shots) for own, asked_of in zip(results, samples, strict=True)]
    whole = parts[0] if len(parts) == 1 else _together(parts)
    # A group of the harness has its own way to weigh its parts.
    group = found["results"].get(task.harness) if len(parts) > 1 else None
    return replace(whole, value=float(group[f"{metric},none"])) if group else whole


def _result(metric: str, found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], shots: int) -> TaskResult:
    """From the harness's own results of a task, and of its questions in order."""
    metrics = {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}
    kept = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    scores = tuple(float(sample[metric]) for sample in samples if isinstance(sample[metric], int | float | bool))
    if metric.endswith("perplexity"):
        error = _perplexity_error([sample[metric] for sample in samples])
    else:
        error = _mean_error(scores)
    counts = [len(sample["arguments"]) for sample in samples]
    chance = sum(1 / count for count in counts) / len(counts) if min(counts) > 1 else None
    return TaskResult(metric, float(metrics[metric]), error, len(samples), chance, shots, scores, kept)


def _together(parts: Sequence[TaskResult]) -> TaskResult:
    """Several tasks as one: every question counts alike, and errors are pooled as the harness pools them."""
    from lm_eval.api.metrics import pooled_sample_stderr

    sizes, errors = [part.questions for part in parts], [part.standard_error for part in parts]
    count = sum(sizes)
    known = [error for error in errors if error is not None]
    error = float(pooled_sample_stderr(known, sizes)) if len(known) == len(parts) else None
    chances = [part.chance for part in parts if part.chance is not None]
    return TaskResult(
        parts[0].metric,
        sum(part.value * part.questions for part in parts) / count,
        error,
        count,
        sum(chance * size for chance, size in zip(chances, sizes, strict=True)) / count if chances else None,
        parts[0].shots,
        tuple(score for part in parts for score in part.scores),
    )


def _mean_error(scores: Sequence[float]) -> float | None:
    """Standard error of a mean: the sample's standard deviation over the square root of their number."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def _perplexity_error(pairs: Sequence[Sequence[float]]) -> float | None:
    """Standard error of exp(-sum of log-likelihoods / sum of weights) over documents, by the ratio's linearisation."""
    if len(pairs) < 2:
        return None
    values, weights = np.array(pairs, dtype=np.float64).T
    mean = -values.sum() / weights.sum()
    residuals = -values - mean * weights
    spread = math.sqrt(len(pairs) / (len(pairs) - 1) * float((residuals**2).sum()))
    return float(math.exp(mean) * spread / weights.sum())


def _main_metric(task: NamedTask, result: Mapping[str, Any]) -> str:
    if task.metric:
        return task.metric
    own = [key.removesuffix(",none") for key in result if key.endswith(",none") and "_stderr" not in key]
    return next((metric for metric in _METRICS if metric in own), own[0])


def _loaded(task: NamedTask, asked: TaskRequest, work: Path) -> dict[str, Any]:
    """The harness's own tasks with their data, ready to be asked."""
    manager = _manager(task.defined)
    folder = local_folder(task, asked.data)
    if task.name not in TASKS:
        _require_known(task)
    shots = task.shots if asked.shots is None else asked.shots
    if shots and folder and examples_missing(task, folder):
        raise BadInput(
            f"{folder}: holds no worked examples, and {shots} are asked for; add a file such as "
            f"{'dev' if task.name == 'mmlu' else 'train'}.jsonl, or give --shots 0"
        )
    spec = local_spec(task, folder, work) if folder else _hub_spec(task)
    items = [dict(each) | ({} if shots is None else {"num_fewshot": shots}) for each in _listed(spec)]
    try:
        loaded: dict[str, Any] = manager.load([{"group": GROUP, "task": items}])
        _prepare(loaded["tasks"], shots)
        for each in loaded["tasks"].values():
            if each.OUTPUT_TYPE not in _LIKELIHOODS:
                raise BadInput(
                    f"{task.name}: asks for generated text, and tasks are scored by likelihoods here; "
                    "leave it out, or run lm_eval on an extracted folder"
                )
            next(iter(each.eval_docs))
            if each.config.num_fewshot:
                next(iter(each.fewshot_docs()))
    except BadInput:
        raise
    except Exception as error:  # the harness and datasets raise whatever their parts raise
        raise _unreadable(task, folder, error) from None
    return loaded


def _hub_spec(task: NamedTask) -> dict[str, Any]:
    kind = "group" if task.harness in _manager(task.defined).all_groups else "task"
    return {kind: task.harness}


def _listed(spec: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return spec if isinstance(spec, list) else [spec]


def _prepare(tasks: Mapping[str, Any], shots: int | None) -> None:
    """What ``simple_evaluate`` does before it asks: seeds, and no worked examples where nobody names a number."""
    import torch

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in tasks.values():
        if shots is None and task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["shots"])


def _facts(task: NamedTask, asked: TaskRequest, tasks: Mapping[str, Any], context: int) -> dict[str, Any]:
    """What decides a result besides who answers: the questions and examples themselves, and how they are asked."""
    import lm_eval

    digest = hashlib.sha256()
    for name, each in tasks.items():
        config = each.dump_config()
        kept = {key: value for key, value in config.items() if key not in _PLACES}
        digest.update(f"{name} {json.dumps(kept, sort_keys=True, default=str)}\n".encode())
        docs = itertools.chain(each.eval_docs, each.fewshot_docs() if each.config.num_fewshot else ())
        for doc in docs:
            digest.update((json.dumps(doc, sort_keys=True, default=str) + "\n").encode())
    return {
        "task": task.name,
        "metric": task.metric,
        "content": digest.hexdigest(),
        "limit": asked.limit,
        "context": context,
        "harness": lm_eval.__version__,
    }


def _questions(task: Any, limit: int | None) -> int:
    count = len(task.eval_docs)
    return count if limit is None else min(count, limit)


def _choices_of(tasks: Mapping[str, Any]) -> int:
    """How many requests a question of these tasks makes."""
    first = next(iter(tasks.values()))
    if first.OUTPUT_TYPE != "multiple_choice":
        return 1
    return len(first.doc_to_choice(next(iter(first.eval_docs))))


def _require_known(task: NamedTask) -> None:
    known = _manager().all_tasks
    if task.harness not in known:
        near = difflib.get_close_matches(task.name, TASKS, 1) or difflib.get_close_matches(task.name, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"the paper's are {', '.join(TASKS)}"
        raise BadInput(f"{task.name}: is neither a file of questions nor a task of lm-evaluation-harness; {hint}")


def _unreadable(task: NamedTask, folder: Path | None, error: Exception) -> BadInput:
    """One sentence for whatever kept the harness from its data."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if folder:
        return BadInput(f"{folder}: cannot be asked ({reason}); docs/evaluation.md shows what the folder may hold")
    return BadInput(
        f"{task.name}: its data could not be had ({reason}); connect to the hub, or keep files in the folder "
        f"$AMOEBA_DATA/{task.local or task.name} (docs/evaluation.md shows their form)"
    )


@cache
def _manager(defined: str | None = None) -> Any:
    """The harness's index of tasks: of one folder of its definitions, or of all, which are some thousand files."""
    with _quiet():
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        if defined is None:
            return TaskManager()
        return TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / defined), include_defaults=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While the harness works, its remarks and bars, and those of datasets, stay off the terminal.

    Raises:
        ToolchainMissing: the extra ``evaluate`` is not installed.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(quiet_data("lm_eval", "transformers"))
            from lm_eval.api import task as asking
        except ImportError:
            raise ToolchainMissing(
                "tasks by name are asked through lm-evaluation-harness, which is not installed; "
                "run pip install 'amoeba-deploy[evaluate]'"
            ) from None
        # The one bar of the harness that has no switch, over the making of requests.
        stack.enter_context(_replaced(asking, "tqdm", lambda items, **_: items))
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
