"""What the tests of the ``onnx`` flow share: lowering, feeding, and onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import BuildOptions, Engine, Ids, options_for
from amoeba_deploy.model_folder import ModelFolder

ONNX = load_backend("onnx")
CONTEXT = 128
OPTIONS = options_for(ONNX, CONTEXT)
ON_CPU = tuple(precision for precision in ONNX.precisions() if precision != "bf16")


def lowered(model: ModelFolder, folder: Path, precision: str = "fp32", options: BuildOptions = OPTIONS) -> Path:
    folder.mkdir(exist_ok=True)
    ONNX.lower(model, folder, precision, options)
    return folder


def fed(engine: Engine, ids: Ids, first: int) -> np.ndarray:
    """Logits of ids [batch, n]: ``first`` of them at once, the others one by one."""
    engine.reset()
    parts = [engine.feed(ids[:, :first])] + [engine.feed(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
    return np.concatenate(parts, axis=1)


def fed_in_rows(engine: Engine, chunks: Sequence[tuple[Ids, Sequence[int]]]) -> list[np.ndarray]:
    """For each chunk the logits of every row's real ids, one array a row."""
    engine.reset()
    found = []
    for ids, lengths in chunks:
        logits = engine.feed(ids, np.array(lengths))
        assert logits.shape[:2] == ids.shape
        found.append([row[:length] for row, length in zip(logits, lengths, strict=True)])
    return [row for rows in found for row in rows]


def with_tokenizer(folder: Path) -> None:
    """A small byte-level tokenizer in a model's folder, which onnxruntime-genai insists on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["a little story"], trainers.BpeTrainer(vocab_size=128, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "eos_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def genai_greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens by onnxruntime-genai from any folder that it can load."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False, min_length=len(prompt) + tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(prompt) :]
