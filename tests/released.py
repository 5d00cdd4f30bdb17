"""A checkpoint as AmoebaLLM's authors' code saves it, tiny and random, and what their forward pass makes of it.

Both were written from a description of that code, not with its help: ``numpy.save`` of one dict of strategies, metrics,
masks and biases, a PEFT folder of LoRA experts with their gate, and a model that masks the outputs of its linears.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from amoeba_deploy.model_folder import ModelFolder

RATIOS = (1.0, 0.875, 0.75, 0.625)
RANK, ALPHA, EXPERTS, TOP_K = 4, 6, 5, 2
LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
MODULES = "base_model.model.model.layers"
ROUTER = "base_model.lora_sparsemoe.router"
# Kept heads of 6 and neurons of 160 by ratio and block: no two blocks alike, and one without attention.
KEPT = {
    1.0: [(6, 160)] * 4,
    0.875: [(6, 131), (5, 150), (6, 140), (4, 157)],
    0.75: [(4, 120), (3, 133), (6, 101), (5, 90)],
    0.625: [(4, 97), (0, 150), (5, 80), (2, 61)],
}


@dataclass
class Released:
    """What is saved, before it is: tests change it and write it."""

    strategy: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    binary: bool = False
    adapter_folder: str = field(default="adapter_model")

    def write(self, folder: Path) -> Path:
        """Write the files and return the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "dp_selection_strategy.npy", self.strategy, allow_pickle=True)  # type: ignore[arg-type]
        if self.config:
            where = folder / self.adapter_folder
            where.mkdir(exist_ok=True)
            (where / "adapter_config.json").write_text(json.dumps(self.config))
            if self.binary:
                torch.save(self.tensors, where / "adapter_model.bin")
            else:
                save_file(self.tensors, where / "adapter_model.safetensors")
        return folder


def make_released(model: ModelFolder) -> Released:
    """Random files of a model of 4 blocks, 6 heads and 160 neurons."""
    sizes, rng = model.architecture, np.random.default_rng(3)
    blocks = sizes.depth
    strategy: dict[int, Any] = {}
    for removed in range(1, blocks - 1):
        kept = np.ones(blocks)
        kept[1 : 1 + removed] = 0
        strategy[removed] = kept
    masks: dict[str, Any] = {}
    biases: dict[str, Any] = {}
    for block in range(blocks):
        heads, neurons = rng.permutation(sizes.heads), rng.permutation(sizes.neurons)
        at: dict[str, dict[float, Any]] = {"heads": {}, "neurons": {}}
        for ratio in RATIOS:
            kept_heads, kept_neurons = KEPT[ratio][block]
            head, neuron = np.zeros(sizes.heads, np.float32), np.zeros(sizes.neurons)
            head[heads[:kept_heads]], neuron[neurons[:kept_neurons]] = 1, 1
            at["heads"][ratio], at["neurons"][ratio] = np.repeat(head, sizes.head_dim), neuron
        for part, linears in LINEARS.items():
            for linear in linears:
                name, units = f"{MODULES}.{block}.{part}.{linear}", "heads" if part == "self_attn" else "neurons"
                output = linear in ("o_proj", "down_proj")
                masks[name] = None if output else {ratio: mask.copy() for ratio, mask in at[units].items()}
                bias = {r: (0 if r == 1 else 0.3) * rng.standard_normal(sizes.hidden) for r in RATIOS}
                biases[name] = bias if output else None
    metric = {removed: 40.0 - removed for removed in strategy}
    saved = {"strategy": strategy, "metric": metric, "width_mask": masks, "bias": biases}
    return Released(saved, adapter_config(), adapter_tensors(model))


def adapter_config() -> dict[str, Any]:
    """PEFT's usual fields and those of the authors' fork."""
    return {
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_to_transform": None, "lora_alpha": ALPHA,
        "lora_dropout": 0.1, "modules_to_save": None, "peft_type": "LORA", "r": RANK, "rank_pattern": {},
        "alpha_pattern": {}, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", "use_rslora": False,
        "use_dora": False, "use_moe_lora": True, "num_experts": EXPERTS, "top_k": TOP_K,
        "width_choice": "[1,7/8,3/4,5/8]",
    }  # fmt: skip


def adapter_tensors(model: ModelFolder) -> dict[str, torch.Tensor]:
    """All experts and the gate."""
    sizes, made = model.architecture, torch.Generator().manual_seed(5)
    seen = sizes.depth + len(RATIOS)

    def random(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=made)

    found: dict[str, torch.Tensor] = {}
    for block in range(sizes.depth):
        for part, linears in LINEARS.items():
            for linear in linears:
                rows, columns = model.tensors.info(f"model.layers.{block}.{part}.{linear}.weight").shape
                for expert in range(EXPERTS):
                    stem = f"{MODULES}.{block}.{part}.{linear}"
                    found[f"{stem}.lora_A.{expert}.weight"] = random(RANK, columns)
                    found[f"{stem}.lora_B.{expert}.weight"] = random(rows, RANK)
    shapes = {"topkroute_linear.0": (16, seen), "topkroute_linear.1": (EXPERTS, 16), "noise_linear": (EXPERTS, seen)}
    for layer, (rows, columns) in shapes.items():
        found[f"{ROUTER}.{layer}.weight"] = 3 * random(rows, columns)
        found[f"{ROUTER}.{layer}.bias"] = random(rows)
    return found


def gate(released: Released, kept: list[int], ratio: float) -> torch.Tensor:
    """Every expert's share for a shape, without the noise that belongs to training."""
    tensors, depth = released.tensors, 4
    seen = torch.zeros(depth + len(RATIOS))
    seen[kept] = 1
    widths = [float(Fraction(part)) for part in released.config["width_choice"].strip(" []").split(",")]
    seen[depth + widths.index(ratio)] = 1
    inner = tensors[f"{ROUTER}.topkroute_linear.0.weight"] @ seen + tensors[f"{ROUTER}.topkroute_linear.0.bias"]
    logits = tensors[f"{ROUTER}.topkroute_linear.1.weight"] @ inner + tensors[f"{ROUTER}.topkroute_linear.1.bias"]
    best = logits.topk(TOP_K)
    shares = torch.zeros(EXPERTS)
    shares[best.indices] = best.values.softmax(0)
    return shares


def released_logits(
    model: ModelFolder, released: Released, kept: list[int], ratio: float, ids: torch.Tensor, bias: bool = True
) -> torch.Tensor:
    """Logits of the full model as the authors run a subnet: mask times (W x + LoRA), plus the bias."""
    full: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    shares = gate(released, kept, ratio) if released.config.get("use_moe_lora") else None

    def change(name: str) -> Any:
        mask = released.strategy["width_mask"][name]
        added = released.strategy["bias"][name] if bias else None
        if shares is not None:
            factors = [
                sum(s * released.tensors[f"{name}.lora_{f}.{e}.weight"] for e, s in enumerate(shares)) for f in "AB"
            ]
        elif released.config:
            factors = [released.tensors[f"{name}.lora_{f}.weight"] for f in "AB"]
        else:
            factors = []

        def hook(_module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if factors:
                output = output + ALPHA / RANK * (inputs[0] @ factors[0].T) @ factors[1].T
            if mask is not None:
                output = output * torch.tensor(mask[ratio], dtype=torch.float32)
            if added is not None:
                output = output + torch.tensor(added[ratio], dtype=torch.float32)
            return output

        return hook

    layers = full.model.layers
    for block in kept:
        for part, linears in LINEARS.items():
            for linear in linears:
                getattr(getattr(layers[block], part), linear).register_forward_hook(
                    change(f"{MODULES}.{block}.{part}.{linear}")
                )
    full.model.layers = torch.nn.ModuleList(layers[index] for index in kept)
    full.config.num_hidden_layers = len(kept)
    with torch.inference_mode():
        logits: torch.Tensor = full(input_ids=ids, use_cache=False).logits
    return logits
