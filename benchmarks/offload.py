"""How little memory stage 1 needs when blocks are read from disk: ``python -m benchmarks.offload``.

A model with random weights whose blocks have the size of LLaMA2-7B's (hidden 4096, 32 heads, 11008 neurons, bf16), but
few of them, is selected with ``--offload`` and without, as whole processes. Printed is each one's peak of anonymous
memory (its own; pages of the weight files do not count, the system drops them when it needs room) above that of a
process that has only imported torch and transformers, beside the sizes of the model and of one block in float32, which
is what is computed in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amoeba_deploy.model_folder import ModelFolder
from benchmarks.models import llama_config, random_model
from benchmarks.selection_speed import DEMO

GB = 1e9


def anonymous_peak(command: list[str]) -> tuple[float, float]:
    """Peak of a process's anonymous memory in bytes, looked at every 10 ms, and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in found)])
        time.sleep(0.01)
    if process.wait() != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak, time.perf_counter() - began


def write_text(file: Path) -> None:
    """Some text, with which the demo's tokenizer makes more tokens than are asked for."""
    file.write_text((DEMO / "validation.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of stage 1 with and without --offload.")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="amoeba-bench-") as work:
        config = llama_config(arguments.blocks, 4096, 32, 32, 11008, 32000)
        config |= {"dtype": "bfloat16", "tie_word_embeddings": False}
        model = random_model(Path(work, "model"), config)
        source = DEMO / "checkpoint" / "base" / "tokenizer.json"
        (model.path / "tokenizer.json").write_bytes(source.read_bytes())
        write_text(Path(work, "text.txt"))
        report(ModelFolder(model.path), Path(work), arguments)


def report(model: ModelFolder, work: Path, arguments: argparse.Namespace) -> None:
    """Run all processes and print their peaks."""
    sizes = model.architecture
    states = 4 * arguments.samples * arguments.sequence * sizes.hidden
    print(f"{sizes.depth} blocks of {sizes.block_parameters / 1e6:.0f} M, {sizes.parameters / 1e9:.2f} B parameters")
    print(f"in float32: model {4 * sizes.parameters / GB:.2f} GB, one block {4 * sizes.block_parameters / GB:.2f} GB")
    print(f"hidden states of the calibration data at all {sizes.depth} boundaries: {sizes.depth * states / GB:.3f} GB")
    idle, _ = anonymous_peak([sys.executable, "-c", "import torch, transformers, amoeba_deploy.stage1.pipeline"])
    select = [sys.executable, "-m", "amoeba_deploy", "select", str(model.path), "--calibration", str(work / "text.txt")]
    select += ["--samples", str(arguments.samples), "--sequence", str(arguments.sequence)]
    for name, options in (("--offload", ["--offload"]), ("all in memory", [])):
        peak, seconds = anonymous_peak([*select, "-o", str(work / name.strip("-").replace(" ", "-")), *options])
        own = peak - idle
        print(
            f"{name:14} peak {own / GB:5.2f} GB above an idle process's {idle / GB:.2f} GB: "
            f"{own / (4 * sizes.parameters):.2f} of the model, {own / (4 * sizes.block_parameters):.2f} blocks; "
            f"{seconds:.0f} s"
        )
    same = (work / "offload" / "selection.safetensors").read_bytes() == (
        work / "all-in-memory" / "selection.safetensors"
    ).read_bytes()
    print(f"same selection: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
