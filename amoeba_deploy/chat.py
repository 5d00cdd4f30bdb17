"""Chats: a question in the form that a model was taught, by its own chat template.

The template is rendered and encoded by transformers, so the ids are those of
``apply_chat_template(add_generation_prompt=True)``; no special tokens are added to those that the template wrote. For a
few tokenizer classes (``LlamaTokenizer``) transformers 5 splits texts otherwise than ``tokenizer.json`` alone would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object
from amoeba_deploy.model_folder import MORE_TEMPLATES, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ANSWER = "an answer"
"""A text that a template puts where an answer belongs, to see what it ends a turn with."""


@dataclass(frozen=True)
class Chat:
    """A rendered prompt: its ids, and further ids that end the answer."""

    ids: list[int]
    stops: frozenset[int]


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template, in any of the places where transformers finds one."""
    if (folder / "chat_template.jinja").is_file() or any((folder / MORE_TEMPLATES).glob("*.jinja")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json_object(config).get("chat_template"))


def render_chat(folder: Path, prompt: str, system: str | None = None) -> Chat:
    """The ids of a question, with the system's instructions before it where there are some.

    Raises:
        BadInput: the folder has no chat template, none that is the default, or one that refuses the messages.
    """
    if not has_chat_template(folder):
        raise BadInput(
            f"{folder}: its tokenizer has no chat template, so it was not made for --chat; leave it out to continue "
            f"the text as it is, or put the model's chat_template.jinja there"
        )
    templates, tokenizer = _chat_tokenizer(folder), load_tokenizer(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    ids: list[int] = _applied(folder, templates, messages, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise BadInput(f"{folder}: its chat template makes no text of the prompt; leave out --chat")
    ends = {getattr(templates, "eos_token", None), *_named_ends(folder)}
    stops = {tokenizer.token_to_id(token) for token in ends if isinstance(token, str)}
    stops.add(_end_of_turn(folder, templates, tokenizer, messages))
    return Chat(ids, frozenset(stop for stop in stops if stop is not None))


def _chat_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers loads it, with no remote code and no network."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever a class of its own needs; templates need only the tokens that the files name
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise BadInput(f"{folder}: transformers cannot load its tokenizer ({_first_line(error)})") from None


def _applied(folder: Path, templates: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    try:
        return templates.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises what it likes
        hint = "leave out --system" if messages[0]["role"] == "system" else "leave out --chat"
        raise BadInput(f"{folder}: its chat template refuses this ({_first_line(error)}); {hint}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _named_ends(folder: Path) -> list[Any]:
    """End-of-turn tokens that the tokenizer's config names beside its end of text."""
    file = folder / "tokenizer_config.json"
    config = read_json_object(file) if file.is_file() else {}
    more = config.get("extra_special_tokens")
    places = (config, more if isinstance(more, dict) else {})
    return [place.get(key) for place in places for key in ("eot_token", "end_of_turn_token")]


def _end_of_turn(folder: Path, templates: Any, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> int | None:
    """The special token that the template puts right after an answer, or None where it puts none there."""
    try:
        answered = [*messages, {"role": "assistant", "content": _ANSWER}]
        text: str = _applied(folder, templates, answered, tokenize=False)
    except BadInput:
        return None  # a template that renders questions alone
    rest = text.rpartition(_ANSWER)[2].lstrip()
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = [token for token in special if rest.startswith(token)]
    return special[max(found, key=len)] if found else None
