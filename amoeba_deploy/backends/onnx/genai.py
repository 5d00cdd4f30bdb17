"""``genai_config.json``, which makes a folder one that onnxruntime-genai runs, and text by onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.backends.onnx import runtime
from amoeba_deploy.backends.onnx.precisions import GRAPH
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import ModelFolder, load_tokenizer

CONFIG = "genai_config.json"
_SEARCH: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""What onnxruntime-genai's model builder and transformers assume where nothing is said."""
_FROM_GENERATION = (
    "diversity_penalty",
    "do_sample",
    "length_penalty",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
"""Settings of generation_config.json that onnxruntime-genai knows under the same name."""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def genai_config(model: ModelFolder, context: int, provider: str) -> dict[str, Any]:
    """``genai_config.json`` as onnxruntime-genai reads it (its model builder's ``make_genai_config``).

    Where blocks differ it states the most heads of any; onnxruntime-genai 0.18 takes each layer's from the graph.
    Special tokens and sampling are those of generation_config.json, then of config.json.
    """
    sizes = model.architecture
    file = model.path / "generation_config.json"
    said = read_json_object(file) if file.is_file() else {}
    attending = [block for block in model.blocks or () if block.heads]
    start, ends, fill = (
        _first(said.get(f"{kind}_token_id"), model.config.get(f"{kind}_token_id")) for kind in ("bos", "eos", "pad")
    )
    end = ends[0] if isinstance(ends, list) and ends else ends
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [] if provider == "cpu" else [{provider: {}}],
        },
        "filename": GRAPH,
        "head_size": sizes.head_dim,
        "hidden_size": sizes.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": max((block.heads for block in attending), default=sizes.heads),
        "num_hidden_layers": len(attending) or sizes.depth,
        "num_key_value_heads": max((block.kv_heads for block in attending), default=sizes.kv_heads),
    }
    search = _SEARCH | {name: said[name] for name in _FROM_GENERATION if said.get(name) is not None}
    return {
        "model": {
            "bos_token_id": _first(start, 0),
            "context_length": context,
            "decoder": decoder,
            "eos_token_id": _first(ends, 0),
            "pad_token_id": _first(fill, end, 0),
            "type": sizes.family,
            "vocab_size": sizes.vocabulary,
        },
        "search": dict(sorted((search | {"max_length": context}).items())),
    }


@dataclass(frozen=True)
class BuiltFor:
    """What an artefact is for: where it computes, the positions of a row, and the channels of a head."""

    provider: str
    context: int
    head_size: int


def read_genai_config(folder: Path) -> BuiltFor:
    """What an artefact was built for; raises BadInput where it does not say."""
    found = read_json_object(folder / CONFIG)
    try:
        model = found["model"]
        options = model["decoder"]["session_options"]["provider_options"]
        provider = next(iter(options[0])) if options else "cpu"
        return BuiltFor(str(provider).lower(), int(model["context_length"]), int(model["decoder"]["head_size"]))
    except (KeyError, TypeError, IndexError, ValueError, StopIteration):
        raise BadInput(f"{folder / CONFIG}: does not say provider and context; build the artefact again") from None


def _encoded(tokenizer: Any, folder: Path, prompt: str) -> list[int]:
    """Ids of a prompt by onnxruntime-genai's tokenizer, behind the special tokens that the folder's puts in front.

    Version 0.18 leaves out what tokenizer.json adds by its post-processor, such as a Llama's beginning of text.
    """
    ids = [int(identifier) for identifier in tokenizer.encode(prompt)]
    own = load_tokenizer(folder)
    text, whole = own.encode(prompt, add_special_tokens=False).ids, own.encode(prompt).ids
    for begin in range(len(whole) - len(text) + 1):
        if whole[begin : begin + len(text)] == text:
            front = whole[:begin]
            return ids if ids[:begin] == front else front + ids
    return ids


def stream(folder: Path, prompt: str, tokens: int) -> Iterator[str]:
    """Pieces of the text that onnxruntime-genai writes after a prompt, by its own tokenizer; greedy.

    Args:
        folder: an artefact with its tokenizer's files.
        prompt: the text to go on with.
        tokens: the most to write; a token of the config's that ends a text ends it before.

    Raises:
        ToolchainMissing: onnxruntime-genai is not installed.
        BadInput: the folder cannot be run, or the prompt is empty or too long.
    """
    try:
        og = runtime.load("onnxruntime_genai")
    except ImportError:
        raise ToolchainMissing(
            "text by onnxruntime-genai needs onnxruntime-genai, which is not installed; run pip install "
            "onnxruntime-genai"
        ) from None
    context = read_genai_config(folder).context
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
    except Exception as error:  # the library raises bare exceptions
        raise BadInput(f"{folder}: onnxruntime-genai cannot run it ({error!s:.300})") from None
    ids = _encoded(tokenizer, folder, prompt)
    if not ids:
        raise BadInput("the prompt has no tokens; give a text")
    if len(ids) + tokens > context:
        raise BadInput(f"the prompt of {len(ids)} tokens and {tokens} more exceed the context of {context}")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    decoder = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        piece = decoder.decode(generator.get_next_tokens()[0])
        if piece:
            yield piece
