"""``export --flow all``: one bundle of every engine that this machine can build, side by side in one folder.

Each flow gets the best shape that its own latencies allow within the budget. Every bundle appears whole, under
``FLOW-PRECISION``, as soon as it is done: the folder grows, and what is done stays when a later engine fails or the
command is interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import ALL, flow_names, load_backend
from amoeba_deploy.backends.backend import require_toolchain
from amoeba_deploy.bundle import MANIFEST
from amoeba_deploy.checkpoint import Checkpoint
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.exported import ExportAnswer, export_answer
from amoeba_deploy.options import comma_list
from amoeba_deploy.profiles.device import Device, load_device
from amoeba_deploy.profiles.table import read_table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.progress import Progress
from amoeba_deploy.request import Request, require_budget
from amoeba_deploy.space import Space


@dataclass(frozen=True)
class PassedOver:
    """An engine that was not built; ``precision`` is None where its flow has none that was asked for, or no engine."""

    flow: str
    precision: str | None
    error: Exception

    @property
    def reason(self) -> str:
        """Why, as a sentence."""
        if isinstance(self.error, AmoebaError):
            return str(self.error)
        return f"unexpected {type(self.error).__name__}: {next(iter(str(self.error).splitlines()), 'no message')}"

    def to_json(self) -> dict[str, Any]:
        """The entry in ``passed_over``."""
        return {"flow": self.flow, "precision": self.precision, "reason": self.reason}


@dataclass(frozen=True)
class AllExports:
    """The bundles that were built into a folder, and the engines that were not."""

    output: Path
    bundles: tuple[ExportAnswer, ...]
    passed_over: tuple[PassedOver, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``export --flow all --json`` prints."""
        return {
            "bundles": [done.to_json() for done in self.bundles],
            "passed_over": [passed.to_json() for passed in self.passed_over],
        }

    def failure(self) -> AmoebaError | None:
        """What the command ends with: nothing where an engine was built and none is wrong, else an error."""
        wrong = [passed for passed in self.passed_over if isinstance(passed.error, VerificationFailed)]
        if wrong:
            return VerificationFailed(
                f"{len(wrong)} of {len(self.bundles) + len(self.passed_over)} engines failed; {wrong[0].reason}; "
                f"{len(self.bundles)} others were built"
            )
        odd = [passed for passed in self.passed_over if not isinstance(passed.error, AmoebaError)]
        if odd:
            said = f"{odd[0].flow} {odd[0].precision}: {odd[0].reason}; run 'amoeba --debug ...' to see where"
            failure = AmoebaError(said)
            failure.__cause__ = odd[0].error
            return failure
        if self.bundles:
            return None
        tried = [passed.error for passed in self.passed_over if not isinstance(passed.error, ToolchainMissing)]
        if tried and len({type(error) for error in tried}) == 1:
            # Every engine that is installed ended alike: no shape fits, or the request is bad.
            return type(tried[0])(str(tried[0]))  # type: ignore[return-value]
        return ToolchainMissing(f"no engine could be built for this request; {self.passed_over[0].reason}")


def wanted_engines(device: Device, precisions: Sequence[str]) -> tuple[list[tuple[str, str]], list[PassedOver]]:
    """Every (flow, precision) pair to build, and the flows that cannot be.

    Of each flow the precisions that were asked for and it has; where none was asked for the one that the device's file
    prefers, else its first.

    Raises:
        BadInput: no flow has a precision that was asked for.
    """
    pairs, passed, known = [], [], set()
    for flow in flow_names():
        try:
            backend = load_backend(flow)
            own = {precision: backend.takes.own_name(precision) for precision in precisions}
            known |= {asked for asked, name in own.items() if name in backend.precisions()}
            preferred = [backend.takes.own_name(p.precision) for p in device.flows if p.flow == flow]
            has = [name for name in (own.values() if precisions else preferred) if name in backend.precisions()]
            if precisions and not has:
                listed = ", ".join(backend.precisions())
                raise BadInput(f"the flow '{flow}' has none of these precisions; it has {listed}")
            chosen = list(dict.fromkeys(has)) if precisions else (has or list(backend.precisions()))[:1]
            for precision in chosen:
                try:
                    require_toolchain(backend)
                except AmoebaError as error:
                    passed.append(PassedOver(flow, precision, error))
                else:
                    pairs.append((flow, precision))
        except AmoebaError as error:
            passed.append(PassedOver(flow, None, error))
    unknown = [precision for precision in precisions if precision not in known]
    if unknown:
        raise BadInput(f"no flow of this installation has the precision {', '.join(unknown)}")
    return pairs, passed


def check_folder(output: Path, force: bool) -> None:
    """Raise BadInput where bundles may not be put into a folder."""
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output}: is a file, and a folder belongs there; choose another output")
    if (output / MANIFEST).is_file():
        raise BadInput(
            f"{output}: is a bundle itself, and bundles of all engines lie side by side; choose another output"
        )
    if output.is_dir() and any(output.iterdir()) and not force:
        raise BadInput(f"{output}: exists already; choose another output or add --force to replace the bundles in it")


def export_all(
    checkpoint: Checkpoint,
    asked: Mapping[str, Any],
    output: Path | None,
    *,
    shape: str | None,
    force: bool,
    verify: bool,
    text: Path | None,
    progress: Progress,
) -> AllExports:
    """Build a bundle of every engine that can be built here for a device.

    Args:
        checkpoint: what the engines are built from.
        asked: the options of ``search``; its flow is not used.
        output: the folder that bundles are put into; named after the device where left out.
        shape: build this one instead of searching; each engine gets it in sizes that it takes.
        force: replace bundles that are there.
        verify: compare engines with transformers.
        text: what perplexity is measured on.
        progress: told what is built.

    Raises:
        BadInput: the output is taken, or device, shape or precision are not known.
        AmoebaError: it was interrupted after some bundles were done.
    """
    device = load_device(asked["device"])
    folder = output or Path(f"{device.name}-{ALL}")
    if shape is not None:
        checkpoint.plan_of(shape)
    check_folder(folder, force)
    require_budget(asked, shape)
    Workload(asked["batch"], asked["prompt"], asked["tokens"]).context_for(
        checkpoint.architecture.context, asked["context"]
    )
    for file in asked["table"]:
        read_table(file)
    if asked.get("settings"):
        raise BadInput("--set is of one engine; name that engine with --flow, not all")
    space = Space.of_checkpoint(checkpoint)
    pairs, passed = wanted_engines(device, comma_list(asked["precision"]))
    bundles: list[ExportAnswer] = []
    try:
        for flow, precision in pairs:
            try:
                request = Request.of(space, {**asked, "flow": flow, "precision": precision}, progress, shape)
                target = folder / f"{flow}-{precision}"
                bundles.append(export_answer(checkpoint, request, target, force=force, verify=verify, text=text))
            except Exception as error:  # one engine's failure is its own
                passed.append(PassedOver(flow, precision, error))
                progress.say(f"note: {flow} {precision} was not built: {passed[-1].reason}")
    except KeyboardInterrupt:
        if not bundles:
            raise
        raise AmoebaError(f"interrupted; the bundles that were done ({len(bundles)}) are in {folder}") from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing was built
    order = {flow: number for number, flow in enumerate(flow_names())}
    passed.sort(key=lambda entry: order[entry.flow])
    return AllExports(folder, tuple(bundles), tuple(passed))
