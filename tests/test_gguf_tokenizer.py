"""The tokenizer in a GGUF file: llama.cpp gives the ids that tokenizers gives, or the file is refused."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_random_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import options_for
from amoeba_deploy.backends.gguf import tokenizer as module
from amoeba_deploy.backends.gguf.engine import library, load
from amoeba_deploy.backends.gguf.tokenizer import PROBES
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder

pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

GGUF = load_backend("gguf")
OPTIONS = options_for(GGUF, 64)
CORPUS = [
    *PROBES,
    "the little girl went to the park and the little dog went home",
    "2026 2026 2026 2026 12345 678 90",
    "Don't stop, we'll go",
]
TEXTS = [
    *CORPUS,
    "A text that was not trained on: naïve façade №5 — “quoted” … 東京",
    "x" * 40,
    "   a   b",
    "tab\t\ttab",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def byte_level(add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])


def byte_tokenizer(pre_tokenizer: Any, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE trained here, with two special tokens, the first of them put in front of a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def folder(path: Path, tokenizer: Tokenizer | None, **settings: Any) -> ModelFolder:
    """A small model with a tokenizer."""
    model = save_random_model(path, "llama", vocab_size=512, num_hidden_layers=1)
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
        given = {"bos_token": "<s>", "eos_token": "</s>"} | settings
        (path / "tokenizer_config.json").write_text(json.dumps(given))
    return ModelFolder(model.path)


def lower(model: ModelFolder, out: Path, **settings: str) -> tuple[str, ...]:
    out.mkdir(exist_ok=True)
    return GGUF.lower(model, out, "fp32", options_for(GGUF, 64, settings=settings)).notes


class Vocabulary:
    """The vocabulary of a file, as llama.cpp reads it."""

    def __init__(self, file: Path) -> None:
        self.model = load(file, vocab_only=True)
        self.held = library().llama_model_get_vocab(self.model)

    def ids(self, text: str) -> list[int]:
        raw, room = text.encode(), len(text.encode()) + 8
        tokens = (ctypes.c_int32 * room)()
        return list(tokens[: library().llama_tokenize(self.held, raw, len(raw), tokens, room, True, True)])

    def __del__(self) -> None:
        library().llama_model_free(self.model)


def assert_equal_ids(vocabulary: Vocabulary, tokenizer: Tokenizer, texts: Sequence[str] = TEXTS) -> None:
    for text in texts:
        assert vocabulary.ids(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (byte_level(), False, "gpt-2"),
        (digits(), False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(QWEN2), False, "qwen2"),
    ],
)
def test_a_byte_level_tokenizer_gives_equal_ids_under_its_own_pre_tokenizer(
    pre_tokenizer: Any, ignore_merges: bool, name: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(pre_tokenizer, ignore_merges)
    assert lower(folder(tmp_path / "model", tokenizer), tmp_path / "out") == ()
    fields = gguf.GGUFReader(tmp_path / "out" / "model-fp32.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert_equal_ids(Vocabulary(tmp_path / "out" / "model-fp32.gguf"), tokenizer)


def test_the_tokenizer_of_stories_and_of_the_shipped_checkpoint_give_equal_ids(
    demo: Checkpoint, stories: Path, tmp_path: Path
) -> None:
    for model in (demo.model, ModelFolder(stories)):
        out = tmp_path / model.path.name
        assert lower(model, out) == ()
        vocabulary = Vocabulary(out / "model-fp32.gguf")
        assert_equal_ids(vocabulary, model.tokenizer())
        assert_equal_ids(vocabulary, model.tokenizer(), ["Hi</s>there <s> you"])


def test_special_tokens_flags_and_template_are_those_of_the_folder(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(byte_level())
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    model = folder(tmp_path / "model", tokenizer, pad_token="!", chat_template=template)
    settings = {"eos_token_id": [1, 7], "bos_token_id": 0}
    (model.path / "generation_config.json").write_text(json.dumps(settings))
    lower(model, tmp_path / "out")
    vocabulary = Vocabulary(tmp_path / "out" / "model-fp32.gguf")
    llama = library()
    assert (llama.llama_vocab_bos(vocabulary.held), llama.llama_vocab_eos(vocabulary.held)) == (0, 1)
    assert llama.llama_vocab_eot(vocabulary.held) == 7
    assert llama.llama_vocab_pad(vocabulary.held) == tokenizer.token_to_id("!")
    assert all(llama.llama_vocab_is_eog(vocabulary.held, end) for end in (1, 7))
    assert llama.llama_vocab_get_add_bos(vocabulary.held)
    assert not llama.llama_vocab_get_add_eos(vocabulary.held)
    assert llama.llama_vocab_is_control(vocabulary.held, 0)
    assert llama.llama_vocab_n_tokens(vocabulary.held) == 512
    assert llama.llama_model_chat_template(vocabulary.model, None).decode() == template
    (model.path / "chat_template.jinja").write_text("own file")
    lower(model, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model-fp32.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "own file"


def test_flags_follow_what_the_tokenizer_does_and_not_what_its_settings_say(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(byte_level())
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    lower(folder(tmp_path / "model", tokenizer, add_bos_token=True, add_eos_token=False), tmp_path / "out")
    vocabulary = Vocabulary(tmp_path / "out" / "model-fp32.gguf")
    assert not library().llama_vocab_get_add_bos(vocabulary.held)
    assert library().llama_vocab_get_add_eos(vocabulary.held)
    assert_equal_ids(vocabulary, tokenizer)


def sentencepiece(prefix: bool = True, **changes: Any) -> Tokenizer:
    """BPE with bytes for what it lacks, as SentencePiece's models become in tokenizers."""
    spec = json.loads(byte_tokenizer(byte_level()).to_str())
    words = ["▁", "a", "b", "c", "d", "e", "ab", "▁a", "abc", "▁ab", "▁abc", "de"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    spec["model"] |= {
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": [
            ["a", "b"],
            ["▁", "a"],
            ["ab", "c"],
            ["▁", "ab"],
            ["▁a", "b"],
            ["▁", "abc"],
            ["▁ab", "c"],
            ["d", "e"],
        ],
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
    } | changes
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": i, "content": tokens[i], **special} for i in range(3)]
    tokenizer = Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "pre_tokenizer": None}))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_gives_equal_ids(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix)
    lower(folder(tmp_path / "model", tokenizer, unk_token="<unk>"), tmp_path / "out")
    vocabulary = Vocabulary(tmp_path / "out" / "model-fp32.gguf")
    assert_equal_ids(vocabulary, tokenizer, [*TEXTS, "abc abcde deabc aab", " abc"])


def refusals() -> Iterator[tuple[str, Callable[[], Tokenizer], str]]:
    def word_level() -> Tokenizer:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer

    def lowercased() -> Tokenizer:
        tokenizer = byte_tokenizer(byte_level())
        tokenizer.normalizer = normalizers.Lowercase()
        return tokenizer

    def two_in_front() -> Tokenizer:
        tokenizer = byte_tokenizer(byte_level())
        template = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", 0), ("</s>", 1)])
        tokenizer.post_processor = template
        return tokenizer

    def too_many() -> Tokenizer:
        tokenizer = byte_tokenizer(byte_level())
        tokenizer.add_tokens([f"extra{i}" for i in range(200)])
        return tokenizer

    def merged_otherwise() -> Tokenizer:
        # "ol" is a token that no merge makes, yet llama.cpp joins whatever gives a token.
        found = json.loads(sentencepiece().to_str())
        for token in ("o", "l", "ol"):
            found["model"]["vocab"][token] = len(found["model"]["vocab"])
        return Tokenizer.from_str(json.dumps(found))

    yield "word-level", word_level, "a tokenizer of the kind WordLevel, which a GGUF file cannot hold"
    yield "another pre-tokenizer", lambda: byte_tokenizer(split(r"\p{N}+|\P{N}+")), "pre-tokenizer is none that llama"
    yield "space in front", lambda: byte_tokenizer(byte_level(True)), "pre-tokenizer is none that llama.cpp has"
    yield "changed text", lowercased, r"changes text before splitting it \(Lowercase\)"
    yield "two ids in front", two_in_front, "adds 2 ids in front of a text and 0 behind"
    yield "more ids than the model", too_many, "ids up to .*, its model only 512 of them"
    yield "other merges", merged_otherwise, "llama.cpp tokenises .* otherwise than its tokenizer.json"


REFUSALS = {name: (make, said) for name, make, said in refusals()}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_tokenizer_that_a_file_cannot_hold_is_refused_and_can_be_left_out(name: str, tmp_path: Path) -> None:
    make, said = REFUSALS[name]
    model = folder(tmp_path / "model", make())
    with pytest.raises(BadInput, match=rf"{said}.*add --set tokenizer=none|{said}.*or add --set tokenizer=none"):
        lower(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert lower(model, tmp_path / "out", tokenizer="none") == ()
    assert GGUF.open(tmp_path / "out", "fp32").feed(np.array([[1, 2, 3]])).shape == (1, 3, 512)


def test_a_wrong_pre_tokenizer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(byte_level())
    table = dict.fromkeys(module._PRE_TOKENIZERS, "smollm")
    monkeypatch.setattr(module, "_PRE_TOKENIZERS", table)
    with pytest.raises(BadInput, match=r"llama.cpp tokenises .*2026-11-24.* otherwise than its tokenizer.json"):
        lower(folder(tmp_path / "model", tokenizer), tmp_path / "out")


def test_a_model_that_names_no_end_of_text_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", byte_tokenizer(byte_level()), eos_token=None)
    for name in ("config.json", "generation_config.json"):
        value = json.loads((model.path / name).read_text())
        (model.path / name).write_text(json.dumps(value | {"eos_token_id": None}))
    with pytest.raises(BadInput, match=r"names no token that ends a text, for which llama.cpp takes id 11"):
        lower(ModelFolder(model.path), tmp_path / "out")


def test_without_llama_cpp_it_is_said_that_the_tokenizer_was_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError

    monkeypatch.setattr(module, "library", missing)
    (note,) = lower(folder(tmp_path / "model", byte_tokenizer(byte_level())), tmp_path / "out")
    assert "was not compared" in note


def test_text_around_special_tokens_or_behind_a_space_that_differs_is_said(tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    (note,) = lower(folder(tmp_path / "model", tokenizer), tmp_path / "out")
    assert note.startswith("llama.cpp tokenises some text otherwise than tokenizer.json does, such as 'Hello</s>world")
    assert note.endswith("' begins with a space'")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", byte_tokenizer(byte_level()))
    (model.path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="is not a tokenizer"):
        lower(ModelFolder(model.path), tmp_path / "out")


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", byte_tokenizer(byte_level()))
    copy = ModelFolder(Path(shutil.copytree(model.path, tmp_path / "copy")))
    for each, out in ((model, "a"), (copy, "b")):
        lower(each, tmp_path / out)
    assert (tmp_path / "a/model-fp32.gguf").read_bytes() == (tmp_path / "b/model-fp32.gguf").read_bytes()
