"""The commented ``amoeba.toml`` that ``amoeba init`` writes."""

from __future__ import annotations

import re
from pathlib import Path

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import check_new_file, whole_file, write_json
from amoeba_deploy.profiles.device import load_device
from amoeba_deploy.project.config import NAME, load_project, schema
from amoeba_deploy.settings import SETTINGS

SCHEMA = ".amoeba.schema.json"
TEMPLATE = """\
#:schema ./{schema}
# What 'amoeba build' makes of a checkpoint. Paths are relative to this file.

{checkpoint}

[build]
# output = "dist"                         # bundles go to dist/NAME
# jobs = 2                                # targets that are built at once
# baseline = "amoeba-baseline.json"       # written by 'amoeba build --save-baseline'
# fail-if = ["size > 1.1 * baseline", "loss > baseline + 0.02"]

[defaults]                                # what targets have that do not say otherwise
workload = {{ batch = 1, prompt = 128, tokens = 32 }}
# private-key = "env:AMOEBA_SIGNING_KEY"  # for 'amoeba build --sign': a PEM file, or env:NAME

[targets.{key}]
device = "{device}"                       # a name of 'amoeba devices', or the path of your own device file
latency = "40ms"                          # time per output token; metric = "ttft" or "e2e" bounds those
# memory = "8GB"                          # never above what the device has
# flow = ["tensorrt-llm", "onnx"]         # in order of preference; the device's own where left out
# precision = ["int4", "fp16"]
# max-loss = 0.7
# table = ["tables/{device}.json"]        # measured by 'amoeba profile' on the device
# registry = "ghcr.io/me/{name}:latest"   # for 'amoeba build --push'
"""


def template(checkpoint: str | None = None, device: str = "orin-nx", name: str = "kiosk") -> str:
    """The file for a checkpoint (None: the embedded one), with one target."""
    line = '# checkpoint = "checkpoint"               # the one that ships in the package where left out'
    if checkpoint is not None:
        line = f'checkpoint = "{checkpoint}"'
    key = f'"{name}"' if "." in name else name
    return TEMPLATE.format(schema=SCHEMA, checkpoint=line, device=device, key=key, name=name)


def write_project(folder: Path, checkpoint: str | None, device: str, name: str, force: bool) -> list[Path]:
    """Write ``amoeba.toml`` and its schema for editors into a folder; returns the files.

    Raises:
        BadInput: there is one already, the device is not known, or a name cannot stand in the file.
    """
    file, described = folder / SETTINGS, folder / SCHEMA
    check_new_file(file, force)
    load_device(device)
    if re.fullmatch(NAME, name) is None:
        raise BadInput(f"'{name}' cannot name a target; take letters, digits, dots, hyphens and underscores")
    if any(mark in text for text in (checkpoint or "", device, name) for mark in '"\\\n\r'):
        raise BadInput("checkpoint, device and name hold no quotes, backslashes or line breaks; write others")
    with whole_file(file, force) as work:
        work.write_text(template(checkpoint, device, name), encoding="utf-8")
        load_project(work)
    with whole_file(described, force=True) as work:
        write_json(work, schema())
    return [file, described]
