"""``python -m benchmarks.paper --table 1|2|3|4|5 --figure 1|3 [--model MODEL]``: the paper's comparisons.

* ``--table 1``: LLM-Pruner, FLAP, Shortened LLaMA, Amoeba, and Amoeba tuned alone at 80, 65 and 50 % of the block
  parameters, on held-out text and questions;
* ``--table 2``: the same of a second model: give it with ``--model``;
* ``--table 3``: depths chosen by dynamic programming and by others (``benchmarks.selection --table depth``);
* ``--table 4``: what each part of tuning is worth (``benchmarks.tuning --table4``);
* ``--table 5``: calibration sources (``benchmarks.selection --table calibration``);
* ``--figure 1``: latency as depth or width shrinks, in the engines of a measured table;
* ``--figure 3``: accuracy against latency of Table 1's subnets, by the latencies of a device.

The embedded model is compared in half an hour on two cores. Another model takes files and names of tasks:

    python -m benchmarks.paper --table 1 --model meta-llama/Llama-2-7b-hf --device cuda \\
        --tuning alpaca-gpt4 --calibration wiki.train.txt --held-out wiki.test.txt \\
        --tasks mmlu,boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa \\
        --steps 10000 --batch 8 --rank 64 --lr 2e-4 --samples 512 --sequence 512
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from amoeba_deploy.checkpoint import EMBEDDED
from amoeba_deploy.files import cache_folder
from amoeba_deploy.model_folder import ModelFolder, resolve_model
from amoeba_deploy.stage2.settings import Settings
from benchmarks.paper import figures, reference
from benchmarks.paper.data import Data, demo_data, file_data
from benchmarks.paper.runs import Runs
from benchmarks.paper.table1 import print_table, table_1

OTHERS = {
    3: ("benchmarks.selection", "--table", "depth"),
    4: ("benchmarks.tuning", "--table4"),
    5: ("benchmarks.selection", "--table", "calibration"),
}
"""Tables that stand in other benchmarks."""


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=range(1, 6))
    what.add_argument("--figure", type=int, choices=(1, 3))
    parser.add_argument("--model", help="Model folder or hub id.  [default: the embedded model]")
    parser.add_argument("--calibration", type=Path, help="Text that selects, and that chooses Amoeba's shapes.")
    parser.add_argument("--tuning", help="Text or instructions that tune: a file, or a name such as alpaca-gpt4.")
    parser.add_argument("--held-out", type=Path, help="Text that is tested on.")
    parser.add_argument("--questions", type=Path, action="append", default=[], help="File of questions; repeatable.")
    parser.add_argument("--tasks", default="", help="Tasks of lm-evaluation-harness, separated by commas.")
    parser.add_argument("--data", type=Path, help="Folder of files that stand in for the tasks' data.")
    parser.add_argument("--limit", type=int, help="The first so many questions of each task.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="Several commands may share the work of one table.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--samples", type=int, default=64, help="Rows of calibration text.")
    parser.add_argument("--sequence", type=int, default=256, help="Tokens of each.")
    parser.add_argument("--device", default="cpu", help="Of torch, for --table 1; a device's name for figures.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="Where to keep everything that was measured.")
    parser.add_argument("--work", type=Path, help="Where finished cells are kept.  [default: $AMOEBA_CACHE/paper]")
    return parser


def data_of(asked: argparse.Namespace, parser: argparse.ArgumentParser, work: Path) -> Data:
    """The embedded model's data, or the files that were named."""
    if asked.model is None:
        return demo_data(work)
    if not (asked.calibration and asked.tuning and asked.held_out):
        parser.error("--model needs --calibration, --tuning and --held-out")
    tasks = [name for name in asked.tasks.split(",") if name]
    return file_data(asked.calibration, asked.tuning, asked.held_out, asked.questions, tasks, asked.data, asked.limit)


def runs_of(asked: argparse.Namespace, data: Data) -> Runs:
    """What computes the cells of Table 1."""
    model = ModelFolder(EMBEDDED / "base" if asked.model is None else resolve_model(asked.model))
    settings = Settings(
        steps=asked.steps,
        batch=asked.batch,
        accumulate=1,
        lr=asked.lr,
        schedule="cosine",
        warmup=asked.steps // 15,
        rank=asked.rank,
        widths=tuple(Fraction(n, 8) for n in (8, 7, 6, 5, 4)),
        mixed_precision="no" if asked.device == "cpu" else "bf16",
    )
    folder = asked.work or cache_folder() / "paper"
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    return Runs(model, data, settings, asked.samples, asked.sequence, folder, say, asked.device == "cpu")


def main() -> None:
    parser = arguments()
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.table in OTHERS:
        given = [] if asked.model is None or asked.table == 4 else ["--model", asked.model]
        sys.exit(subprocess.run([sys.executable, "-m", *OTHERS[asked.table], *given], check=False).returncode)
    if asked.figure == 1:
        figures.print_figure_1(asked.device)
        return
    if asked.table == 2 and asked.model is None:
        parser.error("Table 2 is Table 1 of a second model; name it with --model")
    with tempfile.TemporaryDirectory(prefix="amoeba-paper-") as work:
        data = data_of(asked, parser, Path(work))
        runs = runs_of(asked, data)
        found = table_1(runs, range(asked.first_seed, asked.first_seed + asked.seeds))
        depth = runs.model.architecture.depth
        if asked.figure == 3:
            figures.print_figure_3(found, depth, asked.device)
        else:
            print_table(found, depth)
            reference.print_table_1()
    if asked.json:
        asked.json.write_text(json.dumps(_plain(found), indent=1), encoding="utf-8")


def _plain(found: dict[float, Any]) -> dict[str, Any]:
    return {f"{ratio:g}": methods for ratio, methods in found.items()}


if __name__ == "__main__":
    main()
