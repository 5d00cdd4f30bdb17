"""How to tune: every setting that decides what comes out, with the released recipe's values."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal

from amoeba_deploy.adapters import Mix
from amoeba_deploy.errors import BadInput
from amoeba_deploy.shape import Policy, format_width
from amoeba_deploy.stage2.mixture import MixtureSettings

Adapter = Literal["smol", "lora", "none"]
ExpertDtype = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
RECIPE_WIDTHS = (Fraction(1), Fraction(7, 8), Fraction(3, 4), Fraction(5, 8))
LEARNING_RATES: dict[Adapter, float] = {"smol": 2e-4, "lora": 2e-4, "none": 2e-5}


@dataclass(frozen=True)
class Settings:
    """What decides the result, apart from the model, its selection and the data."""

    steps: int = 10_000
    batch: int = 2
    """Rows of a batch, over all processes."""
    accumulate: int = 4
    """Batches a step."""
    lr: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    """Steps over which the learning rate rises."""
    clip: float = 0.3
    """The largest norm of all gradients together; 0 for no limit."""
    adapter: Adapter = "smol"
    rank: int = 64
    alpha: float = 16.0
    experts: int = 5
    top_k: int = 2
    mix: Mix = "factors"
    adapter_dtype: ExpertDtype = "fp32"
    widths: tuple[Fraction, ...] = RECIPE_WIDTHS
    random_shapes: int = 2
    shape: str | None = None
    """The only shape to tune, where one alone is tuned."""
    distillation: float = 1.0
    balance: bool = True
    conflicts: Literal["sum", "project"] = "sum"
    policy: Policy = "uniform"
    bias: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    base_bits: Literal[4, 8] | None = None
    """In how many bits the frozen base is held; as it is where left out."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Raises BadInput where settings contradict each other."""
        for name in ("lr", "clip", "alpha"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise BadInput(f"--{name} {value} is not a finite number")
        if self.adapter == "none" and self.base_bits is not None:
            raise BadInput(
                "with --adapter none all weights are tuned, and weights in 4 or 8 bits cannot be; leave out one"
            )
        if self.adapter == "smol" and not 1 <= self.top_k <= self.experts:
            raise BadInput(f"--top-k {self.top_k} must be from 1 to the number of experts, {self.experts}")
        if Fraction(1) not in self.widths and self.shape is None:
            raise BadInput("--widths must have 1: the full width is the largest shape, from which the others learn")
        if len(set(self.widths)) != len(self.widths):
            raise BadInput("--widths names a width twice")

    @property
    def learning_rate(self) -> float:
        """The learning rate asked for, else the usual one of the kind of tuning."""
        return LEARNING_RATES[self.adapter] if self.lr is None else self.lr

    @property
    def mixture(self) -> MixtureSettings | None:
        """The experts that are tuned; None where the model's own weights are."""
        if self.adapter == "none":
            return None
        if self.adapter == "lora":
            return MixtureSettings(1, self.rank, self.alpha, 1, gated=False)
        return MixtureSettings(self.experts, self.rank, self.alpha, self.top_k, self.mix)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: risen in a line, then constant or half a cosine to nothing."""
        risen = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "constant":
            return self.learning_rate * risen
        share = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * risen * 0.5 * (1 + math.cos(math.pi * share))

    def to_json(self) -> dict[str, Any]:
        """Every setting by its name, as JSON values."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return found | {"lr": self.learning_rate, "widths": [format_width(width) for width in self.widths]}
