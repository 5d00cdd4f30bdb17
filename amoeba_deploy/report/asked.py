"""What a report is asked for: its devices with their tables, where nothing may be measured for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import LatencyUnknown
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.profiler import local_table_file
from amoeba_deploy.profiles.shipped import all_shipped
from amoeba_deploy.profiles.table import read_table
from amoeba_deploy.several import asked_of_each
from amoeba_deploy.space import Space

ESTIMATED = "orin-nx"
"""The device that stands for all that nobody measured."""


def searches_of(space: Space, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of one search for each device.

    Where none is named they are those of the tables, else those that a table ships for with this model, and one whose
    latencies are estimated.

    Raises:
        BadInput: as ``asked_of_each`` does.
        LatencyUnknown: this machine is named, and was never measured.
    """
    files: Sequence[Path] = asked["table"]
    devices = tuple(asked["devices"]) or tuple(dict.fromkeys(read_table(file).device for file in files))
    if not devices:
        known = [table.device for _, table in all_shipped() if table.architecture_digest == space.architecture.digest]
        devices = tuple(dict.fromkeys((*known, ESTIMATED)))
    each = asked_of_each({**asked, "devices": devices})
    return [one if one["device"] != LOCAL or one["table"] else _of_this_machine(space, one) for one in each]


def _of_this_machine(space: Space, asked: dict[str, Any]) -> dict[str, Any]:
    """The same with the table that this machine holds of itself: a search would measure what it lacks."""
    file = local_table_file(space.source)
    if not file.is_file():
        raise LatencyUnknown(
            "nothing is measured on this machine of this model, and a report measures nothing; run 'amoeba profile' "
            "first, or name another --device"
        )
    return {**asked, "table": (file,)}
