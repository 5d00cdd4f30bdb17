"""Boards: the cases of one device whose qualities can be ranked against each other, which share a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from amoeba_deploy.entrants import ranked_pairs
from amoeba_deploy.errors import AmoebaError, BadInput, LatencyUnknown, NoShapeFits
from amoeba_deploy.progress import Progress
from amoeba_deploy.report.case import Case, Pair, resolved
from amoeba_deploy.space import Space


@dataclass(frozen=True)
class Board:
    """Some cases of one device: of several engines first the one that ranks them together."""

    cases: tuple[Case, ...]
    start: float | None = None
    """The budget that is shown first, where one was asked for."""

    @property
    def widest(self) -> Case:
        """The case that has all shapes of the others."""
        return self.cases[0]

    @property
    def device(self) -> str:
        """The device's name."""
        return self.widest.request.target.device.name

    @property
    def singles(self) -> tuple[Case, ...]:
        """The cases of one engine each."""
        return self.cases if len(self.cases) == 1 else self.cases[1:]


@dataclass(frozen=True)
class DeviceBoards:
    """All boards of a device, and what is to be said of how they came about."""

    boards: tuple[Board, ...]
    remarks: tuple[str, ...]


def boards_of(space: Space, asked: Mapping[str, Any], progress: Progress) -> DeviceBoards:
    """The boards of the device that the options of one search name.

    An engine whose precision was not measured is never ranked against another: it has a board of its own. One that
    takes no shape, or of whose speed nothing is known, is passed over while others are left.

    Raises:
        AmoebaError: what a search raises where no engine can be considered.
    """
    target, start = resolved(space, asked, progress).target, asked["latency"]
    singles, remarks = _singles(space, asked, target.pairs, progress)
    try:
        ranked, _ = ranked_pairs(replace(target, pairs=tuple(singles)), space.quality)
    except BadInput:
        ranked = ()
    together = _together(space, asked, ranked, progress) if len(ranked) > 1 else None
    boards = [] if together is None else [Board((together, *(singles[pair] for pair in together.pairs)), start)]
    alone = [pair for pair in singles if together is None or pair not in together.pairs]
    boards += [Board((singles[pair],), start) for pair in alone]
    said = (*target.remarks, *remarks, *(remark for board in boards for remark in board.widest.answer.remarks))
    return DeviceBoards(tuple(boards), tuple(dict.fromkeys(said)))


def _singles(
    space: Space, asked: Mapping[str, Any], pairs: Sequence[Pair], progress: Progress
) -> tuple[dict[Pair, Case], list[str]]:
    """A case of each engine, and why others have none; raises what was wrong with the first where none has."""
    found: dict[Pair, Case] = {}
    errors: list[tuple[Pair, AmoebaError]] = []
    for pair in pairs:
        try:
            found[pair] = Case.of(space, {**asked, "flow": pair[0], "precision": pair[1]}, progress)
        except (BadInput, LatencyUnknown, NoShapeFits) as error:
            errors.append((pair, error))
    if not found:
        raise errors[0][1]
    return found, [f"passed over {' '.join(pair)}: {error}" for pair, error in errors]


def _together(space: Space, asked: Mapping[str, Any], pairs: Sequence[Pair], progress: Progress) -> Case | None:
    """The case that ranks some engines against each other; None where one search cannot ask for these alone."""
    flows = ",".join(dict.fromkeys(flow for flow, _ in pairs))
    try:
        case = Case.of(space, {**asked, "flow": flows}, progress)
    except (BadInput, LatencyUnknown):
        return None
    return case if set(case.pairs) == set(pairs) else None
