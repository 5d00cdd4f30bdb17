"""Baselines: the figures of a project's targets at one time, in a file that lies in the repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from amoeba_deploy import __version__
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json, whole_file, write_json
from amoeba_deploy.manifest import Bytes, Count, Milliseconds, Name
from amoeba_deploy.project.result import Result

BASELINE_FORMAT = "amoeba.baseline/1"


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Latency(_Form):
    tpot_ms: Milliseconds
    ttft_ms: Milliseconds
    e2e_ms: Milliseconds
    machines: list[Name]


class _Predicted(_Latency):
    memory_bytes: Bytes
    source: Name


class _Quality(_Form):
    metric: Name
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: Name


class _Figures(_Form):
    device: Name
    flow: Name
    precision: Name
    shape: Name
    content: Name
    bytes: Count
    budget: dict[str, Any]
    predicted: _Predicted
    measured: _Latency | None
    quality: _Quality
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    verified: bool
    steps: int


_TARGETS = TypeAdapter(dict[str, _Figures])


def read_baseline(file: Path) -> dict[str, Any]:
    """The stored figures by target; raises BadInput where the file is damaged."""
    value = read_json(file, BASELINE_FORMAT)
    try:
        _TARGETS.validate_python(value.get("targets"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["targets", *(str(part) for part in first["loc"])])
        raise BadInput(
            f"{file}: '{where}': {first['msg']}; write the file again with 'amoeba build --save-baseline'"
        ) from None
    targets: dict[str, Any] = value["targets"]
    return targets


def write_baseline(file: Path, results: Sequence[Result], before: Mapping[str, Any]) -> None:
    """Write the figures of some targets over those that are stored; what was not built this time stays."""
    figures = {result.name: dict(result.figures) for result in results if result.good and result.figures is not None}
    targets = dict(sorted({**before, **figures}.items()))
    with whole_file(file, force=True) as work:
        write_json(work, {"format": BASELINE_FORMAT, "tool": f"amoeba-deploy {__version__}", "targets": targets})
