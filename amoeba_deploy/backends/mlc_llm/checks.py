"""What MLC-LLM wrote, held against the model it was to write: it exits with 0 also where these differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from amoeba_deploy.backends.mlc_llm.cache import TensorCache, source_values
from amoeba_deploy.backends.mlc_llm.formats import Format
from amoeba_deploy.backends.mlc_llm.layout import Stored
from amoeba_deploy.errors import VerificationFailed
from amoeba_deploy.model_folder import ModelFolder

_REPORTED = "though mlc_llm reported success"


def _entries(tensors: Iterable[Stored], form: Format) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: entry for stored in tensors for name, entry in stored.entries(form).items()}


def check_tensors(cache: TensorCache, tensors: Sequence[Stored], form: Format, depth: int) -> None:
    """Raise VerificationFailed where converted weights are not all of the model's, in its shapes and the format."""
    wanted = _entries(tensors, form)
    blocks = {name.split(".")[2] for name in cache.records if name.startswith("model.layers.")}
    if len(blocks) != depth:
        raise VerificationFailed(
            f"mlc_llm convert_weight wrote {len(blocks)} blocks where the subnet has {depth}, {_REPORTED}"
        )
    for name in (*sorted(wanted.keys() - cache.records.keys()), *sorted(cache.records.keys() - wanted.keys())):
        what = "did not write" if name in wanted else "wrote the unknown tensor"
        raise VerificationFailed(f"mlc_llm convert_weight {what} '{name}', {_REPORTED}")
    for name, (shape, dtype) in wanted.items():
        found = cache.records[name]
        if found.shape != shape or found.dtype != dtype:
            raise VerificationFailed(
                f"mlc_llm convert_weight wrote '{name}' as {found.dtype} {list(found.shape)} where {dtype} "
                f"{list(shape)} belongs"
            )


def check_values(cache: TensorCache, model: ModelFolder, tensors: Sequence[Stored], form: Format) -> None:
    """Raise VerificationFailed where a stored tensor is not the model's own.

    What is not packed must be the model's numbers, rounded to the format's dtype and no further (norms beside packed
    matrices in float32 are rounded to bfloat16 by MLC). Packed matrices may be off by what rounding to their bits does.
    """
    for stored in tensors:
        own, held = source_values(model, stored), cache.values(stored, form)
        if not np.isfinite(held).all():
            raise VerificationFailed(
                f"the tensor '{stored.name}' does not fit {form.dtype}: some of its numbers are infinite; choose "
                f"another precision"
            )
        packed = form.group is not None and stored.columns is not None
        norm = float(np.linalg.norm(own))
        error = float(np.linalg.norm(own - held)) / norm if norm else float(np.abs(held).max())
        allowed = _allowed_error(form, packed)
        if not error <= allowed:
            raise VerificationFailed(
                f"the tensor '{stored.name}' that mlc_llm convert_weight wrote is {error:.2%} off the subnet's, where "
                f"rounding explains {allowed:.2%}"
            )


def _allowed_error(form: Format, packed: bool) -> float:
    if packed:
        return 4 * 2.0**-form.bits  # as verification.allowed_weight_error has it
    if form.half:
        return 2.0**-10  # float16 keeps 11 bits; small numbers, which it keeps less of, weigh little
    return 0.0 if form.group is None else 2.0**-8


def check_config(config: Mapping[str, Any], precision: str, settings: Mapping[str, Any]) -> None:
    """Raise VerificationFailed where ``mlc-chat-config.json`` is not of the model, precision and limits asked for."""
    if config.get("quantization") != precision:
        raise VerificationFailed(f"mlc_llm gen_config wrote the format {config.get('quantization')}, not {precision}")
    found = config.get("model_config")
    inner = found if isinstance(found, dict) else {}
    for name, value in settings.items():
        # MLC's classes that always tie, or never, do not state it; tensors tell.
        if name == "tie_word_embeddings" and name not in inner:
            continue
        if not _same(inner.get(name), value):
            raise VerificationFailed(
                f"mlc_llm gen_config wrote {name} = {inner.get(name)!r} where the subnet has {value!r}, {_REPORTED}"
            )


def _same(found: Any, wanted: Any) -> bool:
    """Equal, where 10000 is 10000.0 and a rotary scaling may have entries beside those wanted."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_same(found.get(key), value) for key, value in wanted.items())
    return bool(found == wanted)


def check_metadata(
    metadata: Mapping[str, Any],
    precision: str,
    settings: Mapping[str, Any],
    tensors: Sequence[Stored],
    form: Format,
) -> None:
    """Raise VerificationFailed where a compiled library's own metadata is not of the model."""
    cache = metadata.get("kv_cache")
    found: dict[str, Any] = dict(metadata) | (cache if isinstance(cache, dict) else {})
    wanted = {"quantization": precision} | {
        name: settings[name]
        for name in (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "context_window_size",
            "prefill_chunk_size",
            "max_batch_size",
        )
    }
    for name, value in wanted.items():
        if found.get(name) != value:
            raise VerificationFailed(
                f"mlc_llm compile built a library of {name} = {found.get(name)!r} where {value!r} belongs, {_REPORTED}"
            )
    listed = {str(entry.get("name")): entry for entry in metadata.get("params", ()) if isinstance(entry, dict)}
    entries = _entries(tensors, form)
    if listed.keys() != entries.keys():
        odd = min(listed.keys() ^ entries.keys())
        raise VerificationFailed(f"the library that mlc_llm compile built and the weights differ in the tensor '{odd}'")
    for name, (shape, dtype) in entries.items():
        sizes = [settings["vocab_size"] if size == "vocab_size" else size for size in listed[name].get("shape", ())]
        if sizes != list(shape) or listed[name].get("dtype") != dtype:
            raise VerificationFailed(
                f"the library that mlc_llm compile built takes '{name}' as {listed[name].get('dtype')} {sizes}, and "
                f"the weights hold {dtype} {list(shape)}"
            )
