"""Graphs by onnxruntime-genai's model builder, for families that the emitter does not know.

The builder loads the whole model with transformers and writes its weights once more, as ``model.onnx.data``. It takes
more families, and is wrong about some: those it was seen to fail on are refused by name here, as is what it would
silently get wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.onnx import runtime
from amoeba_deploy.backends.onnx.genai import CONFIG
from amoeba_deploy.backends.onnx.precisions import GRAPH
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.rotary import turning

DATA = "model.onnx.data"
PACKAGE = "onnxruntime-genai"
_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"})
_FAILS = {
    "gemma3_text": "it reads one rotary base where a Gemma 3 has two, and stops",
    "granite": "its graph of a Granite was not compared",
    "olmo2": "it does not know OLMo 2",
    "smollm3": "it stops at blocks without rotary positions",
}
"""Families that the builder of version 0.18 does not build from transformers 5's configs, and why."""
_ROPES = frozenset({"default", "llama3"})


def refusal(subnet: Architecture, precision: str, context: int, provider: str) -> str | None:
    """Why the model builder's graph of a subnet cannot be had or trusted, as half a sentence, or None."""
    if subnet.family not in _FAMILIES:
        why = _FAILS.get(subnet.family, "it was never tried")
        return f"onnxruntime-genai's model builder does not take a {subnet.family}: {why}"
    if subnet.sliding_window is not None and subnet.sliding_window < context:
        return (
            f"its sliding window of {subnet.sliding_window} positions is shorter than the context of {context}, where "
            f"the model builder's graph is wrong without a word; ask for --context {subnet.sliding_window} or less"
        )
    if "partial rotary turn" in subnet.traits:
        turned = turning(subnet.rope, subnet.head_dim)
        if turned % 16:
            return f"it turns {turned} channels of a head, where the model builder's attention needs a multiple of 16"
    if subnet.family == "phi3" and subnet.heads * subnet.head_dim != subnet.hidden:
        return (
            f"its {subnet.heads} heads of {subnet.head_dim} do not make up the hidden size {subnet.hidden}, where the "
            f"model builder's graph of a phi3 is wrong without a word"
        )
    if subnet.rope.kind not in _ROPES:
        return f"its rotary scaling '{subnet.rope.kind}' is not one that the model builder was tried with"
    if subnet.output_bias or subnet.mlp_bias:
        return "its biases on o_proj or in the feed-forward are not something that the model builder was tried with"
    if subnet.head_dim % 16:
        return f"its head size {subnet.head_dim} is no multiple of 16, which the model builder's attention needs"
    if provider == "cpu" and precision in ("fp16", "bf16"):
        return f"the model builder has no {precision} on the CPU; choose fp32, or --set provider=cuda"
    return None


@contextlib.contextmanager
def _silent() -> Iterator[io.StringIO]:
    """The builder prints each step on both streams and logs every node that it quantises."""
    said, disabled = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    finally:
        logging.disable(disabled)


def build(model: ModelFolder, output: Path, precision: str, context: int, provider: str) -> None:
    """Write the builder's graph, its weights and ``genai_config.json`` into ``output``.

    Raises:
        ToolchainMissing: onnxruntime-genai is not installed.
        BadInput: the model is ragged or has no tokenizer, or the builder fails on it.
    """
    try:
        builder = runtime.load("onnxruntime_genai.models.builder")
    except ImportError:
        raise ToolchainMissing(
            f"--set emitter=oga needs {PACKAGE} with onnx-ir, which is not installed; run pip install {PACKAGE} onnx-ir"
        ) from None
    if model.blocks is not None:
        raise BadInput(f"{model.path}: its blocks differ in size, which onnxruntime-genai's model builder cannot hold")
    if not model.tokenizer_files():
        raise BadInput(f"{model.path}: has no tokenizer, which onnxruntime-genai's model builder insists on; add one")
    with tempfile.TemporaryDirectory(prefix=".oga-", dir=output) as work:
        folder, cache = Path(work, "built"), Path(work, "cache")
        arguments = (None, str(model.path), str(folder), precision, provider, str(cache))
        asked = ["hf_token=false", "windowed_kv_cache=false"]
        try:
            with _silent():
                options = builder.parse_extra_options(*arguments, asked)
                builder.create_model(*arguments, **options)
        except Exception as error:  # whatever the builder and what it calls raise
            raise BadInput(
                f"{model.path}: onnxruntime-genai's model builder fails on it ({error!r:.200}); use --set emitter=own"
            ) from None
        if model.family.model_type == "gemma2":
            _mend_embedding_scale(folder / GRAPH, model.architecture.scales.embedding)
        for name in (GRAPH, DATA):
            shutil.move(folder / name, output / name)
        write_json(output / CONFIG, _config(json.loads((folder / CONFIG).read_text()), context))


def _mend_embedding_scale(file: Path, scale: float) -> None:
    """The builder rounds the factor of a Gemma's embeddings to two digits, which logits show; write the exact one."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file, load_external_data=False)
    scaling = next(node for node in model.graph.node if node.name == "/model/embed_tokens/Mul")
    for tensor in model.graph.initializer:
        if tensor.name in scaling.input:
            exact = np.full_like(numpy_helper.to_array(tensor), scale)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
            break
    else:
        for node in model.graph.node:
            if node.op_type == "Constant" and node.output[0] in scaling.input:
                value = node.attribute[0].t
                value.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(value), scale)))
    onnx.save(model, file)


def _config(config: dict[str, Any], context: int) -> dict[str, Any]:
    """The builder's configuration for the context that was asked for, with a cache that grows."""
    config["model"]["context_length"] = config["search"]["max_length"] = context
    config["search"]["past_present_share_buffer"] = False
    return config


def is_built(artefact: Path) -> bool:
    """Whether the model builder wrote an artefact."""
    return (artefact / DATA).is_file()
