"""What each part of tuning is worth: Table 4 of AmoebaLLM (arXiv 2411.10606) in small, on the embedded model.

The embedded base model and its selection are tuned on fresh text of its world, once a variant and seed, all on the same
rows and shapes; then loss on the held-out text and accuracy on the held-out questions are measured for each shape.

* full: the mixture of LoRAs, balanced losses, distillation;
* one LoRA: a single LoRA of the same rank for all shapes;
* all weights: no adapters, the model's own weights (no mixture at all);
* no balancing: each shape's loss at its own magnitude;
* no distillation: every shape learns the labels;
* alone: each shape tuned by itself with one LoRA (the paper's dagger rows), the same number of steps for each.

    python -m benchmarks.tuning --table4                        # 3 seeds, under an hour on 2 cores
    python -m benchmarks.tuning --table4 --steps 50 --seeds 1   # a look
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy.checkpoint import Checkpoint, open_checkpoint
from amoeba_deploy.evaluation import Ids, LogitsFunction, read_questions, task_accuracy, text_loss, text_rows
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import Batches, Sequences, tokenise
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.instructions import read_examples
from amoeba_deploy.stage2.pipeline import make_trainer
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.selected import Selected
from amoeba_deploy.stage2.settings import Settings

DEMO = Path(__file__).parent.parent / "amoeba_deploy" / "demo"
WIDTHS = tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4))
SHAPES = tuple(Shape.parse(text) for text in ("12x1", "9x0.75", "6x1", "6x0.5"))
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


def rows_of(checkpoint: Checkpoint, file: Path) -> Sequences:
    """A text in rows of 256 tokens."""
    tokenizer, context = checkpoint.model.tokenizer(), checkpoint.architecture.context
    return tokenise(read_examples(str(file)), tokenizer, bos=None, eos=None, context=context, source=192, target=64)


def tuned(
    checkpoint: Checkpoint, batches: Batches, settings: Settings, shapes: tuple[Shape, ...]
) -> dict[str, tuple[float, ...]]:
    """Tune with some settings and measure shapes."""
    selected = Selected(checkpoint.name, checkpoint.model, checkpoint.selection)
    trainer = make_trainer(selected, batches, settings, Processes(settings.mixed_precision, cpu=True))
    for _ in trainer.run(settings.steps):
        pass
    return measured(trainer.elastic, checkpoint, shapes)


def untuned(checkpoint: Checkpoint) -> dict[str, tuple[float, ...]]:
    """The embedded base model as it is."""
    from amoeba_deploy.model_folder import load_torch_model

    model = load_torch_model(checkpoint.model.path)
    elastic = ElasticModel(model, checkpoint.selection, checkpoint.architecture, steps=checkpoint.steps)
    return measured(elastic, checkpoint, SHAPES)


def line(name: str, runs: list[dict[str, tuple[float, ...]]]) -> str:
    """A row of the table: mean over seeds, and how far seeds spread, of loss and accuracy."""
    cells = []
    for shape in map(str, SHAPES):
        found = [run[shape] for run in runs if shape in run]
        if not found:
            cells.append("")
            continue
        loss, accuracy = ([row[place] for row in found] for place in (0, 2))
        spread = [f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "" for values in (loss, accuracy)]
        cells.append(f"{statistics.fmean(loss):.3f}{spread[0]}; {statistics.fmean(accuracy):.3f}{spread[1]}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table4", action="store_true", required=True, help="The ablation.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join([*VARIANTS, ALONE]), help="Separated by commas.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="Where to keep what was measured.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint()
    base = Settings(
        steps=arguments.steps,
        batch=8,
        accumulate=1,
        lr=4e-3,
        schedule="cosine",
        warmup=arguments.steps // 15,
        rank=8,
        widths=WIDTHS,
        mixed_precision="bf16",
    )
    print("loss; accuracy (mean over seeds ± standard deviation)\n")
    print("| variant | " + " | ".join(map(str, SHAPES)) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    results: dict[str, list[dict[str, tuple[float, ...]]]] = {"untuned": [untuned(checkpoint)]}
    print(line("untuned", results["untuned"]), flush=True)
    with tempfile.TemporaryDirectory() as work:
        data = [rows_of(checkpoint, corpus(Path(work), 6_000, 100 + seed)) for seed in range(arguments.seeds)]
        for name in arguments.variants.split(","):
            results[name] = []
            for seed, rows in enumerate(data):
                settings = replace(base, seed=seed, **VARIANTS.get(name, {"adapter": "lora"}))
                batches = Batches(rows, settings.batch, seed, "none")
                if name != ALONE:
                    results[name].append(tuned(checkpoint, batches, settings, SHAPES))
                    continue
                runs = [tuned(checkpoint, batches, replace(settings, shape=str(shape)), (shape,)) for shape in SHAPES]
                results[name].append({shape: found for run in runs for shape, found in run.items()})
            print(line(name, results[name]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    ends = results["untuned"][0][str(SHAPES[0])]
    print(f"\nstandard errors of one measurement: loss {ends[1]:.3f} (147 rows), accuracy up to 0.028 (326 questions)")


if __name__ == "__main__":
    main()
