"""Form B's engines: the ``trtllm-build`` command, run where the tool and the GPU are, else a step for the device."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

from amoeba_deploy.backends.backend import BuildOptions, Command, Step
from amoeba_deploy.backends.tensorrt_llm.checkpoint import DTYPES
from amoeba_deploy.backends.tensorrt_llm.forms import form_of, mapping_of
from amoeba_deploy.backends.tensorrt_llm.serving import REQUESTS, bench_commands, max_num_tokens, needs
from amoeba_deploy.errors import AmoebaError

TOOL = "trtllm-build"
CHECKPOINT, ENGINES = "checkpoint", "engines"
_DENSE = "DENSE"
_NEEDS_DENSE = f"; {_DENSE} stands for the folder that 'amoeba extract --layout uniform' writes of the same shape"


def build_command(checkpoint: str, engines: str, precision: str, options: BuildOptions) -> tuple[str, ...]:
    """The command that compiles a checkpoint.

    Every limit is given, for defaults moved between releases. Plugins compute in the checkpoint's dtype.
    """
    dtype = DTYPES[precision]
    paged = ("--paged_kv_cache", "enable") if options.settings["release"] == "0.12" else ("--kv_cache_type", "paged")
    return (
        TOOL,
        *("--checkpoint_dir", checkpoint),
        *("--output_dir", engines),
        *("--max_batch_size", str(options.batch)),
        *("--max_input_len", str(options.context)),
        *("--max_seq_len", str(options.context)),
        *("--max_num_tokens", str(max_num_tokens(options))),
        *("--max_beam_width", "1"),
        *("--gemm_plugin", dtype),
        *("--gpt_attention_plugin", dtype),
        *("--remove_input_padding", "enable"),
        *paged,
        *("--logits_dtype", "float32"),
    )


def builds_here(precision: str, options: BuildOptions) -> bool:
    """Whether engines are compiled by this command: the tool is on the PATH, and the GPU here is the device's."""
    if form_of(precision, options) != "B" or shutil.which(TOOL) is None:
        return False
    from amoeba_deploy.profiles.machine import own_chips

    return options.chip in own_chips() if options.chip else any(chip.startswith("sm_") for chip in own_chips())


def build(folder: Path, precision: str, options: BuildOptions) -> None:
    """Compile ``folder/checkpoint`` into ``folder/engines``.

    Raises:
        AmoebaError: the tool failed, was killed, or left no whole engine; what it left is removed.
    """
    engines = folder / ENGINES
    command = build_command(str(folder / CHECKPOINT), str(engines), precision, options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        wrong = _failure(done) or _missing(engines, options)
    except OSError as error:
        wrong = f"could not be started ({error.strerror})"
    if wrong:
        shutil.rmtree(engines, ignore_errors=True)
        raise AmoebaError(f"{TOOL} {wrong}; build on the device instead, with this tool off the PATH")


def _failure(done: subprocess.CompletedProcess[str]) -> str | None:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"was killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return f"failed with exit code {done.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"
    return None


def _missing(engines: Path, options: BuildOptions) -> str | None:
    """What a finished build lacks; its exit code alone is not trusted."""
    wanted = ["config.json", *(f"rank{rank.number}.engine" for rank in mapping_of(options).ranks())]
    for name in wanted:
        file = engines / name
        if not file.is_file() or file.stat().st_size == 0:
            return f"ended well but left no {name}"
    return None


def engine_steps(precision: str, options: BuildOptions, built: bool) -> tuple[Step, ...]:
    """What finishes the engines on the device: compiling them, unless that was done."""
    command = build_command(f"engine/{CHECKPOINT}", f"engine/{ENGINES}", precision, options)
    return () if built else (Step("compile the checkpoint to engines", command, needs(options)),)


def engine_commands(options: BuildOptions) -> tuple[Command, ...]:
    """Measure the engines. The bundle has no safetensors of the whole model, whose headers ``trtllm-bench`` reads."""
    engines = f"engine/{ENGINES}"
    if options.settings["release"] == "0.12":
        # Of that release trtllm-bench knows a list of models only; this is its tool for any engine.
        tool = ("gptManagerBenchmark", "--engine_dir", engines, "--dataset", REQUESTS, "--streaming", "true")
        return (Command("measure them on a dataset of TensorRT-LLM's prepare_dataset.py", tool, needs(options)),)
    return bench_commands(options, _DENSE, ("--backend", "tensorrt", "--engine_dir", engines), _NEEDS_DENSE)
