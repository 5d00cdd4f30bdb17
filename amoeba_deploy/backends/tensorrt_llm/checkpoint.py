"""A TensorRT-LLM checkpoint (form B): ``config.json``, and ``rank{r}.safetensors`` for each GPU.

It is what ``trtllm-build`` of the releases 0.12 to 1.2 compiles. Tensors are cut from the dense folder part by part, so
a checkpoint of any size passes through a few megabytes of memory. Names, splits and keys follow TensorRT-LLM's own
converters (``models/llama/convert.py``, ``models/qwen/convert.py``, ``models/nemotron_nas/convert.py``):

- queries, keys and values of a GPU's own heads are one matrix, in this order;
- ``fc`` is gate_proj, ``gate`` is up_proj, ``proj`` is down_proj;
- rows of qkv, fc, gate and the head are split, columns of dense and proj; their biases are whole on every GPU, and
  are added once, after the GPUs' products were summed (``RowLinear.collect_and_bias``);
- blocks are numbered within their stage; the embedding is on the first stage, the last norm and the head on the last;
- the head is always written, and gets rows of zeros until ``tp`` divides them.

Blocks of different sizes are a ``DeciLMForCausalLM``, whose feed-forward is called ``ffn``; a sublayer that a block
lacks has neither matrices nor norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_deploy.architecture import Architecture, Rope
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping, Rank, key_value_heads
from amoeba_deploy.errors import BadInput
from amoeba_deploy.extraction.cutting import Cut, cut_source
from amoeba_deploy.extraction.native_layouts import DeciBlocks
from amoeba_deploy.extraction.ragged import BlockSizes
from amoeba_deploy.files import write_json
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.tensors import CONFIG_DTYPES, Part, TensorSource, write_tensors

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "w8a16": "float16", "w4a16": "float16"}
"""Of the weights as they are written; TensorRT-LLM quantises them while it loads them."""
ALGORITHMS = {"w8a16": "W8A16", "w4a16": "W4A16"}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DECI = "DeciLMForCausalLM"


def checkpoint_config(model: ModelFolder, precision: str, mapping: Mapping) -> dict[str, Any]:
    """``config.json`` of the checkpoint of a dense subnet.

    Every key is written, for TensorRT-LLM's defaults are another model's: activation gelu, learned positions, biases
    for every Qwen.
    """
    sizes = model.architecture
    blocks = model.blocks or (BlockSizes(sizes.heads, sizes.kv_heads, sizes.neurons),)
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES[sizes.family] if model.blocks is None else DECI,
        "dtype": DTYPES[precision],
        "logits_dtype": "float32",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": max(block.heads for block in blocks),
        "num_key_value_heads": max(block.kv_heads for block in blocks),
        "head_size": sizes.head_dim,
        "intermediate_size": max(block.neurons for block in blocks),
        "vocab_size": sizes.vocabulary,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "norm_epsilon": sizes.norm_epsilon,
        "max_position_embeddings": sizes.context,
        "rotary_base": sizes.rope.theta,
        "rotary_scaling": rotary_scaling(sizes.rope),
        "attn_bias": sizes.qkv_bias,
        "mlp_bias": sizes.mlp_bias,
        "qk_layernorm": sizes.qk_norm,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": mapping.to_json(),
        "quantization": {"quant_algo": ALGORITHMS.get(precision), "kv_cache_quant_algo": None},
    }
    if model.blocks is not None:
        config["layer_configs"] = DeciBlocks(config["num_attention_heads"], model.blocks).layer_configs()
    elif sizes.family.startswith("qwen"):
        config["qwen_type"] = sizes.family
    return config


def rotary_scaling(rope: Rope) -> dict[str, Any] | None:
    """Rotary scaling with its kind under both names, of which releases read one or the other; None for the plain."""
    if rope.kind == "default":
        return None
    return {"type": rope.kind, "rope_type": rope.kind, **dict(rope.settings)}


def check_blocks(model: ModelFolder) -> None:
    """Raise BadInput where blocks of different sizes are not as DeciLM takes them."""
    if model.blocks is None:
        return
    sizes, heads = model.architecture, {block.heads for block in model.blocks if block.heads}
    if len(heads) > 1:
        raise BadInput(
            f"{model.path}: its blocks have {' and '.join(map(str, sorted(heads)))} query heads, where DeciLM takes "
            f"one number; extract the subnet for this flow, which pads them"
        )
    if sizes.qkv_bias or sizes.qk_norm or any(".bias" in n for i in range(sizes.depth) for n in model.block_shapes(i)):
        raise BadInput(f"{model.path}: its blocks differ, and DeciLM has neither biases nor norms of query and key")


def write_checkpoint(model: ModelFolder, folder: Path, precision: str, mapping: Mapping) -> None:
    """Write the checkpoint of a dense subnet into an existing folder.

    Raises:
        BadInput: its blocks are not as DeciLM takes them, or a weight is beyond the numbers of float16.
    """
    check_blocks(model)
    write_json(folder / "config.json", checkpoint_config(model, precision, mapping))
    for rank in mapping.ranks():
        write_tensors(folder / rank.file, rank_tensors(model, precision, mapping, rank), {"format": "pt"})


def rank_tensors(model: ModelFolder, precision: str, mapping: Mapping, rank: Rank) -> dict[str, TensorSource]:
    """All tensors of one GPU; values are made when they are written."""
    share = _Share(model, CONFIG_DTYPES[DTYPES[precision]], mapping.tp, rank.place)
    found: dict[str, TensorSource] = {}
    if rank.stage == 0:
        found["transformer.vocab_embedding.weight"] = share.cut("model.embed_tokens.weight")
    for local, index in enumerate(mapping.layers(model.architecture.depth, rank.stage)):
        found |= {f"transformer.layers.{local}.{name}": source for name, source in share.block(index)}
    if rank.stage == mapping.pp - 1:
        found["transformer.ln_f.weight"] = share.cut("model.norm.weight")
        found["lm_head.weight"] = share.head()
    return found


class _Share:
    """What one of ``tp`` GPUs gets of a model's tensors."""

    def __init__(self, model: ModelFolder, dtype: str, tp: int, place: int) -> None:
        self.model, self.dtype, self.tp, self.place = model, dtype, tp, place

    def cut(self, name: str, rows: Cut | None = None, columns: Cut | None = None) -> TensorSource:
        """Some rows and columns of a tensor."""
        cuts = (rows, columns)[: len(self.model.tensors.info(name).shape)]
        return cut_source(self.model.tensors, name, cuts, self.dtype)

    def own(self, count: int, size: int = 1) -> Cut:
        """This GPU's share of so many units."""
        share = count // self.tp
        return Cut(np.arange(self.place * share, (self.place + 1) * share), size)

    def head(self) -> TensorSource:
        """This GPU's rows of the output head, the embedding where the two are tied."""
        sizes = self.model.architecture
        share = -(-sizes.vocabulary // self.tp)
        rows = np.arange(self.place * share, (self.place + 1) * share)
        name = "model.embed_tokens.weight" if sizes.tied else "lm_head.weight"
        return self.cut(name, Cut(np.where(rows < sizes.vocabulary, rows, -1), 1))

    def block(self, index: int) -> Iterator[tuple[str, TensorSource]]:
        """Names (after ``transformer.layers.{i}.``) and sources of one block."""
        model = self.model
        block = _sizes_of(model, index)
        prefix, names = f"model.layers.{index}.", set(model.block_shapes(index))
        if block.heads:
            yield "input_layernorm.weight", self.cut(prefix + "input_layernorm.weight")
            yield from self._attention(prefix, names, block, model.architecture)
        if block.neurons:
            yield "post_layernorm.weight", self.cut(prefix + "post_attention_layernorm.weight")
            yield from self._feed_forward(prefix, names, block, "mlp" if model.blocks is None else "ffn")

    def _attention(
        self, prefix: str, names: set[str], block: BlockSizes, sizes: Architecture
    ) -> Iterator[tuple[str, TensorSource]]:
        queries = self.own(block.heads, sizes.head_dim)
        keys = Cut(np.array(key_value_heads(block.kv_heads, self.tp, self.place)), sizes.head_dim)
        rows = (("q", queries), ("k", keys), ("v", keys))
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in names:
                parts = [self.cut(f"{prefix}self_attn.{part}_proj.{kind}", cut) for part, cut in rows]
                yield f"attention.qkv.{kind}", stacked(parts)
        if "self_attn.q_norm.weight" in names:
            yield "attention.q_layernorm.weight", self.cut(prefix + "self_attn.q_norm.weight")
            yield "attention.k_layernorm.weight", self.cut(prefix + "self_attn.k_norm.weight")
        yield "attention.dense.weight", self.cut(prefix + "self_attn.o_proj.weight", None, queries)
        if "self_attn.o_proj.bias" in names:
            yield "attention.dense.bias", self.cut(prefix + "self_attn.o_proj.bias")

    def _feed_forward(
        self, prefix: str, names: set[str], block: BlockSizes, called: str
    ) -> Iterator[tuple[str, TensorSource]]:
        neurons = self.own(block.neurons)
        for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj")):
            yield f"{called}.{ours}.weight", self.cut(f"{prefix}mlp.{theirs}.weight", neurons)
            if f"mlp.{theirs}.bias" in names:
                yield f"{called}.{ours}.bias", self.cut(f"{prefix}mlp.{theirs}.bias", neurons)
        yield f"{called}.proj.weight", self.cut(f"{prefix}mlp.down_proj.weight", None, neurons)
        if "mlp.down_proj.bias" in names:
            yield f"{called}.proj.bias", self.cut(f"{prefix}mlp.down_proj.bias")


def _sizes_of(model: ModelFolder, index: int) -> BlockSizes:
    sizes = model.architecture
    return model.blocks[index] if model.blocks else BlockSizes(sizes.heads, sizes.kv_heads, sizes.neurons)


def stacked(sources: list[TensorSource]) -> TensorSource:
    """Sources whose rows follow each other in one tensor."""
    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])

    def parts() -> Iterable[Part]:
        return chain.from_iterable(source.parts() for source in sources)

    return TensorSource(sources[0].dtype, shape, parts)
