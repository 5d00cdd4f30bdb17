"""Build the one-for-all checkpoint that ships in the package.

    python tools/build_demo_checkpoint.py build/demo-model    # from the model that train_demo.py trained
    python tools/build_demo_checkpoint.py                     # from the base model that ships, about an hour on 2 cores
    python tools/build_demo_checkpoint.py --tuned FOLDER      # from what stage 2 wrote already: quality and card

Writes ``amoeba_deploy/demo``: ``checkpoint/`` (the base model in bf16 shards under 5 MB, its selection, the mixture of
LoRAs that stage 2 tuned, the quality over the grid of shapes, and a card with every shape before and after),
``validation.txt`` and ``questions.jsonl``. Texts for training, calibration, tuning and validation come from different
seeds; every validation question asks about a fact that no other text asks about.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import demo_corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from amoeba_deploy.checkpoint import Checkpoint, create_checkpoint, finish_checkpoint, open_checkpoint
from amoeba_deploy.evaluation import read_questions, task_accuracy, text_loss, text_rows, torch_logits
from amoeba_deploy.files import whole_folder, write_json
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import WIDTHS, Quality, QualityRow, write_quality
from amoeba_deploy.quality_measurement import measure_quality
from amoeba_deploy.selection import write_selection
from amoeba_deploy.stage1.pipeline import select
from amoeba_deploy.stage2.data import DataSettings
from amoeba_deploy.stage2.pipeline import Run, tune_checkpoint
from amoeba_deploy.stage2.settings import Settings

DEMO = Path(__file__).parent.parent / "amoeba_deploy" / "demo"
NAME = "amoeba-demo-7m"
CALIBRATION_SEED, VALIDATION_SEED, TUNING_SEED = 2, 1, 3
VALIDATION_DOCUMENTS, CALIBRATION_DOCUMENTS, TUNING_DOCUMENTS = 700, 600, 60_000
TUNING = Settings(
    steps=1500,
    batch=8,
    accumulate=1,
    lr=4e-3,
    schedule="cosine",
    warmup=30,
    rank=8,
    adapter_dtype="bf16",
    widths=WIDTHS,
    mixed_precision="bf16",
)
WINDOWS = {"source_tokens": 192, "target_tokens": 64}
"""Rows of 256 tokens, as the quality is measured in."""

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small Llama ({parameters:,} parameters: 12 blocks, hidden 256, 8 query heads of 32 over 4 key/value heads, 512
neurons, a tied vocabulary of 1024) that ships with Amoeba so that everything can be tried offline. It knows a small
invented world of people, towns and creatures, from text that `tools/demo_corpus.py` generates; `tools/train_demo.py`
trained it from scratch on {tokens} tokens.

| on held-out data | this model | chance |
|---|---|---|
| loss, nats a token | {loss:.3f} (perplexity {perplexity:.2f}) | {uniform:.2f} |
| questions answered rightly | {accuracy:.1%} | {chance:.1%} |

The loss is over {rows} rows of 256 tokens from seeds that training never used. The {questions} questions have four
choices each and ask about facts that the training text states but never asks about.

It is good for nothing but trying tools.
"""

TUNED_CARD = """# {name}: the one-for-all checkpoint

The small Llama in `base/`, tuned once so that every shape is good: {steps} sandwich steps over {tokens:,} tokens of
fresh text of its world, with {experts} experts of rank {rank}, seed {seed} (`tools/build_demo_checkpoint.py`). Loss is
in nats a token over {held:,} held-out tokens, accuracy that of {questions} held-out questions (chance is 25%), both
after extraction, in float32. Standard errors are over rows and questions of one run.

| shape | loss untuned | loss tuned | accuracy untuned | accuracy tuned |
|---|---|---|---|---|
{rows}
"""


def text(world: demo_corpus.World, seed: int, documents: int) -> str:
    """Running text of so many documents."""
    return "\n\n".join(islice(demo_corpus.documents(world, seed), documents)) + "\n"


def save_base(trained: Path, folder: Path) -> None:
    """The trained model in bf16, in shards under 5 MB, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4800KB")
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # transformers 5 names a class that readers of version 4 do not have; this one both know.
    write_json(settings, json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_card(base: Path, tokens: str) -> None:
    """README.md of the base model, with its figures measured here."""
    model = ModelFolder(base)
    logits, tokenizer = torch_logits(load_torch_model(base)), model.tokenizer()
    rows = text_rows(DEMO / "validation.txt", tokenizer)
    loss = text_loss(logits, rows)
    task = task_accuracy(logits, read_questions(DEMO / "questions.jsonl"), tokenizer, model.architecture.context)
    uniform = float(torch.log(torch.tensor(float(model.architecture.vocabulary))))
    (base / "README.md").write_text(
        CARD.format(
            name=NAME,
            parameters=model.architecture.parameters,
            tokens=tokens,
            rows=len(rows),
            loss=loss.loss,
            perplexity=loss.perplexity,
            uniform=uniform,
            questions=task.questions,
            accuracy=task.accuracy,
            chance=task.chance,
        ),
        encoding="utf-8",
    )


def take_over(tuned: Path, base: Path, output: Path) -> Checkpoint:
    """A tuned checkpoint with its base model inside, so that it can be moved; without the log of its steps."""
    opened = open_checkpoint(tuned)
    for part in ("selection.json", "selection.safetensors", "smol.safetensors"):
        shutil.copyfile(tuned / part, output / part)
    return finish_checkpoint(
        output,
        ModelFolder(base),
        NAME,
        include_base=True,
        policy=opened.policy,
        bias=opened.bias,
        widths=opened.widths,
        adapters="smol",
        tuning=opened.tuning,
    )


def tuned_card(checkpoint: Checkpoint, before: Quality, after: Quality) -> str:
    """README.md of the checkpoint: loss and accuracy of every shape of the grid, before and after tuning."""
    rows = [
        f"| {old.shape} | {old.loss:.4f} | {new.loss:.4f} ± {new.loss_error:.4f} | {percent(old)} | {percent(new)} |"
        for old, new in zip(before.rows, (row for row in after.rows if row.precision == "fp32"), strict=True)
    ]
    tuning, data = checkpoint.tuning["settings"], checkpoint.tuning["data"]
    return TUNED_CARD.format(
        name=NAME,
        steps=tuning["steps"],
        tokens=tuning["steps"] * tuning["batch"] * tuning["accumulate"] * data["sequence"],
        rank=tuning["rank"],
        experts=tuning["experts"],
        seed=tuning["seed"],
        rows="\n".join(rows),
        held=before.text["tokens"],
        questions=before.rows[0].questions,
    )


def percent(row: QualityRow) -> str:
    """An accuracy and its standard error."""
    assert row.accuracy is not None
    error = (row.accuracy * (1 - row.accuracy) / row.questions) ** 0.5
    return f"{row.accuracy:.1%} ± {error:.1%}"


def build(trained: Path | None, tokens: str, tuned: Path | None) -> None:
    """Everything under ``amoeba_deploy/demo``; the base model is the one that lies there where none is given."""
    world = demo_corpus.build_world()
    progress = Progress()
    DEMO.mkdir(parents=True, exist_ok=True)
    (DEMO / "validation.txt").write_text(text(world, VALIDATION_SEED, VALIDATION_DOCUMENTS), encoding="utf-8")
    lines = [json.dumps(row) + "\n" for row in demo_corpus.validation_questions(world)]
    (DEMO / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    with tempfile.TemporaryDirectory() as work, whole_folder(DEMO / "checkpoint", force=True) as output:
        base, chosen, plain = (Path(work, name) for name in ("base", "selection", "untuned"))
        calibration, corpus = Path(work, "calibration.txt"), Path(work, "tuning.txt")
        if trained is None:
            shutil.copytree(DEMO / "checkpoint" / "base", base)
        else:
            save_base(trained, base)
            write_card(base, tokens)
        calibration.write_text(text(world, CALIBRATION_SEED, CALIBRATION_DOCUMENTS), encoding="utf-8")
        chosen.mkdir()
        if tuned is None:
            write_selection(chosen, select(ModelFolder(base), calibration, progress=progress))
            corpus.write_text(text(world, TUNING_SEED, TUNING_DOCUMENTS), encoding="utf-8")
            data = DataSettings(str(corpus), hold_out=0, **WINDOWS)
            tuned = Path(work, "tuned")
            tune_checkpoint(Run(str(base), chosen, tuned, data, TUNING, progress, cpu=True))
        made = take_over(tuned, base, output)
        plain.mkdir()
        untuned = create_checkpoint(str(base), output, plain, name=NAME)
        questions = DEMO / "validation.txt", DEMO / "questions.jsonl"
        before = measure_quality(untuned, *questions, precisions=["fp32"], progress=progress)
        after = measure_quality(made, *questions, progress=progress)
        write_quality(output, after)
        (output / "README.md").write_text(tuned_card(made, before, after), encoding="utf-8")
    for file in sorted((DEMO / "checkpoint").rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>9} {file.relative_to(DEMO)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded checkpoint.")
    parser.add_argument("trained", type=Path, nargs="?", help="What train_demo.py wrote.")
    parser.add_argument("--tokens", default="12.3 million", help="How many tokens it was trained on, for its card.")
    parser.add_argument("--tuned", type=Path, help="What 'amoeba tune' wrote of that base model with TUNING.")
    arguments = parser.parse_args()
    build(arguments.trained, arguments.tokens, arguments.tuned)


if __name__ == "__main__":
    main()
