"""Batches of stage 2: tokens, which of them are learnt, windows, order, shares and packing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from amoeba_deploy.checkpoint import EMBEDDED, Checkpoint
from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder, load_torch_model
from amoeba_deploy.stage2.batches import (
    Batch,
    Batches,
    Grouping,
    LongAnswers,
    Sequences,
    check_packing,
    special_tokens,
    tokenise,
)
from amoeba_deploy.stage2.instructions import Example, Instructions, RunningText, Template, read_examples

TEXT = EMBEDDED.parent / "validation.txt"
BOS, EOS, CONTEXT = 0, 1, 512
PROMPT = "Name a baker.", [47, 839, 70, 260, 793, 15]
"""An instruction and its tokens."""
ANSWER = "Weven.", [56, 762, 15]
LONG = Example("Tell.", "", "the baker and the miller and the baker", "line 7")
GROUPINGS: list[Grouping] = ["none", "length", "pack"]


@pytest.fixture(scope="module")
def tokenizer(demo: Checkpoint) -> Tokenizer:
    return demo.model.tokenizer()


def examples(*items: Example, named: bool = False) -> Instructions:
    return Instructions(items, "own.jsonl", named, {"source": "own.jsonl"})


def tokens(
    data: Instructions | RunningText,
    tokenizer: Tokenizer,
    *,
    bos: int | None = BOS,
    eos: int | None = EOS,
    context: int = CONTEXT,
    source: int = 384,
    target: int = 128,
    template: Template = "plain",
    long_answers: LongAnswers | None = None,
) -> Sequences:
    windows = {"source": source, "target": target}
    return tokenise(
        data, tokenizer, bos=bos, eos=eos, context=context, **windows, template=template, long_answers=long_answers
    )


def row(data: Sequences, index: int) -> tuple[list[int], list[int]]:
    """Source and target of a sequence."""
    ids = data.ids[data.starts[index] : data.starts[index + 1]].tolist()
    return ids[: data.learnt[index]], ids[data.learnt[index] :]


def made(parts: Sequence[tuple[int, int]], length: int = 32) -> Sequences:
    """Sequences of given source and target tokens, in which no token occurs twice; 0 is not among them."""
    sizes = np.array([source + target for source, target in parts])
    ids = np.arange(1, sizes.sum() + 1, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Sequences(ids, starts, np.array([source for source, _ in parts]), length, "instructions", {})


def found(data: Sequences, batch: Batch) -> list[list[int]]:
    """The sequences in each row of a batch of ``made`` ones; fails where one is not whole, or anything is between."""
    rows = []
    for ids in batch.ids.tolist():
        column, row = 0, []
        while column < len(ids) and ids[column]:
            index = int(np.searchsorted(data.starts, ids[column] - 1))
            whole = data.ids[data.starts[index] : data.starts[index + 1]].tolist()
            assert ids[column : column + len(whole)] == whole
            row.append(index)
            column += len(whole)
        assert not any(ids[column:])
        rows.append(row)
    return rows


# Tokens


def test_an_example_is_its_prompt_and_its_answer_between_the_tokens_that_begin_and_end_a_text(
    tokenizer: Tokenizer,
) -> None:
    data = tokens(examples(Example(PROMPT[0], "", ANSWER[0], "line 1")), tokenizer)
    assert row(data, 0) == ([BOS, *PROMPT[1], 200], [*ANSWER[1], EOS])
    facts = {"source": "own.jsonl", "examples": 1, "template": "plain", "source_tokens": 384, "target_tokens": 128}
    assert data.facts == facts | {"answer_tokens": 4}


def test_the_alpaca_prompt_in_tokens(tokenizer: Tokenizer) -> None:
    data = tokens(examples(Example(PROMPT[0], "", ANSWER[0], "line 1")), tokenizer, template="alpaca")
    # fmt: off
    introduction = [
        35, 274, 287, 296, 754, 301, 379, 83, 86, 753, 312, 412, 277, 284, 262, 68, 83, 74, 67, 262, 260, 259, 280, 76,
        15, 288, 83, 368, 260, 307, 262, 81, 278, 684, 412, 277, 419, 83, 80, 873, 74, 277, 274, 90, 309, 78, 418, 85,
        262, 261, 307, 70, 806, 300, 15, 200, 200, 4, 4, 4, 352, 299, 85, 83, 86, 753, 312, 27, 200,
    ]
    # fmt: on
    response = [200, 200, 4, 4, 4, 408, 262, 81, 278, 684, 27, 222]
    assert row(data, 0) == ([BOS, *introduction, *PROMPT[1], *response], [*ANSWER[1], EOS])


def test_tokens_that_a_tokenizer_lacks_are_left_out(tokenizer: Tokenizer) -> None:
    data = tokens(examples(Example(PROMPT[0], "", ANSWER[0], "line 1")), tokenizer, bos=None, eos=None)
    assert row(data, 0) == ([*PROMPT[1], 200], ANSWER[1])


def test_many_examples_are_those_of_each_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Example("Say.", "the " * n, "baker " * (n + 1), "") for n in range(7)]
    alone = [row(tokens(examples(item), tokenizer), 0) for item in items]
    monkeypatch.setattr("amoeba_deploy.stage2.batches._TEXTS_AT_ONCE", 3)
    data = tokens(examples(*items), tokenizer)
    assert [row(data, index) for index in range(7)] == alone


def test_padding_and_truncation_in_a_tokenizers_file_do_not_count(tokenizer: Tokenizer) -> None:
    items = examples(LONG, Example("Say.", "", "so", "line 1"))
    asking = Tokenizer.from_str(tokenizer.to_str())
    asking.enable_padding(length=20)
    asking.enable_truncation(3)
    data, wanted = tokens(items, asking), tokens(items, tokenizer)
    assert data.ids.tolist() == wanted.ids.tolist()
    assert asking.padding is not None, "the caller's tokenizer stays as it is"


@pytest.mark.parametrize("name", ["demo", "stories"])
def test_a_models_first_and_last_tokens_are_found(name: str, request: pytest.FixtureRequest) -> None:
    if name == "demo":
        assert special_tokens(request.getfixturevalue("demo").model) == (0, 1)
    else:
        assert special_tokens(ModelFolder(request.getfixturevalue("stories"))) == (1, 2)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, {}, (0, 1)),
        (None, {}, (0, 1)),
        ({}, {"eos_token_id": [5, 1]}, (0, 5)),
        ({"bos_token": None}, {}, (None, 1)),
        ({"eos_token": {"content": "<s>"}}, {}, (0, 0)),
        ({"bos_token": "no such token"}, {}, (None, 1)),
    ],
)
def test_the_tokenizers_config_decides_before_the_models(
    demo: Checkpoint, tmp_path: Path, config: dict[str, object] | None, generation: object, wanted: object
) -> None:
    for file in demo.model.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert special_tokens(ModelFolder(tmp_path)) == wanted


def test_a_last_token_outside_the_vocabulary_is_refused(demo: Checkpoint, tmp_path: Path) -> None:
    for file in demo.model.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1024}')
    with pytest.raises(BadInput, match=r"its eos_token is 1024, which is not one of its 1024 tokens"):
        special_tokens(ModelFolder(tmp_path))


# Windows


def test_a_long_source_is_cut_at_its_end_and_counted(tokenizer: Tokenizer) -> None:
    data = tokens(examples(Example(PROMPT[0], "", ANSWER[0], "line 1")), tokenizer, source=4)
    assert row(data, 0) == ([BOS, *PROMPT[1][:3]], [*ANSWER[1], EOS])
    assert data.facts["cut_sources"] == 1


def test_a_long_answer_in_a_file_is_refused(tokenizer: Tokenizer) -> None:
    short = Example("Say.", "", "so", "line 6")
    wanted = (
        r"^own\.jsonl, line 7: the answer takes 10 tokens with its end, and --target-tokens is 8; raise it, or give "
        r"--long-answers cut or drop$"
    )
    with pytest.raises(BadInput, match=wanted):
        tokens(examples(short, LONG), tokenizer, target=8)
    with pytest.raises(BadInput, match=r"line 7: .* is 8, which 1 more exceed too; raise it"):
        tokens(examples(LONG, short, LONG), tokenizer, target=8)
    assert tokens(examples(short, LONG), tokenizer, target=10).count == 2


def test_a_long_answer_of_a_data_set_by_name_is_cut_without_an_end(tokenizer: Tokenizer) -> None:
    data = tokens(examples(LONG, named=True), tokenizer, target=8)
    whole = row(tokens(examples(LONG), tokenizer), 0)[1]
    assert row(data, 0)[1] == whole[:8]
    assert EOS not in row(data, 0)[1]
    assert data.facts["cut_answers"] == 1
    assert data.facts["answer_tokens"] == 8


def test_long_answers_may_be_cut_dropped_or_refused_by_choice(tokenizer: Tokenizer) -> None:
    items = LONG, Example("Say.", "", "so", "line 8")
    cut = tokens(examples(*items), tokenizer, target=8, long_answers="cut")
    assert (cut.count, cut.facts["cut_answers"]) == (2, 1)
    dropped = tokens(examples(*items), tokenizer, target=8, long_answers="drop")
    assert (dropped.count, dropped.facts["dropped"], dropped.facts["examples"]) == (1, 1, 1)
    with pytest.raises(BadInput, match="line 7: the answer takes 10 tokens"):
        tokens(examples(*items, named=True), tokenizer, target=8, long_answers="refuse")
    with pytest.raises(BadInput, match=r"own\.jsonl: has no answers to learn from within --target-tokens 8"):
        tokens(examples(LONG), tokenizer, target=8, long_answers="drop")


def test_an_answer_that_the_tokenizer_makes_nothing_of_is_skipped(tokenizer: Tokenizer) -> None:
    from tokenizers.normalizers import Replace

    deaf = Tokenizer.from_str(tokenizer.to_str())
    deaf.normalizer = Replace("so", "")
    data = examples(LONG, Example("Say.", "", "so", "line 8"))
    assert tokens(replace(data, facts={"source": "own.jsonl", "skipped": 2}), deaf).facts["skipped"] == 3


def test_windows_together_are_within_the_context(tokenizer: Tokenizer) -> None:
    data = examples(Example(PROMPT[0], "", ANSWER[0], "line 1"))
    assert tokens(data, tokenizer, source=6, target=4, context=10).length == 10
    wanted = r"--source-tokens 6 and --target-tokens 5 make 11 tokens, and the model attends to 10; ask for fewer"
    with pytest.raises(BadInput, match=wanted):
        tokens(data, tokenizer, source=6, target=5, context=10)
    with pytest.raises(BadInput, match="--source-tokens 6 and --target-tokens 0 must be 1 or more"):
        tokens(data, tokenizer, source=6, target=0)


def test_the_seed_tasks_of_self_instruct_in_the_recipes_windows(tokenizer: Tokenizer) -> None:
    from conftest import SHARED

    file = SHARED / "data" / "instructions" / "stanford_seed_tasks.jsonl"
    if not file.is_file():
        pytest.skip("../shared/data/instructions is not here")
    data = tokens(read_examples(str(file)), tokenizer, template="alpaca", long_answers="cut")
    assert (data.count, data.facts["cut_sources"], data.facts["cut_answers"]) == (175, 18, 60)
    assert data.lengths.max() <= 512
    assert data.facts["answer_tokens"] == sum(len(row(data, index)[1]) for index in range(175))


# Text


def test_a_text_is_tokenised_whole_and_every_token_but_a_rows_first_is_learnt(tokenizer: Tokenizer) -> None:
    text = TEXT.read_text(encoding="utf-8")
    data = tokens(RunningText(text, "here", {"source": "here"}), tokenizer, source=30, target=10)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert data.ids.tolist() == whole[: len(whole) // 40 * 40]
    assert set(data.lengths) == {40}
    assert set(data.learnt) == {1}
    assert data.facts == {
        "source": "here",
        "examples": len(whole) // 40,
        "sequence": 40,
        "answer_tokens": 39 * (len(whole) // 40),
    }


def test_a_long_text_is_tokenised_in_pieces_that_begin_a_line(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = RunningText(TEXT.read_text(encoding="utf-8"), "here", {})
    whole = tokens(data, tokenizer)
    monkeypatch.setattr("amoeba_deploy.stage2.batches._CHARACTERS_AT_ONCE", 1000)
    assert tokens(data, tokenizer).ids.tolist() == whole.ids.tolist()


def test_a_row_of_text_is_at_most_the_context(tokenizer: Tokenizer) -> None:
    assert set(tokens(RunningText(TEXT.read_text(), "here", {}), tokenizer, context=64).lengths) == {64}


def test_a_text_shorter_than_a_row_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"^here: has 9 tokens where a row takes 10; give a longer text, or smaller"):
        tokens(RunningText(LONG.output, "here", {}), tokenizer, source=5, target=5)
    assert tokens(RunningText(LONG.output, "here", {}), tokenizer, source=5, target=4).count == 1


# What is learnt


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_each_answer_token_is_predicted_from_the_one_before_it(grouping: Grouping) -> None:
    data = made([(3, 2), (2, 4), (5, 1), (1, 1)])
    batch = Batches(data, 4, 0, grouping)[0]
    before = batch.ids.flatten()[batch.places].tolist()
    pairs = {(5 - 2, 4), (4, 5), (7, 8), (8, 9), (9, 10), (10, 11), (16, 17), (18, 19)}
    if grouping == "pack":  # all fit in one row, which comes four times
        assert sorted(zip(before, batch.wanted.tolist(), strict=True)) == sorted([*pairs] * 4)
    else:
        assert sorted(zip(before, batch.wanted.tolist(), strict=True)) == sorted(pairs)


def test_rows_are_padded_at_their_end_to_the_longest_of_the_batch() -> None:
    batch = Batches(made([(3, 2), (2, 1)]), 2, 0, "none", pad=99)[0]
    assert sorted(batch.ids.tolist()) == [[1, 2, 3, 4, 5], [6, 7, 8, 99, 99]]
    assert 99 not in batch.wanted
    assert batch.positions is None


def test_a_batch_moves_whole() -> None:
    batch = Batches(made([(3, 2), (2, 1)]), 2, 0, "pack")[0].to("meta")
    assert batch.positions is not None
    assert {each.device.type for each in (batch.ids, batch.positions, batch.places, batch.wanted)} == {"meta"}
    assert batch.ids.dtype == batch.places.dtype == batch.wanted.dtype == torch.int64


# Order

PARTS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(parts=PARTS, rows=st.integers(1, 9), seed=st.integers(), grouping=st.sampled_from(GROUPINGS))
def test_every_example_is_read_whole_once_an_epoch(
    parts: list[tuple[int, int]], rows: int, seed: int, grouping: Grouping
) -> None:
    data = made(parts)
    batches = Batches(data, rows, seed, grouping)
    epoch, contents = batches.rows_an_epoch, []
    for number in range(-(-3 * epoch // rows)):
        batch = batches[number]
        assert batch.ids.shape[0] == rows
        assert len(batch.wanted) > 0
        contents += found(data, batch)
    for start in (0, epoch, 2 * epoch):
        read = [index for content in contents[start : start + epoch] for index in content]
        assert sorted(read) == list(range(len(parts)))


@settings(deadline=None, max_examples=60)
@given(parts=PARTS, seed=st.integers())
def test_packed_rows_hold_whole_examples_within_their_length(parts: list[tuple[int, int]], seed: int) -> None:
    data = made(parts)
    batches = Batches(data, 2, seed, "pack")
    batch = batches[0]
    assert batch.ids.shape[1] <= data.length
    assert batch.positions is not None
    inside = set()
    for number, content in enumerate(found(data, batch)):
        column = 0
        for index in content:
            size, learnt = int(data.lengths[index]), int(data.learnt[index])
            assert batch.positions[number, column : column + size].tolist() == list(range(size))
            first = number * batch.ids.shape[1] + column
            inside |= set(range(first + learnt - 1, first + size - 1))
            column += size
    assert sorted(batch.places.tolist()) == sorted(inside), "an example's first token is never predicted"


def test_packed_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    data = made([(int(a), int(b)) for a, b in rng.integers(1, 60, (2000, 2))], length=256)
    full = len(data.ids) / (Batches(data, 1, 0, "pack").rows_an_epoch * data.length)
    assert full > 0.99


def order(data: Sequences, seed: int, grouping: Grouping = "none", rows: int = 8, batches: int = 5) -> list[list[int]]:
    made_of = Batches(data, rows, seed, grouping)
    return [content for number in range(batches) for content in found(data, made_of[number])]


def test_the_order_is_that_of_the_seed_and_another_in_each_epoch() -> None:
    data = made([(2, 2)] * 40)
    assert order(data, 3) == order(data, 3)
    assert order(data, 3) != order(data, 4)
    both = order(data, 3, batches=10)
    assert both[:40] != both[40:]


def test_the_order_of_a_seed_never_changes() -> None:
    # A run that goes on elsewhere or with a later version must meet the same examples.
    data = made([(2, n % 5 + 1) for n in range(11)], length=12)
    assert order(data, 3, "none", rows=4, batches=3) == [[n] for n in (5, 4, 3, 2, 0, 7, 9, 1, 10, 6, 8, 4)]
    assert order(data, 3, "length", rows=4, batches=3) == [[n] for n in (7, 3, 4, 9, 5, 0, 1, 2, 10, 6, 8, 4)]
    packed = [[9, 7], [4, 2], [8, 3], [1, 6, 0], [10, 5], [9, 7], [8, 3], [4, 2]]
    assert order(data, 3, "pack", rows=4, batches=2) == packed


def test_a_batch_needs_no_batch_before_it() -> None:
    data = made([(2, n % 5 + 1) for n in range(21)])
    for grouping in GROUPINGS:
        straight = Batches(data, 4, 1, grouping)
        wanted = [straight[number].ids.tolist() for number in range(30)]
        for number in (29, 3, 17, 0, 16):
            assert Batches(data, 4, 1, grouping)[number].ids.tolist() == wanted[number]
            assert straight[number].ids.tolist() == wanted[number]


def test_rows_of_like_length_save_padding_and_their_batches_come_in_no_order() -> None:
    rng = np.random.default_rng(1)
    data = made([(int(n), 1) for n in rng.integers(1, 31, 400)])
    longest: dict[Grouping, list[int]] = {
        grouping: [Batches(data, 8, 0, grouping)[number].ids.shape[1] for number in range(50)]
        for grouping in ("none", "length")
    }
    assert sum(longest["length"]) * 8 < 1.05 * len(data.ids)
    assert sum(longest["none"]) * 8 > 1.5 * len(data.ids)
    assert longest["length"] != sorted(longest["length"])


def test_instructions_are_grouped_by_length_and_rows_of_text_only_shuffled(tokenizer: Tokenizer) -> None:
    assert Batches(made([(1, 1)]), 1, 0).grouping == "length"
    text = tokens(RunningText(TEXT.read_text(), "here", {}), tokenizer, source=10, target=10)
    assert {Batches(text, 1, 0, grouping).grouping for grouping in (None, *GROUPINGS)} == {"none"}
    assert Batches(text, 3, 0)[0].ids.shape == (3, 20)


def test_there_is_no_batch_before_the_first_and_none_without_rows() -> None:
    data = made([(1, 1)])
    with pytest.raises(IndexError, match="there is no batch -1"):
        Batches(data, 1, 0)[-1]
    with pytest.raises(BadInput, match="a batch of 0 rows holds nothing; give 1 or more"):
        Batches(data, 0, 0)


# Shares


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_shares_of_all_processes_are_the_batch(grouping: Grouping, ranks: int) -> None:
    data = made([(n % 7 + 1, n % 5 + 1) for n in range(50)])
    batches = Batches(data, 6, 5, grouping)
    for number in (0, 8, 30):
        whole = batches[number]
        shares = [batches.share(number, rank, ranks) for rank in range(ranks)]
        for rank, share in enumerate(shares):
            assert torch.equal(share.ids, whole.ids[rank::ranks])
            if whole.positions is not None and share.positions is not None:
                assert torch.equal(share.positions, whole.positions[rank::ranks])
            assert len(share.wanted) > 0
            assert torch.equal(share.ids.flatten()[share.places + 1], share.wanted)
        assert sorted(torch.cat([share.wanted for share in shares]).tolist()) == sorted(whole.wanted.tolist())


def test_rows_that_do_not_divide_by_the_processes_are_refused() -> None:
    with pytest.raises(BadInput, match="a batch of 6 rows cannot be spread evenly over 4 processes; give a"):
        Batches(made([(1, 1)]), 6, 0).share(0, 0, 4)


# Stock models


@pytest.mark.parametrize(
    ("name", "grouping"),
    [(name, "pack") for name in MODELS if name != "phi3-long"] + [("llama-grouped-tied", "none"), ("gemma2", "none")],
)
def test_a_stock_model_computes_for_each_example_what_it_computes_alone(
    models: Callable[[str], ModelFolder], name: str, grouping: Grouping
) -> None:
    data = made([(8, 1), (19, 1), (2, 1), (24, 1), (1, 1), (30, 4)], length=60)
    batch = Batches(data, 6 if grouping == "none" else 2, 0, grouping)[0]
    model = load_torch_model(models(name).path)
    with torch.no_grad():
        together = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        for number, content in enumerate(found(data, batch)):
            column = 0
            for index in content:
                ids = torch.from_numpy(data.ids[data.starts[index] : data.starts[index + 1]].astype(np.int64))
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
                # Float32 sums in another order; logits are up to 16.
                torch.testing.assert_close(together[number, column : column + len(ids)], alone, rtol=1e-5, atol=3e-5)
                column += len(ids)


def test_packing_is_refused_where_the_longest_example_changes_the_others_positions(
    models: Callable[[str], ModelFolder],
) -> None:
    architecture = models("phi3-long").architecture
    check_packing(architecture, made([(20, 2), (3, 3)]))
    with pytest.raises(BadInput, match=r"examples of up to 23 tokens cannot be packed .* beyond 22; take smaller"):
        check_packing(architecture, made([(20, 3), (3, 3)]))
    check_packing(models("llama-3-rope").architecture, made([(20, 12)]))
