"""What an engine takes, as data: classes, sizes, biases, and whether blocks may differ.

From it follow the numbers of heads and neurons that a subnet for an engine may keep, and why an engine refuses one.
Each backend states its own; docs/backends.md names every rule with its reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.plan import Steps

Varying = Literal["kv_heads", "heads", "neurons", "without_attention", "without_feed_forward"]
"""What may differ between the blocks of one model, or be missing in some."""


@dataclass(frozen=True)
class Takes:
    """The rules of one engine. Empty sets of names mean that any will do."""

    flow: str
    precisions: tuple[str, ...]
    """Best quality first."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Common names of precisions that stand for one of its own, such as int4 for q4_k_m."""
    classes: frozenset[str] = frozenset()
    """Stock model types that it runs, as the subnet's config names them."""
    traits: frozenset[str] = frozenset()
    """What it computes beyond the common block; a model with any other trait is refused."""
    any_trait: bool = False
    ropes: frozenset[str] = frozenset()
    varying: frozenset[Varying] = frozenset()
    """Empty: every block alike, so blocks of different widths are zero-padded."""
    biases: bool = True
    """Whether it adds biases on o_proj and down_proj."""
    heads_divide: frozenset[str] = frozenset()
    """Model types whose heads must divide the hidden size, whatever head_dim says."""
    head_sizes: frozenset[int] = frozenset()
    even_heads: bool = False
    neuron_multiple: Mapping[str, int] = field(default_factory=dict)
    """By precision; of others the one under "": cut neurons must be multiples of it."""
    query_multiple: Mapping[str, int] = field(default_factory=dict)
    """Likewise for the channels of all query heads together, which are the inputs of o_proj."""
    hidden_multiple: Mapping[str, int] = field(default_factory=dict)

    def refusal(self, subnet: Architecture, precision: str, compensated: bool = False) -> str | None:
        """Why it does not take a subnet of these sizes, every block alike, as half a sentence, or None.

        ``compensated``: the subnet's biases on o_proj and down_proj are compensation, and could be left out.
        """
        unknown = () if self.any_trait else tuple(trait for trait in subnet.traits if trait not in self.traits)
        if unknown:
            return f"its {unknown[0]} is not something that {self.flow} computes"
        held_by = families.held_by(subnet)
        has_biases = subnet.output_bias or subnet.mlp_bias
        if (self.classes and held_by not in self.classes) or (has_biases and not self.biases):
            return self._class_refusal(subnet, held_by, has_biases and compensated)
        if self.ropes and subnet.rope.kind not in self.ropes:
            return f"its rotary scaling '{subnet.rope.kind}' is none of {', '.join(sorted(self.ropes))}"
        if held_by in self.heads_divide and subnet.hidden % subnet.heads:
            return f"its {subnet.heads} heads do not divide the hidden size {subnet.hidden}, which {self.flow} demands"
        if self.head_sizes and subnet.head_dim not in self.head_sizes:
            return f"its head size {subnet.head_dim} is none of {', '.join(map(str, sorted(self.head_sizes)))}"
        if self.even_heads and subnet.head_dim % 2:
            return f"its head size {subnet.head_dim} is odd, which rotary positions cannot pair"
        multiple = _of(self.hidden_multiple, precision)
        if subnet.hidden % multiple:
            return f"its hidden size {subnet.hidden} is not a multiple of {multiple}, which {precision} rows need"
        return None

    def count_refusal(self, full: Architecture, heads: int, neurons: int, precision: str) -> str | None:
        """Why it does not take a block of so many query heads and neurons of a model, as half a sentence, or None.

        What is not cut is taken as it is.
        """
        multiple, share = _of(self.neuron_multiple, precision), _of(self.query_multiple, precision)
        said = f" in {precision}" if precision else " by its strictest rules"
        if neurons != full.neurons and neurons % multiple:
            return f"a block keeps {neurons} neurons, where {self.flow} takes multiples of {multiple}{said}"
        if heads != full.heads and heads * full.head_dim % share:
            channels = heads * full.head_dim
            return f"a block keeps {channels} channels of heads, where {self.flow} takes multiples of {share}{said}"
        return None

    def own_name(self, precision: str) -> str:
        """The engine's own name of a precision, where a common one stands for it; else the name as it is."""
        return self.aliases.get(precision, precision)

    def check_precision(self, precision: str) -> None:
        """Raise BadInput where the engine has no such precision."""
        if precision not in self.precisions:
            close = difflib.get_close_matches(precision, self.precisions, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise BadInput(
                f"the flow '{self.flow}' has no precision '{precision}'; it has {', '.join(self.precisions)}{hint}"
            )

    def _class_refusal(self, subnet: Architecture, held_by: str, compensated: bool) -> str:
        if not compensated:
            return f"it is a {held_by}, which {self.flow} does not run" + (
                " with biases on o_proj and down_proj" if held_by in self.classes else ""
            )
        choices = "--bias off"
        if self.biases and subnet.hidden % subnet.heads:
            choices = f"a width whose heads divide the hidden size {subnet.hidden}, or --bias off"
        return (
            f"its {subnet.heads} heads with biases on o_proj and down_proj fit no class but a {held_by}, which "
            f"{self.flow} does not run with them; choose {choices}"
        )

    def steps(self, full: Architecture, multiple: int, precision: str, compensated: bool = False) -> Steps:
        """The numbers of groups and neurons that a subnet of a model may keep for this engine.

        ``multiple`` holds where the engine asks for none. All groups are always among them. A multiple that the model's
        own size does not have binds only what is cut.
        """
        asked = _of(self.neuron_multiple, precision)
        finest = Steps.of(full, multiple if asked == 1 else asked)
        share = _of(self.query_multiple, precision)
        width = full.group * full.head_dim

        def legal(groups: int) -> bool:
            subnet = full.subnet(full.depth, groups, full.neurons)
            held = families.compensated(subnet) if compensated else subnet
            return groups * width % share == 0 and self.refusal(held, precision, compensated) is None

        groups = tuple(count for count in finest.groups if count == full.kv_heads or legal(count))
        return Steps(groups, finest.multiple)


def _of(multiples: Mapping[str, int], precision: str) -> int:
    return multiples.get(precision, multiples.get("", 1))


LLAMAS = frozenset({"llama", "mistral", "qwen2"})
"""Model types that compute the plain block: rotary grouped-query attention and a gated feed-forward."""
KNOWN_ROPES = frozenset({"default", "linear", "llama3"})
ANY_WIDTHS: frozenset[Varying] = frozenset({"kv_heads", "heads", "neurons"})
ANY_BLOCKS: frozenset[Varying] = ANY_WIDTHS | {"without_attention", "without_feed_forward"}
