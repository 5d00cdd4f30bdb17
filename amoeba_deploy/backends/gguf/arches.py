"""llama.cpp's architectures: which one computes a subnet, and what its file says of it.

Each family goes to the architecture whose graph is the same function, read in llama.cpp's own sources
(``src/models/*.cpp``); what that graph lacks is refused. Llama, Mistral, Qwen2, Phi-3 and a SmolLM3 that rotates
everywhere are one block, so all are written as ``llama``: its graph adds every bias and takes any number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.gguf.rotary import FACTORED
from amoeba_deploy.extraction.ragged import BlockSizes, has_output_bias
from amoeba_deploy.families import gemma3_text

NO_ROTATION = "attention without rotary positions"
GELU = "feed-forward with GELU"
TRAITS = frozenset(
    {
        "constant scaling",
        "fused query, key and value matrix",
        "partial rotary turn",
        NO_ROTATION,
        "norm behind each sublayer",
        "norm over all heads together",
        "norm of weight one plus its tensor",
        "soft-capping",
        "second rotary base",
        GELU,
    }
)


@dataclass(frozen=True)
class Arch:
    """What the graph of one of llama.cpp's architectures can do."""

    name: str
    interleaved: bool = False
    """Whether it turns neighbouring channels, so that rows of queries and keys change places."""
    factored: bool = False
    """Whether it reads ``rope_freqs.weight``."""
    output_biases: bool = False
    """Whether it adds biases on o_proj and in the feed-forward; all add those on queries, keys and values."""
    heads_fill: bool = False
    """Whether it insists that all heads together are as wide as the hidden size."""
    tied: bool | None = None
    """Whether the output head must be the embedding, or must not; None: either."""
    gemma: bool = False
    """Whether it is one of Gemma's: blocks with a sliding window, norms of one plus their tensor, GELU from a table."""
    norms: Mapping[str, str] | None = None
    """Its names of norms, where they are not those of ``llama``."""


_COMMON_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OLMO_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
LLAMA = Arch("llama", interleaved=True, factored=True, output_biases=True)
DECI = Arch("deci", interleaved=True, factored=True, output_biases=True)
_BY_FAMILY = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "phi3": LLAMA,
    "granite": Arch("granite", interleaved=True, factored=True, output_biases=True),
    "smollm3": Arch("smollm3", interleaved=True),
    "qwen3": Arch("qwen3"),
    "olmo2": Arch("olmo2", heads_fill=True, tied=False, norms=_OLMO_NORMS),
    "gemma2": Arch("gemma2", tied=True, gemma=True, norms=_GEMMA_NORMS),
    "gemma3_text": Arch("gemma3", gemma=True, norms=_GEMMA_NORMS),
}
FAMILIES = frozenset(_BY_FAMILY)
INEXACT = frozenset(arch.name for arch in _BY_FAMILY.values() if arch.gemma)
"""Architectures that are not exact in float32 either."""
_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def arch_of(sizes: Architecture) -> Arch:
    """The architecture that computes a subnet whose blocks are alike."""
    if sizes.family == "smollm3" and NO_ROTATION not in sizes.traits:
        return LLAMA
    return _BY_FAMILY[sizes.family]


def takes_differing(sizes: Architecture) -> bool:
    """Whether blocks may differ: ``deci`` computes what ``llama`` does, block by block."""
    return arch_of(sizes) is LLAMA


def file_arch(sizes: Architecture, blocks: tuple[BlockSizes, ...] | None) -> Arch:
    """The architecture of the file: ``deci`` where blocks differ."""
    return DECI if blocks and len(set(blocks)) > 1 else arch_of(sizes)


def tensor_name(arch: Arch, block: int, name: str) -> str:
    """The name in the file of a tensor of the common block, such as ``mlp.gate_proj.weight``."""
    stem, _, kind = name.rpartition(".")
    known = _MATRICES | dict(arch.norms or _COMMON_NORMS)
    return f"blk.{block}.{known[stem]}.{kind}"


def refusal(sizes: Architecture, precision: str, context: int) -> str | None:
    """Why no architecture computes a subnet of these sizes in a context, as half a sentence, or None."""
    arch = arch_of(sizes)
    if precision == "fp32" and GELU in sizes.traits:
        return (
            f"its {GELU} is read by llama.cpp from a table of 16-bit numbers on CPUs, so that fp32 would not be exact; "
            f"choose fp16"
        )
    biased = sizes.output_bias or sizes.mlp_bias
    if biased and not arch.output_biases:
        return f"its biases on o_proj or the feed-forward are not something that llama.cpp's '{arch.name}' adds"
    if arch.heads_fill and sizes.heads * sizes.head_dim != sizes.hidden:
        return (
            f"its heads are {sizes.heads * sizes.head_dim} channels wide together, where llama.cpp's '{arch.name}' "
            f"insists on the hidden size {sizes.hidden}"
        )
    if arch.tied not in (None, sizes.tied):
        other = "the embedding" if sizes.tied else "a matrix of its own"
        return f"its output head is {other}, which llama.cpp's '{arch.name}' does not take"
    return _positions_refusal(arch, sizes, context)


def _positions_refusal(arch: Arch, sizes: Architecture, context: int) -> str | None:
    kind, window = sizes.rope.kind, sizes.sliding_window
    if kind not in (FACTORED if arch.factored else ("default", "linear")):
        return f"its rotary scaling '{kind}' is not something that llama.cpp's '{arch.name}' computes"
    if window is not None and window < context and not arch.gemma:
        return (
            f"its sliding window of {window} positions is shorter than the context of {context}, which llama.cpp's "
            f"'{arch.name}' would get wrong without a word; ask for --context {window} or less"
        )
    if kind == "longrope":
        short = int(sizes.rope.setting("original_max_position_embeddings"))
        if short < context:
            return (
                f"its rotary scaling 'longrope' changes with the length of the text beyond {short} positions, and "
                f"llama.cpp's does not; ask for --context {short} or less"
            )
    return None


def config_refusal(sizes: Architecture, config: Mapping[str, Any]) -> str | None:
    """Why what only the config says is not what the architecture computes, as half a sentence, or None.

    llama.cpp's ``smollm3`` leaves every fourth block without rotary positions, whatever the file says; its ``gemma3``
    neither caps scores nor scales the positions of blocks with a window.
    """
    if has_output_bias(dict(config)) and not arch_of(sizes).output_biases:
        return (
            f"its biases on o_proj and down_proj are not something that llama.cpp's '{arch_of(sizes).name}' adds; "
            f"choose --bias off"
        )
    if sizes.family == "gemma3_text":
        if config.get("attn_logit_softcapping"):
            return "its soft-capping of scores is not something that llama.cpp's 'gemma3' computes"
        local = gemma3_text.ropes_of(dict(config))["sliding_attention"]
        if local.kind != "default":
            return f"llama.cpp's 'gemma3' does not scale the positions of blocks with a window, as '{local.kind}' asks"
    if sizes.family != "smollm3" or NO_ROTATION not in sizes.traits:
        return None
    found = [bool(rotary) for rotary in config["no_rope_layers"][: sizes.depth]]
    if found == [bool((index + 1) % 4) for index in range(sizes.depth)]:
        return None
    still = ", ".join(str(index) for index, rotary in enumerate(found) if not rotary)
    return (
        f"its blocks without rotary positions are {still}, where llama.cpp's 'smollm3' takes every fourth one; "
        f"keep all blocks"
    )


def blocks_refusal(sizes: Architecture, blocks: tuple[BlockSizes, ...]) -> str | None:
    """Why a ragged folder's blocks are not written as they are, as half a sentence, or None; ``lower_plan`` pads them.

    Of a layer without neurons llama.cpp leaves out the attention too, without a word.
    """
    empty = [index for index, block in enumerate(blocks) if not block.neurons]
    if empty:
        return (
            f"its block {empty[0]} has no neurons, for which llama.cpp leaves out its attention too; pad it with zeros"
        )
    if len(set(blocks)) > 1 and not takes_differing(sizes):
        return (
            f"its blocks differ, and llama.cpp's 'deci', which takes such, does not compute a {sizes.family}; pad them "
            f"to the widest"
        )
    return None


def metadata(
    sizes: Architecture, arch: Arch, blocks: tuple[BlockSizes, ...], config: Mapping[str, Any], context: int
) -> dict[str, Any]:
    """What the file says of the model, by its keys after the architecture's name; each value's type is its Python one.

    Key and value lengths always stand there: without them readers take hidden size / heads of the first block.
    """
    first, differ = blocks[0], arch is DECI
    rope = sizes.rope
    found: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "context_length": context,
        "embedding_length": sizes.hidden,
        "block_count": sizes.depth,
        "feed_forward_length": [block.neurons for block in blocks] if differ else first.neurons,
        "attention.head_count": [block.heads for block in blocks] if differ else first.heads,
        "attention.head_count_kv": [block.kv_heads for block in blocks] if differ else first.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": float(sizes.norm_epsilon),
        "rope.dimension_count": sizes.head_dim,
        "rope.freq_base": float(rope.theta),
    }
    if rope.kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.setting("factor"))}
    if arch.name == "granite":
        scales = sizes.scales
        found |= {
            "embedding_scale": scales.embedding,
            "attention.scale": sizes.head_dim**-0.5 if scales.attention is None else scales.attention,
            "residual_scale": scales.residual,
            "logit_scale": scales.logits,
        }
    return found | (_gemma(sizes, arch, config) if arch.gemma else {})


UNCAPPED = 1e6
"""A soft cap that changes nothing in float32: gemma2's graph caps always."""


def _gemma(sizes: Architecture, arch: Arch, config: Mapping[str, Any]) -> dict[str, Any]:
    windowed = [kind == "sliding_attention" for kind in config["layer_types"][: sizes.depth]]
    final = config.get("final_logit_softcapping")
    found: dict[str, Any] = {}
    if any(windowed):
        found |= {
            "attention.sliding_window": int(config["sliding_window"]),
            "attention.sliding_window_pattern": windowed,
        }
    if arch.name == "gemma3" and any(windowed):
        found["rope.freq_base_swa"] = float(gemma3_text.ropes_of(dict(config))["sliding_attention"].theta)
    if arch.name == "gemma2":
        if not any(windowed):
            found |= {"attention.sliding_window": sizes.context, "attention.sliding_window_pattern": windowed}
        found["attn_logit_softcapping"] = float(config.get("attn_logit_softcapping") or UNCAPPED)
        found["final_logit_softcapping"] = float(final or UNCAPPED)
    elif final:
        found["final_logit_softcapping"] = float(final)
    return found


def adjustments(sizes: Architecture) -> tuple[float, float]:
    """What scores must be multiplied by beyond what the graph does, and what norms' tensors lack.

    Gemma's graphs scale scores by head_dim**-0.5, or in models of 46 (Gemma 2) and 62 (Gemma 3) blocks by
    (hidden / heads)**-0.5, whatever the config says. All others take the scale from the file or need none.
    """
    arch = arch_of(sizes)
    if not arch.gemma:
        return 1.0, 0.0
    special = sizes.depth == (46 if arch.name == "gemma2" else 62)
    own = (sizes.hidden // sizes.heads if special else sizes.head_dim) ** -0.5
    return (sizes.scales.attention or own) / own, 1.0
