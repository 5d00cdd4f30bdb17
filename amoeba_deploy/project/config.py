"""``amoeba.toml``: the checkpoint of a project, and the targets that are built of it.

The form is one pydantic model; docs/amoeba.toml.schema.json is the JSON Schema that follows from it, for editors.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from amoeba_deploy.errors import BadInput

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LATENCY = r"^\s*\d*\.?\d+\s*(us|ms|s)\s*$"
MEMORY = r"^\s*\d*\.?\d+\s*(MB|GB|MiB|GiB)\s*$"

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Span = Annotated[str, StringConstraints(pattern=LATENCY)]
Amount = Annotated[str, StringConstraints(pattern=MEMORY)]


def _spelt(name: str) -> str:
    return name.replace("_", "-")


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", alias_generator=_spelt, populate_by_name=False)


class Workload(_Form):
    """What an engine is built and judged for."""

    batch: Count = Field(default=1, description="Sequences at once.")
    prompt: Count = Field(default=128, description="Prompt tokens.")
    tokens: Count = Field(default=32, description="Generated tokens.")
    context: Count | None = Field(
        default=None, description="Positions to provide for; the model's, 2048 at most, by default."
    )


class Target(_Form):
    """An engine for a device: within which limits, by which flow, and where it goes."""

    device: Text | None = Field(
        default=None, description="A name of 'amoeba devices', or the path of your own device file."
    )
    latency: Span | None = Field(default=None, description="Budget with its unit, such as 40ms.")
    metric: Literal["tpot", "ttft", "e2e"] = Field(default="tpot", description="What the latency bounds.")
    memory: Amount | None = Field(
        default=None, description="Budget with its unit, such as 8GB; never above the device's own."
    )
    tpot: Span | None = Field(default=None, description="Further limit on time per output token.")
    ttft: Span | None = Field(default=None, description="Further limit on time to first token.")
    e2e: Span | None = Field(default=None, description="Further limit on the time of the whole workload.")
    size: Amount | None = Field(default=None, description="Further limit on the engine's files, such as 500MB.")
    max_loss: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Further limit on loss, where it is known."
    )
    flow: list[Text] = Field(
        default_factory=list,
        description="Engines in order of preference: the first that can be built here and fits is taken. The device's "
        "own preferences where left out.",
    )
    precision: list[Text] = Field(
        default_factory=list, description="Precisions in order of preference. The device's own where left out."
    )
    shape: Text | None = Field(
        default=None, description="Build this shape, or the plan in this file, instead of searching."
    )
    table: list[Text] = Field(default_factory=list, description="Latency tables to use.")
    measured_only: bool = Field(default=False, description="Refuse estimates of latency.")
    workload: Workload = Field(default_factory=Workload, description="What the engine is built and judged for.")
    settings: dict[str, str] = Field(default_factory=dict, description="Settings of the engine's own, as --set.")
    verify: bool = Field(default=True, description="Compare the engine with transformers, where it can run here.")
    verify_text: Text | None = Field(default=None, description="Text to compare perplexities on.")
    output: Text | None = Field(
        default=None, description="Folder of the bundle; its name under build.output where left out."
    )
    registry: Text | None = Field(default=None, description="Where 'amoeba build --push' puts it: HOST/NAME:TAG.")
    private_key: Text | None = Field(
        default=None,
        description="Key of 'amoeba build --sign': a PEM file, or env:NAME of an environment variable with a path or "
        "the PEM itself.",
    )
    certificate: Text | None = Field(default=None, description="Certificate of the private-key, in PEM.")
    chain: list[Text] = Field(
        default_factory=list, description="Certificates between it and the authority that devices trust."
    )
    needs: list[Text] = Field(default_factory=list, description="Targets that must be built before this one.")


class Build(_Form):
    """How ``amoeba build`` works."""

    output: Text = Field(default="dist", description="Folder that bundles are put into.")
    jobs: Count = Field(default=1, description="Targets that are built at once.")
    baseline: Text = Field(default="amoeba-baseline.json", description="Figures that builds are compared with.")
    fail_if: list[Text] = Field(
        default_factory=list, description="Gates, such as 'size > 1.1 * baseline', as --fail-if."
    )


class Project(_Form):
    """A project: its checkpoint, and the targets that are built of it."""

    checkpoint: Text | None = Field(
        default=None, description="One-for-all checkpoint; the embedded one where left out."
    )
    build: Build = Field(default_factory=Build, description="How 'amoeba build' works.")
    defaults: Target = Field(default_factory=Target, description="What targets have that do not say otherwise.")
    targets: dict[Annotated[str, StringConstraints(pattern=NAME)], Target] = Field(
        default_factory=dict, description="What is built, by name."
    )

    @field_validator("defaults")
    @classmethod
    def _of_all(cls, value: Target) -> Target:
        for single in ("output", "needs", "registry"):
            if single in value.model_fields_set:
                raise ValueError(f"'{single}' is of one target; put it under [targets.NAME]")
        return value


def schema() -> dict[str, Any]:
    """The JSON Schema of ``amoeba.toml``."""
    found = Project.model_json_schema(by_alias=True)
    return {"$schema": SCHEMA_ID, **found, "title": "amoeba.toml: what amoeba build makes of a checkpoint"}


class Loaded:
    """A project with the folder that its paths are relative to, and every target complete with the defaults."""

    def __init__(self, file: Path, project: Project) -> None:
        self.file, self.folder, self.project = file, file.parent, project

    def path(self, text: str) -> Path:
        """A path of the file, which is relative to it."""
        return self.folder / text

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder, or None for the embedded one."""
        return None if self.project.checkpoint is None else self.path(self.project.checkpoint)

    @cached_property
    def targets(self) -> dict[str, Target]:
        """The targets by name, in the order of the file."""
        return {name: self._complete(target) for name, target in self.project.targets.items()}

    def _complete(self, target: Target) -> Target:
        defaults = self.project.defaults
        own = {name: getattr(target, name) for name in target.model_fields_set}
        given = {name: getattr(defaults, name) for name in defaults.model_fields_set}
        parts = [one.workload for one in (defaults, target) if "workload" in one.model_fields_set]
        workload = {name: getattr(part, name) for part in parts for name in part.model_fields_set}
        return target.model_copy(update=given | own | {"workload": Workload().model_copy(update=workload)})

    def output(self, name: str) -> Path:
        """The folder of a target's bundle."""
        return self.path(self.targets[name].output or f"{self.project.build.output}/{name}")


def load_project(file: Path) -> Loaded:
    """Read and check ``amoeba.toml``.

    Raises:
        BadInput: it is missing or damaged, has an unknown key, or targets that cannot be built together.
    """
    try:
        value = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{file}: is not there; write one with 'amoeba init'") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); give the project's amoeba.toml") from None
    except ValueError as error:
        raise BadInput(f"{file}: is not valid TOML ({error})") from None
    try:
        project = Project.model_validate(value)
    except ValidationError as error:
        raise BadInput(f"{file}: {_sentence(error)}") from None
    loaded = Loaded(file, project)
    _check(loaded)
    return loaded


def _check(loaded: Loaded) -> None:
    file, outputs = loaded.file, dict[Path, str]()
    for name, target in loaded.targets.items():
        if target.device is None:
            raise BadInput(f"{file}: [targets.{name}] names no device; add device = \"NAME\", see 'amoeba devices'")
        limits = (target.latency, target.memory, target.tpot, target.ttft, target.e2e, target.size, target.max_loss)
        if target.shape is None and not any(limits):
            raise BadInput(f'{file}: [targets.{name}] has no budget; add such as latency = "40ms", or a shape')
        for needed in target.needs:
            if needed not in loaded.targets:
                raise BadInput(f"{file}: [targets.{name}] needs '{needed}', which is no target{_hint(needed, loaded)}")
        output = loaded.output(name).resolve()
        for other, owner in outputs.items():
            if output == other or output in other.parents or other in output.parents:
                raise BadInput(f"{file}: the outputs of {owner} and {name} lie in each other; give each its own folder")
        outputs[output] = name


def _hint(name: str, loaded: Loaded) -> str:
    close = difflib.get_close_matches(name, loaded.targets, 1)
    return f"; did you mean '{close[0]}'?" if close else ""


_PLAIN = {
    "list_type": "must be a list in brackets",
    "string_type": "must be a text in quotes",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "model_type": "must be a table",
    "dict_type": "must be a table",
}


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with the key that was probably meant."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path).removesuffix(".[key]")
    if first["type"] == "extra_forbidden" and len(path) == 3 and isinstance(first["input"], dict):
        return f"'{where}' is no target; a name with a dot needs quotes: [targets.\"{path[1]}.{path[2]}\"]"
    if first["type"] == "extra_forbidden":
        known = _keys(path[:-1])
        close = difflib.get_close_matches(path[-1].replace("_", "-"), known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
        return f"'{where}' is not a key of it; {hint}"
    said = _PLAIN.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "string_pattern_mismatch":
        pattern = first["ctx"]["pattern"]
        example = {LATENCY: "a latency with its unit, such as 40ms", MEMORY: "an amount with its unit, such as 8GB"}
        said = f"is not {example.get(pattern, 'a name of letters, digits, dots, hyphens and underscores')}"
        return f"'{where}' = {first['input']!r} {said}"
    return f"'{where}': {said}"


def _keys(path: list[str]) -> list[str]:
    """The keys of the table at a path."""
    model: type[BaseModel] = Project
    for part in path:
        found = [field for field in model.model_fields.values() if field.alias == part]
        if not found:
            continue  # the name of a target
        kinds = (found[0].annotation, *get_args(found[0].annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]
