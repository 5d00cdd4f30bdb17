"""How good is what stage 1 selects? ``python -m benchmarks.selection``: the paper's Tables 3 and 5, and widths.

* ``--table depth``: remaining depth x method, in held-out loss and question accuracy (the form of Table 3). Beside the
  methods of the paper stand the dynamic programming over sublayers and with a beam, at equal depth (two sublayers count
  as one block).
* ``--table calibration``: calibration source x depth (the form of Table 5).
* ``--table width``: width x method, at full depth, with and without bias compensation.

By default all is measured on the embedded checkpoint, with texts and questions of its own world: calibration text of
another seed, and calibration questions about other facts than the held-out ones. Any model folder and files do:

    python -m benchmarks.selection --model MODEL --text train.txt --questions train.jsonl \\
        --held-out-text test.txt --held-out-questions test.jsonl --source other=other.txt
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path

from amoeba_deploy.checkpoint import EMBEDDED
from amoeba_deploy.evaluation import read_questions, read_text, task_accuracy, text_loss, text_rows, torch_logits
from amoeba_deploy.extraction.compensation import compensate
from amoeba_deploy.extraction.folder import extract
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.progress import Progress
from amoeba_deploy.selection import DepthChoice, Selection
from amoeba_deploy.shape import Shape, format_width
from amoeba_deploy.stage1.calibration import (
    Calibration,
    Metric,
    question_calibration,
    read_calibration,
    text_calibration,
)
from amoeba_deploy.stage1.importance import WIDTH_METHODS
from amoeba_deploy.stage1.pipeline import STATE_MEMORY, Settings, Stage1
from amoeba_deploy.stage1.removal import LocalRemover, Removed, Trial, total

DEMO = EMBEDDED.parent
WIDTHS = tuple(Fraction(n, 8) for n in (7, 6, 5, 4))
EXHAUSTIVE_BLOCKS = 8
"""Up to so many blocks every subset is measured too."""
DEMO_QUESTIONS = 120


@dataclass(frozen=True)
class Data:
    """Files: calibration text and questions, held-out text and questions, further calibration sources by name."""

    text: Path
    questions: Path | None
    held_out_text: Path
    held_out_questions: Path | None
    sources: dict[str, str]


def demo_data(folder: Path) -> Data:
    """The embedded model's own: made by tools/demo_corpus.py, and what ships."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import demo_corpus

    world = demo_corpus.build_world()
    text, questions = folder / "calibration.txt", folder / "calibration.jsonl"
    text.write_text("\n\n".join(islice(demo_corpus.documents(world, 2), 600)) + "\n", encoding="utf-8")
    asked = demo_corpus.calibration_questions(world)[:DEMO_QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return Data(text, questions, DEMO / "validation.txt", DEMO / "questions.jsonl", {})


class HeldOut:
    """Measures shapes on held-out data."""

    def __init__(self, model: ModelFolder, data: Data, sequence: int) -> None:
        self.model, self.data, self.sequence = model, data, sequence
        self.loaded = load_torch_model(model.path)
        tokenizer, context = model.tokenizer(), model.architecture.context
        ids = tokenizer.encode(read_text(data.held_out_text), add_special_tokens=False).ids
        self.text = text_calibration(ids, len(ids) // sequence, sequence, {"source": "held-out text"})
        self.asked = read_questions(data.held_out_questions) if data.held_out_questions else []
        self.questions = question_calibration(self.asked, tokenizer, context, {}) if self.asked else None

    def depths(self, choices: Sequence[DepthChoice]) -> list[tuple[float, float | None]]:
        """Held-out loss and accuracy of what is kept at each depth, at full width."""
        trials = [Trial(removed_sublayers(choice, self.model.architecture.depth)) for choice in choices]
        losses = self._means(self.text, "loss", trials)
        if self.questions is None:
            return [(loss, None) for loss in losses]
        wrong = self._means(self.questions, "accuracy", trials)
        return [(loss, 1 - share) for loss, share in zip(losses, wrong, strict=True)]

    def _means(self, data: Calibration, metric: Metric, trials: Sequence[Trial]) -> list[float]:
        from amoeba_deploy.stage1.blocks import ResidentBlocks

        remover = LocalRemover(ResidentBlocks(self.loaded), data.batches, metric, "sublayer", STATE_MEMORY)
        return [total(costs) / data.count for costs in remover.costs(0, trials)]

    def width(self, selection: Selection, shape: Shape, bias: bool) -> tuple[float, float | None]:
        """Held-out loss and accuracy of a shape, really extracted."""
        tokenizer, context = self.model.tokenizer(), self.model.architecture.context
        plan = selection.plan(self.model.architecture, shape)
        with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
            extract(self.model, plan, Path(work), dtype="float32")
            subnet = load_torch_model(Path(work))
        if bias:
            compensate(subnet, self.model, selection, plan)
        logits = torch_logits(subnet)
        loss = text_loss(logits, text_rows(self.data.held_out_text, tokenizer, self.sequence)).loss
        return loss, task_accuracy(logits, self.asked, tokenizer, context).accuracy if self.asked else None


def removed_sublayers(choice: DepthChoice, depth: int) -> Removed:
    """What a choice removes, in sublayers."""
    kept = set(choice.kept)
    gone = {2 * i for i in range(depth) if i not in kept or i in choice.without_attention}
    gone |= {2 * i + 1 for i in range(depth) if i not in kept or i in choice.without_feed_forward}
    return tuple(sorted(gone))


def print_table(title: str, columns: Sequence[str], rows: dict[str, Sequence[tuple[float, float | None]]]) -> None:
    """One Markdown table: loss, and accuracy where questions were asked; perplexity is e^loss."""
    print(f"\n{title}\n")
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, found in rows.items():
        cells = [f"{loss:.3f}" + ("" if acc is None else f" / {100 * acc:.1f}%") for loss, acc in found]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def depth_methods(questions: bool) -> dict[str, Settings]:
    """The rows of the depth table."""
    asked = {
        "DP, accuracy": Settings(metric="accuracy"),
        "DP, choice loss": Settings(metric="choice-loss"),
    }
    return {
        "DP, loss": Settings(metric="loss"),
        **(asked if questions else {}),
        "Shortened LLaMA, PPL": Settings(depth_method="shortened-ppl"),
        "Shortened LLaMA, Taylor": Settings(depth_method="shortened-taylor"),
        "angular distance": Settings(depth_method="angular"),
        "first": Settings(depth_method="first"),
        "DP, loss, beam 4": Settings(metric="loss", beam=4),
        "DP, loss, sublayers": Settings(metric="loss", units="sublayer"),
    }


def exhaustive(stage: Stage1) -> dict[int, DepthChoice]:
    """The best of all subsets at each depth, on calibration loss."""
    depth = stage.model.architecture.depth
    candidates = range(depth - stage.settings.keep_last)
    sets = [removed for m in range(stage.removals + 1) for removed in combinations(candidates, m)]
    costs = [total(found) for found in stage.remover().costs(0, [Trial(removed) for removed in sets])]
    best: dict[int, tuple[float, Removed]] = {}
    for cost, removed in zip(costs, sets, strict=True):
        best[len(removed)] = min(best.get(len(removed), (math.inf, ())), (cost, removed))
    return {
        depth - m: DepthChoice(tuple(i for i in range(depth) if i not in removed), cost / stage.calibration.count)
        for m, (cost, removed) in best.items()
    }


def report_depth(held_out: HeldOut, data: Data, common: Settings) -> None:
    """Print the depth table, and what each method keeps."""
    rows, kept = {}, []
    read = {path: _read(held_out, path, common) for path in (data.text, data.questions) if path}
    depths: list[int] = []

    def add(name: str, choices: dict[int, DepthChoice]) -> None:
        depths[:] = sorted(choices, reverse=True)
        rows[name] = held_out.depths([choices[d] for d in depths])
        kept.append((name, choices))

    for name, method in depth_methods(data.questions is not None).items():
        asks = method.metric in ("accuracy", "choice-loss") and data.questions is not None
        calibration = read[data.questions] if asks and data.questions else read[data.text]
        settings = replace(method, minimum_depth=common.minimum_depth, keep_last=common.keep_last)
        stage = Stage1(held_out.model, calibration, calibration, settings, Progress(quiet=True))
        add(name, stage.depths()[0])
    if held_out.model.architecture.depth <= EXHAUSTIVE_BLOCKS:
        settings = replace(common, metric="loss")
        text = read[data.text]
        add("best of all subsets", exhaustive(Stage1(held_out.model, text, text, settings, Progress(quiet=True))))
    print_table("Remaining depth: held-out loss / accuracy", [str(d) for d in depths], rows)
    print("\nKept blocks and calibration metric (3a: attention alone of block 3, 3f: its feed-forward alone)\n")
    from amoeba_deploy.console import kept_text

    for name, choices in kept:
        print(f"- {name}: " + "; ".join(f"{d}: {kept_text(choices[d])} ({choices[d].metric:.4f})" for d in depths[1:]))


def _read(held_out: HeldOut, source: Path | str, common: Settings) -> Calibration:
    sizes = held_out.model.architecture
    return read_calibration(
        str(source),
        held_out.model.tokenizer(),
        sizes.context,
        samples=None if str(source).endswith(".jsonl") else common.samples,
        sequence=common.sequence,
    )


def report_calibration(held_out: HeldOut, data: Data, common: Settings) -> None:
    """Print the table of calibration sources."""
    sources: dict[str, tuple[str, Metric | None]] = {"text, loss": (str(data.text), None)}
    if data.questions:
        sources |= {
            "questions, accuracy": (str(data.questions), None),
            "questions, choice loss": (str(data.questions), "choice-loss"),
        }
    sources |= {name: (source, None) for name, source in data.sources.items()}
    rows, depths = {}, []
    for name, (source, metric) in sources.items():
        calibration = _read(held_out, source, common)
        settings = replace(common, metric=metric)
        stage = Stage1(held_out.model, calibration, calibration, settings, Progress(quiet=True))
        choices, _ = stage.depths()
        depths = sorted(choices, reverse=True)
        rows[name] = held_out.depths([choices[d] for d in depths])
    print_table("Calibration source (DP): held-out loss / accuracy", [str(d) for d in depths], rows)


def report_width(held_out: HeldOut, data: Data, common: Settings) -> None:
    """Print the width table."""
    model, text = held_out.model, _read(held_out, data.text, common)
    whole = {model.architecture.depth: DepthChoice(tuple(range(model.architecture.depth)), 0.0)}
    rows: dict[str, list[tuple[float, float | None]]] = {}
    for method in WIDTH_METHODS:
        stage = Stage1(model, text, text, replace(common, width_method=method), Progress(quiet=True))
        selection = Selection(model.digest, whole, stage.widths(), {})
        for policy in ("uniform", "adaptive"):
            for bias in (False, True):
                name = f"{method}, {policy}" + (", bias" if bias else "")
                shapes = [Shape(model.architecture.depth, width, policy) for width in WIDTHS]  # type: ignore[arg-type]
                rows[name] = [held_out.width(selection, shape, bias) for shape in shapes]
    full = held_out.depths([whole[model.architecture.depth]])[0]
    print(f"\nfull model: loss {full[0]:.3f}" + ("" if full[1] is None else f", accuracy {100 * full[1]:.1f}%"))
    print_table("Width at full depth: held-out loss / accuracy", [format_width(w) for w in WIDTHS], rows)


REPORTS = {"depth": report_depth, "calibration": report_calibration, "width": report_width}


def main() -> None:
    parser = argparse.ArgumentParser(description="Selections compared on held-out data.")
    parser.add_argument("--model", type=Path, help="Model folder.  [default: the embedded model]")
    parser.add_argument("--text", type=Path, help="Calibration text.")
    parser.add_argument("--questions", type=Path, help="Calibration questions.")
    parser.add_argument("--held-out-text", type=Path)
    parser.add_argument("--held-out-questions", type=Path)
    parser.add_argument(
        "--source", action="append", default=[], help="NAME=FILE_OR_NAME: a further calibration source."
    )
    parser.add_argument("--table", choices=[*REPORTS, "all"], default="all")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--min-depth", type=int)
    parser.add_argument("--keep-last", type=int, default=1)
    asked = parser.parse_args()
    common = Settings(
        samples=asked.samples, sequence=asked.sequence, minimum_depth=asked.min_depth, keep_last=asked.keep_last
    )
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        sources = dict(item.split("=", 1) for item in asked.source)
        if asked.model is None:
            data = replace(demo_data(Path(work)), sources=sources)
        elif asked.text is None or asked.held_out_text is None:
            parser.error("--model needs --text and --held-out-text")
        else:
            data = Data(asked.text, asked.questions, asked.held_out_text, asked.held_out_questions, sources)
        held_out = HeldOut(ModelFolder(asked.model or EMBEDDED / "base"), data, asked.sequence)
        for name, report in REPORTS.items():
            if asked.table in (name, "all"):
                report(held_out, data, common)


if __name__ == "__main__":
    main()
