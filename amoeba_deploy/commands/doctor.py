"""The command ``doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import output_options

if TYPE_CHECKING:
    from amoeba_deploy.doctor import Finding


@click.command()
@click.option("--flow", "flows", multiple=True, help="Fail with exit code 6 unless it can build here.  [repeatable]")
@output_options
def doctor(flows: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Show what is installed, which flows can build and run here, and the command that gets what is missing.

    \b
    amoeba doctor
    amoeba doctor --flow onnx --flow gguf
    """
    from amoeba_deploy.doctor import examine, report_json, unable
    from amoeba_deploy.errors import ToolchainMissing

    findings = examine()
    lacking = unable(findings, flows)
    emit(report_json(findings), as_json, lambda: _print(findings))
    if lacking:
        said = "; ".join(f"{each.name}: {each.said}; {each.todo}" for each in lacking)
        raise ToolchainMissing(f"{len(lacking)} of {len(set(flows))} flows cannot build here; {said}")


def _print(findings: Sequence[Finding]) -> None:
    labels = [f"{each.kind.removesuffix('s')} {each.name}" for each in findings]
    names = [
        label if each.kind in ("flows", "extras") else each.name for label, each in zip(labels, findings, strict=True)
    ]
    width = max(map(len, names))
    for name, each in zip(names, findings, strict=True):
        click.echo(f"{name.ljust(width)}  {each.state.ljust(7)}  {each.said}" + (f"; {each.todo}" if each.todo else ""))
    states = [each.state for each in findings]
    click.echo(f"{states.count('problem')} problems, {states.count('missing')} not installed")
