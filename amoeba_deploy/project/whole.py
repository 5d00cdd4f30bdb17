"""A build as a user asks for it, from the target list to what is signed, pushed and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, VerificationFailed, with_code
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.baseline import read_baseline, write_baseline
from amoeba_deploy.project.cache import BuildCache
from amoeba_deploy.project.config import Loaded, load_project
from amoeba_deploy.project.gate import Gate, Verdict
from amoeba_deploy.project.pipeline import Build
from amoeba_deploy.project.planned import plan
from amoeba_deploy.project.result import Result
from amoeba_deploy.project.shipping import pushed, signed


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

    def failure(self) -> AmoebaError | None:
        """The failure of the build as a whole: that of its first target which failed, else of its gates."""
        failed = [result for result in self.results if not result.good]
        if failed:
            first = next((result for result in failed if result.state == "failed"), failed[0])
            names = ", ".join(result.name for result in failed)
            said = (
                f"{len(failed)} of {len(self.results)} targets were not built ({names}); {first.name}: {first.reason}"
            )
            return with_code(first.exit_code, said)
        broken = [verdict for verdict in self.verdicts if verdict.broken]
        if not broken:
            return None
        more = f"; {len(broken) - 1} more gates are broken" if len(broken) > 1 else ""
        return VerificationFailed(
            f"{broken[0].target} breaks the gate '{broken[0].condition}': {broken[0].said}{more}; look at what "
            f"changed, or store a new baseline with --save-baseline"
        )

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
    loaded, cache = load_project(wishes.config), BuildCache()
    settings = loaded.project.build
    gates = [Gate(text).check() for text in (*settings.fail_if, *wishes.conditions)]
    file = wishes.baseline or loaded.path(settings.baseline)
    needed = wishes.baseline is not None and not wishes.save_baseline
    stored = read_baseline(file) if needed or file.is_file() else {}
    planned = plan(loaded, wishes.targets, cache, wishes.force)
    build = Build(loaded, cache, progress, wishes.jobs or settings.jobs, wishes.force)
    results = build.foreseen(planned) if wishes.dry_run else build.run(planned)
    verdicts = [
        gate.judge(result.name, result.figures, stored.get(result.name))
        for gate in gates
        for result in results
        if result.good and result.figures is not None
    ]
    if not wishes.dry_run:
        broken = {verdict.target for verdict in verdicts if verdict.broken}
        results = [each if each.name in broken else _shipped(loaded, each, wishes, progress) for each in results]
    whole = Whole(wishes.config, cache.folder, tuple(results), tuple(verdicts))
    if wishes.save_baseline and not wishes.dry_run and whole.failure() is None:
        write_baseline(file, results, stored)
    return whole


def _shipped(loaded: Loaded, result: Result, wishes: Wishes, progress: Progress) -> Result:
    if wishes.sign:
        result = signed(loaded, result, wishes.serial)
    return pushed(loaded, result, wishes.tag, wishes.plain_http, progress) if wishes.push else result
