"""Writing a kit: the engines of some shapes, the runner, and the part of this package that it needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy import __version__, families
from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import (
    Backend,
    BuildOptions,
    check_precision,
    chosen_settings,
    options_for,
    require_toolchain,
)
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import folder_bytes, whole_folder
from amoeba_deploy.profiles.device import LOCAL, Device
from amoeba_deploy.profiles.kit import run
from amoeba_deploy.profiles.kit.carried import carried_files
from amoeba_deploy.profiles.kit.form import ARTEFACTS, PACKAGE, RUN, Item, Kit, all_files, read_kit, write_kit_file
from amoeba_deploy.profiles.local import shapes_named
from amoeba_deploy.profiles.source import CheckpointSource, Source
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.shape import Shape, format_width, width_to_json

BUDGET_SECONDS = 1200.0


@dataclass(frozen=True)
class Wanted:
    """One engine to build."""

    backend: Backend
    precision: str
    shape: Shape
    options: BuildOptions

    def __str__(self) -> str:
        return f"{self.backend.flow} {self.precision} {self.shape}"

    @property
    def id(self) -> str:
        """A name that tells it from the kit's others, good for files."""
        width = format_width(self.shape.width).replace("/", "of")
        return f"{self.backend.flow}-{self.precision}-{self.shape.depth}x{width}"


def _precisions(backend: Backend, precisions: Sequence[str], device: Device) -> list[str]:
    """Those asked for that a flow has; where none is asked for, the device's own, or else the flow's best."""
    if precisions:
        own = {backend.takes.own_name(precision) for precision in precisions}
        return [precision for precision in backend.precisions() if precision in own]
    listed = [entry.precision for entry in device.flows if entry.flow == backend.flow]
    return [backend.takes.own_name((listed or list(backend.precisions()))[0])]


def wanted_items(
    source: Source,
    device: Device,
    flows: Sequence[str],
    precisions: Sequence[str],
    shapes: str,
    workload: Workload,
    context: int,
    settings: Mapping[str, str],
) -> list[Wanted]:
    """The engines of a kit, in the order in which they are built.

    Raises:
        BadInput: a flow or precision is not known, refuses a shape, or cannot be measured on a device.
        ToolchainMissing: a flow cannot be lowered to here.
    """
    chip = None if device.name == LOCAL else device.architecture
    found = []
    for flow in dict.fromkeys(flows):
        backend = load_backend(flow)
        require_toolchain(backend)
        options = options_for(backend, context, workload.batch, chip, settings)
        for precision in _precisions(backend, precisions, device):
            check_precision(backend, precision)
            if not backend.opens and not backend.bench(precision, options, workload.prompt, workload.tokens):
                raise BadInput(
                    f"the flow '{flow}' in {precision} has no command of its own that measures what is built so; "
                    f"choose another precision or setting"
                )
            for shape in shapes_named(source, shapes, flow, precision):
                sizes = source.sized(shape, source.steps(backend, precision))
                refused = families.refusal(sizes) or backend.refusal(sizes, precision, options)
                if refused:
                    raise BadInput(f"the flow '{flow}' in {precision} refuses the shape {shape}: {refused}")
                found.append(Wanted(backend, precision, shape, options))
    missing = {p for p in precisions if not any(w.backend.takes.own_name(p) == w.precision for w in found)}
    if missing:
        raise BadInput(f"no flow in {', '.join(flows)} has the precision {', '.join(sorted(missing))}")
    return found


def write_kit(
    source: Source,
    device: Device,
    wanted: Sequence[Wanted],
    workload: Workload,
    context: int,
    output: Path,
    *,
    budget: float = BUDGET_SECONDS,
    force: bool = False,
    progress: Progress,
) -> Kit:
    """Build the engines and write the kit.

    Args:
        source: what is measured.
        device: where.
        wanted: the engines, from ``wanted_items``.
        workload: batch, prompt and tokens.
        context: positions that the engines provide for.
        output: the folder to make.
        budget: seconds of measuring in one start of the runner.
        force: replace an existing kit.
        progress: told of every engine that is built.

    Raises:
        BadInput: the output exists, or a backend refuses a shape.
    """
    sizes = source.architecture
    with whole_folder(output, force) as work:
        items = []
        progress.say(f"building {len(wanted)} engines")
        with progress.bar("build", len(wanted)) as step:
            for one in wanted:
                items.append(_build(source, one, workload, work / ARTEFACTS / one.id))
                step(str(one))
        shutil.copyfile(run.__file__, work / RUN)
        for name, file in carried_files(list(dict.fromkeys(item.flow for item in items))).items():
            target = work / PACKAGE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        names = ("depth", "hidden", "heads", "kv_heads", "head_dim", "neurons", "vocabulary", "context")
        kit = Kit(
            device.name,
            source.name,
            "checkpoint" if isinstance(source, CheckpointSource) else "random",
            sizes.digest,
            {name: getattr(sizes, name) for name in names},
            workload,
            context,
            budget,
            0,
            tuple(items),
            all_files(work),
            f"amoeba-deploy {__version__}",
        )
        write_kit_file(work, kit)
        return read_kit(work)


def _build(source: Source, wanted: Wanted, workload: Workload, folder: Path) -> Item:
    backend, shape = wanted.backend, wanted.shape
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=folder.parent.parent) as dense:
        artefact = source.lower(shape, backend, wanted.precision, wanted.options, folder, Path(dense))
    steps = tuple(step.command for step in artefact.steps)
    bench: tuple[tuple[str, ...], ...] = ()
    if not backend.opens:
        found = backend.bench(wanted.precision, wanted.options, workload.prompt, workload.tokens)
        bench = tuple(command.command for command in found)
    elif steps:
        raise BadInput(
            f"{wanted} is finished on the device only ({artefact.steps[0].does}), and a kit measures finished engines; "
            f"test it there with tools/test_device.py"
        )
    return Item(
        wanted.id,
        backend.flow,
        wanted.precision,
        shape.depth,
        width_to_json(shape.width),
        folder_bytes(folder),
        chosen_settings(backend, wanted.options),
        (*steps, *bench) if bench else (),
    )
