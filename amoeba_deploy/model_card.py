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
| query heads a block | {full.heads} | {subnet.heads} |
| key/value heads a block | {full.kv_heads} | {subnet.kv_heads} |
| neurons a block | {full.neurons} | {subnet.neurons} |
| parameters | {full.parameters:,} | {facts["parameters"]:,} |

Removed blocks (counted from 0): {", ".join(map(str, removed)) or "none"}. The exact units kept are in `subnet.json`.
Policy `{plan.shape.policy}`, layout `{facts["layout"]}`, weights in {facts["dtype"]}.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")
```

Made again by `amoeba extract CHECKPOINT --shape {plan.shape} -o DIR` with {facts["tool"]}.
"""
