"""The workload that latencies are stated for: batch, prompt, generated tokens, and the context to provide for."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_deploy.errors import BadInput

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Workload:
    """``batch`` sequences, each with a prompt of ``prompt`` tokens after which ``tokens`` are generated."""

    batch: int = 1
    prompt: int = 128
    tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} is {getattr(self, name)}; it must be at least 1")

    def context_for(self, model_context: int, wanted: int | None = None) -> int:
        """Positions to provide for: ``wanted``, else the model's own or 2048, the smaller.

        Raises:
            BadInput: it exceeds what the model was trained for, or prompt and tokens do not fit in it.
        """
        context = min(model_context, DEFAULT_CONTEXT) if wanted is None else wanted
        if context > model_context:
            raise BadInput(f"--context {context} exceeds the model's {model_context} positions; ask for fewer")
        if self.prompt + self.tokens > context:
            raise BadInput(
                f"--prompt {self.prompt} and --tokens {self.tokens} do not fit in a context of {context}; ask for fewer"
            )
        return context
