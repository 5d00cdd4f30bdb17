"""Text as a user meets it: chats, sampling, stop tokens, whole characters; and that the tokenizer's files travel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatting import (
    BEGIN,
    END,
    MESSAGE,
    SPECIAL,
    TEMPLATE,
    TURN,
    build_bundle,
    byte_tokenizer,
    chat_model,
    running_flows,
    tokenizer_config,
    write_json,
)
from click.testing import Result
from conftest import amoeba
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models

from amoeba_deploy.chat import render_chat
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.device_test import checkpoint_of
from amoeba_deploy.errors import BadInput
from amoeba_deploy.generation import Timings, stop_tokens, stream_text
from amoeba_deploy.model_folder import TOKENIZER_FILES, ModelFolder
from amoeba_deploy.sampling import Sampler, SamplingSettings, read_sampling, softmax, warped

QUESTION, SYSTEM = "Where does Mirel live?", "Answer in one sentence."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A random model with a tokenizer and a chat template."""
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chat_checkpoint(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its checkpoint."""
    return checkpoint_of(model.path, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(model: ModelFolder, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(model.path, tmp_path / "model"))


def refusal(result: Result, code: int) -> str:
    """The one sentence of a refusal."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def transformers_ids(folder: Path, system: str | None) -> list[int]:
    """The ids of the question by transformers alone."""
    from transformers import AutoTokenizer

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": QUESTION})
    loaded = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


# Templates

NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]


def _as_file(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=None))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _as_files(folder: Path) -> None:
    _as_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


PLACES: dict[str, Callable[[Path], None]] = {
    "a string": lambda _folder: None,
    "a list of named ones": lambda folder: write_json(
        folder / "tokenizer_config.json", tokenizer_config(chat_template=NAMED)
    ),
    "a file": _as_file,
    "a file with others beside it": _as_files,
}


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["no system", "system"])
@pytest.mark.parametrize("place", PLACES)
def test_a_chat_is_rendered_as_transformers_renders_it(folder: Path, place: str, system: str | None) -> None:
    PLACES[place](folder)
    ids = render_chat(folder, QUESTION, system).ids
    assert ids == transformers_ids(folder, system)
    assert ids.count(BEGIN) == 1, "special tokens were added twice"
    assert byte_tokenizer().decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "TokenizersBackend"])
def test_a_class_that_splits_texts_its_own_way_is_followed(stories: Path, kind: str) -> None:
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    asked = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    write_json(stories / "tokenizer_config.json", config | {"chat_template": asked})
    assert render_chat(stories, QUESTION).ids == transformers_ids(stories, None)


def test_the_token_that_ends_a_turn_of_the_template_ends_the_answer(folder: Path) -> None:
    assert stop_tokens(folder) == {END, MESSAGE}
    assert render_chat(folder, QUESTION).stops == {END, TURN}


def test_tokens_that_the_tokenizer_names_as_ends_of_turns_end_the_answer(folder: Path) -> None:
    plain = TEMPLATE.replace("<|im_end|>", "")
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=plain, eot_token=SPECIAL[MESSAGE]))
    assert render_chat(folder, QUESTION).stops == {END, MESSAGE}


def test_a_model_without_a_chat_template_is_refused_in_one_sentence(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=None))
    said = refusal(amoeba("run", folder, "-p", QUESTION, "--chat", "--quiet"), 2)
    assert "no chat template" in said
    assert "leave it out" in said


def test_named_templates_without_a_default_are_refused_by_their_names(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=NAMED[1:]))
    assert "tool_use" in refusal(amoeba("run", folder, "-p", QUESTION, "--chat", "--quiet"), 2)


def test_a_template_that_refuses_a_system_message_is_named_with_what_to_do(folder: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=strict))
    said = refusal(amoeba("run", folder, "-p", QUESTION, "--chat", "--system", SYSTEM, "--quiet"), 2)
    assert "no system role" in said
    assert "--system" in said
    assert render_chat(folder, QUESTION).ids == transformers_ids(folder, None)


def test_a_template_that_is_no_jinja_is_named(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template="{% for %}"))
    assert str(folder) in refusal(amoeba("run", folder, "-p", QUESTION, "--chat", "--quiet"), 2)


@pytest.mark.parametrize(("options", "needed"), [(("--system", SYSTEM), "--chat"), (("--seed", 3), "--sample")])
def test_an_option_without_the_one_that_it_belongs_to_is_refused(
    folder: Path, options: tuple[object, ...], needed: str
) -> None:
    assert f"add {needed}" in refusal(amoeba("run", folder, "-p", QUESTION, *options), 2)


def test_a_ragged_subnet_chats_too(chat_checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(amoeba("extract", chat_checkpoint.path, "--shape", "3x1", "--plan-only").stdout)
    value = json.loads(plan.read_text())
    value["blocks"][1]["neurons"] = value["blocks"][1]["neurons"][:96]
    plan.write_text(json.dumps(value))
    made = amoeba(
        "extract", chat_checkpoint.path, "--shape", plan, "--layout", "ragged", "-o", tmp_path / "ragged", "--quiet"
    )
    assert made.exit_code == 0, made.output
    assert render_chat(tmp_path / "ragged", QUESTION).ids == transformers_ids(chat_checkpoint.model.path, None)


# Every engine


@pytest.fixture(scope="module")
def answer(model: ModelFolder) -> str:
    """What transformers alone answers to the question, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = transformers_ids(model.path, SYSTEM)
    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    given = loaded.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=[END, MESSAGE, TURN])
    text: str = byte_tokenizer().decode(given[0, len(ids) :].tolist(), skip_special_tokens=True)
    return text


@pytest.mark.parametrize("flow", running_flows())
def test_every_engine_gives_the_text_that_transformers_gives(
    chat_checkpoint: Checkpoint, answer: str, tmp_path: Path, flow: str
) -> None:
    bundle = build_bundle(chat_checkpoint, flow, tmp_path / "bundle")
    result = amoeba("run", bundle, "--chat", "--system", SYSTEM, "-p", QUESTION, "--tokens", 16, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    text = json.loads(result.stdout)["text"]
    # A character that is not whole when the tokens end is not printed.
    assert answer.startswith(text)
    assert set(answer[len(text) :]) <= {"\N{REPLACEMENT CHARACTER}"}
    assert len(text) > 4


# Streaming


class Scripted:
    """An engine that is most sure of given ids, one after the other."""

    def __init__(self, ids: Sequence[int], vocabulary: int) -> None:
        self._ids, self._vocabulary, self.fed = list(ids), vocabulary, [0]

    def reset(self) -> None:
        self.fed = []

    def feed(self, ids: NDArray[np.int64], lengths: Any = None) -> NDArray[np.float32]:
        assert lengths is None
        logits = np.zeros((*ids.shape, self._vocabulary), np.float32)
        logits[0, -1, self._ids[len(self.fed)]] = 1.0
        self.fed.append(ids.shape[1])
        return logits


def streamed(folder: Path, ids: Sequence[int], tokens: int = 8, stops: Sequence[int] = ()) -> list[str]:
    """The pieces that come of an engine which chooses given ids."""
    engine = Scripted(ids, 400)
    return list(stream_text(engine, folder, [BEGIN, 10], tokens, 128, Timings(), stops=frozenset(stops)))


def ids_of(text: str) -> list[int]:
    """The ids of a text without special tokens."""
    ids: list[int] = byte_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def test_characters_of_several_tokens_come_whole(folder: Path) -> None:
    assert len(ids_of("€é")) == 5
    assert streamed(folder, [*ids_of("€é"), END]) == ["€", "é"]


def test_a_stop_token_in_the_middle_of_a_character_ends_the_text_without_it(folder: Path) -> None:
    assert streamed(folder, [*ids_of("a€")[:3], END, *ids_of("b")]) == ["a"]


@pytest.mark.parametrize("stop", [END, MESSAGE])
def test_every_stop_token_of_the_generation_settings_ends_the_text_unseen(folder: Path, stop: int) -> None:
    assert streamed(folder, [*ids_of("river"), stop, *ids_of(" by")]) == streamed(
        folder, ids_of("river"), len(ids_of("river"))
    )


def test_a_stop_token_of_the_template_ends_the_text_unseen(folder: Path) -> None:
    assert "".join(streamed(folder, [*ids_of("by"), TURN, *ids_of(" the")], stops=[TURN])) == "by"


def test_a_special_token_that_ends_nothing_is_not_printed(folder: Path) -> None:
    assert "".join(streamed(folder, [*ids_of("by"), TURN, *ids_of(" the"), END])) == "by the"


def test_a_token_beyond_the_tokenizers_is_not_printed(folder: Path) -> None:
    assert "".join(streamed(folder, [*ids_of("by"), 399, *ids_of(" the"), END])) == "by the"


def test_no_more_tokens_come_than_were_asked_for(folder: Path) -> None:
    assert "".join(streamed(folder, ids_of("abcdefgh"), tokens=3)) == "abc"


def test_bytes_of_a_tokenizer_with_byte_fallback_come_as_whole_characters(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 1})
    euro = [3 + byte for byte in "€".encode()]
    engine = Scripted([2, *euro, 2, *euro[:2], 1], 300)
    assert list(stream_text(engine, tmp_path, [2], 16, 128, Timings())) == [" a", "€", " a"]


def test_the_prompt_is_fed_at_once_and_every_token_by_itself(folder: Path) -> None:
    engine = Scripted(ids_of("abcd"), 400)
    list(stream_text(engine, folder, [BEGIN, 10, 11], 3, 128, Timings()))
    assert engine.fed == [3, 1, 1]


# Sampling

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7, "top_k": 0},
    "top k": {"top_k": 5},
    "top k of everything": {"top_k": 10_000},
    "top p": {"top_k": 0, "top_p": 0.4},
    "top p of nearly nothing": {"top_p": 0.001},
    "min p": {"top_k": 0, "min_p": 0.2},
    "repetition": {"repetition_penalty": 1.3},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_distributions_are_reshaped_as_transformers_reshapes_them(folder: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_json(folder / "generation_config.json", SETTINGS[name])
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    prompt = torch.tensor([[BEGIN, 10, 11, 10]])
    told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": 10_000}
    given = loaded.generate(prompt, do_sample=True, max_new_tokens=6, **told)
    settings, ids = read_sampling(folder), given.sequences[0].tolist()
    for step, (logits, scores) in enumerate(zip(given.logits, given.scores, strict=True)):
        found = softmax(warped(logits[0].numpy(), ids[: prompt.shape[1] + step], settings))
        np.testing.assert_allclose(found, scores[0].softmax(-1).numpy(), atol=2e-6)


def test_what_generation_settings_leave_out_has_transformers_defaults(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    theirs = GenerationConfig._get_default_generation_params()
    ours = read_sampling(tmp_path)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == theirs[name]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    settings = SamplingSettings(top_k=2)
    draws = [[Sampler(settings, seed)(logits, []) for _ in range(1)] for seed in range(3000)]
    share = np.bincount(np.ravel(draws), minlength=3) / len(draws)
    np.testing.assert_allclose(share, [0.625, 0.375, 0.0], atol=0.04)
    one, two = Sampler(SamplingSettings(), 7), Sampler(SamplingSettings(), 7)
    assert [one(logits, []) for _ in range(20)] == [two(logits, []) for _ in range(20)]


def test_run_samples_as_the_seed_says_and_is_greedy_by_default(folder: Path) -> None:
    def text(*options: object) -> str:
        result = amoeba("run", folder, "-p", QUESTION, "--tokens", 12, "--json", "--quiet", *options)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["text"])

    assert text("--sample", "--seed", 1) == text("--sample", "--seed", 1)
    assert len({text(), text("--sample"), text("--sample", "--seed", 1), text("--sample", "--seed", 2)}) > 2
    assert text() == text()


@pytest.mark.parametrize(
    "bad", [{"temperature": 0}, {"temperature": "hot"}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 1.5}, {"top_p": True}]
)
def test_a_generation_setting_that_cannot_be_is_refused_by_name(tmp_path: Path, bad: dict[str, Any]) -> None:
    write_json(tmp_path / "generation_config.json", bad)
    with pytest.raises(BadInput, match=next(iter(bad))):
        read_sampling(tmp_path)


def test_a_generation_setting_that_is_not_done_here_is_refused_not_ignored(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {"typical_p": 0.9})
    with pytest.raises(BadInput, match="typical_p"):
        read_sampling(tmp_path)


# Files that travel


@pytest.fixture
def travelling(folder: Path) -> dict[str, bytes]:
    """The model's folder with every file that a tokenizer may have, and their bytes."""
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            (folder / name).write_text(f'{{"{name}": 1}}' if name.endswith(".json") else f"{name}\n")
    write_json(folder / "special_tokens_map.json", {"bos_token": SPECIAL[BEGIN]})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    names = [*TOKENIZER_FILES, "additional_chat_templates/rag.jinja", "generation_config.json"]
    return {name: (folder / name).read_bytes() for name in names}


def test_every_file_of_the_tokenizer_travels_byte_by_byte_into_an_extracted_folder(
    folder: Path, travelling: dict[str, bytes], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(folder, _made(tmp_path / "work"))
    result = amoeba("extract", checkpoint.path, "--shape", "2x0.5", "-o", tmp_path / "subnet", "--quiet")
    assert result.exit_code == 0, result.output
    for name, content in travelling.items():
        assert (tmp_path / "subnet" / name).read_bytes() == content, name


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("flow", running_flows())
def test_every_file_of_the_tokenizer_travels_byte_by_byte_into_a_bundle_and_is_in_its_manifest(
    folder: Path, travelling: dict[str, bytes], tmp_path: Path, flow: str
) -> None:
    checkpoint = checkpoint_of(folder, _made(tmp_path / "work"))
    bundle = build_bundle(checkpoint, flow, tmp_path / "bundle")
    listed = json.loads((bundle / "manifest.json").read_text())["files"]
    for name, content in travelling.items():
        assert (bundle / name).read_bytes() == content, name
        assert name in listed
        beside = bundle / "engine" / name
        assert beside.is_file() or flow not in ("torch", "onnx"), name
        assert not beside.is_file() or beside.read_bytes() == content, name


def test_a_changed_template_makes_another_model(folder: Path, travelling: dict[str, bytes]) -> None:
    assert "additional_chat_templates/rag.jinja" in travelling
    before = ModelFolder(folder).digest
    (folder / "additional_chat_templates" / "rag.jinja").write_text("others")
    assert ModelFolder(folder).digest != before


def test_a_template_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="link"):
        ModelFolder(folder)
