"""The harness's own model class over a ``LogitsFunction``: what it asks, an engine answers.

Tokenising, windows, truncation and scoring stay the harness's own (``lm_eval.models.huggingface.HFLM``), so that a
model folder scores here what it scores there; only the forward pass is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_deploy.evaluation import LogitsFunction

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], None]
"""Told after each forward pass how many requests it answered."""


@dataclass(frozen=True)
class _Logits:
    """What the harness reads of a model's output."""

    logits: torch.Tensor


class _StandIn:
    """In the place of a transformers model: its config, its device, and a forward pass by the logits function."""

    def __init__(self, logits: LogitsFunction, folder: Path) -> None:
        import torch
        from transformers import AutoConfig

        self._logits = logits
        self.config = AutoConfig.from_pretrained(str(folder))
        self.device = torch.device("cpu")
        self.name_or_path = str(folder)

    def __call__(self, ids: torch.Tensor) -> _Logits:
        import torch

        return _Logits(torch.from_numpy(self._logits(ids.numpy())))


@cache
def _model_class() -> type[Any]:
    """The class, made when the harness is first needed: importing it takes seconds."""
    from lm_eval.models.huggingface import HFLM

    class Answering(HFLM):  # type: ignore[misc]
        """HFLM without its progress bars; ``advance`` hears how many requests were answered."""

        def __init__(self, logits: LogitsFunction, folder: Path, context: int, rows: int, advance: Advance) -> None:
            model = _StandIn(logits, folder)
            super().__init__(pretrained=model, tokenizer=str(folder), max_length=context, batch_size=rows)
            self._advance = advance

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, override_bs: Any = None, **_: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            found: torch.Tensor = super()._model_call(inps, attn_mask, labels)
            self._advance(len(inps))
            return found

    return Answering


def answering(logits: LogitsFunction, folder: Path, context: int, rows: int, advance: Advance) -> Any:
    """The harness's model.

    Args:
        logits: from ids [rows, length] to logits [rows, length, vocabulary].
        folder: where the tokenizer and ``config.json`` lie.
        context: the most tokens that are fed at once; longer requests lose their beginning, as in the harness.
        rows: how many requests are fed together, padded on the right; 1 for an engine that takes rows one by one.
        advance: told how many requests each forward pass answered.
    """
    return _model_class()(logits, folder, context, rows, advance)
