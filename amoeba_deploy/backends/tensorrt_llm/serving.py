"""Form A: the files and commands by which TensorRT-LLM serves and measures a Hugging Face folder.

``serve.yaml`` holds the arguments of TensorRT-LLM's LLM interface that ``trtllm-serve`` and ``trtllm-bench`` read.
``bench.yaml`` is the same without reuse of cached prompts: a benchmark warms up with prompts that it then measures,
whose first token would come from the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_deploy.backends.backend import BuildOptions, Command
from amoeba_deploy.backends.tensorrt_llm.forms import mapping_of

SERVE, BENCH = "serve.yaml", "bench.yaml"
REQUESTS, REPORT = "../requests.json", "../report.json"
"""Beside the bundle, which holds nothing that its manifest does not list."""
TOKENS_AT_ONCE = 8192
"""Prompt tokens that are processed together at most, unless a single prompt may be longer; TensorRT-LLM's default."""
_PROMPT, _OUTPUT, _REQUESTS = 128, 32, 64
"""What is measured where nobody says otherwise."""


def max_num_tokens(options: BuildOptions) -> int:
    """The most tokens of one step: the prompts of a whole batch, up to a bound, and always one whole prompt."""
    return max(options.context, min(options.batch * options.context, TOKENS_AT_ONCE))


def arguments(options: BuildOptions, reuse: bool) -> dict[str, Any]:
    """The arguments of the LLM interface, by the names that they have since release 1.0."""
    mapping = mapping_of(options)
    return {
        "tensor_parallel_size": mapping.tp,
        "pipeline_parallel_size": mapping.pp,
        "max_batch_size": options.batch,
        "max_num_tokens": max_num_tokens(options),
        "max_seq_len": options.context,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": reuse},
        "cuda_graph_config": {"max_batch_size": options.batch, "enable_padding": True},
    }


def write_serving(folder: Path, options: BuildOptions) -> None:
    """Write ``serve.yaml`` and ``bench.yaml``."""
    import yaml

    for name, reuse in ((SERVE, True), (BENCH, False)):
        text = yaml.safe_dump(arguments(options, reuse), sort_keys=False)
        (folder / name).write_text(text, encoding="utf-8")


def needs(options: BuildOptions) -> str:
    """What must be installed where the commands run."""
    count = mapping_of(options).world_size
    gpus = "an NVIDIA GPU" if count == 1 else f"{count} NVIDIA GPUs"
    chip = f" of {options.chip}" if options.chip else ""
    return f"{gpus}{chip} and TensorRT-LLM {options.settings['release']} (nvcr.io/nvidia/tensorrt-llm/release)"


def _flag(options: BuildOptions) -> str:
    return "--config" if options.settings["release"] == "1.3" else "--extra_llm_api_options"


def serving_commands(options: BuildOptions) -> tuple[Command, ...]:
    """Measure the folder ``engine``, and serve it."""
    serve = ("trtllm-serve", "engine", "--port", "8000", _flag(options), f"engine/{SERVE}")
    return (*folder_bench(options), Command("serve it on port 8000", serve, needs(options)))


def folder_bench(options: BuildOptions, prompt: int = _PROMPT, tokens: int = _OUTPUT) -> tuple[Command, ...]:
    """Measure the Hugging Face folder ``engine``."""
    run = ("--backend", "pytorch", _flag(options), f"engine/{BENCH}", "--max_seq_len", str(options.context))
    return bench_commands(options, "engine", run, prompt=prompt, tokens=tokens)


def bench_commands(
    options: BuildOptions,
    model: str,
    run: tuple[str, ...],
    more: str = "",
    *,
    prompt: int = _PROMPT,
    tokens: int = _OUTPUT,
) -> tuple[Command, ...]:
    """Make requests with random prompts, and measure them; latencies to the first and to each further token.

    Args:
        options: what the engine was built for.
        model: the Hugging Face folder; ``trtllm-bench`` reads config, tokenizer and the headers of its safetensors.
        run: the arguments that say what is measured.
        more: what is needed beside TensorRT-LLM.
        prompt: tokens of a request, as far as the context holds them.
        tokens: tokens of an answer, likewise.
    """
    prompt = min(prompt, max(options.context - tokens, 1))
    output = max(min(tokens, options.context - prompt), 1)
    tool, mapping = ("trtllm-bench", "--model", model, "--model_path", model), mapping_of(options)
    lengths = ("--input-mean", str(prompt), "--input-stdev", "0", "--output-mean", str(output), "--output-stdev", "0")
    made = (*tool, "prepare-dataset", "--output", REQUESTS, "token-norm-dist")
    # Left out, the limits are a guess of the tool's own, by the model and the GPU.
    limits = ("--max_batch_size", str(options.batch), "--max_num_tokens", str(max_num_tokens(options)))
    spread = ("--tp", str(mapping.tp), "--pp", str(mapping.pp))
    measured = (*tool, "throughput", "--dataset", REQUESTS, *run, *limits, *spread)
    return (
        Command("make requests to measure", (*made, "--num-requests", str(_REQUESTS), *lengths), needs(options) + more),
        Command(
            "measure the times to the first and to each further token",
            (*measured, "--streaming", "--concurrency", str(options.batch), "--report_json", REPORT),
            needs(options) + more,
        ),
    )
