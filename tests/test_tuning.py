"""Stage 2 as a command: from a model, its selection and data to a checkpoint, whole runs of it.

The model is a random Llama of four blocks with the embedded model's tokenizer. Everything is float32 on the CPU, so a
run repeats itself bit for bit; several processes add up in another order, which moves losses in the seventh digit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import amoeba, random_selection, save_random_model
from test_families import TOLERANCE, relative_error, stock_logits

from amoeba_deploy.adapters import ADAPTERS
from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.selection import write_selection
from amoeba_deploy.stage2.batches import Batches
from amoeba_deploy.stage2.data import DataSettings
from amoeba_deploy.stage2.pipeline import make_trainer
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.result import elastic_model
from amoeba_deploy.stage2.selected import Selected
from amoeba_deploy.stage2.settings import Settings
from amoeba_deploy.stage2.trainer import Diverged

WORDS = ["red", "fox", "green", "boat", "old", "mill", "song", "blue", "river", "cold", "morning", "bird", "stone"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A random Llama that reads text."""
    folder = tmp_path_factory.mktemp("tuning") / "model"
    save_random_model(folder, "llama", vocab_size=1024, hidden_size=48, intermediate_size=96, head_dim=8)
    base = open_checkpoint().model.path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    return ModelFolder(folder)


@pytest.fixture(scope="session")
def selection(model: ModelFolder) -> Path:
    (folder := model.path.parent / "selection").mkdir()
    write_selection(folder, random_selection(model))
    return folder


@pytest.fixture(scope="session")
def data(model: ModelFolder) -> Path:
    """Forty instructions with short answers."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        asked, answer = (" ".join(rng.choice(WORDS, count)) for count in (5, 4))
        rows.append(json.dumps({"instruction": asked, "input": "", "output": answer}) + "\n")
    file = model.path.parent / "data.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    return file


@pytest.fixture
def command(model: ModelFolder, selection: Path, data: Path) -> list[str]:
    """What every run here has in common."""
    options = {
        "--selection": selection,
        "--data": data,
        "--template": "plain",
        "--source-tokens": 48,
        "--target-tokens": 48,
        "--widths": "1,3/4,1/2",
        "--steps": 6,
        "--batch": 4,
        "--accumulate": 2,
        "--rank": 4,
        "--experts": 3,
        "--lr": 0.01,
        "--hold-out": 0,
    }
    return ["tune", str(model.path), *(str(part) for pair in options.items() for part in pair)]


def without(command: list[str], *names: str) -> list[str]:
    """A command without some of its options and their values."""
    places = [command.index(name) for name in names]
    return [part for place, part in enumerate(command) if place not in places and place - 1 not in places]


def tune(command: list[str], output: Path, *more: object) -> Checkpoint:
    done = amoeba(*command, "-o", output, "--quiet", *more)
    assert done.exit_code == 0, done.stderr
    return open_checkpoint(output)


def log_of(folder: Path, name: str = "tuning.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def largest(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"]["4x1"] for line in lines]


def test_a_run_writes_a_checkpoint_that_extracts_as_it_was_tuned(command: list[str], tmp_path: Path) -> None:
    made = tune(command, tmp_path / "tuned", "--steps", 30)
    assert made.adapters is not None
    assert (made.adapters.experts, made.adapters.rank, made.adapters.top_k) == (3, 4, 2)
    assert [float(width) for width in made.widths] == [1, 0.75, 0.5]
    lines = log_of(made.path)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert all(list(line["loss"])[:2] == ["4x1", "2x0.5"] and len(line["loss"]) == 4 for line in lines)
    assert np.mean(largest(lines)[-5:]) < np.mean(largest(lines)[:5]) - 0.1
    elastic = elastic_model(made)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 1024, (2, 20)))
    for text in ("4x1", "3x0.6", "2x0.5"):
        assert amoeba("extract", made.path, "--shape", text, "-o", tmp_path / text, "--quiet").exit_code == 0
        with elastic.shape(made.plan_of(text).shape), torch.no_grad():
            assert relative_error(elastic(ids), stock_logits(tmp_path / text, ids)) < TOLERANCE
    assert not (tmp_path / "tuned.tuning").exists()


def test_the_same_command_gives_the_same_bytes(command: list[str], tmp_path: Path) -> None:
    first, second = (tune(command, tmp_path / name) for name in ("a", "b"))
    assert (first.path / ADAPTERS).read_bytes() == (second.path / ADAPTERS).read_bytes()
    assert first.digest != tune(command, tmp_path / "c", "--seed", 1).digest
    named = [json.loads((made.path / "amoeba.json").read_text()) for made in (first, second)]
    assert {**named[0], "name": ""} == {**named[1], "name": ""}


@pytest.mark.parametrize(
    "options",
    [
        ("--adapter", "lora"),
        ("--mix", "products", "--adapter-dtype", "bf16"),
        ("--policy", "adaptive", "--bias", "on"),
        ("--grouping", "pack", "--gradient-checkpointing"),
        ("--no-balance", "--distillation", "0.5", "--conflicts", "project"),
        ("--mixed-precision", "bf16", "--schedule", "cosine", "--warmup", "2"),
        ("--base-bits", "4"),
        ("--base-bits", "8"),
    ],
    ids=" ".join,
)
def test_every_way_of_tuning_lowers_the_loss_and_can_be_extracted(
    options: tuple[str, ...], command: list[str], tmp_path: Path
) -> None:
    if "--base-bits" in options:
        pytest.importorskip("bitsandbytes")
    if "lora" in options:
        command = without(command, "--experts")
    made = tune(command, tmp_path / "tuned", "--steps", 12, *options)
    losses = largest(log_of(made.path))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    done = amoeba("extract", made.path, "--shape", "3x0.5", "-o", tmp_path / "subnet", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert made.policy == ("adaptive" if "adaptive" in options else "uniform")
    assert made.bias == ("on" in options)


def all_weights(command: list[str]) -> list[str]:
    return [*without(command, "--rank", "--experts"), "--adapter", "none", "--lr", "0.002"]


def test_all_weights_can_be_tuned(command: list[str], model: ModelFolder, tmp_path: Path) -> None:
    made = tune(all_weights(command), tmp_path / "tuned", "--steps", 12)
    assert made.adapters is None
    assert made.model.path == made.path / "base"
    assert made.selection.facts["selected_on"] == model.digest
    assert np.mean(largest(log_of(made.path))[-3:]) < np.mean(largest(log_of(made.path))[:3])
    before, after = (folder.tensors.float32("model.layers.1.mlp.up_proj.weight") for folder in (model, made.model))
    apart = np.abs(before - after)
    assert 0 < apart.max() < 0.1  # changed a little, each number where it was
    shutil.move(tmp_path / "tuned", tmp_path / "moved")
    assert open_checkpoint(tmp_path / "moved").model.digest == made.model.digest


def test_one_shape_can_be_tuned_alone(command: list[str], tmp_path: Path) -> None:
    made = tune(without(command, "--experts"), tmp_path / "tuned", "--shape", "2x0.4", "--adapter", "lora")
    assert all(list(line["loss"]) == ["2x0.4"] for line in log_of(made.path))
    assert made.tuning["settings"]["shape"] == "2x0.4"
    assert [str(width) for width in made.widths] == ["1", "2/5"]
    assert "tuned for 2x0.4 alone" in amoeba("checkpoint", "show", made.path).stdout
    said = amoeba("extract", made.path, "--shape", "4x1", "-o", tmp_path / "other").stderr
    assert "was tuned for 2x0.4 alone" in said


def test_quality_is_measured_on_what_was_held_out(command: list[str], tmp_path: Path) -> None:
    made = tune(command, tmp_path / "tuned", "--hold-out", 0.5, "--steps", 2)
    assert made.quality is not None
    assert {row.shape.depth for row in made.quality.rows} == {2, 3, 4}
    assert made.tuning["data"]["held_out"] == 20


def killed(command: list[str], output: Path, after: int) -> None:
    """Run a command in a process of its own and kill it, without a chance to clean up, behind so many steps."""
    process = subprocess.Popen([sys.executable, "-m", "amoeba_deploy", *command, "-o", str(output), "--quiet"])
    log = Path(f"{output}.tuning", "log.jsonl")
    while not log.exists() or log.read_text().count("\n") < after:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_resumes_to_the_same_weights(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--steps", "40", "--save-every", "5"]
    whole = tune(command, tmp_path / "whole")
    killed(command, tmp_path / "killed", 12)
    assert not (tmp_path / "killed").exists()
    done = amoeba(*command, "-o", tmp_path / "killed", "--quiet")
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    resumed = tune(command, tmp_path / "killed", "--resume")
    assert (whole.path / ADAPTERS).read_bytes() == (resumed.path / ADAPTERS).read_bytes()
    assert log_of(whole.path) == log_of(resumed.path)


def test_resuming_with_other_settings_is_refused(command: list[str], tmp_path: Path) -> None:
    killed([*command, "--steps", "400", "--save-every", "2"], tmp_path / "tuned", 5)
    done = amoeba(*command, "--steps", 400, "-o", tmp_path / "tuned", "--resume", "--lr", 0.02, "--top-k", 1)
    assert done.exit_code == 2
    assert "--lr is 0.02 where the run was begun with 0.01" in done.stderr
    assert "--top-k is 1 where the run was begun with 2" in done.stderr


def launched(command: list[str], output: Path, *how: str) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes under accelerate's launcher, which on the CPU starts them when told of GPUs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_machines", "1"]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = ["-m", "amoeba_deploy", *command, "--cpu", "-o", str(output), "--quiet"]
    return subprocess.run(
        [*launcher, "--main_process_port", "0", *run],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("adapter", ["smol", "none"])
def test_two_processes_give_the_losses_of_one(adapter: str, command: list[str], tmp_path: Path) -> None:
    command = all_weights(command) if adapter == "none" else command
    one = tune(command, tmp_path / "one")
    done = launched(command, tmp_path / "two", "--multi_gpu")
    assert done.returncode == 0, done.stderr[-3000:]
    same_losses(log_of(one.path), log_of(tmp_path / "two"))


def test_sharded_blocks_give_the_losses_of_whole_ones(command: list[str], tmp_path: Path) -> None:
    command = all_weights(command)
    one = tune(command, tmp_path / "one")
    done = launched(command, tmp_path / "two", "--use_fsdp", "--fsdp_version", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    same_losses(log_of(one.path), log_of(tmp_path / "two"))
    for name in one.model.tensors.infos:
        found, wanted = (made.model.tensors.float32(name) for made in (open_checkpoint(tmp_path / "two"), one))
        assert np.abs(found - wanted).max() < 2e-3, name  # Adam turns a rounding error at zero into a whole step


def test_rows_that_do_not_divide_by_the_processes_are_refused(command: list[str], tmp_path: Path) -> None:
    done = launched([*command, "--batch", "3"], tmp_path / "two", "--multi_gpu")
    assert done.returncode != 0
    assert "cannot be spread evenly over 2 processes" in done.stderr
    assert list(tmp_path.iterdir()) == []


def same_losses(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert one["loss"].keys() == two["loss"].keys()
        assert one["tokens"] == two["tokens"]
        assert np.allclose(list(one["loss"].values()), list(two["loss"].values()), rtol=0, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(command: list[str], tmp_path: Path) -> None:
    done = amoeba(*command, "-o", tmp_path / "tuned", "--lr", 1e30, "--clip", 0, "--save-every", 1)
    assert done.exit_code == 2
    assert "the loss of 4x1 in step 2 is not finite" in done.stderr
    assert "the state behind step 1 is kept in" in done.stderr
    assert (tmp_path / "tuned.tuning" / "state-00000001.safetensors").is_file()
    assert not (tmp_path / "tuned").exists()


def test_a_gradient_that_is_not_finite_changes_nothing(model: ModelFolder, selection: Path, data: Path) -> None:
    settings = Settings(steps=2, batch=2, accumulate=1, rank=4, widths=(Fraction(1), Fraction(1, 2)))
    rows, _ = DataSettings(str(data), "plain", 48, 48).read(model, held_out=False)
    selected = Selected.open(str(model.path), selection)
    trainer = make_trainer(selected, Batches(rows, 2, 0), settings, Processes("no", cpu=True))
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(Diverged, match="the gradient of step 1 is not finite"):
        trainer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state().items())


def test_a_tokenizer_beyond_the_vocabulary_is_refused(command: list[str], model: ModelFolder, tmp_path: Path) -> None:
    small = save_random_model(tmp_path / "small", "llama", vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model.path / name, small.path / name)
    (chosen := tmp_path / "selection").mkdir()
    write_selection(chosen, random_selection(ModelFolder(small.path)))
    done = amoeba("tune", small.path, *without(command[2:], "--selection"), "--selection", chosen, "-o", tmp_path / "a")
    assert done.exit_code == 2
    assert "put the model's own tokenizer there" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--top-k", 4), "--top-k 4 must be from 1"),
        (("--widths", "3/4,1/2"), "--widths must have 1"),
        (("--widths", "1,2"), "not in"),
        (("--shape", "9x1"), "depth 9"),
        (("--shape", "nonsense"), "is not a shape"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--data", "alpaca-gtp4"), "did you mean 'alpaca-gpt4'"),
        (("--target-tokens", 4), "--long-answers"),
        (("--source-tokens", 4000), "4000"),
        (("--quality-tasks", "questions.jsonl"), "--quality-text"),
        (("--steps", 0), "--steps"),
        (("--adapter", "none"), "--rank does nothing beside --adapter none"),
        (("--shape", "2x0.5", "--conflicts", "project"), "--conflicts does nothing beside --shape"),
        (("--quality-text", "nowhere.txt"), "nowhere.txt"),
        (("--seed", -1), "--seed"),
        (("--lr", "nan"), "--lr nan"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: tuple[object, ...], says: str, command: list[str], tmp_path: Path
) -> None:
    done = amoeba(*command, "-o", tmp_path / "tuned", *options)
    assert done.exit_code == 2
    assert says in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_selection_of_another_model_is_refused(command: list[str], model: ModelFolder, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model.path, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    done = amoeba("tune", other, *command[2:], "-o", tmp_path / "tuned")
    assert done.exit_code == 2
    assert "select again for this model" in done.stderr


def test_all_weights_are_not_held_in_few_bits(command: list[str], tmp_path: Path) -> None:
    done = amoeba(*all_weights(command), "-o", tmp_path / "tuned", "--base-bits", 4)
    assert done.exit_code == 2
    assert "cannot be" in done.stderr


def test_a_changed_selection_does_not_resume(command: list[str], selection: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(selection, tmp_path / "selection"))
    command = [*without(command, "--selection"), "--selection", str(other), "--steps", "400", "--save-every", "2"]
    killed(command, tmp_path / "tuned", 5)
    chosen = json.loads((other / "selection.json").read_text())
    chosen["depth"]["3"]["kept"] = [0, 1, 2]
    (other / "selection.json").write_text(json.dumps(chosen))
    done = amoeba(*command, "-o", tmp_path / "tuned", "--resume")
    assert done.exit_code == 2
    assert "kept blocks" in done.stderr


def test_dropout_is_off_while_tuning(command: list[str], model: ModelFolder, tmp_path: Path) -> None:
    dropping = Path(shutil.copytree(model.path, tmp_path / "dropping"))
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    (tmp_path / "selection").mkdir()
    write_selection(tmp_path / "selection", random_selection(ModelFolder(dropping)))
    there = ["tune", str(dropping), *without(command[2:], "--selection"), "--selection", str(tmp_path / "selection")]
    with_dropout, plain = tune(there, tmp_path / "a"), tune(command, tmp_path / "b")
    assert log_of(with_dropout.path) == log_of(plain.path)


def test_tensorboard_gets_the_losses(command: list[str], tmp_path: Path) -> None:
    tune(command, tmp_path / "tuned", "--tensorboard", tmp_path / "events")
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))


def test_data_without_answers_are_refused(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"instruction": "say", "output": ""}\n')
    done = amoeba(*command, "-o", tmp_path / "tuned", "--data", tmp_path / "empty.jsonl")
    assert done.exit_code == 2
    assert "no answers to learn from" in done.stderr
