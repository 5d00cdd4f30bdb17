"""What to search on: a device with its flows and precisions, and where the latencies come from.

Where the user names neither flow nor precision, the first of the device's own preferences that this installation can
lower, and that takes any of the shapes, is taken; it is said why earlier ones were passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import Backend, BuildOptions, check_precision, options_for, require_toolchain
from amoeba_deploy.errors import AmoebaError, BadInput, LatencyUnknown, ToolchainMissing
from amoeba_deploy.profiles.device import LOCAL, Device
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.roofline import estimate
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.workload import Workload
from amoeba_deploy.quality import Quality
from amoeba_deploy.search import Budget, Candidate, SearchResult, SubnetSizes, candidates, search
from amoeba_deploy.shape import Shape

Choices = tuple[Sequence[Shape], Callable[[Shape], SubnetSizes]]
"""Shapes to choose from, and the function that gives a shape the sizes of its subnet."""


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


def ranked_pairs(target: Target, quality: Quality | None) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """The pairs whose qualities can be ranked against each other, and a remark for each that was left out."""
    if len({precision for _, precision in target.pairs}) == 1:
        return target.pairs, []
    measured = quality.precisions if quality is not None else ()
    known = tuple(pair for pair in target.pairs if pair[1] in measured)
    left = [p for p in target.pairs if p not in known]
    if not known:
        raise BadInput("none of these precisions has a measured quality, so they cannot be ranked; name a single one")
    return known, [f"left out {flow} {precision}: its quality was not measured" for flow, precision in left]


def predictor(
    target: Target,
    sizes_of: Callable[[Shape], SubnetSizes],
    digest: str,
    flow: str,
    precision: str,
    table: Table | None,
) -> Callable[[Shape], Prediction]:
    """Where latencies of one flow and precision come from: the table where it has rows for them, else an estimate.

    Raises:
        BadInput: the table is of another architecture.
        LatencyUnknown: there are no rows, and the device has no figures to estimate from.
    """
    if table is not None:
        if table.architecture_digest != digest:
            raise BadInput("the latency table was measured for another model architecture; profile this one")
        if (flow, precision) in table.flows(target.workload) or target.device.bandwidth is None:
            return table.predictor(lambda shape: sizes_of(shape).mean, flow, precision, target.workload)
    storage = load_backend(flow).storage(precision)

    def estimated(shape: Shape) -> Prediction:
        sizes, workload = sizes_of(shape), target.workload
        return estimate(sizes.padded, storage, target.device, flow, precision, workload, target.context, sizes.parts)

    return estimated


def _built_sizes(sizes_of: Callable[[Shape], SubnetSizes], ragged: bool, shape: Shape) -> SubnetSizes:
    return sizes_of(shape).built(ragged)


def search_target(
    target: Target,
    architecture: Architecture,
    choices: Callable[[str, str], Choices],
    quality: Quality | None,
    budget: Budget,
    table: Table | None = None,
    measured_only: bool = False,
) -> tuple[SearchResult, list[str]]:
    """Search all shapes in all pairs of a target; returns the result and further remarks.

    ``choices`` gives for a flow and precision the shapes that its engine takes, with the sizes of their subnets.

    Raises:
        NoShapeFits: nothing fits the budget.
        BadInput: a backend refuses every shape.
        LatencyUnknown: no latency is known, or only estimates where ``measured_only`` demands more.
    """
    pairs, remarks = ranked_pairs(target, quality)
    found: list[Candidate] = []
    refusals: list[str] = []
    for flow, precision in pairs:
        backend, options = load_backend(flow), target.options(flow)
        shapes, own_sizes = choices(flow, precision)
        sizes_of = partial(_built_sizes, own_sizes, "ragged" in backend.layouts(architecture, precision, options))
        predict = predictor(target, sizes_of, architecture.digest, flow, precision, table)
        if table is not None and (flow, precision) not in table.flows(target.workload):
            asked = f"batch {target.workload.batch}, prompt {target.workload.prompt}, tokens {target.workload.tokens}"
            remarks.append(f"the table has no row of {flow} {precision} for {asked}: its latencies are estimated")
        legal = []
        for shape in shapes:
            subnet = sizes_of(shape).padded
            refused = families.refusal(subnet) or backend.refusal(subnet, precision, options)
            refusals += [f"{shape} cannot be lowered to {flow} {precision}: {refused}"] if refused else []
            legal += [] if refused else [shape]
        found += candidates(
            legal,
            architecture,
            own_sizes,
            flow,
            precision,
            predict,
            quality,
            sizes_of,
            backend.storage(precision),
        )
    if not found:
        raise BadInput(f"{refusals[0]}; see whether another --flow or --precision takes it")
    if measured_only:
        found = [c for c in found if c.prediction.source != "estimated"]
        if not found:
            raise LatencyUnknown(
                f"only estimates exist for '{target.device.name}'; run 'amoeba profile' there, or drop --measured-only"
            )
    return search(found, budget, target.workload), remarks
