"""Measuring a kit on a device over ssh: copy what has changed, run, fetch the results.

The system's own ssh does it, so the user's config, keys and agent hold. What is already there is not sent again: the
device's Python compares digests. Files go by rsync where both sides have it, else as a tar stream that the device's
Python unpacks. Whatever ends between, the same command goes on from there.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.profiles.kit.form import KIT, RUN, Kit, kit_digest
from amoeba_deploy.profiles.kit.results import FILE, RESULTS, read_results
from amoeba_deploy.progress import Progress

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[\w.-]+)@)?(?P<host>[\w.-]+|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?(?P<dir>/.*)?"
)
_FOLDERS = "amoeba-kits"
"""Where kits lie in the home folder of the device's user, where the address names no folder."""
_LOST, _NO_COMMAND = 255, 127
"""What ssh itself ends with, and a shell that does not find a command."""

_LOOK = """
import hashlib, json, os, shutil, sys
wanted = json.load(sys.stdin)
def same(name, size, digest):
    if not os.path.isfile(name) or os.path.getsize(name) != size:
        return False
    found = hashlib.sha256()
    with open(name, "rb") as stream:
        for part in iter(lambda: stream.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest() == digest
missing = [name for name in sorted(wanted) if not same(name, *wanted[name])]
print(json.dumps({"version": list(sys.version_info[:2]), "missing": missing, "free": shutil.disk_usage(".").free,
                  "rsync": bool(shutil.which("rsync"))}))
"""
"""Says which files of a kit the device lacks, in the kit's folder there; any Python 3.6 runs it."""
_UNPACK = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall()"
_PACK = """
import sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as stream:
    stream.add("results", filter=lambda member: None if "/commands" in member.name else member)
"""


@dataclass(frozen=True)
class Remote:
    """A device that ssh reaches."""

    host: str
    user: str | None
    port: int | None
    folder: str | None
    """Where the kit belongs there; None: below the home folder."""
    python: str

    @classmethod
    def parse(cls, address: str, python: str = "python3") -> Remote:
        """Read ``ssh://[user@]host[:port][/folder]``; raises BadInput where it is none."""
        match = _ADDRESS.fullmatch(address)
        if match is None or match["host"].startswith("-"):
            raise BadInput(f"'{address}' is no address; write ssh://[USER@]HOST[:PORT][/FOLDER]")
        port = int(match["port"]) if match["port"] else None
        folder = (match["dir"] or "").rstrip("/") or None
        if folder is not None and folder.startswith("/~/"):
            folder = folder[3:]
        return cls(match["host"].strip("[]"), match["user"], port, folder, python)

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    def ssh(self) -> list[str]:
        """The ssh command up to the host; a terminal may ask for a password, nothing else may."""
        if shutil.which("ssh") is None:
            raise ToolchainMissing("ssh is not installed here; install openssh-client, or copy the kit by other means")
        options = ["-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        options += [] if sys.stdin.isatty() else ["-o", "BatchMode=yes"]
        port = ["-p", str(self.port)] if self.port else []
        return ["ssh", "-T", *options, *port, *(["-l", self.user] if self.user else [])]

    def command(self, script: str) -> list[str]:
        """The command that runs a line of shell there."""
        return [*self.ssh(), "--", self.host, script]

    def check(self) -> None:
        """Raises AmoebaError where the device is not reached, before any work is done for it."""
        self.told(subprocess.run(self.command("true"), capture_output=True, check=False, stdin=subprocess.DEVNULL))

    def told(self, done: subprocess.CompletedProcess[bytes]) -> bytes:
        """What a command printed; raises AmoebaError where ssh or the command failed."""
        if done.returncode == 0:
            return done.stdout
        lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1][:300] if lines else f"status {done.returncode}"
        if done.returncode == _LOST:
            raise AmoebaError(
                f"{self}: ssh does not reach it, or lost it ({said}); run the same command again to go on"
            )
        if done.returncode == _NO_COMMAND:
            raise AmoebaError(f"{self}: has no {self.python} ({said}); name its interpreter by --python")
        raise AmoebaError(f"{self}: {said}; look there, then run the same command again to go on")

    def run(self, script: str, given: bytes | None = None) -> bytes:
        """Run a line of shell there with some standard input; returns its standard output."""
        given_or_none: dict[str, Any] = {"input": given} if given is not None else {"stdin": subprocess.DEVNULL}
        return self.told(subprocess.run(self.command(script), capture_output=True, check=False, **given_or_none))


def measure_there(folder: Path, kit: Kit, remote: Remote, progress: Progress) -> Path:
    """Run a kit on a device; returns the folder of the results that were fetched, beside the kit's own.

    Raises:
        AmoebaError: the device is not reached, the connection is lost, or an item failed there; all of what was
            measured until then is fetched where that is possible, and the same command goes on.
    """
    digest = kit_digest(folder)
    there = remote.folder or f"{_FOLDERS}/{digest.partition(':')[2][:16]}"
    _copy(folder, kit, remote, there, progress)
    progress.say(f"measuring on {remote}, for {kit.budget:.0f} s of runs at most")
    script = f"cd {shlex.quote(there)} && exec {shlex.quote(remote.python)} {RUN}"
    output = subprocess.DEVNULL if progress.quiet else None
    done = subprocess.run(
        remote.command(script), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output, check=False
    )
    if done.returncode == _LOST:
        raise AmoebaError(f"{remote}: ssh lost it while it measured; run the same command again to go on")
    found = _fetch(folder, remote, there, digest)
    if done.returncode != 0:
        from amoeba_deploy.profiles.kit.runner import outcome

        wrong = outcome(read_results(found / FILE))
        said = wrong or f"run.py ended with status {done.returncode} there"
        kind = AmoebaError if wrong is None else type(wrong)
        raise kind(f"{remote}: {said}; what was measured is in {found}")
    return found


def _copy(folder: Path, kit: Kit, remote: Remote, there: str, progress: Progress) -> None:
    """Bring the kit's files there, as far as they are not."""
    write = shlex.quote(there)
    files = dict(kit.files)
    entry = folder / KIT
    files[KIT] = (entry.stat().st_size, kit_digest(folder).partition(":")[2])
    look = f"mkdir -p {write} && cd {write} && exec {shlex.quote(remote.python)} -c {shlex.quote(_LOOK)}"
    try:
        answer = json.loads(remote.run(look, json.dumps(files).encode()))
        missing, version = [str(name) for name in answer["missing"]], tuple(answer["version"])
    except (ValueError, KeyError, TypeError):
        raise AmoebaError(
            f"{remote}: {remote.python} there answers with no JSON; give its interpreter by --python"
        ) from None
    if version < (3, 9):
        raise AmoebaError(
            f"{remote}: {remote.python} there is Python {version[0]}.{version[1]}; give 3.9 or newer by --python"
        )
    if not missing:
        progress.say(f"{remote} has all {len(files)} files of the kit")
        return
    size = sum(files[name][0] for name in missing)
    if size > int(answer["free"]):
        free = int(answer["free"]) / 1e6
        raise AmoebaError(
            f"{remote}: has {free:.0f} MB free, and the kit needs {size / 1e6:.0f} MB more; free some there"
        )
    by_rsync = answer["rsync"] and shutil.which("rsync") is not None
    how = "rsync" if by_rsync else "tar"
    progress.say(f"copying {len(missing)} of {len(files)} files, {size / 1e6:.0f} MB, by {how}")
    (_by_rsync if by_rsync else _by_tar)(folder, missing, remote, there)


def _by_rsync(folder: Path, names: Sequence[str], remote: Remote, there: str) -> None:
    shell = shlex.join(remote.ssh())
    host = f"[{remote.host}]" if ":" in remote.host else remote.host
    target = f"{host}:{there}/"
    command = ["rsync", "-t", "--inplace", "--partial", "--files-from=-", "-e", shell, f"{folder}/", target]
    done = subprocess.run(command, input="\n".join(names).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise AmoebaError(f"{remote}: rsync failed ({lines[-1][:300]}); run the same command again to go on")


def _by_tar(folder: Path, names: Sequence[str], remote: Remote, there: str) -> None:
    command = remote.command(f"cd {shlex.quote(there)} && exec {shlex.quote(remote.python)} -c {shlex.quote(_UNPACK)}")
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert receiver.stdin is not None
    assert receiver.stderr is not None
    with suppress(BrokenPipeError):  # where it has ended it says why
        with tarfile.open(fileobj=receiver.stdin, mode="w|") as stream:
            for name in names:
                stream.add(folder / name, name)
        receiver.stdin.close()
    told = receiver.stderr.read()
    remote.told(subprocess.CompletedProcess(command, receiver.wait(), b"", told))


def _fetch(folder: Path, remote: Remote, there: str, digest: str) -> Path:
    """Bring the results here, into a folder of their own for each device."""
    found = folder / f"{RESULTS}-{re.sub(r'[^A-Za-z0-9.-]', '_', remote.host)}"
    packed = remote.run(f"cd {shlex.quote(there)} && exec {shlex.quote(remote.python)} -c {shlex.quote(_PACK)}")
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as work:
        inside = Path(work) / RESULTS
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as stream:
                _extract(stream, Path(work))
        except (tarfile.TarError, OSError) as error:
            raise AmoebaError(f"{remote}: its results were not fetched ({error}); run the same command again") from None
        if read_results(inside / FILE).head.get("kit") != digest:
            raise BadInput(f"{remote}: its {there}/{RESULTS} is of another kit; name another folder in the address")
        shutil.rmtree(found, ignore_errors=True)
        inside.rename(found)
    return found


def _extract(stream: tarfile.TarFile, target: Path) -> None:
    """Write the plain files of an archive below a folder; whatever else a device sends is left out."""
    for member in stream:
        content, path = stream.extractfile(member), PurePosixPath(member.name)
        if content is None or not member.isfile() or path.is_absolute() or ".." in path.parts:
            continue
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.read())
