"""The tokenizer inside the file, so that whatever reads it can chat: from ``tokenizer.json`` to llama.cpp's keys.

llama.cpp knows two kinds that matter here. ``gpt2`` is byte-level BPE behind one of a list of pre-tokenizers, which are
compiled in and named; a tokenizer whose own is none of them cannot be held. ``llama`` is SentencePiece's BPE with bytes
for what it lacks: it merges the pair whose token has the highest score, so the order of merges becomes scores. Whether
llama.cpp then gives the same ids is tried on texts before any weight is written, never assumed.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_deploy.backends.gguf.engine import library, load
from amoeba_deploy.backends.gguf.file import write_file
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import ModelFolder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NONE: Mapping[str, Any] = {"tokenizer.ggml.model": "none"}
"""The keys of a file without a tokenizer, which is fed token ids."""
_WITHOUT = "add --set tokenizer=none to build a file that is fed token ids"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""gguf's types of tokens."""
_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LINES, "raw"), True): "llama-bpe",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _LINES, "raw"), False): "smaug-bpe",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _LINES, "raw"), False): "qwen2",
    (("|".join((*_CASED, r"\p{N}", _SLASHED)), "raw"), True): "tekken",
    (("|".join((*(c + _CONTRACTIONS + "?" for c in _CASED), r"\p{N}{1,3}", _SLASHED)), "raw"), False): "gpt-4o",
}
"""By the steps of ``tokenizer.json``, and whether whole words skip merging: llama.cpp's name (llama-vocab.cpp)."""
PROBES = (
    "Once upon a time there was a little girl named Lily.",
    " two  spaces   and\ttabs\n\nnew lines \r\n end ",
    "I'm sure they've said it's 3.14159, 1,234,567 or 2026-11-24!",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]} # ok?",
    "Grüße aus Köln, ça va? Привет мир. 你好，世界 こんにちは 한국어 مرحبا",
    "emoji 🙂👩‍🚀 and symbols ∑√≠ © ™ ½",
    "UPPER lower MiXeD don't WE'LL",
    "a",
    " ",
    "\n",
)
"""Texts that must give the same ids."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as keys of a file."""

    entries: Mapping[str, Any]
    tokenizer: Tokenizer
    specials: tuple[str, ...]
    metaspace: bool
    """Whether a space in front is left out where a text begins with one; llama.cpp always adds it."""

    def check(self, model: ModelFolder, arch: str, sizes: Mapping[str, Any]) -> tuple[str, ...]:
        """Let llama.cpp tokenise with these keys; returns notes on what is not quite the same.

        Args:
            model: for its folder's name.
            arch: llama.cpp's name of the architecture.
            sizes: the other keys of the file, without which llama.cpp does not read it.

        Raises:
            BadInput: a text gives other ids.
        """
        try:
            library()
        except (ToolchainMissing, ImportError):
            return (
                "llama-cpp-python is not installed, so the tokenizer in the file was not compared with the model's",
            )
        with tempfile.TemporaryDirectory(prefix="amoeba-gguf-") as work:
            file = Path(work) / "vocabulary.gguf"
            write_file(file, arch, {**sizes, **self.entries}, model, [], "F32")
            loaded = load(file, vocab_only=True)
        try:
            for text in PROBES:
                self._compare(model, loaded, text.lstrip(" ") if self.metaspace else text)
            doubtful = [f"Hello{special}world {special} again" for special in self.specials]
            doubtful += [" begins with a space"] if self.metaspace else []
            other = [text for text in doubtful if self.tokenizer.encode(text).ids != _ids(loaded, text)]
        finally:
            library().llama_model_free(loaded)
        if other:
            said = " and ".join(repr(text) for text in other[:: max(len(other) - 1, 1)])
            return (f"llama.cpp tokenises some text otherwise than tokenizer.json does, such as {said}",)
        return ()

    def _compare(self, model: ModelFolder, loaded: Any, text: str) -> None:
        own, found = self.tokenizer.encode(text).ids, _ids(loaded, text)
        if own == found:
            return
        at = next((i for i, (a, b) in enumerate(zip(own, found, strict=False)) if a != b), min(len(own), len(found)))
        raise BadInput(
            f"{model.path}: llama.cpp tokenises {text[:64]!r} otherwise than its tokenizer.json (from token {at} on: "
            f"{found[at : at + 3]} for {own[at : at + 3]}); {_WITHOUT}"
        )


def _ids(loaded: Any, text: str) -> list[int]:
    """Ids by llama.cpp, special tokens parsed and added."""
    llama, raw = library(), text.encode()
    room = len(raw) + 8
    tokens = (ctypes.c_int32 * room)()
    vocabulary = llama.llama_model_get_vocab(loaded)
    count = llama.llama_tokenize(vocabulary, raw, len(raw), tokens, room, True, True)
    return list(tokens[: max(count, 0)])


def vocabulary(model: ModelFolder) -> Vocabulary | None:
    """The tokenizer of a model's folder as keys; None where it has no ``tokenizer.json``.

    Raises:
        BadInput: llama.cpp has no such tokenizer.
    """
    file = model.path / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer, spec = model.tokenizer(), read_json_object(file)
    kind = spec["model"].get("type")
    if kind != "BPE":
        raise BadInput(f"{file}: is a tokenizer of the kind {kind}, which a GGUF file cannot hold; {_WITHOUT}")
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, spec, model, byte_fallback)
    held = _sentencepiece(spec, tokens, file) if byte_fallback else _byte_level(spec, file)
    entries: dict[str, Any] = held | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    entries |= _special_ids(model, tokenizer, file)
    template = _chat_template(model.path)
    if template:
        entries["tokenizer.chat_template"] = template
    specials = tuple(sorted(tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL))
    metaspace = (spec.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    return Vocabulary(entries, tokenizer, specials[:8], metaspace)


def _tokens(
    tokenizer: Tokenizer, spec: dict[str, Any], model: ModelFolder, byte_fallback: bool
) -> tuple[list[str], list[int]]:
    """The text and the type of every id of the model; what the tokenizer has no token for is filled up."""
    count, known = model.architecture.vocabulary, tokenizer.get_vocab(with_added_tokens=True)
    most = max(known.values())
    if most >= count:
        raise BadInput(
            f"{model.path}: its tokenizer has ids up to {most}, its model only {count} of them; get a folder in which "
            f"they agree, or {_WITHOUT}"
        )
    tokens = [f"[PAD{identifier}]" for identifier in range(count)]
    kinds = [_UNUSED] * count
    for text, identifier in known.items():
        byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[identifier], kinds[identifier] = text, _BYTE if byte else _NORMAL
    for added in spec.get("added_tokens", ()):
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    unknown = spec["model"].get("unk_token")
    if byte_fallback and unknown in known:
        kinds[known[unknown]] = _UNKNOWN
    twice = len(tokens) - len(set(tokens))
    if twice or "" in known:
        raise BadInput(f"{model.path}: its tokenizer has {twice or 'empty'} tokens twice or without text; {_WITHOUT}")
    return tokens, kinds


def _byte_level(spec: dict[str, Any], file: Path) -> dict[str, Any]:
    """The keys of byte-level BPE."""
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise BadInput(f"{file}: changes text before splitting it ({normalizer.get('type')}); {_WITHOUT}")
    steps = _steps(spec.get("pre_tokenizer"))
    name = _PRE_TOKENIZERS.get((steps, bool(spec["model"].get("ignore_merges")))) if steps else None
    if name is None:
        raise BadInput(f"{file}: its pre-tokenizer is none that llama.cpp has built in; {_WITHOUT}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    if not merges:
        raise BadInput(f"{file}: has no merges, without which llama.cpp reads no tokenizer; {_WITHOUT}")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _steps(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The steps of a pre-tokenizer in one spelling; None where one is of no known kind."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found = []
    for step in steps:
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append("digits")
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            found.append("bytes" if step.get("use_regex", True) else "raw")
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(found)


def _sentencepiece(spec: dict[str, Any], tokens: Sequence[str], file: Path) -> dict[str, Any]:
    """The keys of SentencePiece's BPE: a token's score is minus the place of the first merge that makes it."""
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in set(tokens)]
    if missing:
        raise BadInput(f"{file}: has no token for the byte {missing[0]}, for lack of which llama.cpp ends; {_WITHOUT}")
    places: dict[str, int] = {}
    for place, merge in enumerate(spec["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    last = len(spec["model"]["merges"])
    scores = [-float(places.get(token, last)) for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _prefixed(spec),
    }


def _prefixed(spec: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    normalizer, pre_tokenizer = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps):
        return True
    return pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme", "always") != "never"


def _special_ids(model: ModelFolder, tokenizer: Tokenizer, file: Path) -> dict[str, Any]:
    """Ids with a meaning, and whether the tokenizer itself adds the first and the last; both as it really behaves."""
    config = _json(model.path / "tokenizer_config.json")
    generation = _json(model.path / "generation_config.json")
    plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, behind = whole[:start], whole[start + len(plain) :]
    if len(before) > 1 or len(behind) > 1:
        raise BadInput(f"{file}: adds {len(before)} ids in front of a text and {len(behind)} behind; {_WITHOUT}")

    def named(role: str) -> int | None:
        entry = config.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        found = tokenizer.token_to_id(text) if isinstance(text, str) else None
        stated = model.config.get(f"{role}_token_id")
        return found if found is not None else (stated if isinstance(stated, int) else None)

    ends = [generation.get("eos_token_id"), model.config.get("eos_token_id")]
    listed = [i for entry in ends for i in (entry if isinstance(entry, list) else [entry]) if isinstance(i, int)]
    end = behind[0] if behind else named("eos")
    end = end if end is not None else next(iter(listed), None)
    if end is None:
        raise BadInput(f"{model.path}: names no token that ends a text, for which llama.cpp takes id 11; {_WITHOUT}")
    others = [identifier for identifier in dict.fromkeys(listed) if identifier != end]
    found: dict[str, Any] = {
        "bos_token_id": before[0] if before else named("bos"),
        "eos_token_id": end,
        "eot_token_id": next(iter(others), None),
        "eom_token_id": others[1] if len(others) > 1 else None,
        "unknown_token_id": named("unk"),
        "padding_token_id": named("pad"),
        "add_bos_token": bool(before),
        "add_eos_token": bool(behind),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def _json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _chat_template(folder: Path) -> str | None:
    """The chat template, from the file of its own or from the tokenizer's settings."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
