"""Build the one-for-all checkpoint that ships in the package.

    python tools/build_demo_checkpoint.py build/demo-model    # from the model that train_demo.py trained
    python tools/build_demo_checkpoint.py                     # from the base model that ships: selection and quality

Writes ``amoeba_deploy/demo``: ``checkpoint/`` (the base model in bf16 shards under 5 MB, its selection, its quality
over the grid of shapes), ``validation.txt`` and ``questions.jsonl``. Calibration text, validation text and training
text come from different seeds; every validation question asks about a fact that training never asks about.
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

from amoeba_deploy.checkpoint import create_checkpoint
from amoeba_deploy.evaluation import read_questions, task_accuracy, text_loss, text_rows, torch_logits
from amoeba_deploy.files import whole_folder, write_json
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.progress import Progress
from amoeba_deploy.quality import write_quality
from amoeba_deploy.quality_measurement import measure_quality
from amoeba_deploy.selection import write_selection
from amoeba_deploy.stage1.pipeline import select

DEMO = Path(__file__).parent.parent / "amoeba_deploy" / "demo"
NAME = "amoeba-demo-7m"
CALIBRATION_SEED, VALIDATION_SEED = 2, 1
VALIDATION_DOCUMENTS, CALIBRATION_DOCUMENTS = 700, 600

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


def build(trained: Path | None, tokens: str) -> None:
    """Everything under ``amoeba_deploy/demo``; the base model is the one that lies there where none is given."""
    world = demo_corpus.build_world()
    progress = Progress()
    DEMO.mkdir(parents=True, exist_ok=True)
    (DEMO / "validation.txt").write_text(text(world, VALIDATION_SEED, VALIDATION_DOCUMENTS), encoding="utf-8")
    lines = [json.dumps(row) + "\n" for row in demo_corpus.validation_questions(world)]
    (DEMO / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    with tempfile.TemporaryDirectory() as work, whole_folder(DEMO / "checkpoint", force=True) as output:
        base, chosen, calibration = Path(work, "base"), Path(work, "selection"), Path(work, "calibration.txt")
        if trained is None:
            shutil.copytree(DEMO / "checkpoint" / "base", base)
        else:
            save_base(trained, base)
            write_card(base, tokens)
        calibration.write_text(text(world, CALIBRATION_SEED, CALIBRATION_DOCUMENTS), encoding="utf-8")
        chosen.mkdir()
        write_selection(chosen, select(ModelFolder(base), calibration, progress=progress))
        made = create_checkpoint(str(base), chosen, output, name=NAME, include_base=True)
        quality = measure_quality(made, DEMO / "validation.txt", DEMO / "questions.jsonl", progress=progress)
        write_quality(output, quality)
    for file in sorted((DEMO / "checkpoint").rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>9} {file.relative_to(DEMO)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded checkpoint.")
    parser.add_argument("trained", type=Path, nargs="?", help="What train_demo.py wrote.")
    parser.add_argument("--tokens", default="12.3 million", help="How many tokens it was trained on, for its card.")
    arguments = parser.parse_args()
    build(arguments.trained, arguments.tokens)


if __name__ == "__main__":
    main()
