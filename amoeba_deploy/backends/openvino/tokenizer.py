"""The tokenizer as two OpenVINO models, which openvino-genai needs to read and write text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from amoeba_deploy.backends.openvino.runtime import core, load
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import json_text
from amoeba_deploy.model_folder import ModelFolder

SAMPLES = (
    "Once upon a time there was",
    "  two spaces, a tab\tand\na line; digits 1234567890, 3.14!",
    "Größe, naïve, 日本語, 🙂 — “quoted”",
)
"""Texts that a converted tokenizer must read as the folder's own does."""


def convert_tokenizer(model: ModelFolder, output: Path) -> str | None:
    """Write ``openvino_tokenizer`` and ``openvino_detokenizer`` (xml and bin); returns why they were not written.

    openvino_tokenizers rewrites the tokenizer's pipeline, and not every rewriting is the same function. So the sample
    texts are read by both, and nothing is written where the ids differ.
    """
    try:
        own = model.tokenizer()
    except BadInput:
        return "the subnet has no tokenizer.json"
    try:
        package: Any = load("openvino_tokenizers")
    except ImportError:
        return "openvino-tokenizers is not installed (pip install openvino-tokenizers)"
    from transformers import PreTrainedTokenizerFast

    loader: Any = PreTrainedTokenizerFast
    try:
        source = loader.from_pretrained(str(model.path), local_files_only=True)
        pair = package.convert_tokenizer(source, with_detokenizer=True)
        compiled = core().compile_model(pair[0], "CPU")
        for text in SAMPLES:
            found = compiled([text])["input_ids"][0].tolist()
            wanted = own.encode(text).ids
            if found != wanted:
                return f"openvino_tokenizers converts it to one that reads {json_text(text).strip()} as other ids"
    except Exception as error:  # whatever a tokenizer of an unknown kind raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"openvino_tokenizers does not convert it ({reason:.120})"
    from amoeba_deploy.backends.openvino.graph import name_all

    for part, name in zip(pair, ("tokenizer", "detokenizer"), strict=True):
        name_all(part)
        file = output / f"openvino_{name}.xml"
        load("openvino").save_model(part, str(file), compress_to_fp16=False)
        file.write_text(renumbered(file.read_text(encoding="utf-8")), encoding="utf-8")
    return None


_NAMES = re.compile(r'\b((?:output_)?names?=")([^"]*)"')
_COUNTED = re.compile(r"\b([A-Za-z]+)_(\d+)\b")


def renumbered(xml: str) -> str:
    """A saved model whose nodes and tensors are counted from 0: OpenVINO counts through all models of a process."""
    numbers: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"{found[1]}_{len(numbers)}")

    return _NAMES.sub(lambda found: f'{found[1]}{_COUNTED.sub(name, found[2])}"', xml)
