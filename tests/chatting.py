"""A random model with a real tokenizer and a chat template, and bundles of it in any flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import QUIET
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.backends.conformance import CONTEXT, random_llama
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.export import Order, Phases, export
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.profiles.source import CheckpointSource
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.shape import Shape

SPECIAL = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|eom|>")
BEGIN, END, START, TURN, MESSAGE = range(5)
WORDS = "Where does Mirel live? Mirel lives in Kowick, by the river. Answer in one sentence. user assistant system "
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE whose encoding of a text begins with a special token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([WORDS * 4], trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", special_tokens=[(SPECIAL[BEGIN], BEGIN)]
    )
    return made


def tokenizer_config(**changes: Any) -> dict[str, Any]:
    """A tokenizer_config.json as transformers writes it, with a chat template."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[BEGIN], "eos_token": SPECIAL[END]}
    config |= {"chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
    return {name: value for name, value in (config | changes).items() if value is not None}


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(value))


def chat_model(folder: Path) -> ModelFolder:
    """The random model, with its tokenizer beside it and two tokens that end a text."""
    tokenizer = byte_tokenizer()
    random_llama(folder, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "generation_config.json", {"eos_token_id": [END, MESSAGE], "temperature": 0.7, "top_p": 0.9})
    return ModelFolder(folder)


def running_flows() -> list[str]:
    """The flows whose engines can be built and run here."""
    found = []
    for flow in flow_names():
        backend = load_backend(flow)
        first = backend.precisions()[0]
        if not backend.toolchain().missing and backend.cannot_run(first, options_for(backend, CONTEXT)) is None:
            found.append(flow)
    return found


FACTS = {
    "device": "local",
    "budget": {"metric": "tpot", "ms": None, "memory_bytes": None},
    "predicted": {"tpot_ms": 1.0, "ttft_ms": 1.0, "memory_bytes": 1, "source": "estimated"},
    "quality": {"metric": "parameters_kept", "value": 1.0, "source": "counted"},
    "table": None,
}
"""What a search would have said of a bundle."""


def build_bundle(checkpoint: Checkpoint, flow: str, output: Path, precision: str | None = None) -> Path:
    """A bundle of the whole model in a flow, its first precision unless told otherwise; not verified."""
    backend = load_backend(flow)
    chosen = precision or backend.precisions()[0]
    steps = CheckpointSource(checkpoint).steps(backend, chosen)
    plan = checkpoint.plan(Shape.parse(f"{checkpoint.architecture.depth}x1"), steps)
    options = options_for(backend, CONTEXT)
    order = Order(plan, flow, chosen, Workload(1, 16, 16), options, False, FACTS)
    export(checkpoint, order, output, force=False, verify=False, phases=Phases(), progress=QUIET)
    return output
