"""The README.md of a derived model: what it was cut from, how, how good it is, how to load it and make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Plan


def base_license(folder: Path) -> str | None:
    """The licence that the model card of a folder names; None where there is none or it cannot be read."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (ValueError, OSError, TypeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def hub_metadata(model: ModelFolder, facts: dict[str, Any]) -> str:
    """The hub's metadata of a subnet as YAML: what it is, and the model that it was cut from where the hub has it."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=facts.get("base_model"),
        library_name="transformers",
        license=base_license(model.path),
        pipeline_tag="text-generation",
        tags=["amoeba", "pruned", "depth-pruning", "width-pruning"],
    )
    text: str = data.to_yaml()
    return text


def model_card(model: ModelFolder, plan: Plan, facts: dict[str, Any]) -> str:
    """The model card of a dense subnet, as Markdown with the hub's metadata in front."""
    full = model.architecture
    subnet = plan.subnet(full)
    removed = sorted(set(range(full.depth)) - set(plan.kept_blocks))
    name = str(facts.get("checkpoint", "a local checkpoint"))
    ragged = facts["layout"] == "ragged"
    most = " at most" if ragged else ""
    adapted = " Tuned adapters are merged into the weights." if facts.get("adapters") else ""
    return f"""---
{hub_metadata(model, facts)}
---
# {name}, shape {plan.shape}

A dense subnet, cut from the one-for-all checkpoint `{name}`
(digest `{facts.get("checkpoint_digest", "unknown")}`), with no training after the cut.

| | full model | this subnet |
|---|---|---|
| blocks | {full.depth} | {subnet.depth} |
| query heads a block | {full.heads} | {subnet.heads}{most} |
| key/value heads a block | {full.kv_heads} | {subnet.kv_heads}{most} |
| neurons a block | {full.neurons} | {subnet.neurons}{most} |
| parameters | {full.parameters:,} | {facts["parameters"]:,} |

Removed blocks (counted from 0): {", ".join(map(str, removed)) or "none"}. The exact units kept are in `subnet.json`.
Policy `{plan.shape.policy}`, layout `{facts["layout"]}`, bias compensation {facts["bias"]}, weights in \
{facts["dtype"]}.{adapted}
{_layouts(facts)}
## Quality

{_quality(facts.get("quality"))}

## Use

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER"{", trust_remote_code=True" if ragged else ""})
```

{f"Made again by `{facts['command']}`" if "command" in facts else "Made from a plan"} with {facts["tool"]}.
"""


def _quality(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "Not measured. `amoeba evaluate` measures it on a text or on questions of yours."
    lines = [
        f"Loss on a held-out text (mean nats a token, digest `{quality['text']}`), {quality['source']}:",
        "",
        "| | loss |",
        "|---|---|",
        f"| full model | {quality['before']:.4f} |",
        f"| this subnet | {quality['after']:.4f} |",
    ]
    if "difference" in quality:
        of = f"{quality['difference']:+.4f} ± {quality['difference_se']:.4f} ({quality['rows']} rows of text in pairs)"
        lines.append(f"| difference, with its standard error | {of} |")
    for setting in ("on", "off"):
        other = quality.get(f"after_with_bias_{setting}")
        if other is not None:
            lines.append(f"| this subnet with bias compensation {setting} | {other:.4f} |")
    return "\n".join(lines)


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
