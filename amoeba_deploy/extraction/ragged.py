"""Ragged subnets: every block with its own numbers of heads and neurons, sublayers without any left out.

No stock class holds one, so its folder brings a small modelling file, ``modeling_amoeba.py``, which builds stock layers
block by block, and a config of its own ``model_type``: who does not trust the file gets an error, never a wrong model.
The config's other entries are those of the model that it was cut from, its numbers of heads and neurons too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from amoeba_deploy.architecture import Architecture
from amoeba_deploy.errors import BadInput
from amoeba_deploy.families.family import OUTPUT_BIASES, RAGGED, Family, Tensors
from amoeba_deploy.plan import Plan

MODELLING_FILE = Path(__file__).parent / "modeling_amoeba.py"
AUTO_MAP = {
    "AutoConfig": f"{MODELLING_FILE.stem}.AmoebaRaggedConfig",
    "AutoModelForCausalLM": f"{MODELLING_FILE.stem}.AmoebaRaggedForCausalLM",
}
Layout = Literal["uniform", "ragged"]
"""Blocks padded to the widest, or each in its own size."""
_HEADS, _KV_HEADS, _NEURONS = "num_attention_heads", "num_key_value_heads", "intermediate_size"


@dataclass(frozen=True)
class BlockSizes:
    """How many query heads, key/value heads and neurons one block has; a sublayer without any is not there."""

    heads: int
    kv_heads: int
    neurons: int

    def of(self, architecture: Architecture) -> Architecture:
        """The sizes of a model of one such block."""
        return replace(architecture, depth=1, heads=self.heads, kv_heads=self.kv_heads, neurons=self.neurons)


def plan_sizes(plan: Plan) -> tuple[BlockSizes, ...]:
    """What each block of a plan keeps."""
    return tuple(BlockSizes(len(b.heads), len(b.kv_heads), len(b.neurons)) for b in plan.blocks)


def is_ragged(config: dict[str, Any]) -> bool:
    """Whether a config is of a ragged subnet."""
    return config.get("model_type") == RAGGED


def has_output_bias(config: dict[str, Any]) -> bool:
    """Whether every o_proj and down_proj of a ragged subnet has a bias, whatever its family."""
    return bool(config.get("output_bias", False))


def read_block_sizes(config: dict[str, Any], depth: int) -> tuple[BlockSizes, ...]:
    """The sizes of each block that a ragged subnet's config states; raises BadInput where they make no sense."""
    entries = config.get("block_sizes")
    if not isinstance(entries, list) or len(entries) != depth:
        raise BadInput(f"config.json must have {depth} entries in block_sizes, one for each block")
    found = []
    for index, entry in enumerate(entries):
        numbers = [entry.get(key) if isinstance(entry, dict) else None for key in (_HEADS, _KV_HEADS, _NEURONS)]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise BadInput(f"config.json: block_sizes[{index}] must have whole {_HEADS}, {_KV_HEADS} and {_NEURONS}")
        heads, kv_heads, neurons = (int(number) for number in numbers if number is not None)
        if bool(heads) != bool(kv_heads) or (kv_heads and heads % kv_heads) or not (heads or neurons):
            raise BadInput(
                f"config.json: block_sizes[{index}] has {heads} query heads, {kv_heads} key/value heads and {neurons} "
                f"neurons, which no block can have"
            )
        found.append(BlockSizes(heads, kv_heads, neurons))
    if not any(block.heads for block in found):
        raise BadInput("config.json: block_sizes has no block with attention")
    return tuple(found)


def refuse_ragged(config: dict[str, Any], where: Path) -> None:
    """Raise BadInput where a config is of a ragged subnet: that is run and lowered, not cut again."""
    if is_ragged(config):
        raise BadInput(f"{where}: is a ragged subnet, whose blocks differ; give the model that it was cut from")


def ragged_config(config: dict[str, Any], blocks: Sequence[BlockSizes], output_bias: bool) -> dict[str, Any]:
    """The config of a ragged subnet, from that of its kept blocks with all of their heads and neurons."""
    # transformers 4 does not load this folder, and version 5 warns where rotary settings stand in both spellings.
    shared = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    return shared | {
        "model_type": RAGGED,
        "base_model_type": config["model_type"],
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].partition(".")[2]],
        "auto_map": AUTO_MAP,
        "block_sizes": [{_HEADS: b.heads, _KV_HEADS: b.kv_heads, _NEURONS: b.neurons} for b in blocks],
        "output_bias": output_bias,
    }


def _is_in_front(name: str, names: Iterable[str]) -> bool:
    """Whether a norm stands in front of its sublayer, or else is of what that gives (``norms_around`` there)."""
    return not (name.startswith("post_") and any("feedforward" in other for other in names))


def _is_of_attention(name: str, names: Iterable[str]) -> bool:
    if name.startswith(("self_attn.", "input_layernorm.")):
        return True
    return name.startswith("post_attention_layernorm.") and not _is_in_front(name, names)


def block_tensors(family: Family, architecture: Architecture, block: BlockSizes, output_bias: bool) -> Tensors:
    """Names and axes of the tensors of one block of a ragged subnet, in the order in which they are written.

    Of a sublayer without units nothing is left, or, where outputs have biases, that bias and the norm that reads it.
    """
    own = family.block_tensors(architecture)
    names = tuple(own)
    wanted: Tensors = own | (dict.fromkeys(OUTPUT_BIASES, ("hidden",)) if output_bias else {})

    def stays(name: str) -> bool:
        if block.heads if _is_of_attention(name, names) else block.neurons:
            return True
        return output_bias and (name in OUTPUT_BIASES or ("layernorm" in name and not _is_in_front(name, names)))

    return {name: axes for name, axes in wanted.items() if stays(name)}


def require_own_file(folder: Path, config: dict[str, Any]) -> None:
    """Raise BadInput where a ragged folder would make transformers run another file than the one of this package."""
    file = folder / MODELLING_FILE.name
    same = file.is_file() and file.read_bytes() == MODELLING_FILE.read_bytes()
    if not same or config.get("auto_map") != AUTO_MAP:
        raise BadInput(
            f"{folder}: its {MODELLING_FILE.name} is not the one of this version of Amoeba, whose code alone is run; "
            f"extract the subnet again"
        )
