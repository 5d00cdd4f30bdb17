"""The data of a run as it was asked for: where from, in which windows, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_deploy.errors import BadInput
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.stage2.batches import (
    SOURCE_TOKENS,
    TARGET_TOKENS,
    Grouping,
    LongAnswers,
    Sequences,
    check_packing,
    special_tokens,
    tokenise,
)
from amoeba_deploy.stage2.instructions import Template, read_examples, split


@dataclass(frozen=True)
class DataSettings:
    """How data become rows; what is left out has the meaning that ``amoeba tune -h`` gives."""

    source: str
    template: Template = "alpaca"
    source_tokens: int = SOURCE_TOKENS
    target_tokens: int = TARGET_TOKENS
    long_answers: LongAnswers | None = None
    grouping: Grouping | None = None
    hold_out: float = 0.02

    def read(self, model: ModelFolder, held_out: bool) -> tuple[Sequences, str]:
        """The data as token ids of a model, and what is ``held_out`` of it as text.

        Raises:
            BadInput: they are missing, damaged, or hold nothing to learn, or the tokenizer is not the model's.
        """
        data, held = read_examples(self.source), ""
        if held_out and self.hold_out:
            data, held = split(data, self.hold_out, self.template)
        bos, eos = special_tokens(model)
        sizes = model.architecture
        sequences = tokenise(
            data,
            model.tokenizer(),
            bos=bos,
            eos=eos,
            context=sizes.context,
            source=self.source_tokens,
            target=self.target_tokens,
            template=self.template,
            long_answers=self.long_answers,
        )
        largest = int(sequences.ids.max())
        if largest >= sizes.vocabulary:
            raise BadInput(
                f"{model.path}: its tokenizer gives the token {largest} and the model knows {sizes.vocabulary}; "
                f"put the model's own tokenizer there"
            )
        if self.grouping == "pack":
            check_packing(sizes, sequences)
        return sequences, held
