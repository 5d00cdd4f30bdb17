"""Calibration data: which tokens are read, which are predicted, and what a metric makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.evaluation import (
    Question,
    choice_scores,
    log_probabilities,
    read_questions,
    task_accuracy,
    torch_logits,
)
from amoeba_deploy.model_folder import load_torch_model
from amoeba_deploy.stage1.blocks import ResidentBlocks
from amoeba_deploy.stage1.calibration import (
    TOKENS_AT_ONCE,
    Batch,
    Calibration,
    Metric,
    batch_cost,
    metric_value,
    question_calibration,
    read_calibration,
    running_batch,
    text_calibration,
)
from amoeba_deploy.stage1.removal import LocalRemover, Trial, total

DEMO = EMBEDDED.parent
TEXT, QUESTIONS = DEMO / "validation.txt", DEMO / "questions.jsonl"
FACTS = {"source": "here"}
CONTEXT = 512


@pytest.fixture(scope="module")
def stock(demo: Checkpoint) -> Any:
    """The embedded model as stock transformers runs it."""
    return load_torch_model(demo.model.path)


@pytest.fixture(scope="module")
def tokenizer(demo: Checkpoint) -> Tokenizer:
    return demo.model.tokenizer()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Twelve questions of which the model is made to miss some: each right choice is one too far in every third."""
    found = read_questions(QUESTIONS)[:12]
    return [q if i % 3 else replace(q, gold=(q.gold + 1) % len(q.choices)) for i, q in enumerate(found)]


@pytest.fixture(scope="module")
def asked(questions: list[Question], tokenizer: Tokenizer) -> Calibration:
    return question_calibration(questions, tokenizer, CONTEXT, FACTS)


def measured(stock: Any, batches: Sequence[Batch], metric: Metric) -> float:
    """The full model's metric as stage 1 measures it."""
    remover = LocalRemover(ResidentBlocks(stock), batches, metric, "block", 10**9)
    cost = total(remover.costs(remover.units, [Trial(())])[0])
    return metric_value(metric, cost, sum(batch.count for batch in batches))


# Text


def test_a_text_is_its_first_tokens_in_rows_of_equal_length() -> None:
    data = text_calibration(range(100), 3, 30, FACTS)
    rows = torch.cat([batch.ids for batch in data.batches])
    assert rows.flatten().tolist() == list(range(90))
    assert rows.shape == (3, 30)
    assert data.count == 3 * 29
    assert data.facts == {"source": "here", "samples": 3, "sequence": 30}


def test_a_text_of_just_enough_tokens_is_enough_and_one_less_is_refused() -> None:
    assert text_calibration(range(90), 3, 30, FACTS).count == 87
    with pytest.raises(BadInput, match=r"here: has 89 tokens where 90 are needed, 3 rows of 30"):
        text_calibration(range(89), 3, 30, FACTS)


def test_a_batch_of_text_holds_a_bounded_number_of_tokens_and_at_least_a_row() -> None:
    short, long = text_calibration(range(20 * 100), 20, 100, FACTS), text_calibration([1] * 4096, 2, 2048, FACTS)
    assert [len(batch.lengths) for batch in short.batches] == [10, 10]
    assert all(batch.tokens <= TOKENS_AT_ONCE for batch in short.batches)
    assert [len(batch.lengths) for batch in long.batches] == [1, 1]


def test_a_text_file_is_tokenised_whole_with_nothing_added(tokenizer: Tokenizer) -> None:
    data = read_calibration(str(TEXT), tokenizer, CONTEXT, samples=4, sequence=40)
    wanted = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids[:160]
    assert torch.cat([batch.ids for batch in data.batches]).flatten().tolist() == wanted
    assert data.facts["source"] == "validation.txt"
    assert data.facts["digest"].startswith("sha256:")


def test_a_row_is_no_longer_than_the_model_attends_to(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"--sequence 41 exceeds the 40 positions"):
        read_calibration(str(TEXT), tokenizer, 40, samples=1, sequence=41)


def test_a_text_by_name_is_read_from_its_local_copy(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    lines = TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:200]
    folder = tmp_path / "wikitext2" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    monkeypatch.setenv("AMOEBA_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data = read_calibration("wikitext2", tokenizer, CONTEXT, samples=3, sequence=32)
    wanted = tokenizer.encode("".join(lines), add_special_tokens=False).ids[:96]
    assert torch.cat([batch.ids for batch in data.batches]).flatten().tolist() == wanted
    assert data.facts["from"] == "local copy"
    with pytest.raises(BadInput, match=r"wikitext2: has \d+ tokens where 512000 are needed"):
        read_calibration("wikitext2", tokenizer, CONTEXT, samples=1000, sequence=512)


def test_the_loss_is_the_stock_models_mean_cross_entropy_over_every_next_token(
    stock: Any, tokenizer: Tokenizer
) -> None:
    data = read_calibration(str(TEXT), tokenizer, CONTEXT, samples=6, sequence=48)
    rows = torch.cat([batch.ids for batch in data.batches])
    with torch.no_grad():
        logits = stock(input_ids=rows, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert data.count == 6 * 47
    # Float32 sums in another order.
    assert measured(stock, data.batches, "loss") == pytest.approx(float(wanted), rel=1e-5)


# Questions


def test_accuracy_is_that_of_evaluate(
    stock: Any, asked: Calibration, questions: list[Question], tokenizer: Tokenizer
) -> None:
    wanted = task_accuracy(torch_logits(stock), questions, tokenizer, CONTEXT).accuracy
    assert 0 < wanted < 1
    assert asked.count == len(questions)
    assert measured(stock, asked.batches, "accuracy") == pytest.approx(wanted, rel=1e-12)  # a count of questions


def test_choice_loss_is_the_mean_loss_of_the_right_choice_run_alone(
    stock: Any, asked: Calibration, questions: list[Question], tokenizer: Tokenizer
) -> None:
    losses = []
    for question in questions:
        choice = question.choices[question.gold]
        prefix = len(tokenizer.encode(question.question).ids)
        ids = torch.tensor([tokenizer.encode(f"{question.question} {choice}").ids])
        with torch.no_grad():
            logits = stock(input_ids=ids, use_cache=False).logits[0, prefix - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, prefix:], reduction="sum")))
    # Float32 sums in another order, over padded rows.
    assert measured(stock, asked.batches, "choice-loss") == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_choices_of_several_tokens_score_as_in_evaluate(stock: Any, tokenizer: Tokenizer) -> None:
    question = Question("Question: What does Weven work as? Answer:", ("one of the bakers", "miller", "a sailor"), 1)
    (batch,) = question_calibration([question], tokenizer, CONTEXT, FACTS).batches
    remover = LocalRemover(ResidentBlocks(stock), [batch], "choice-loss", "block", 10**9)
    wanted = choice_scores(torch_logits(stock), question, tokenizer, CONTEXT)
    for gold, score in enumerate(wanted):
        choices = replace(batch.choices, gold=(gold,))  # type: ignore[type-var]
        remover.batches = [replace(batch, choices=choices)]
        (cost,) = remover.costs(0, [Trial(())])[0]
        assert -cost / len(question.choices[gold].encode()) == pytest.approx(score, rel=1e-5)  # float32 sums


def test_choices_of_one_token_share_a_row(tokenizer: Tokenizer) -> None:
    letters = Question("Question: Where? Answer:", ("A", "B", "C", "D"), 2)
    (batch,) = question_calibration([letters, replace(letters, gold=0)], tokenizer, CONTEXT, FACTS).batches
    assert len(batch.lengths) == 2
    assert len(batch.wanted) == 8
    row = tokenizer.encode(letters.question).ids
    assert batch.ids.tolist() == [row, row]
    assert set(batch.places.tolist()) == {len(row) - 1, 2 * len(row) - 1}


def test_choices_of_several_tokens_have_rows_of_their_own(tokenizer: Tokenizer) -> None:
    question = Question("Question: Where? Answer:", ("A", "B", "A of the B", "B of the A"), 0)
    (batch,) = question_calibration([question], tokenizer, CONTEXT, FACTS).batches
    assert len(batch.lengths) == 3, "the single letters share one"
    assert batch.choices is not None
    assert batch.choices.utf8_bytes == (1, 1, 10, 10)


def test_what_is_in_the_padding_changes_nothing(stock: Any, asked: Calibration) -> None:
    (batch,) = (each for each in asked.batches if len(set(each.lengths)) > 1)
    ids = batch.ids.clone()
    for row, length in enumerate(batch.lengths):
        ids[row, length:] = 77
    assert not torch.equal(ids, batch.ids)
    for metric in ("accuracy", "choice-loss"):
        assert measured(stock, [replace(batch, ids=ids)], metric) == measured(stock, [batch], metric)


def test_questions_in_one_batch_are_measured_as_each_alone(
    stock: Any, asked: Calibration, questions: list[Question], tokenizer: Tokenizer
) -> None:
    alone = [question_calibration([question], tokenizer, CONTEXT, FACTS).batches[0] for question in questions]
    assert len(asked.batches) < len(alone)
    assert measured(stock, alone, "accuracy") == pytest.approx(measured(stock, asked.batches, "accuracy"), rel=1e-12)
    # Float32 sums over matrices of other sizes.
    assert measured(stock, alone, "choice-loss") == pytest.approx(
        measured(stock, asked.batches, "choice-loss"), rel=1e-5
    )


def test_activations_are_taken_from_questions_with_their_right_choices(tokenizer: Tokenizer) -> None:
    few = read_questions(QUESTIONS)[:3]
    data = question_calibration(few, tokenizer, CONTEXT, FACTS)
    rows = [batch.ids[row, :length].tolist() for batch in data.text for row, length in enumerate(batch.lengths)]
    wanted = [tokenizer.encode(f"{q.question} {q.choices[q.gold]}").ids for q in few]
    assert sorted(rows) == sorted(wanted)
    assert sum(batch.count for batch in data.text) == sum(len(ids) - 1 for ids in wanted)


def test_padding_is_left_out_of_activations() -> None:
    batch = running_batch([[5, 6, 7], [8, 9]])
    values = torch.arange(12.0).reshape(2, 3, 2)
    assert batch.real(values).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert batch.wanted.tolist() == [6, 7, 9]
    assert batch.places.tolist() == [0, 1, 3]


def test_a_question_beyond_the_context_is_refused(questions: list[Question], tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"a question takes \d+ tokens, and the model reads 2 to 8"):
        question_calibration(questions, tokenizer, 8, FACTS)


def test_as_many_questions_are_read_as_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(QUESTIONS.read_text(encoding="utf-8").split("\n")[:5]) + "\n", encoding="utf-8")
    assert read_calibration(str(file), tokenizer, CONTEXT, samples=2).count == 2
    assert read_calibration(str(file), tokenizer, CONTEXT).count == 5
    with pytest.raises(BadInput, match=r"holds 5 questions where --samples asks for 6"):
        read_calibration(str(file), tokenizer, CONTEXT, samples=6)


# Metrics


@pytest.mark.parametrize("metric", ["accuracy", "choice-loss"])
def test_metrics_of_questions_need_questions(metric: Metric) -> None:
    with pytest.raises(BadInput, match=rf"--metric {metric} needs multiple-choice questions, and here is text"):
        text_calibration(range(100), 2, 10, FACTS).check(metric)


def test_loss_needs_a_text(asked: Calibration) -> None:
    with pytest.raises(BadInput, match=r"--metric loss needs a text, and here holds questions"):
        asked.check("loss")


def test_a_tie_between_choices_goes_to_the_first(tokenizer: Tokenizer) -> None:
    asked = [Question("Question: Where? Answer:", ("A", "B"), gold) for gold in (0, 1)]
    (batch,) = question_calibration(asked, tokenizer, CONTEXT, FACTS).batches
    assert batch_cost("accuracy", batch, torch.full((4,), -1.0)) == 1, "only the second question is answered wrongly"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("metric", ["loss", "accuracy", "choice-loss"])
def test_a_cost_is_no_number_where_a_prediction_is_none(metric: Metric, value: float, asked: Calibration) -> None:
    batch = running_batch([[1, 2, 3]]) if metric == "loss" else asked.batches[0]
    chances = torch.full((len(batch.wanted),), -1.0)
    assert math.isfinite(batch_cost(metric, batch, chances))
    chances[0] = value
    assert math.isnan(batch_cost(metric, batch, chances))


def test_a_question_without_text_scores_from_the_second_token(demo: Checkpoint) -> None:
    # The tokenizer adds no first token, so nothing predicts a choice's own first one.
    tokenizer, asked = demo.model.tokenizer(), Question("", ("the baker works", "a miller"), 0)
    logits = torch_logits(load_torch_model(demo.model.path))
    for choice, found in zip(asked.choices, choice_scores(logits, asked, tokenizer, 512), strict=True):
        ids = np.array([tokenizer.encode(f" {choice}").ids])
        assert found == pytest.approx(log_probabilities(logits(ids), ids).sum() / len(choice.encode()), rel=1e-5)
