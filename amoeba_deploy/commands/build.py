"""The commands ``build``, ``init`` and ``cache``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amoeba_deploy.commands.common import emit
from amoeba_deploy.options import Days, Memory, output_options, plain_http_option
from amoeba_deploy.progress import Progress
from amoeba_deploy.settings import SETTINGS

if TYPE_CHECKING:
    from amoeba_deploy.project.cache import Entry
    from amoeba_deploy.project.gate import Verdict
    from amoeba_deploy.project.result import Result

FILE = click.Path(path_type=Path)


@click.command()
@click.option("--config", type=FILE, default=SETTINGS, show_default=True, help="The project's file.")
@click.option(
    "--target", "targets", multiple=True, help="Build this one, and what it needs.  [repeatable; default: all]"
)
@click.option("--jobs", type=click.IntRange(1), help="Targets that are built at once.  [default: the file's, else 1]")
@click.option("--explain", is_flag=True, help="Say of every target why it is built, or is not.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
@click.option("--force", is_flag=True, help="Build again what did not change.")
@click.option(
    "--fail-if", "conditions", multiple=True, help="Fail where this holds: 'tpot > 1.05 * baseline'.  [repeatable]"
)
@click.option("--baseline", type=FILE, help="Figures to compare with.  [default: the file's]")
@click.option("--save-baseline", is_flag=True, help="Store the figures of this build as the baseline, if it is good.")
@click.option("--sign", is_flag=True, help="Sign the bundles of targets that name a private-key.")
@click.option("--serial", type=click.IntRange(0), help="Release number of signatures.  [default: seconds since 1970]")
@click.option("--push", is_flag=True, help="Push the bundles of targets that name a registry.")
@click.option("--tag", help="Push under this tag instead of the file's.")
@plain_http_option
@click.option("--junit", type=FILE, help="Write JUnit's XML here.")
@click.option("--summary", type=FILE, help="Append a Markdown summary here, such as $GITHUB_STEP_SUMMARY.")
@output_options
def build(
    config: Path,
    targets: tuple[str, ...],
    jobs: int | None,
    explain: bool,
    dry_run: bool,
    force: bool,
    conditions: tuple[str, ...],
    baseline: Path | None,
    save_baseline: bool,
    sign: bool,
    serial: int | None,
    push: bool,
    tag: str | None,
    plain_http: bool,
    junit: Path | None,
    summary: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build every target of amoeba.toml, but for what did not change: search, extract, lower, verify, bundle.

    Bundles are kept in the cache by all that decided their bytes. A target that fails does not stop the others.

    \b
    amoeba build
    amoeba build --target kiosk --explain
    amoeba build --jobs 4 --sign --push --junit build.xml --fail-if 'size > 1.1 * baseline'
    """
    from amoeba_deploy.project.report import append_summary, markdown, write_junit
    from amoeba_deploy.project.whole import Wishes, build_project

    wishes = Wishes(
        config,
        targets,
        jobs,
        dry_run=dry_run,
        force=force,
        conditions=conditions,
        baseline=baseline,
        save_baseline=save_baseline,
        sign=sign,
        serial=serial,
        push=push,
        tag=tag,
        plain_http=plain_http,
    )
    done = build_project(wishes, Progress(quiet))
    if junit is not None:
        write_junit(junit, done.results, done.verdicts)
    if summary is not None:
        append_summary(summary, markdown(done.results, done.verdicts))
    emit(done.to_json(), as_json, lambda: _print(done.results, done.verdicts, explain or dry_run))
    error = done.failure()
    if error is not None:
        raise error


def _print(results: Sequence[Result], verdicts: Sequence[Verdict], explain: bool) -> None:
    from amoeba_deploy.console import columns
    from amoeba_deploy.project.report import HEAD, cells

    columns([cells(result) for result in results], HEAD)
    for result in results:
        if explain or not result.good:
            click.echo(f"{result.name}: {result.state}, {result.reason}")
        if explain:
            for remark in result.remarks:
                click.echo(f"  note: {remark}")
        if result.signed is not None:
            click.echo(f"{result.name}: signed as release {result.signed}")
        if result.pushed is not None:
            click.echo(f"{result.name}: pushed to {result.pushed['reference']} ({result.pushed['digest']})")
    for verdict in verdicts:
        word = {True: "broken", False: "holds", None: "not compared"}[verdict.broken]
        click.echo(
            f"gate '{verdict.condition}' on {verdict.target}: {word}, {verdict.said.removeprefix('not compared: ')}"
        )
    idle = all(result.state == "unchanged" and not (result.signed or result.pushed) for result in results)
    if idle and not any(verdict.broken for verdict in verdicts):
        click.echo("nothing to do: no target changed")


@click.command()
@click.argument("folder", type=FILE, default=".")
@click.option("--checkpoint", help="One-for-all checkpoint, relative to the folder.  [default: the embedded one]")
@click.option("--device", default="orin-nx", show_default=True, help="Device of the first target.")
@click.option("--name", default="kiosk", show_default=True, help="Name of the first target.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
def init(folder: Path, checkpoint: str | None, device: str, name: str, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a commented amoeba.toml, and beside it the JSON Schema by which editors complete it.

    \b
    amoeba init && amoeba build
    """
    from amoeba_deploy.project.template import write_project

    files = write_project(folder, checkpoint, device, name, force)
    emit({"files": [str(file) for file in files]}, as_json, lambda: click.echo("\n".join(map(str, files))))


@click.group()
def cache() -> None:
    """Bundles that 'amoeba build' keeps."""


@cache.command("list")
@output_options
def cache_list(as_json: bool, quiet: bool) -> None:
    """List the bundles of the cache, the latest used first.

    \b
    amoeba cache list
    """
    from amoeba_deploy.project.cache import BuildCache

    store = BuildCache()
    entries = store.entries()
    total = sum(entry.bytes for entry in entries)
    value = {"path": str(store.folder), "bytes": total, "entries": [_entry_json(entry) for entry in entries]}
    emit(value, as_json, lambda: _print_entries(store.folder, entries, total))


def _entry_json(entry: Entry) -> dict[str, Any]:
    figures = entry.figures
    shown = {name: figures[name] for name in ("device", "flow", "precision", "shape")}
    return {"key": entry.key, "target": entry.facts.get("target"), "bytes": entry.bytes, "used": entry.used, **shown}


def _print_entries(folder: Path, entries: Sequence[Entry], total: float) -> None:
    import datetime

    from amoeba_deploy.console import amount, columns

    rows = [
        [
            entry.key[:12],
            str(entry.facts.get("target")),
            f"{entry.figures['device']} {entry.figures['flow']} {entry.figures['precision']} {entry.figures['shape']}",
            amount(entry.bytes),
            datetime.datetime.fromtimestamp(entry.used).astimezone().isoformat(" ", "seconds")[:16],
        ]
        for entry in entries
    ]
    if rows:
        columns(rows, ["key", "target", "what", "size", "last used"])
    click.echo(f"{folder}: {len(entries)} bundles, {amount(total)}")


@cache.command("prune")
@click.option("--older-than", type=Days(), help="Remove what was not used for so long, such as 30d.")
@click.option("--keep", type=Memory(), help="Remove the longest unused beyond this size, such as 5GB.")
@output_options
def cache_prune(older_than: float | None, keep: float | None, as_json: bool, quiet: bool) -> None:
    """Remove bundles from the cache: all, or those that --older-than and --keep name. What is being built stays.

    \b
    amoeba cache prune --older-than 30d --keep 5GB
    """
    from amoeba_deploy.console import amount
    from amoeba_deploy.project.cache import BuildCache

    store = BuildCache()
    removed = store.prune(older_than=older_than, keep_bytes=keep)
    freed = sum(entry.bytes for entry in removed)
    value = {"path": str(store.folder), "removed": [entry.key for entry in removed], "bytes": freed}
    emit(value, as_json, lambda: click.echo(f"{store.folder}: {len(removed)} bundles removed, {amount(freed)}"))
