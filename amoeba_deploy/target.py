"""What to search on: a device with its flows and precisions, the workload, and the engine's own settings.

Where the user names neither flow nor precision, the first of the device's own preferences that this installation can
lower, and that takes any of the shapes, is taken; it is said why earlier ones were passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import (
    Backend,
    BuildOptions,
    check_precision,
    chosen_settings,
    options_for,
    require_toolchain,
)
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.profiles.device import LOCAL, Device
from amoeba_deploy.profiles.row import Row
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload


@dataclass(frozen=True)
class Target:
    """A device, the (flow, precision) pairs to consider, the workload, and remarks on how the pairs were chosen."""

    device: Device
    pairs: tuple[tuple[str, str], ...]
    workload: Workload
    context: int
    remarks: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the engine, as the user gave them; only where a single flow is considered."""

    def options(self, flow: str) -> BuildOptions:
        """What an engine of a flow is built with; raises BadInput where it has no such settings."""
        chip = None if self.device.name == LOCAL else self.device.architecture
        return options_for(load_backend(flow), self.context, self.workload.batch, chip, self.settings)

    def own_settings(self, flow: str) -> dict[str, str]:
        """The settings of an engine that are not at their defaults: another engine, as far as latency goes."""
        return chosen_settings(load_backend(flow), self.options(flow))

    def rows(self, table: Table, flow: str, precision: str) -> Table:
        """The table with only the rows of a flow and precision that were measured as this target runs them.

        A row that does not say what context its engine provided for fits any; one that says it is preferred.
        """
        suited: dict[tuple[Any, ...], Row] = {}
        for row in table.selected(self.context, self.own_settings(flow)).rows:
            if (row.flow, row.precision, row.workload) != (flow, precision, self.workload):
                continue
            at = row.depth, row.width, row.policy
            if at not in suited or row.context is not None:
                suited[at] = row
        return replace(table, rows=tuple(suited.values()))

    def measure_command(self, flow: str, precision: str) -> str:
        """The command that measures on the device what is not known of a flow and precision."""
        workload, settings = self.workload, self.own_settings(flow)
        own = "".join(f" --set {name}={value}" for name, value in settings.items())
        return (
            f"amoeba profile --flow {flow} --precision {precision} --batch {workload.batch} --prompt "
            f"{workload.prompt} --tokens {workload.tokens} --context {self.context}{own}"
        )


def ready_backend(flow: str) -> Backend:
    """The backend of a flow with its toolchain installed; raises ToolchainMissing with how to get it otherwise."""
    backend = load_backend(flow)
    require_toolchain(backend)
    return backend


Refuses = Callable[[str, str, BuildOptions], str | None]
"""Why a flow in a precision takes no shape at all, as half a sentence, or None."""


def _takes_any(_flow: str, _precision: str, _options: BuildOptions) -> str | None:
    return None


def _first_ready(
    device: Device, precisions: Sequence[str], options: Callable[[str], BuildOptions], refuses: Refuses
) -> tuple[list[tuple[str, str]], list[str]]:
    """The device's first preference that can be lowered here (in one of ``precisions``, if any), and remarks.

    One that takes no shape at all is passed over too.
    """
    remarks, refused = [], False
    for preference in device.flows:
        passed_over = f"passed over {preference.flow} {'/'.join(precisions) or preference.precision}"
        try:
            backend = ready_backend(preference.flow)
            wanted = [backend.takes.own_name(p) for p in precisions or [preference.precision]]
            for precision in wanted:
                check_precision(backend, precision)
        except AmoebaError as error:
            remarks.append(f"{passed_over}: {error}")
            continue
        reasons = [refuses(preference.flow, precision, options(preference.flow)) for precision in wanted]
        if all(reasons):
            remarks.append(
                f"passed over {preference.flow} {'/'.join(precisions) or preference.precision}: {reasons[0]}"
            )
            refused = True
            continue
        return [(preference.flow, precision) for precision in wanted], remarks
    listed = ", ".join(f"{p.flow} {p.precision}" for p in device.flows)
    if precisions and not any(_has(load_backend(f), p) for f in flow_names() for p in precisions):
        known = sorted({p for flow in flow_names() for p in load_backend(flow).precisions()})
        raise BadInput(
            f"no flow of this installation has the precision {', '.join(precisions)}; known are {', '.join(known)}"
        )
    if refused:
        raise BadInput(f"nothing that '{device.name}' lists takes this model ({listed}); {remarks[0]}")
    raise ToolchainMissing(f"nothing that '{device.name}' lists can be lowered here ({listed}); {remarks[0]}")


def _has(backend: Backend, precision: str) -> bool:
    return backend.takes.own_name(precision) in backend.precisions()


def resolve_target(
    device: Device,
    flows: Sequence[str],
    precisions: Sequence[str],
    workload: Workload,
    context: int,
    settings: Mapping[str, str] | None = None,
    refuses: Refuses = _takes_any,
) -> Target:
    """The (flow, precision) pairs to search over.

    ``refuses`` is asked of the device's own preferences, where no flow is named.

    Raises:
        BadInput: a flow or precision is not known.
        ToolchainMissing: a flow's toolchain is not installed.
    """
    if not flows:
        asked = Target(device, (), workload, context, (), dict(settings or {}))
        first, remarks = _first_ready(device, precisions, asked.options, refuses)
        return _checked(Target(device, tuple(first), workload, context, tuple(remarks), dict(settings or {})))
    pairs: list[tuple[str, str]] = []
    for flow in flows:
        backend = ready_backend(flow)
        own = backend.takes.own_name
        preferred = [own(p.precision) for p in device.flows if p.flow == flow and _has(backend, p.precision)]
        wanted = [own(p) for p in precisions if _has(backend, p)]
        if precisions and not wanted:
            check_precision(backend, own(precisions[0]))
        pairs += [(flow, p) for p in wanted or preferred[:1] or backend.precisions()[:1]]
    unknown = {p for p in precisions if not any(_has(load_backend(flow), p) for flow in flows)}
    if unknown:
        raise BadInput(f"none of the flows {', '.join(flows)} has the precision {', '.join(sorted(unknown))}")
    return _checked(Target(device, tuple(dict.fromkeys(pairs)), workload, context, (), dict(settings or {})))


def _checked(target: Target) -> Target:
    flows = list(dict.fromkeys(flow for flow, _ in target.pairs))
    if target.settings and len(flows) > 1:
        raise BadInput(f"--set is of one engine, and {', '.join(flows)} are considered; name one with --flow")
    for flow in flows:
        target.options(flow)
    return target
