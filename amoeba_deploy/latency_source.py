"""Where a request's latencies come from: tables that were named, this machine's own, or those that ship with us."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amoeba_deploy.export import Phases
from amoeba_deploy.files import sha256_of
from amoeba_deploy.local_latency import named_table, searched_table
from amoeba_deploy.plan import Plan
from amoeba_deploy.profiles.device import LOCAL
from amoeba_deploy.profiles.profiler import local_table_file
from amoeba_deploy.profiles.shipped import shipped_tables
from amoeba_deploy.profiles.table import Table
from amoeba_deploy.profiles.table_set import read_tables
from amoeba_deploy.progress import Progress
from amoeba_deploy.space import Space
from amoeba_deploy.target import Target

Latencies = tuple[Table | None, str | None, tuple[str, ...]]
"""The table that latencies come from, the digest of its files, and remarks."""


def latencies_of(
    space: Space,
    target: Target,
    files: Sequence[Path],
    plans: Sequence[Plan],
    measure: bool,
    progress: Progress,
    phases: Phases,
) -> Latencies:
    """Where latencies come from: the tables that were named, else this machine's own, else those that ship with us."""
    device, digest = target.device.name, space.architecture.digest
    flows = [flow for flow, _ in target.pairs]
    if device == LOCAL and not files:
        if measure:
            return None, None, ()
        with phases.phase("profile"):
            return _local_table(space, target, plans, progress)
    shipped = () if files else shipped_tables(device, digest)
    if not files and not shipped:
        return None, None, ()
    tables = read_tables(files or shipped, device, digest, flows)
    said = [f"uses the table that ships with amoeba-deploy for this device and model: {file.name}" for file in shipped]
    return tables.table, tables.digest, (*said, *tables.remarks)


def _local_table(space: Space, target: Target, plans: Sequence[Plan], progress: Progress) -> Latencies:
    source = space.source
    table = named_table(source, target, plans, progress) if plans else searched_table(source, target, progress)
    file = local_table_file(source)
    return table, "sha256:" + sha256_of(file) if file.is_file() else None, ()
