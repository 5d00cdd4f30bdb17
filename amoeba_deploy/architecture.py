"""The sizes of a decoder-only language model, as its config states them, and what follows from them.

An ``Architecture`` is enough to count parameters, bytes and FLOPs of any subnet: nothing here reads weights, and
nothing heavy is imported, so searches over a shape space work from a config alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from amoeba_deploy.errors import BadInput


@dataclass(frozen=True)
class Rope:
    """Rotary position settings: the base, the kind of scaling, and that kind's own settings (sorted pairs)."""

    theta: float = 10000.0
    kind: str = "default"
    settings: tuple[tuple[str, Any], ...] = ()

    def setting(self, name: str) -> Any:
        """One setting of the scaling, by its name in the config; raises BadInput where it is missing."""
        found = dict(self.settings)
        if name not in found:
            raise BadInput(f"the config's rotary scaling '{self.kind}' lacks '{name}'; complete config.json")
        return found[name]


Dim = Literal["hidden", "head", "query", "key_value", "neuron"]
"""What an axis of a tensor counts: hidden channels, channels of one head, rows of all query heads, rows of all
key/value heads, or neurons."""


HeadRule = Literal["any", "divides", "all"]


@dataclass(frozen=True)
class Scales:
    """Constant factors of a forward pass that are one, or follow from the head size, in most families.

    Embeddings and what each sublayer adds are multiplied by theirs, logits are divided by theirs; ``attention``
    multiplies scores, head_dim**-0.5 where it is None.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """Sizes of one model: ``depth`` blocks of ``heads`` query heads, ``kv_heads`` key/value heads and ``neurons``."""

    family: str
    depth: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocabulary: int
    context: int
    tied: bool
    norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    norms: int = 2
    """RMS norms over the hidden size in a block."""
    head_rule: HeadRule = "any"
    """How many heads a subnet may keep: any groups, those whose query heads divide the hidden size, or ``all``, because
    norms span all query or key heads together (``qk_norm`` then means those) or the stock class takes no other."""
    scales: Scales = Scales()
    traits: tuple[str, ...] = ()
    """What its forward pass does beyond the common block, by name; an engine that does not know one refuses."""

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def block_matrix_parameters(self) -> int:
        """Weights in the seven matrices of one block."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.neurons

    @property
    def block_other_parameters(self) -> int:
        """Norms and biases of one block."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = (query + key_value) if self.head_rule == "all" else 2 * self.head_dim
        count = self.norms * self.hidden + (norms if self.qk_norm else 0)
        count += (query + 2 * key_value) if self.qkv_bias else 0
        count += self.hidden if self.output_bias else 0
        return count + (2 * self.neurons + self.hidden if self.mlp_bias else 0)

    @property
    def block_parameters(self) -> int:
        """All parameters of one block."""
        return self.block_matrix_parameters + self.block_other_parameters

    def extent(self, dims: Dim | tuple[Dim, ...]) -> int:
        """The length of an axis; a fused axis has several dims, one behind the other."""
        if isinstance(dims, tuple):
            return sum(self.extent(dim) for dim in dims)
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes: dict[Dim, int] = {"hidden": self.hidden, "head": self.head_dim, "query": query}
        return (sizes | {"key_value": key_value, "neuron": self.neurons})[dims]

    @property
    def embedding_parameters(self) -> int:
        """The token embedding, counted once; a tied output head adds nothing."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Every parameter of the model; a tied output head is counted once."""
        tables = self.embedding_parameters * (1 if self.tied else 2)
        return tables + self.depth * self.block_parameters + self.hidden

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the key/value cache, over all blocks."""
        return 2 * self.depth * self.kv_heads * self.head_dim

    def subnet(self, depth: int, kv_heads: int, neurons: int) -> Architecture:
        """The architecture that keeps ``depth`` blocks with so many key/value heads and neurons each."""
        return replace(self, depth=depth, kv_heads=kv_heads, heads=kv_heads * self.group, neurons=neurons)

    @property
    def digest(self) -> str:
        """sha256 over all sizes: two models with equal digests have equal latencies, whatever their weights."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def rope_from_config(config: dict[str, Any]) -> Rope:
    """Read rotary settings in either spelling.

    transformers 5 writes ``rope_parameters`` (base and scaling together); older files ``rope_theta`` and
    ``rope_scaling``. Where both stand, the newer one wins, as in transformers 5.
    """
    scaling = dict(config.get("rope_scaling") or {})
    scaling.update(config.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    old_kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or old_kind or "default"
    return Rope(float(theta), str(kind), tuple(sorted((name, _frozen(value)) for name, value in scaling.items())))


def _frozen(value: Any) -> Any:
    """A setting that can be compared and hashed: lists as tuples, objects as their sorted pairs."""
    if isinstance(value, dict):
        return tuple(sorted((name, _frozen(inner)) for name, inner in value.items()))
    return tuple(_frozen(inner) for inner in value) if isinstance(value, list) else value


def positive(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1 from a config; raises BadInput with the key's name otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json has {key} = {value!r}, where a whole number of at least 1 belongs")
    return value
