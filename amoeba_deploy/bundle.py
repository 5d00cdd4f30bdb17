"""Bundles: an engine with everything that a device needs to run, check and trace it.

A bundle is a folder: ``engine/``, the tokenizer's files, ``selftest.json`` (a prompt and the tokens the engine must
give), ``manifest.json`` (what was built, from what, by what, for which device; sha256 of every file), and
``measured.json``, which alone holds dates and measurements and is outside the manifest's digests. So are
``provenance.json``, which speaks of the manifest, and what signing adds: ``release.json`` and ``model.sig``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from amoeba_deploy.backends import load_backend
from amoeba_deploy.backends.backend import Backend, Engine, options_for
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing, VerificationFailed
from amoeba_deploy.files import read_json, read_json_object, sha256_of, write_json
from amoeba_deploy.profiles.machine import own_chips, threads
from amoeba_deploy.provenance import PROVENANCE, provenance_of
from amoeba_deploy.selftest import check, read_selftest

BUNDLE_FORMAT = "amoeba.bundle/1"
MEASURED_FORMAT = "amoeba.measured/1"
MANIFEST, MEASURED, RELEASE, SIGNATURE = "manifest.json", "measured.json", "release.json", "model.sig"
MAX_MANIFEST = 32 << 20
"""Bytes of a manifest: one of ten thousand files has about two million."""
ENGINE = "engine"
UNLISTED = frozenset({MANIFEST, MEASURED, PROVENANCE, RELEASE, SIGNATURE})
"""Files of a bundle that its manifest does not list."""


def bundle_files(folder: Path) -> list[str]:
    """Paths of all files of a bundle that its manifest lists, relative and sorted; links are refused."""
    found = []
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(root) / name).is_symlink():
                raise VerificationFailed(f"{Path(root) / name}: is a link, which a bundle does not hold")
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in found if name not in UNLISTED)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of an otherwise complete bundle, and its provenance.

    ``facts`` are all entries but format and files. What was signed before is not what is there now: the signature goes.
    """
    files = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in bundle_files(folder)
    }
    manifest = {"format": BUNDLE_FORMAT, **facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    write_json(folder / PROVENANCE, provenance_of(manifest, (folder / MANIFEST).read_bytes()))
    for signed in (RELEASE, SIGNATURE):
        (folder / signed).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle; raises BadInput where the folder is no bundle."""
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{folder}: is not a bundle, it has no {MANIFEST}")
    if (folder / MANIFEST).stat().st_size > MAX_MANIFEST:
        raise BadInput(
            f"{folder / MANIFEST}: has more than {MAX_MANIFEST >> 20} MB, which no bundle's has; get the bundle again"
        )
    manifest = read_json(folder / MANIFEST, BUNDLE_FORMAT)
    strings = all(isinstance(manifest.get(key), str) for key in ("flow", "precision"))
    if not strings or not isinstance(manifest.get("files"), dict):
        raise BadInput(f"{folder / MANIFEST}: lacks files, flow or precision; get the bundle again")
    return manifest


def verify_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Check every file's digest against the manifest; returns the manifest.

    ``known`` are the sha256 of all files where they were just computed, as by a signature that holds; then no file is
    read again.

    Raises:
        VerificationFailed: a file is changed, missing or not listed.
    """
    manifest = read_manifest(folder)
    listed, found = set(manifest["files"]), set(bundle_files(folder))
    if listed - found:
        raise VerificationFailed(f"{folder}: the file {min(listed - found)} is missing; get the bundle again")
    if found - listed:
        raise VerificationFailed(f"{folder}: the file {min(found - listed)} is not in its manifest; remove it")
    names = sorted(listed)
    with ThreadPoolExecutor(threads()) as pool:
        digests = known or dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))
    for name in names:
        entry = manifest["files"][name]
        if not isinstance(entry, dict) or digests.get(name) != entry.get("sha256"):
            raise VerificationFailed(f"{folder / name}: differs from what its manifest lists; get the bundle again")
    return manifest


def check_provenance(folder: Path) -> None:
    """Raise VerificationFailed where the provenance of a bundle, if it has one, is not that of its manifest."""
    file, manifest = folder / PROVENANCE, folder / MANIFEST
    if not file.is_file():
        return
    if read_json_object(file) != provenance_of(read_manifest(folder), manifest.read_bytes()):
        raise VerificationFailed(f"{file}: speaks of another bundle; get the bundle again")


def require_runnable(folder: Path, manifest: Mapping[str, Any]) -> Backend:
    """The backend of a bundle whose engine can be opened on this machine; nothing is loaded yet.

    Raises:
        BadInput: it was built for another machine, or with versions that must be the same and are not.
        ToolchainMissing: it does not run here, or steps are left that finish it.
    """
    flow, precision = manifest["flow"], manifest["precision"]
    if manifest.get("steps"):
        said = "; ".join(f"{step.get('does')}: {step.get('command')}" for step in manifest["steps"])
        where = "on a host and then on the device" if _is_for_host(manifest["steps"][0]) else "on the device"
        raise ToolchainMissing(
            f"{folder}: its engine is not finished; run 'amoeba bundle finish {folder}' {where}, which does "
            f"what is left ({said})"
        )
    backend = load_backend(flow)
    foreign = foreign_to(manifest.get("identity"), backend.toolchain().versions)
    if foreign:
        raise BadInput(f"{folder}: its engine {foreign}; build it again, or run it there")
    context, identity = manifest.get("context"), manifest.get("identity") or {}
    if context and precision in backend.precisions():
        chip, settings = identity.get("chip"), manifest.get("settings")
        options = options_for(backend, int(context), _batch(manifest), chip, settings)
        reason = backend.cannot_run(precision, options)
        if reason:
            raise ToolchainMissing(f"{folder}: its {flow} engine cannot run here: {reason}")
    return backend


def _batch(manifest: Mapping[str, Any]) -> int:
    return int(manifest.get("workload", {}).get("batch", 1))


def open_engine(folder: Path, manifest: Mapping[str, Any]) -> Engine:
    """The engine of a bundle; raises what ``require_runnable`` raises, and BadInput where it is damaged."""
    backend = require_runnable(folder, manifest)
    return backend.open(folder / ENGINE, manifest["precision"], context=manifest.get("context"), batch=_batch(manifest))


def _is_for_host(step: Mapping[str, str]) -> bool:
    return step.get("where") == "host"


@dataclass(frozen=True)
class Finished:
    """How many steps of a bundle ran, and how many are left for the device."""

    ran: int
    left: int


def finish_bundle(folder: Path, run: Callable[[Mapping[str, str]], None] | None = None) -> Finished:
    """Run the steps of a bundle that are left for this machine, and enter what each made into its manifest.

    On the engine's device these are all; on any other machine those at the front that are for a host. Where a step
    fails, what it made is removed, and it and all after it are still left. ``run`` runs one step; left out, its command
    runs in the bundle's folder.

    Raises:
        VerificationFailed: a file of the bundle is changed, missing or not listed, or a step made a link.
        BadInput: the steps that are left are for the device, and this machine is another.
        ToolchainMissing: a step's command is not on this machine, or a host must run its steps first.
        AmoebaError: a step fails.
    """
    manifest = verify_files(folder)
    steps = manifest.get("steps") or []
    if not steps:
        return Finished(0, 0)
    identity = manifest.get("identity")
    foreign = foreign_to(identity, load_backend(manifest["flow"]).toolchain().versions)
    for_host = list(takewhile(_is_for_host, steps))
    if foreign and not for_host:
        raise BadInput(f"{folder}: its engine {foreign}; finish it there")
    if not foreign and for_host and identity and identity.get("chip"):
        raise ToolchainMissing(
            f"{folder}: the step to {for_host[0].get('does')} is not for the device; run 'amoeba bundle finish' on "
            f"{for_host[0].get('needs') or 'a host'} first, and copy the bundle here"
        )
    here = for_host if foreign else steps
    for count in range(1, len(here) + 1):
        _finish_step(folder, manifest, steps[:count], steps[count:], run)
    return Finished(len(here), len(steps) - len(here))


def _finish_step(
    folder: Path,
    manifest: Mapping[str, Any],
    done: Sequence[Mapping[str, str]],
    left: Sequence[Mapping[str, str]],
    run: Callable[[Mapping[str, str]], None] | None,
) -> None:
    """Run the last of ``done`` and write the manifest anew; what it made is removed where it fails."""
    before = set(folder.rglob("*"))
    try:
        run(done[-1]) if run else run_step(folder, done[-1])
        facts = {key: value for key, value in manifest.items() if key not in ("format", "files")}
        finished = [*manifest.get("finished", []), *done]
        write_manifest(folder, facts | {"steps": list(left), "finished": finished})
    except BaseException:
        _remove_others(folder, before)
        raise


def _remove_others(folder: Path, kept: Set[Path]) -> None:
    """Remove all below a folder but what is named, as far as that is possible, and without an error."""
    for root, folders, files in os.walk(folder, topdown=False):
        for path in (Path(root) / name for name in (*folders, *files)):
            if path not in kept:
                with suppress(OSError):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def run_step(folder: Path, step: Mapping[str, str]) -> None:
    """Run a step's command in a bundle's folder.

    Raises:
        ToolchainMissing: the command is not on this machine.
        AmoebaError: it fails; the message has its last line.
    """
    command = shlex.split(str(step.get("command", "")))
    what = f"{folder}: the step to {step.get('does')}"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except (OSError, IndexError) as error:
        needs = f"; install {step['needs']}" if step.get("needs") else ""
        name = command[0] if command else "a command"
        raise ToolchainMissing(f"{what} needs {name}, which does not start here ({error}){needs}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no message"])[-1]
        raise AmoebaError(f"{what} failed with status {done.returncode}: {last}; run it by hand in that folder")


def foreign_to(identity: Any, installed: Mapping[str, str], chips: Sequence[str] | None = None) -> str | None:
    """Why an engine of some identity is not valid here, as half a sentence, or None.

    Args:
        identity: the manifest's ``identity``; an older manifest has none.
        installed: versions of the engine's packages on this machine.
        chips: the architectures of this machine; found out where left out.
    """
    if not isinstance(identity, dict):
        return None
    wanted = identity.get("chip")
    if wanted and wanted not in (here := chips or own_chips()):
        return f"was built for {wanted}, and this machine is {' with '.join(here)}"
    versions = identity.get("versions", {})
    for package in identity.get("bound", ()):
        if installed.get(package) != versions.get(package):
            found = installed.get(package, "missing")
            return f"was built with {package} {versions.get(package)}, which is {found} here"
    return None


def run_selftest(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Run the self-test through the bundle's engine; returns the number of tokens compared.

    Raises:
        VerificationFailed: the engine gives other tokens.
        BadInput: the engine is not valid on this machine.
    """
    return check(open_engine(folder, manifest), read_selftest(folder), str(folder))
