"""Tasks by name: as lm-evaluation-harness asks and scores them, of model folders, engines and shapes alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STORIES, amoeba, sentence

from amoeba_deploy import evaluated
from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.evaluation import Ids, LogitsFunction, torch_logits
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.tasks import TASKS, TaskResult, named_task, task_results
from amoeba_deploy.tasks.local_rows import local_spec

pytest.importorskip("lm_eval")

BASE = EMBEDDED / "base"
SHARED_DATA = STORIES.parent.parent / "data"
NAMES = ("mmlu", "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "wikitext")
PETS = ("growl", "hiss", "chirp", "squeak")


def choice_rows(count: int, choices: int, **more: Any) -> list[dict[str, Any]]:
    """Questions of our own, of different lengths, about animals that do not exist."""
    rows = []
    for number in range(count):
        name = ("robbo", "jelf", "nindle", "zemp")[number % 4]
        words = " and then again" * (number % 3)
        rows.append(
            {
                "question": f"What sound does the {name} make at night{words}",
                "choices": [f"{PETS[(number + place) % 4]}{' loudly' * place}" for place in range(choices)],
                "gold": number % choices,
                **more,
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of rows for every task of the paper."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("arc_easy", "arc_challenge", "openbookqa"):
        write_rows(folder / task / "test.jsonl", choice_rows(9, 4))
    for task in ("piqa", "hellaswag"):
        write_rows(folder / task / "validation.jsonl", choice_rows(8, 2 if task == "piqa" else 4))
    sentence_of = "Mirel gave Faiven a cup because _ was thirsty {} times."
    pairs = [{"question": sentence_of.format(n), "choices": ["Mirel", "Faiven"], "gold": n % 2} for n in range(7)]
    write_rows(folder / "winogrande" / "validation.jsonl", pairs)
    asked = {"question": "does it have bridges"}
    passages = [{"passage": f"The river has {n} bridges.", **asked, "gold": n % 2} for n in range(7)]
    write_rows(folder / "boolq" / "validation.jsonl", passages)
    subjects = ("astronomy", "marketing", "virology")
    write_rows(
        folder / "mmlu" / "test.jsonl",
        [row for place, subject in enumerate(subjects) for row in choice_rows(4 + place, 4, subject=subject)],
    )
    write_rows(folder / "mmlu" / "dev.jsonl", [row for s in subjects for row in choice_rows(5, 4, subject=s)])
    body = "The {} birds sing , and the fish swims in {} @.@ 5 rivers . \n = = Part = = \n It rains . \n"
    text = "".join(f" = Title {n} = \n\n {body.format(n, n + 2)}" for n in range(5))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base_logits() -> LogitsFunction:
    return torch_logits(load_torch_model(BASE))


@pytest.fixture(scope="module")
def ours(data: Path, base_logits: LogitsFunction) -> dict[str, TaskResult]:
    """Every task asked of the embedded base model."""
    return task_results(NAMES, base_logits, BASE, 512, data=data, rows=4)


@pytest.fixture(scope="module")
def theirs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The harness's own figures, by its own model class, of the same folder and rows."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    items: list[dict[str, Any]] = []
    for name in NAMES:
        task = named_task(name)
        spec = local_spec(task, data / (task.local or name), tmp_path_factory.mktemp(name))
        items += [one | {"num_fewshot": task.shots} for one in (spec if isinstance(spec, list) else [spec])]
    return dict(
        simple_evaluate(
            model="hf",
            model_args=f"pretrained={BASE},dtype=float32",
            tasks=[{"group": "own", "task": items}],
            task_manager=TaskManager(),
            device="cpu",
            batch_size=1,
        )
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mmlu", "wikitext")])
def test_figures_are_the_harnesss_own(
    name: str, ours: dict[str, TaskResult], theirs: dict[str, dict[str, Any]]
) -> None:
    own, other = ours[name], theirs["results"][name]
    assert own.value == other[f"{own.metric},none"]
    assert own.standard_error == pytest.approx(other[f"{own.metric}_stderr,none"], rel=1e-9)
    assert own.metrics["acc"] == other["acc,none"]
    assert own.questions == len(theirs["samples"][name])
    assert list(own.scores) == [float(sample[own.metric]) for sample in theirs["samples"][name]]


def test_a_group_counts_every_question_alike_as_in_the_harness(
    ours: dict[str, TaskResult], theirs: dict[str, dict[str, Any]]
) -> None:
    from lm_eval.api.metrics import pooled_sample_stderr

    samples, results = theirs["samples"], theirs["results"]
    names = sorted(name for name in samples if name.startswith("mmlu_"))
    right = [sample["acc"] for name in names for sample in samples[name]]
    assert ours["mmlu"].value == pytest.approx(float(np.mean(right)))
    assert ours["mmlu"].questions == 15
    assert ours["mmlu"].shots == 5
    errors = [results[name]["acc_stderr,none"] for name in names]
    wanted = pooled_sample_stderr(errors, [len(samples[name]) for name in names])
    assert ours["mmlu"].standard_error == pytest.approx(wanted)


def test_perplexity_is_the_harnesss_own(ours: dict[str, TaskResult], theirs: dict[str, dict[str, Any]]) -> None:
    own, other = ours["wikitext"], theirs["results"]["wikitext"]
    assert own.value == pytest.approx(other["word_perplexity,none"], rel=1e-4)  # sums of float32 in another order
    assert own.metrics["bits_per_byte"] == pytest.approx(other["bits_per_byte,none"], rel=1e-5)
    assert own.questions == 5
    assert own.chance is None
    assert own.standard_error is not None and own.standard_error > 0


def test_the_harness_reads_the_five_worked_examples(theirs: dict[str, dict[str, Any]]) -> None:
    sample = theirs["samples"]["mmlu_astronomy"][0]
    prompt = sample["arguments"][0][0]
    assert prompt.count("Answer:") == 6
    assert prompt.startswith("The following are multiple choice questions (with answers) about astronomy.")


def test_chance_is_what_guessing_gives(ours: dict[str, TaskResult]) -> None:
    assert ours["piqa"].chance == 0.5
    assert ours["arc_easy"].chance == 0.25
    assert ours["boolq"].chance == 0.5


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared models are not here")
def test_a_model_that_nobody_here_wrote_scores_what_the_harness_says_of_it() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = task_results(["piqa"], torch_logits(load_torch_model(STORIES)), STORIES, 512, limit=60, data=SHARED_DATA)
    with tempfile.TemporaryDirectory() as work:
        spec = local_spec(named_task("piqa"), SHARED_DATA / "piqa", Path(work))
        result = simple_evaluate(
            model="hf",
            model_args=f"pretrained={STORIES},dtype=float32",
            tasks=[{"group": "own", "task": [spec]}],
            task_manager=TaskManager(),
            limit=60,
            device="cpu",
        )
    assert own["piqa"].value == result["results"]["piqa"]["acc_norm,none"]
    assert own["piqa"].standard_error == pytest.approx(result["results"]["piqa"]["acc_norm_stderr,none"])


# Engines and shapes


def results_of(*command: object) -> dict[str, Any]:
    done = amoeba("evaluate", *command, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Bundles of the embedded checkpoint's smallest shape, by flow and precision."""
    folder, made = tmp_path_factory.mktemp("bundles"), set()

    def built(flow: str, precision: str) -> Path:
        path = folder / f"{flow}-{precision}"
        if path not in made:
            done = amoeba(
                *("export", "--device", "local", "--shape", "6x0.5", "--flow", flow, "--precision", precision),
                *("-o", path, "--quiet"),
            )
            assert done.exit_code == 0, done.output
            made.add(path)
        return path

    return built


@pytest.mark.parametrize(("flow", "precision"), [("onnx", "fp32"), ("gguf", "fp32"), ("onnx", "int4")])
def test_an_engine_is_asked_itself(flow: str, precision: str, bundles: Callable[[str, str], Path], data: Path) -> None:
    """In float32 it answers as the subnet does; in int4 it is the engine's own perplexity that is found."""
    names = ("--tasks", "piqa,arc_easy,wikitext", "--data", data)
    engine = results_of(bundles(flow, precision), *names)["tasks"]
    shape = results_of("--shape", "6x0.5", *names)["tasks"]
    if precision == "fp32":
        assert engine["piqa"]["accuracy"] == shape["piqa"]["accuracy"]
        assert engine["arc_easy"]["accuracy"] == shape["arc_easy"]["accuracy"]
        # llama.cpp keeps its cache in half precision; of so high a perplexity a word that is two in a thousand.
        bits = [found["wikitext"]["metrics"]["bits_per_byte"] for found in (engine, shape)]
        assert bits[0] == pytest.approx(bits[1], rel=1e-3 if flow == "gguf" else 1e-5)
    else:
        off = engine["wikitext"]["word_perplexity"] / shape["wikitext"]["word_perplexity"] - 1
        assert 1e-3 < abs(off) < 0.3


def test_a_bundle_whose_files_were_changed_is_not_evaluated(
    bundles: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    """Else what was remembered of the untouched one would be told of it."""
    own = Path(shutil.copytree(bundles("onnx", "fp32"), tmp_path / "own"))
    ask = ("evaluate", own, "--tasks", "piqa", "--data", data, "--quiet")
    assert amoeba(*ask).exit_code == 0
    weights = max((own / "engine").iterdir(), key=lambda file: file.stat().st_size)
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    assert weights.name in sentence(amoeba(*ask), 5)


@pytest.mark.parametrize("shape", ["12x1", "8x0.75", "6x0.5"])
def test_a_shape_answers_as_the_folder_that_is_extracted(shape: str, data: Path, tmp_path: Path) -> None:
    done = amoeba("extract", "--shape", shape, "--dtype", "fp32", "-o", tmp_path / "subnet", "--quiet")
    assert done.exit_code == 0, done.output
    text = EMBEDDED.parent / "validation.txt"
    short = tmp_path / "text.txt"
    short.write_text(text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    ask = ("--tasks", "arc_easy,mmlu", "--data", data, "--text", short)
    elastic, folder = results_of("--shape", shape, *ask), results_of(tmp_path / "subnet", *ask)
    assert elastic["loss"] == pytest.approx(folder["loss"], abs=1e-4)
    for name in ("arc_easy", "mmlu"):
        assert elastic["tasks"][name]["accuracy"] == folder["tasks"][name]["accuracy"]


def test_a_plan_by_hand_is_extracted_for_it(data: Path, tmp_path: Path) -> None:
    plan = json.loads(amoeba("extract", "--shape", "8x0.75", "--plan-only").stdout)
    plan["blocks"][0]["neurons"] = plan["blocks"][0]["neurons"][:32]
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    found = results_of("--shape", tmp_path / "plan.json", "--tasks", "arc_easy", "--data", data)
    assert found["tasks"]["arc_easy"]["n"] == 9


# How it is asked


def test_the_first_questions_alone(data: Path, base_logits: LogitsFunction) -> None:
    found = task_results(["piqa"], base_logits, BASE, 512, data=data, limit=3)["piqa"]
    assert found.questions == 3


def test_worked_examples_come_from_a_file_of_their_own(data: Path, base_logits: LogitsFunction, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"piqa: holds no worked examples, and 2 are asked for; add a file such as train"
    ):
        task_results(["piqa"], base_logits, BASE, 512, data=data, shots=2)
    own = tmp_path / "piqa"
    write_rows(own / "validation.jsonl", choice_rows(4, 2))
    write_rows(own / "train.jsonl", choice_rows(4, 2))
    seen: list[Ids] = []

    def logits(ids: Ids) -> Any:
        seen.append(ids)
        return base_logits(ids)

    found = task_results(["piqa"], logits, BASE, 512, data=tmp_path, shots=2)["piqa"]
    assert found.shots == 2
    none: list[int] = [ids.shape[1] for ids in seen]
    seen.clear()
    task_results(["piqa"], logits, BASE, 512, data=tmp_path, shots=0)
    assert min(none) > max(ids.shape[1] for ids in seen)


@pytest.mark.parametrize(("alias", "name"), [("arc-e", "arc_easy"), ("obqa", "openbookqa"), ("wikitext2", "wikitext")])
def test_other_names_mean_the_same(alias: str, name: str) -> None:
    assert named_task(alias) == TASKS[name]


def test_a_mistyped_name_is_refused_with_the_nearest(data: Path) -> None:
    said = sentence(amoeba("evaluate", "--tasks", "arc_eazy", "--data", data, "--quiet"), 2)
    assert "did you mean 'arc_easy'?" in said


def test_tasks_that_ask_for_text_are_refused(base_logits: LogitsFunction, tmp_path: Path) -> None:
    write_rows(tmp_path / "gsm8k" / "main" / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 2)
    write_rows(tmp_path / "gsm8k" / "main" / "train.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}] * 6)
    card = [{"config_name": "main", "data_files": [{"split": s, "path": f"main/{s}.jsonl"} for s in ("test", "train")]}]
    (tmp_path / "gsm8k" / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n", encoding="utf-8")
    with pytest.raises(BadInput, match="gsm8k: asks for generated text"):
        task_results(["gsm8k"], base_logits, BASE, 512, data=tmp_path)


def test_a_copy_of_the_hubs_repository_is_asked_too(base_logits: LogitsFunction, tmp_path: Path) -> None:
    """In the hub's own columns, with a card that names its splits."""
    rows = [{"goal": "ready a cage", "sol1": "add bedding", "sol2": "remove it", "label": n % 2} for n in range(4)]
    write_rows(tmp_path / "piqa" / "data" / "validation-00000.jsonl", rows)
    write_rows(tmp_path / "piqa" / "data" / "train-00000.jsonl", rows)
    card = [
        {
            "config_name": "default",
            "data_files": [{"split": s, "path": f"data/{s}-*.jsonl"} for s in ("train", "validation")],
        }
    ]
    (tmp_path / "piqa" / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n", encoding="utf-8")
    found = task_results(["piqa"], base_logits, BASE, 512, data=tmp_path)["piqa"]
    assert found.questions == 4


def test_without_data_and_hub_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the variable HF_HUB_OFFLINE sets where it is there from the beginning.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("AMOEBA_DATA", raising=False)
    said = sentence(amoeba("evaluate", "--tasks", "piqa", "--quiet"), 2)
    assert "keep files in the folder $AMOEBA_DATA/piqa" in said


def test_the_variable_names_the_folder_too(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOEBA_DATA", str(data))
    assert results_of("--shape", "6x0.5", "--tasks", "piqa")["tasks"]["piqa"]["n"] == 8


DAMAGE: dict[str, tuple[str, str]] = {
    "not json": ("{", "line 1"),
    "a list": ("[1, 2]", "line 1"),
    "no choices": ('{"question": "x", "gold": 0}', "lacks 'choices'"),
    "gold beyond": ('{"question": "x", "choices": ["a", "b"], "gold": 2}', "line 1"),
    "gold true": ('{"question": "x", "choices": ["a", "b"], "gold": true}', "line 1"),
    "gold text": ('{"question": "x", "choices": ["a", "b"], "gold": "0"}', "line 1"),
    "empty choice": ('{"question": "x", "choices": ["a", ""], "gold": 0}', "line 1"),
    "deep": ('{"question": ' + "[" * 100_000 + "]" * 100_000 + ', "choices": ["a", "b"], "gold": 0}', "line 1"),
    "three choices": ('{"question": "x", "choices": ["a", "b", "c"], "gold": 0}', "line 1"),
    "numbers": ('{"question": 4, "choices": ["a", "b"], "gold": 0}', "line 1"),
    "nothing": ("\n\n", "holds no rows"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_named(damage: str, base_logits: LogitsFunction, tmp_path: Path) -> None:
    text, said = DAMAGE[damage]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"validation\.jsonl") as error:
        task_results(["piqa"], base_logits, BASE, 512, data=tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("boolq", {"passage": "p", "question": "q", "gold": True}),
        ("boolq", {"passage": "p", "question": "q", "gold": 2}),
        ("arc_easy", {"question": "q", "choices": list("abcdefghijk"), "gold": 10}),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "gold": 1, "subject": "astronomy"}),
        ("winogrande", {"question": "nothing to fill in", "choices": ["a", "b"], "gold": 1}),
    ],
)
def test_a_row_that_does_not_fit_its_task_is_named(
    task: str, row: dict[str, Any], base_logits: LogitsFunction, tmp_path: Path
) -> None:
    for name in ("test.jsonl", "dev.jsonl"):
        write_rows(tmp_path / task / name, [row])
    with pytest.raises(BadInput, match=r"line 1: does not hold what this task asks"):
        task_results([task], base_logits, BASE, 512, data=tmp_path)


def test_no_task_is_no_evaluation() -> None:
    assert "needs --text FILE or --tasks" in sentence(amoeba("evaluate", "--tasks", "", "--quiet"), 2)


def test_a_missing_folder_of_data_is_refused(base_logits: LogitsFunction, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere: is not a folder"):
        task_results(["piqa"], base_logits, BASE, 512, data=tmp_path / "nowhere")


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_deploy.tasks import harness

    harness._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    try:
        with pytest.raises(ToolchainMissing, match=r"pip install 'amoeba-deploy\[evaluate\]'"):
            harness.check_names(["piqa"])
    finally:
        harness._manager.cache_clear()


# What is remembered


def test_the_same_question_is_answered_without_opening_anything(
    data: Path, bundles: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = (bundles("onnx", "fp32"), "--tasks", "piqa", "--data", data)
    first = results_of(*ask)
    assert first["remembered"] is False
    opened: list[Any] = []
    monkeypatch.setattr(evaluated._Opened, "logits", property(lambda self: opened.append(self)))
    second = results_of(*ask)
    assert second["remembered"] is True
    assert not opened
    assert second["tasks"] == first["tasks"]


def test_another_question_is_not(tmp_path: Path) -> None:
    own = tmp_path / "data" / "piqa"
    write_rows(own / "validation.jsonl", choice_rows(4, 2))
    ask = ("--shape", "6x0.5", "--tasks", "piqa", "--data", tmp_path / "data")
    assert results_of(*ask)["remembered"] is False
    assert results_of(*ask)["remembered"] is True
    assert results_of(*ask, "--limit", 2)["remembered"] is False
    assert results_of("--shape", "6x0.63", *ask[2:])["remembered"] is False
    assert results_of(*ask, "--fresh")["remembered"] is False
    rows = choice_rows(4, 2)
    rows[0]["gold"] = 1 - rows[0]["gold"]
    write_rows(own / "validation.jsonl", rows)
    assert results_of(*ask)["remembered"] is False


def test_a_damaged_memory_is_measured_again() -> None:
    ask = ("--shape", "6x0.5", "--tasks", EMBEDDED.parent / "questions.jsonl", "--limit", 3)
    first = results_of(*ask)
    files = list((Path(os.environ["AMOEBA_CACHE"]) / "evaluations").glob("*.json"))
    assert len(files) == 1
    for text in ("{", '{"format": "amoeba.evaluation/1", "facts": {}, "result": {}}', "[]"):
        files[0].write_text(text, encoding="utf-8")
        again = results_of(*ask)
        assert again["remembered"] is False
        assert again["tasks"] == first["tasks"]


# What is printed


def test_nothing_is_printed_but_the_answer(data: Path, tmp_path: Path) -> None:
    """In a process of its own: the harness, datasets and their bars keep silent, and write to no other place."""
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home), "AMOEBA_CACHE": str(tmp_path / "cache"), "HF_HOME": str(home / "hf")}
    command = [sys.executable, "-m", "amoeba_deploy", "evaluate", "--shape", "6x0.5", "--tasks", "mmlu,piqa", "--json"]
    done = subprocess.run(
        [*command, "--data", str(data)], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(json.loads(done.stdout)["tasks"]) == {"mmlu", "piqa"}
    left = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert not {name for name in left if "datasets" in name}, left


def test_people_read_errors_beside_figures(data: Path, demo: Checkpoint) -> None:
    del demo
    said = amoeba("evaluate", "--shape", "6x0.5", "--tasks", "piqa,wikitext", "--data", data).stdout
    assert " of 8 questions right (chance 50.0%)" in said
    assert "± " in said
    assert "wikitext word perplexity " in said and "over 5 documents" in said
