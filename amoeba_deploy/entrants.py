"""All shapes of a target judged: what engines take of them, how fast, how large and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from amoeba_deploy import families
from amoeba_deploy.architecture import Architecture
from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import BadInput, LatencyUnknown
from amoeba_deploy.profiles.calibration import Estimator, estimator
from amoeba_deploy.profiles.prediction import Prediction
from amoeba_deploy.profiles.shipped import all_shipped
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.quality import Quality
from amoeba_deploy.search import Candidate, SubnetSizes, candidates
from amoeba_deploy.shape import Shape
from amoeba_deploy.target import Target

Choices = tuple[Sequence[Shape], Callable[[Shape], SubnetSizes]]
"""Shapes to choose from, and the function that gives a shape the sizes of its subnet."""


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


def estimator_of(
    target: Target, flow: str, precision: str, architecture: Architecture, table: Table | None
) -> Estimator:
    """What estimates latencies, calibrated by a table's other rows and by the tables that ship with us."""
    tables = [] if table is None else [table]
    # A table of the same device and model may be the shipped one, or hold its rows: they count once.
    own = {(each.device, each.architecture_digest) for each in tables if each.rows}
    tables += [each for _, each in all_shipped() if (each.device, each.architecture_digest) not in own]
    return estimator(
        target.device,
        flow,
        precision,
        load_backend(flow).storage(precision),
        target.workload,
        target.context,
        tables,
        architecture=architecture,
        settings=target.own_settings(flow),
    )


@dataclass(frozen=True)
class Entrants:
    """The shapes of one flow and precision that its engine takes, and what each is judged by."""

    target: Target
    flow: str
    precision: str
    architecture: Architecture
    shapes: tuple[Shape, ...]
    refusals: tuple[str, ...]
    """Of the other shapes, each a sentence."""
    own_sizes: Callable[[Shape], SubnetSizes]
    built_sizes: Callable[[Shape], SubnetSizes]
    quality: Quality | None

    @classmethod
    def of(
        cls,
        target: Target,
        flow: str,
        precision: str,
        architecture: Architecture,
        choices: Choices,
        quality: Quality | None,
        named: bool = False,
    ) -> Entrants:
        """Ask an engine which of some shapes it takes.

        Shapes that are not between those whose quality was measured are considered only where they are ``named``:
        their loss would be that of the nearest measured one, and likely too low.
        """
        backend, options = load_backend(flow), target.options(flow)
        shapes, own_sizes = choices
        ragged = "ragged" in backend.layouts(architecture, precision, options)
        built_sizes = partial(_built_sizes, own_sizes, ragged)
        legal, refusals = [], []
        for shape in shapes:
            if quality is not None and not named and not quality.covers(shape, precision):
                continue
            subnet = built_sizes(shape).padded
            refused = families.refusal(subnet) or backend.refusal(subnet, precision, options)
            if refused:
                refusals.append(f"{shape} cannot be lowered to {flow} {precision}: {refused}")
            else:
                legal.append(shape)
        return cls(
            target, flow, precision, architecture, tuple(legal), tuple(refusals), own_sizes, built_sizes, quality
        )

    def candidates(self, table: Table | None) -> list[Candidate]:
        """Every shape judged, latencies from a table where it has rows for them.

        Raises:
            BadInput: the table is of another architecture.
            LatencyUnknown: there are no rows, and the device has no figures to estimate from.
        """
        return candidates(
            self.shapes,
            self.architecture,
            self.own_sizes,
            self.flow,
            self.precision,
            self._predictor(table),
            self.quality,
            self.built_sizes,
            load_backend(self.flow).storage(self.precision),
        )

    def estimates_for(self, table: Table | None) -> str | None:
        """A remark where latencies are not what one would expect: estimated beside a table, or calibrated."""
        target = self.target
        if table is not None and target.rows(table, self.flow, self.precision).rows:
            return None
        estimates = self._estimator(table)
        if table is None:
            return estimates.remark if estimates.rows else None
        workload = target.workload
        asked = f"batch {workload.batch}, prompt {workload.prompt}, tokens {workload.tokens}"
        own = "".join(f", {name}={value}" for name, value in target.own_settings(self.flow).items())
        return f"the table has no row of {self.flow} {self.precision} for {asked}{own}: {estimates.remark}"

    def _estimator(self, table: Table | None) -> Estimator:
        return estimator_of(self.target, self.flow, self.precision, self.architecture, table)

    def _predictor(self, table: Table | None) -> Callable[[Shape], Prediction]:
        """Where latencies come from: the table where it has rows for them, else an estimate."""
        target, flow, precision = self.target, self.flow, self.precision
        if table is not None:
            if table.architecture_digest != self.architecture.digest:
                raise BadInput("the latency table was measured for another model architecture; profile this one")
            rows = target.rows(table, flow, precision)
            if rows.rows:
                return rows.predictor(lambda shape: self.built_sizes(shape).mean, flow, precision, target.workload)
            if target.device.bandwidth is None:
                raise LatencyUnknown(
                    f"the table of '{table.device}' has nothing measured for {flow} in {precision} as it is asked for "
                    f"here; run '{target.measure_command(flow, precision)}' there"
                )
        estimates = self._estimator(table)
        return lambda shape: estimates(self.built_sizes(shape))


def _built_sizes(sizes_of: Callable[[Shape], SubnetSizes], ragged: bool, shape: Shape) -> SubnetSizes:
    return sizes_of(shape).built(ragged)


def entrants_of(
    target: Target,
    architecture: Architecture,
    choices: Callable[[str, str], Choices],
    quality: Quality | None,
    named: bool = False,
) -> tuple[list[Entrants], list[str]]:
    """The shapes of every flow and precision of a target, and remarks.

    ``choices`` gives for a flow and precision the shapes to consider, with the sizes of their subnets.

    Raises:
        BadInput: the backends refuse every shape, or the precisions cannot be ranked against each other.
    """
    pairs, remarks = ranked_pairs(target, quality)
    found = [Entrants.of(target, *pair, architecture, choices(*pair), quality, named) for pair in pairs]
    if not any(entrants.shapes for entrants in found):
        refusals = [refusal for entrants in found for refusal in entrants.refusals]
        if not refusals:
            raise BadInput("no shape lies between those whose quality was measured; measure it anew, or name a --shape")
        raise BadInput(f"{refusals[0]}; see whether another --flow or --precision takes it")
    return [entrants for entrants in found if entrants.shapes], remarks


def require_measured(found: Sequence[Candidate], device: str) -> list[Candidate]:
    """The candidates whose latency is more than an estimate; raises LatencyUnknown where there are none."""
    measured = [candidate for candidate in found if candidate.prediction.source != "estimated"]
    if not measured:
        raise LatencyUnknown(
            f"only estimates exist for '{device}'; run 'amoeba profile' there, or drop --measured-only"
        )
    return measured
