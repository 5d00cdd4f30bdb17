"""A build as a user asks for it, from the target list to what is signed, pushed and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed, with_code
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.baseline import read_baseline, write_baseline
from amoeba_deploy.project.cache import BuildCache
from amoeba_deploy.project.config import Loaded, load_project
from amoeba_deploy.project.gate import Gate, Verdict
from amoeba_deploy.project.pipeline import Build
from amoeba_deploy.project.planned import ordered, plan
from amoeba_deploy.project.result import Result
from amoeba_deploy.project.shipping import check_shipping, pushed, signed


@dataclass(frozen=True)
class Wishes:
    """The options of ``amoeba build``."""

    config: Path
    targets: Sequence[str] = ()
    jobs: int | None = None
    dry_run: bool = False
    force: bool = False
    conditions: Sequence[str] = ()
    """Gates beside those of the file."""
    baseline: Path | None = None
    save_baseline: bool = False
    sign: bool = False
    serial: int | None = None
    push: bool = False
    tag: str | None = None
    plain_http: bool = False


@dataclass(frozen=True)
class Whole:
    """What became of every target, and what the gates say."""

    config: Path
    cache: Path
    results: tuple[Result, ...]
    verdicts: tuple[Verdict, ...]
    replaces: bool = False
    """Whether the baseline is replaced: then no gate against it fails the build."""

    def failure(self) -> AmoebaError | None:
        """The failure of the build as a whole: that of its first target which failed, else of its gates."""
        failed = [result for result in self.results if not result.good]
        if failed:
            first = next((result for result in failed if result.state == "failed"), failed[0])
            names = ", ".join(result.name for result in failed)
            said = f"{len(failed)} of {len(self.results)} targets failed ({names}); {first.name}: {first.reason}"
            return with_code(first.exit_code, said)
        broken = self.broken
        if not broken:
            return None
        more = f"; {len(broken) - 1} more gates are broken" if len(broken) > 1 else ""
        renew = ", or store a new baseline with --save-baseline" if broken[0].against_baseline else ""
        return VerificationFailed(
            f"{broken[0].target} breaks the gate '{broken[0].condition}': {broken[0].said}{more}; look at what "
            f"changed{renew}"
        )

    @property
    def broken(self) -> list[Verdict]:
        """The gates that are broken, but for those against a baseline that is just being replaced."""
        return [each for each in self.verdicts if each.broken and not (self.replaces and each.against_baseline)]

    def to_json(self) -> dict[str, Any]:
        """The object that ``build --json`` prints."""
        return {
            "config": str(self.config),
            "targets": [result.to_json() for result in self.results],
            "gates": [verdict.to_json() for verdict in self.verdicts],
            "cache": str(self.cache),
        }


def build_project(wishes: Wishes, progress: Progress) -> Whole:
    """Build, judge, sign, push, and store the baseline; a target that breaks a gate is neither signed nor pushed.

    Raises:
        BadInput: the project's file, a gate or the baseline is wrong, or the cache cannot be written.
    """
    if wishes.dry_run and wishes.save_baseline:
        raise BadInput("--save-baseline stores what was built, and --dry-run builds nothing; leave one of them out")
    loaded, cache = load_project(wishes.config), BuildCache()
    settings = loaded.project.build
    gates = [Gate(text).check() for text in (*settings.fail_if, *wishes.conditions)]
    file = wishes.baseline or loaded.path(settings.baseline)
    needed = wishes.baseline is not None and not wishes.save_baseline
    stored = read_baseline(file) if needed or file.is_file() else {}
    names = ordered(loaded, wishes.targets)
    for name in names:
        for flow in loaded.targets[name].flow:
            load_backend(flow)
    for remark in check_shipping(loaded, names, wishes.sign, wishes.push, wishes.tag):
        progress.say(remark)
    if not stored and not wishes.save_baseline and any(gate.needs_baseline for gate in gates):
        progress.say(f"note: there is no {file}, so nothing is compared with a baseline; --save-baseline stores one")
    planned = plan(loaded, names, cache, wishes.force)
    build = Build(loaded, cache, progress, wishes.jobs or settings.jobs)
    results = build.foreseen(planned) if wishes.dry_run else build.run(planned)
    verdicts = [
        gate.judge(result.name, result.figures, stored.get(result.name))
        for gate in gates
        for result in results
        if result.good and result.figures is not None
    ]
    whole = Whole(wishes.config, cache.folder, tuple(results), tuple(verdicts), wishes.save_baseline)
    if wishes.dry_run:
        return whole
    broken = {verdict.target for verdict in whole.broken}
    results = [each if each.name in broken else _shipped(loaded, each, wishes, progress) for each in results]
    whole = replace(whole, results=tuple(results))
    if wishes.save_baseline and whole.failure() is None:
        write_baseline(file, results, stored)
        progress.say(f"{file}: stored as the baseline")
    return whole


def _shipped(loaded: Loaded, result: Result, wishes: Wishes, progress: Progress) -> Result:
    if wishes.sign:
        result = signed(loaded, result, wishes.serial)
    return pushed(loaded, result, wishes.tag, wishes.plain_http, progress) if wishes.push else result
