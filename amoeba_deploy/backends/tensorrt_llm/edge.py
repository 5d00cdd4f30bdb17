"""Jetson: the hand-over to TensorRT Edge-LLM, whose engines are built on the device from an ONNX model.

The dense folder is in float16. A host, an x86-64 machine with a GPU, quantises it (int4: AWQ in groups of 128, with its
own calibration data) and exports ONNX; the device compiles that with ``llm_build``. Engines are valid for one JetPack.
"""

from __future__ import annotations

from amoeba_deploy.backends.backend import BuildOptions, Step

EDGE_RELEASES = {"7.2": "0.9.1", "6.2": "0.6.0"}
"""TensorRT Edge-LLM by JetPack."""


def edge_steps(precision: str, options: BuildOptions) -> tuple[Step, ...]:
    """From the folder ``engine`` to an engine that runs on the device."""
    jetpack = options.settings["jetpack"]
    release = EDGE_RELEASES[jetpack]
    host = f"an x86-64 Linux machine with an NVIDIA GPU of sm_80 or newer and TensorRT Edge-LLM {release}"
    device = f"the Jetson with JetPack {jetpack} and TensorRT Edge-LLM {release}"
    older = jetpack == "6.2"
    steps: list[Step] = []
    source = "engine"
    if precision == "w4a16":
        tool = ("tensorrt-edgellm-quantize-llm",) if older else ("tensorrt-edgellm-quantize", "llm")
        wanted = ("--model_dir", source, "--output_dir", "quantized", "--quantization", "int4_awq")
        steps.append(Step("quantise the weights to int4", (*tool, *wanted), host, "host"))
        source = "quantized"
    export = (
        ("tensorrt-edgellm-export-llm", "--model_dir", source, "--output_dir", "onnx")
        if older
        else ("tensorrt-edgellm-export", source, "onnx")
    )
    steps.append(Step("export to ONNX", export, host, "host"))
    limits = {"maxBatchSize": options.batch, "maxInputLen": options.context, "maxKVCacheCapacity": options.context}
    build = ("llm_build", "--onnxDir", "onnx" if older else "onnx/llm", "--engineDir", "engines")
    arguments = tuple(part for name, value in limits.items() for part in (f"--{name}", str(value)))
    steps.append(Step("compile the engine", (*build, *arguments), device))
    return tuple(steps)


def edge_notes(model_type: str) -> tuple[str, ...]:
    """What the user should know of a model type there."""
    if model_type != "mistral":
        return ()
    return ("TensorRT Edge-LLM does not list Mistral; it reads one by its class for common models, so test it there",)
