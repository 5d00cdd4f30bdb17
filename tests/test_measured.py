"""What is measured and what is made of it: loss, accuracy, quality between shapes, latency tables, this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET, amoeba

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.evaluation import (
    Question,
    choice_scores,
    read_questions,
    task_accuracy,
    text_loss,
    text_rows,
    torch_logits,
)
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.interpolation import over_shapes
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.plan import sized, subnet_widths
from amoeba_deploy.profiles.measure import peak_memory
from amoeba_deploy.profiles.profiler import profile
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.source import CheckpointSource
from amoeba_deploy.profiles.table import Table, read_table, write_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quality import WIDTHS, grid
from amoeba_deploy.shape import Shape

DEMO = EMBEDDED.parent
WORKLOAD = Workload()


def test_loss_is_the_mean_cross_entropy_in_nats(models: Callable[[str], ModelFolder]) -> None:
    model = load_torch_model(models("qwen3").path)
    rows = np.random.default_rng(0).integers(0, 128, (11, 30))
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(rows)).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten())
    found = text_loss(torch_logits(model), rows)
    assert found.loss == pytest.approx(float(wanted), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_a_choice_scores_by_its_log_likelihood_a_byte(demo: Checkpoint) -> None:
    model, tokenizer = load_torch_model(demo.model.path), demo.model.tokenizer()
    question = Question("Question: What does Weven work as? Answer:", ("doctor", "tailor"), 1)
    found = choice_scores(torch_logits(model), question, tokenizer, 512)
    for choice, score in zip(question.choices, found, strict=True):
        prefix = len(tokenizer.encode(question.question).ids)
        ids = torch.tensor([tokenizer.encode(f"{question.question} {choice}").ids])
        assert ids[0, 0] == 0, "the tokenizer puts its start token in front"
        with torch.inference_mode():
            chances = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        wanted = sum(float(chances[i - 1, ids[0, i]]) for i in range(prefix, ids.shape[1])) / len(choice.encode())
        assert score == pytest.approx(wanted, rel=1e-3)  # log-probabilities near 0 lose digits in float32


def test_ties_go_to_the_lowest_index(demo: Checkpoint) -> None:
    def flat(ids: np.ndarray) -> np.ndarray:
        return np.zeros((*ids.shape, 1024), np.float32)

    asked = [Question("Question: Which? Answer:", ("same", "same"), gold) for gold in (0, 1)]
    assert task_accuracy(flat, asked, demo.model.tokenizer(), 512).accuracy == 0.5


def test_the_embedded_model_is_as_good_as_its_card_says(demo: Checkpoint) -> None:
    logits, tokenizer = torch_logits(load_torch_model(demo.model.path)), demo.model.tokenizer()
    loss = text_loss(logits, text_rows(DEMO / "validation.txt", tokenizer)[:40])
    task = task_accuracy(logits, read_questions(DEMO / "questions.jsonl")[:80], tokenizer, 512)
    assert loss.loss < 0.7  # chance is ln 1024 = 6.93
    assert task.accuracy > 0.9
    assert task.chance == 0.25


def test_training_never_asks_what_validation_asks() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import demo_corpus

    world = demo_corpus.build_world()
    asked = {row["question"] for row in demo_corpus.validation_questions(world)}
    assert {json.loads(line)["question"] for line in (DEMO / "questions.jsonl").read_text().splitlines()} == asked
    stream = demo_corpus.documents(world, seed=0)
    text = "\n".join(next(stream) for _ in range(20_000))
    assert not [question for question in asked if str(question).removesuffix(" Answer:") in text]


def test_measured_quality_is_that_of_the_extracted_subnet(demo: Checkpoint, tmp_path: Path) -> None:
    """One row of the shipped quality.json, measured again from scratch."""
    assert demo.quality is not None
    shape = Shape.parse("7x0.625")
    plan = demo.plan(shape)
    extract(demo.model, plan, tmp_path, learnt=demo.learnt(plan))
    rows = text_rows(DEMO / "validation.txt", demo.model.tokenizer())
    found = text_loss(torch_logits(load_torch_model(tmp_path)), rows)
    value = demo.quality.loss(shape, "fp32")
    assert value.source == "measured"
    # bf16 weights are the same; sums in bf16 activations differ between processors.
    assert value.value == pytest.approx(found.loss, rel=2e-2)


def test_quality_between_rows_and_of_equal_subnets(demo: Checkpoint) -> None:
    assert demo.quality is not None
    quality = demo.quality
    # These two rows contradict no other; those that do are levelled out first (test_monotone.py).
    left, right = quality.loss(Shape.parse("8x0.875"), "fp32").value, quality.loss(Shape.parse("8x1"), "fp32").value
    between = quality.loss(Shape.parse("8x0.94"), "fp32")
    assert between.source == "interpolated"
    assert between.value == pytest.approx(left + (right - left) * (0.94 - 0.875) / 0.125)
    same = quality.loss(Shape.parse("8x0.63"), "fp32")  # keeps what 0.625 keeps
    assert (same.value, same.source) == (quality.loss(Shape.parse("8x0.625"), "fp32").value, "measured")
    unmeasured = quality.loss(Shape.parse("8x1"), "bf16")
    assert unmeasured.source == "fp32 (this precision not measured)"


def test_both_sides_of_every_head_step_are_in_the_grid() -> None:
    """Quality jumps where a key/value group goes; a line across such a jump once made search prefer worse shapes."""
    sizes = Architecture(
        family="llama", depth=4, hidden=256, heads=8, kv_heads=4, head_dim=32, neurons=512, vocabulary=64, context=64,
        tied=True,
    )  # fmt: skip
    shapes = [sized(sizes, shape) for shape in grid(sizes, 4, WIDTHS, 32)]
    assert len(set(shapes)) == len(shapes)
    legal = [sized(sizes, Shape(4, width)) for width in subnet_widths(sizes, min(WIDTHS))]
    for groups in (4, 3, 2):
        of_group = [found.neurons for found in legal if found.kv_heads == groups]
        measured = [found.neurons for found in shapes if found.kv_heads == groups]
        assert (max(measured), min(measured)) == (max(of_group), min(of_group))
    many = replace(sizes, heads=32, kv_heads=32)
    assert len(grid(many, 4, WIDTHS, 32)) == len(WIDTHS)


def test_an_interpolated_loss_is_close_to_the_measured_one(demo: Checkpoint, tmp_path: Path) -> None:
    assert demo.quality is not None
    rows = text_rows(DEMO / "validation.txt", demo.model.tokenizer())
    for name in ("8x0.8", "9x0.94", "7x0.7", "11x0.56"):
        folder = tmp_path / name
        folder.mkdir()
        plan = demo.plan(Shape.parse(name))
        extract(demo.model, plan, folder, learnt=demo.learnt(plan))
        predicted = demo.quality.loss(Shape.parse(name), "fp32")
        assert predicted.source == "interpolated"
        found = text_loss(torch_logits(load_torch_model(folder)), rows).loss
        # Between neighbours in the grid; the most seen is stated in docs/formats.md.
        assert predicted.value == pytest.approx(found, rel=0.1), name


def test_interpolation_is_linear_inside_and_clamped_outside() -> None:
    rows = {2: [(0.5, 4.0), (1.0, 2.0)], 4: [(0.5, 8.0), (1.0, 6.0)]}
    assert over_shapes(rows, 2, 0.75) == 3.0
    assert over_shapes(rows, 3, 0.75) == 5.0
    assert over_shapes(rows, 9, 0.1) == 8.0
    assert over_shapes(rows, 1, 2.0) == 2.0


def row(shape: str, tpot: float) -> Row:
    depth, width = shape.split("x")
    return Row(
        "onnx", "fp32", int(depth), float(width), "uniform", 1, 128, 32, 2 * tpot, tpot, tpot, tpot, 9, 10**8, 10**7
    )


def test_a_table_gives_measured_rows_and_interpolates_the_rest(demo: Checkpoint, tmp_path: Path) -> None:
    sizes = demo.architecture
    made = Table("local", sizes.digest, {}, ()).merged([row("12x1", 4.0), row("6x1", 2.0), row("12x0.5", 3.0)])
    write_table(tmp_path / "table.json", made)
    table = read_table(tmp_path / "table.json")
    assert table.rows == made.rows
    predict = table.predictor(lambda shape: sized(sizes, shape), "onnx", "fp32", WORKLOAD)
    assert predict(Shape.parse("12x1")) == replace(predict(Shape.parse("12x1")), tpot_ms=4.0, source="measured")
    between = predict(Shape.parse("9x1"))
    assert (between.tpot_ms, between.source) == (pytest.approx(3.0), "interpolated")
    assert predict(Shape.parse("5x1")).source == "estimated"  # nothing so shallow was measured
    assert 3.0 < predict(Shape.parse("12x0.75")).tpot_ms < 4.0
    assert table.merged([row("6x1", 9.0)]).rows != table.rows
    with pytest.raises(LatencyUnknown, match="amoeba profile"):
        table.predictor(lambda shape: sized(sizes, shape), "onnx", "int4", WORKLOAD)


def test_profiling_fills_a_table_of_this_machine(demo: Checkpoint) -> None:
    shapes = [Shape(12, Fraction(1)), Shape(6, Fraction(1, 2))]
    wanted = {("onnx", "fp32"): shapes}
    table = profile(CheckpointSource(demo), wanted, Workload(1, 16, 8), 64, repeats=3, progress=QUIET)
    assert [r.shape for r in table.rows] == shapes
    full, small = table.rows
    assert full.tpot_ms > small.tpot_ms > 0
    assert full.peak_memory_bytes > small.peak_memory_bytes > 10**7
    assert full.artifact_bytes > small.artifact_bytes
    assert full.repeats == 3
    assert full.p10 <= full.tpot_ms <= full.p90
    assert (full.stopped, full.context, full.settings) == ("repeats", 64, {})
    assert full.ttft_p10 <= full.ttft_ms <= full.ttft_p90
    assert full.token_rate > 0
    assert {"machine", "engines", "tool", "date", "runs", "sizes"} <= set(table.facts)
    run = table.facts["runs"][0]
    assert (run["engines"], run["rows"]) == (["onnx fp32"], 2)
    assert run["before"]["load"] >= 0


def test_peak_memory_is_that_of_the_engines_own_process(demo: Checkpoint, tmp_path: Path) -> None:
    """A parent that has once been large does not show in its child's figure."""
    from amoeba_deploy.backends import load_backend
    from amoeba_deploy.backends.backend import BuildOptions

    load_backend("onnx").lower(demo.model, tmp_path, "int4", BuildOptions(64))
    ballast = np.ones(10**8)
    found = peak_memory("onnx", "int4", tmp_path, 1024, Workload(1, 8, 4), 64)
    assert 10**7 < found.memory_bytes < ballast.nbytes
    assert found.gpu_memory_bytes is None


def test_this_machine_is_profiled_once() -> None:
    options = ("--device", "local", "--flow", "onnx", "--precision", "int4", "--prompt", 16, "--tokens", 8)
    first = amoeba("search", *options, "--latency", "10s", "--json")
    again = amoeba("search", *options, "--latency", "10s", "--json")
    assert "profiling onnx int4" in first.stderr
    assert again.stderr == ""
    assert first.stdout == again.stdout
    assert json.loads(again.stdout)["predicted"]["source"] == "measured"


def test_too_long_a_workload_is_refused() -> None:
    with pytest.raises(BadInput, match="do not fit in a context of 100"):
        WORKLOAD.context_for(512, 100)
    with pytest.raises(BadInput, match="exceeds the model's 512"):
        WORKLOAD.context_for(512, 1000)
    assert (WORKLOAD.context_for(512), WORKLOAD.context_for(8192)) == (512, 2048)


def test_precisions_that_nobody_named_are_left_out_where_they_fail(checkpoint: Checkpoint, tmp_path: Path) -> None:
    command = ("profile", checkpoint.path, "--flow", "onnx", "--shapes", "2x1", "--prompt", 8, "--tokens", 4)
    command += ("--context", 32, "--repeats", 3, "-o", tmp_path / "table.json")
    done = amoeba(*command)
    assert done.exit_code == 0, done.stderr
    assert "left out onnx bf16: it refuses the shape 2x1: ONNX Runtime's CPU provider" in done.stderr
    assert {row.precision for row in read_table(tmp_path / "table.json").rows} == {"fp32", "fp16", "int8", "int4"}
    named = amoeba(*command, "--precision", "bf16", "--force")
    assert named.exit_code == 2
    assert "the flow 'onnx' refuses the shape 2x1" in named.stderr
