"""The README.md of a derived model: what it was cut from, how, and how to load it."""

from __future__ import annotations

from typing import Any

from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan


def model_card(model: ModelFolder, plan: Plan, facts: dict[str, Any]) -> str:
    """The model card of a dense subnet, as Markdown with the hub's metadata in front."""
    full = model.architecture
    subnet = plan.subnet(full)
    removed = sorted(set(range(full.depth)) - set(plan.kept_blocks))
    base = str(facts.get("checkpoint", "a local checkpoint"))
    ragged = facts["layout"] == "ragged"
    most = " at most" if ragged else ""
    options = f"--shape {plan.shape}" + (" --policy adaptive" if plan.shape.policy == "adaptive" else "")
    options += " --layout ragged" if ragged else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, amoeba]
---
# {base}, shape {plan.shape}

A dense subnet, cut from the one-for-all checkpoint `{base}`
(digest `{facts.get("checkpoint_digest", "unknown")}`) without further training.

| | full model | this subnet |
|---|---|---|
| blocks | {full.depth} | {subnet.depth} |
| query heads a block | {full.heads} | {subnet.heads}{most} |
| key/value heads a block | {full.kv_heads} | {subnet.kv_heads}{most} |
| neurons a block | {full.neurons} | {subnet.neurons}{most} |
| parameters | {full.parameters:,} | {facts["parameters"]:,} |

Removed blocks (counted from 0): {", ".join(map(str, removed)) or "none"}. The exact units kept are in `subnet.json`.
Policy `{plan.shape.policy}`, layout `{facts["layout"]}`, weights in {facts["dtype"]}.
{_layouts(facts)}
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER"{", trust_remote_code=True" if ragged else ""})
```

Made again by `amoeba extract CHECKPOINT {options} -o DIR` with {facts["tool"]}.
"""


def _layouts(facts: dict[str, Any]) -> str:
    """What it means that blocks differ, where they do: what padding takes, and that the ragged form needs its code."""
    said = ""
    sizes = facts.get("layout_bytes")
    if sizes:
        uniform, own = sizes["uniform"], sizes["ragged"]
        padded = "held by no stock class when padded" if uniform is None else f"{uniform:,} bytes padded"
        said += f"Blocks differ in width: {padded}, {own:,} bytes in the layout `ragged`.\n"
    if facts["layout"] == "ragged":
        said += (
            "Every block has its own size (`block_sizes` in `config.json`), which no stock class holds:\n"
            "`modeling_amoeba.py` in this folder builds stock layers block by block, and transformers runs it only\n"
            "where it is told to trust it.\n"
        )
    return f"\n{said}" if said else ""
