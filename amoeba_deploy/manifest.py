"""The form of a bundle's manifest, which docs/schemas/manifest.schema.json describes: what readers may rely on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from amoeba_deploy.errors import BadInput

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FilePath = Annotated[str, StringConstraints(pattern=r"^[^/].*$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Open(BaseModel):
    """Later versions may add entries here."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Part):
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: Bytes


class _Workload(_Part):
    batch: Count
    prompt: Count
    tokens: Count


class _Identity(_Open):
    precision: Name
    batch: Count
    context: Count
    versions: dict[str, str]
    bound: list[str]
    chip: str | None


class _Budget(_Open):
    metric: Literal["tpot", "ttft", "e2e"]
    ms: Milliseconds | None
    memory_bytes: Count | None


class _Predicted(_Open):
    tpot_ms: Milliseconds
    ttft_ms: Milliseconds
    memory_bytes: Bytes
    source: Literal["measured", "interpolated", "estimated"]


class _Command(_Open):
    does: str
    command: str


class _Manifest(_Open):
    tool: Annotated[str, StringConstraints(pattern=r"^amoeba-deploy ")]
    checkpoint: Name
    checkpoint_digest: Digest
    base_digest: Digest
    flow: Name
    precision: Name
    engine_versions: dict[str, str]
    identity: _Identity
    settings: dict[str, str]
    context: Count
    workload: _Workload
    device: Name
    budget: _Budget
    predicted: _Predicted
    table: Digest | None
    shape: dict[str, Any]
    plan: Annotated[list[dict[str, Any]], Field(min_length=1)]
    steps: list[_Command]
    usage: list[_Command]
    files: Annotated[dict[FilePath, _File], Field(min_length=1)]


def check_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Raise BadInput, with the first entry that is not of the form, where a manifest is damaged."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{folder / 'manifest.json'}: '{where}': {first['msg']}; get the bundle again") from None
