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
    width = max(len(_label(each)) for each in findings)
    for each in findings:
        todo = f"; {each.todo}" if each.todo else ""
        click.echo(f"{_label(each).ljust(width)}  {each.state.ljust(7)}  {each.said}{todo}")
    states = [each.state for each in findings]
    click.echo(f"{states.count('problem')} problems, {states.count('missing')} not installed")


def _label(found: Finding) -> str:
    kind = {"flows": "flow ", "extras": "extra "}.get(found.kind, "")
    return kind + found.name
