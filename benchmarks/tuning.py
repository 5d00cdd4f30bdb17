"""What each part of tuning is worth: Table 4 of AmoebaLLM (arXiv 2411.10606) in small, on the embedded model.

The embedded base model and its selection are tuned on fresh text of its world, once a variant and seed, all on the same
rows and shapes; then loss on the held-out text and accuracy on the held-out questions are measured for each shape.

* full: the mixture of LoRAs, balanced losses, distillation;
* one LoRA: a single LoRA of the same rank for all shapes;
* all weights: no adapters, the model's own weights (no mixture at all);
* no balancing: each shape's loss at its own magnitude;
* no distillation: every shape learns the labels;
* alone: each shape tuned by itself with one LoRA (the paper's dagger rows), the same number of steps for each.

    python -m benchmarks.tuning --table4                        # 3 seeds, about an hour on 2 cores
    python -m benchmarks.tuning --table4 --steps 50 --seeds 1   # a look
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.evaluation import Ids, LogitsFunction, read_questions, task_accuracy, text_loss, text_rows
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.elastic import ElasticModel

DEMO = Path(__file__).parent.parent / "amoeba_deploy" / "demo"
WIDTHS = tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4))
SHAPES = tuple(Shape.parse(text) for text in ("12x1", "12x0.5", "9x1", "9x0.75", "9x0.5", "6x1", "6x0.75", "6x0.5"))
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "one LoRA": {"adapter": "lora"},
    "all weights": {"adapter": "none", "lr": 2e-4},
    "no balancing": {"balance": False},
    "no distillation": {"distillation": 0.0},
    "conflicts projected": {"conflicts": "project"},
}
ALONE = "alone"
"""One run a shape."""


def corpus(folder: Path, documents: int, seed: int) -> Path:
    """Text of the embedded model's world from a seed that neither its training nor its validation used."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import demo_corpus

    file = folder / f"corpus-{seed}.txt"
    text = "\n\n".join(islice(demo_corpus.documents(demo_corpus.build_world(), seed), documents)) + "\n"
    file.write_text(text, encoding="utf-8")
    return file


def logits_of(elastic: ElasticModel) -> LogitsFunction:
    """Logits of the shape that is running."""

    def logits(ids: Ids) -> Any:
        with torch.no_grad():
            return elastic(torch.from_numpy(ids)).float().numpy()

    return logits


def measured(elastic: ElasticModel, checkpoint: Checkpoint, shapes: tuple[Shape, ...]) -> dict[str, tuple[float, ...]]:
    """Of each shape the loss, its standard error, the accuracy, its standard error."""
    tokenizer, context = checkpoint.model.tokenizer(), checkpoint.architecture.context
    rows, questions = text_rows(DEMO / "validation.txt", tokenizer), read_questions(DEMO / "questions.jsonl")
    found = {}
    elastic.eval()
    for shape in shapes:
        with elastic.shape(shape):
            loss = text_loss(logits_of(elastic), rows)
            share = task_accuracy(logits_of(elastic), questions, tokenizer, context).accuracy
        error = math.sqrt(share * (1 - share) / len(questions))
        found[str(shape)] = (loss.loss, loss.standard_error, share, error)
    return found
