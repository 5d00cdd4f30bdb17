"""What each engine takes, as data: classes, sizes, biases, and whether blocks may differ.

From it follow the numbers of heads and neurons that a subnet for an engine may keep, and why an engine refuses one. An
engine is listed here from the day on which its rules are known, so that a subnet can be extracted for it; whether this
version also lowers to it is another matter (backends/__init__.py). Rules were measured with ONNX Runtime 1.32,
llama.cpp of July 2026 and MLC-LLM of July 2026, and read in the sources of TensorRT-LLM 1.2; docs/backends.md names
each with its reason.
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

    def check_precision(self, precision: str) -> None:
        """Raise BadInput where the engine has no such precision."""
        if precision not in self.precisions:
            raise BadInput(f"'{self.flow}' has no precision '{precision}'; it has {', '.join(self.precisions)}")

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


_LLAMAS = frozenset({"llama", "mistral", "qwen2"})
_KNOWN_ROPES = frozenset({"default", "linear", "llama3"})
_EMITTED = {"traits": frozenset({"constant scaling"}), "ropes": _KNOWN_ROPES, "even_heads": True}
_ANY_WIDTHS: frozenset[Varying] = frozenset({"kv_heads", "heads", "neurons"})

_TAKES = (
    Takes(
        "torch", ("fp32", "bf16"), any_trait=True, varying=_ANY_WIDTHS | {"without_attention", "without_feed_forward"}
    ),
    Takes(
        "onnx",
        ("fp32", "int8", "int4"),
        varying=_ANY_WIDTHS | {"without_attention", "without_feed_forward"},
        hidden_multiple={"int8": 32, "int4": 32},
        **_EMITTED,  # type: ignore[arg-type]
    ),
    Takes("openvino", ("fp32", "bf16", "int8", "int4"), varying=_ANY_WIDTHS, **_EMITTED),  # type: ignore[arg-type]
    Takes("executorch", ("fp32", "int8", "int4"), any_trait=True),
    # Quantised rows of another length are stored in wider types without a word; FFN width 0 drops the attention too.
    Takes(
        "gguf",
        ("fp32", "fp16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "int8", "int4"),
        classes=_LLAMAS,
        ropes=_KNOWN_ROPES,
        varying=_ANY_WIDTHS | {"without_attention"},
        even_heads=True,
        neuron_multiple={"fp32": 1, "fp16": 1, "bf16": 1, "q8_0": 32, "q4_0": 32, "int8": 32, "": 256},
        query_multiple={"fp32": 1, "fp16": 1, "bf16": 1, "q8_0": 32, "q4_0": 32, "int8": 32, "": 256},
        hidden_multiple={"q8_0": 32, "q4_0": 32, "int8": 32},
    ),
    Takes(
        "mlc-llm",
        ("q0f32", "q0f16", "q4f32_1", "q4f16_1", "q3f16_1", "fp32", "fp16", "int4"),
        classes=_LLAMAS | {"qwen3"},
        ropes=frozenset({"default", "llama3"}),
        biases=False,
        heads_divide=_LLAMAS,
        even_heads=True,
    ),
    Takes(
        "tensorrt-llm",
        ("fp16", "bf16", "fp8", "w8a16", "w4a16", "int8", "int4"),
        classes=_LLAMAS | {"qwen3"},
        ropes=_KNOWN_ROPES,
        varying=frozenset({"kv_heads", "neurons", "without_attention", "without_feed_forward"}),
        head_sizes=frozenset({32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256}),
        neuron_multiple={"": 64},
        query_multiple={"": 64},
        hidden_multiple={"": 64},
    ),
)


def takes_of(flow: str) -> Takes:
    """The rules of a flow; raises BadInput where none of that name is known."""
    known = {each.flow: each for each in _TAKES}
    if flow not in known:
        close = difflib.get_close_matches(flow, known, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise BadInput(f"'{flow}' is not a flow; known are {', '.join(known)}{hint}")
    return known[flow]
