"""Which form is written, and which sizes each takes.

- form A: the dense Hugging Face folder and its serving files; TensorRT-LLM 1.0 and later loads it directly.
- form B: a TensorRT-LLM checkpoint, which ``trtllm-build`` of the releases 0.12 to 1.2 compiles to engines.
- edge: the dense folder for TensorRT Edge-LLM, which is what runs on a Jetson.
"""

from __future__ import annotations

import re
from typing import Literal

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends.backend import BuildOptions, Setting
from amoeba_deploy.backends.tensorrt_llm.mapping import Mapping

Form = Literal["A", "B", "edge"]
_Counts = tuple[tuple[int, str], ...]

JETSON = frozenset({"sm_87"})
WEIGHT_ONLY = frozenset({"w8a16", "w4a16"})
SETTINGS = {
    "form": Setting("auto", "A: a Hugging Face folder, B: a checkpoint for trtllm-build", ("auto", "A", "B")),
    "tp": Setting("1", "GPUs that share each block (tensor parallel)"),
    "pp": Setting("1", "stages of blocks on GPUs of their own (pipeline parallel)"),
    "release": Setting("1.2", "the TensorRT-LLM release that runs it", ("1.3", "1.2", "0.12")),
    "jetpack": Setting("7.2", "JetPack of a Jetson: 7.2 has Edge-LLM 0.9, 6.2 has 0.6", ("7.2", "6.2")),
}
_GENERATION = {"fp16": 70, "bf16": 80, "fp8": 89, "w8a16": 75, "w4a16": 75}
"""The least CUDA generation that computes in a precision."""
_CUDA = re.compile(r"sm_(\d{2,3})[a-z]?", re.ASCII)
_FP8_MULTIPLE = 16
_WEIGHT_ONLY_MULTIPLE = 64
_EDGE_MULTIPLE = 128
_EDGE_HEADS = (64, 128)


def chip_of(options: BuildOptions) -> str | None:
    """The chip that it is built for, where that is known: the one asked for, else this machine's if a Jetson."""
    if options.chip is not None:
        return options.chip
    from amoeba_deploy.profiles.machine import own_chips

    return next((chip for chip in own_chips() if chip in JETSON), None)


def form_of(precision: str, options: BuildOptions) -> Form:
    """The form that a precision is written in: the one asked for, else A, but B for weights in few bits."""
    if chip_of(options) in JETSON:
        return "edge"
    asked = options.settings["form"]
    if asked == "auto":
        return "B" if options.settings["release"] == "0.12" or precision in WEIGHT_ONLY else "A"
    return "A" if asked == "A" else "B"


def mapping_of(options: BuildOptions) -> Mapping:
    """How many GPUs share it."""
    return Mapping(options.number("tp"), options.number("pp"))


def takes_ragged(subnet: Architecture, precision: str, options: BuildOptions) -> bool:
    """Whether blocks of different sizes can stay so: only DeciLM holds them, in form B, without biases and such.

    Its weights are not quantised by TensorRT-LLM's own converter, its release 0.12 does not have it, and in form A it
    is loaded with remote code that is not ours to ship.
    """
    plain = not (subnet.qkv_bias or subnet.output_bias or subnet.mlp_bias or subnet.qk_norm)
    stock = form_of(precision, options) == "B" and options.settings["release"] != "0.12"
    return plain and stock and precision not in WEIGHT_ONLY


def refusal(subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
    """Why the form that follows from the options does not take a subnet, as half a sentence, or None."""
    form = form_of(precision, options)
    return (
        _chip_refusal(precision, chip_of(options))
        or _window_refusal(subnet, options.context)
        or _form_refusal(subnet, precision, form, options.settings["release"])
        or (_edge_refusal(subnet, precision, options) if form == "edge" else None)
        or (_spread_refusal(subnet, precision, mapping_of(options)) if form != "edge" else None)
    )


def _chip_refusal(precision: str, chip: str | None) -> str | None:
    if chip is None:
        return None
    if not chip.startswith("sm_"):
        return f"the device is a {chip}, and TensorRT-LLM runs on NVIDIA GPUs only"
    if chip in JETSON:
        return None
    named, least = _CUDA.fullmatch(chip), _GENERATION[precision]
    if named is None:
        return f"the device's architecture '{chip}' is no CUDA generation; name it as NVIDIA does: sm_90"
    if int(named[1]) < least:
        return f"{precision} needs an NVIDIA GPU of sm_{least} or newer, and the device is {chip}"
    return None


def _window_refusal(subnet: Architecture, context: int) -> str | None:
    if subnet.sliding_window is not None and subnet.sliding_window < context:
        return (
            f"its sliding window of {subnet.sliding_window} positions is shorter than the context of {context}, and "
            f"TensorRT-LLM would attend to all of them; ask for --context {subnet.sliding_window} or less"
        )
    return None


def _form_refusal(subnet: Architecture, precision: str, form: Form, release: str) -> str | None:
    held_by = families.held_by(subnet)
    if held_by.startswith("qwen") and (subnet.output_bias or subnet.mlp_bias):
        return f"it is a {held_by} with biases on o_proj or down_proj, which TensorRT-LLM's class does not have"
    if form == "A" and release == "0.12":
        return "release 0.12 loads no Hugging Face folder; choose --set form=B or a later release"
    if form == "B" and release == "1.3":
        others = "fp16, bf16 or fp8" if precision in WEIGHT_ONLY else "--set form=A"
        return f"release 1.3 has no trtllm-build, which form B needs; choose --set release=1.2, or {others}"
    if form == "A" and precision in WEIGHT_ONLY:
        return f"form A does not quantise weights to {precision} while it loads them; choose --set form=B, or fp8"
    if form == "B" and precision == "fp8":
        return "fp8 in form B needs scales of activations, from calibration; choose form A, which finds them as it runs"
    if form == "B" and release == "0.12" and held_by == "qwen3":
        return "release 0.12 has no Qwen3; choose --set release=1.2"
    return None


def _spread_refusal(subnet: Architecture, precision: str, mapping: Mapping) -> str | None:
    tp, pp = mapping.tp, mapping.pp
    if pp > subnet.depth:
        return f"its {subnet.depth} blocks do not fill pp={pp} stages; choose {subnet.depth} or fewer"
    for count, what in ((subnet.heads, "query heads"), (subnet.neurons, "neurons")):
        if count % tp:
            return f"its {count} {what} do not spread over tp={tp}; {_nearest(count, tp)}"
    if subnet.kv_heads % tp and tp % subnet.kv_heads:
        return f"its {subnet.kv_heads} key/value heads neither divide tp={tp} nor are a multiple of it"
    size = subnet.head_dim
    if precision in WEIGHT_ONLY:
        # TensorRT-LLM's layers round these up to such multiples, and then the checkpoint's matrices do not fit.
        rows = (subnet.heads + 2 * max(subnet.kv_heads, tp)) * size
        wanted = _WEIGHT_ONLY_MULTIPLE * tp
        parts: _Counts = ((subnet.hidden, "hidden channels"), (rows, "rows of queries, keys and values together"))
    elif precision == "fp8":
        wanted = _FP8_MULTIPLE * tp
        parts = ((subnet.hidden, "hidden channels"), (max(subnet.kv_heads, tp) * size, "channels of key heads"))
    else:
        return None
    parts += ((subnet.heads * size, "channels of query heads"), (subnet.neurons, "neurons"))
    return _multiple_refusal(parts, wanted, f"{precision} with tp={tp} needs")


def _multiple_refusal(parts: _Counts, multiple: int, why: str) -> str | None:
    for count, what in parts:
        if count % multiple:
            return f"its {count} {what} are no multiple of {multiple}, which {why}; {_nearest(count, multiple)}"
    return None


def _nearest(count: int, multiple: int) -> str:
    below = count // multiple * multiple
    sizes = [str(size) for size in (below, below + multiple) if size]
    return f"the nearest that it takes {'are' if len(sizes) > 1 else 'is'} {' and '.join(sizes)}"


def _edge_refusal(subnet: Architecture, precision: str, options: BuildOptions) -> str | None:
    if precision not in ("fp16", "w4a16"):
        return (
            f"TensorRT Edge-LLM has no {precision} on {chip_of(options)}; choose fp16, or w4a16 (int4 in groups of 128)"
        )
    if options.settings["form"] != "auto":
        return "a Jetson takes neither form A nor B but TensorRT Edge-LLM's; leave out --set form"
    if mapping_of(options).world_size > 1:
        return "a Jetson has one GPU; leave out --set tp and --set pp"
    if options.settings["jetpack"] == "6.2" and families.held_by(subnet) == "mistral":
        return "it is a mistral, which TensorRT Edge-LLM 0.6 does not know; choose --set jetpack=7.2"
    if subnet.output_bias or subnet.mlp_bias:
        return "TensorRT Edge-LLM does not list models with biases on o_proj and down_proj; choose --bias off"
    if subnet.rope.kind == "linear":
        return "TensorRT Edge-LLM does not list models with linear rotary scaling"
    if subnet.head_dim not in _EDGE_HEADS:
        return f"its head size {subnet.head_dim} is neither 64 nor 128, which TensorRT Edge-LLM's attention takes"
    size = subnet.head_dim
    parts = (
        (subnet.hidden, "hidden channels"),
        (subnet.heads * size, "channels of query heads"),
        (subnet.kv_heads * size, "channels of key heads"),
        (subnet.neurons, "neurons"),
    )
    return _multiple_refusal(parts, _EDGE_MULTIPLE, "TensorRT Edge-LLM needs")
