"""How answers look: what an engine was verified by, intervals, and latencies that turn out over the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_search import candidate

from amoeba_deploy.answer_text import _between, print_verification
from amoeba_deploy.search import prediction_to_json
from amoeba_deploy.verification import Perplexity, Verification

PERPLEXITY = Perplexity(2.1, 2.0, 1.0, 128)
HELD = Verification(1e-6, 1e-5, True, 32, perplexity=PERPLEXITY)


def said(verified: Verification, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_verification(verified)
    return capsys.readouterr().out.splitlines()


def test_an_engine_held_to_logits_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    logits, perplexity = said(HELD, capsys)
    assert logits == "verified: logits within 1e-06 of the reference (allowed 1e-05), 32 greedy tokens equal"
    assert perplexity.startswith("perplexity 2.1 on 128 tokens where the unquantised subnet has 2 (+5.00%")


def test_an_engine_held_to_perplexity_alone_claims_nothing_of_logits_and_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    perplexity, logits = said(
        replace(HELD, held_to_logits=False, max_logit_error=2.5, greedy_tokens_equal=False, greedy_tokens=0), capsys
    )
    assert perplexity.startswith("verified by perplexity alone, as its dequantised weights cannot be had: perplexity ")
    assert logits == "logits differ from the unquantised subnet's by up to 2.5, not bounded"
    assert "allowed 1e-05" not in perplexity + logits
    assert "tokens equal" not in perplexity + logits


def test_an_interval_stands_beside_its_latency_where_it_is_known() -> None:
    assert _between((1.23456, 2.0)) == " (1.23 to 2)"
    assert _between(None) == ""
    prediction = candidate(tpot=1.5).prediction
    assert set(prediction_to_json(prediction)) == {"tpot_ms", "ttft_ms", "memory_bytes", "source"}
    known = prediction_to_json(replace(prediction, tpot_interval=(1.23456, 2.0)))
    assert known["tpot_interval_ms"] == [1.235, 2.0]
    assert "ttft_interval_ms" not in known
