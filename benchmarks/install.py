"""What an install costs beside reading the bundle once: ``python -m benchmarks.install [MEGABYTES]``.

A small bundle gets that many megabytes (200) of random weights beside its engine. Its parts are timed side by side, in
turn, and so is the whole install but for the health check, which is the engine's own time. The floors: reading all
files once from the page cache; once from the disk, where the system lets go of the pages; and their sha256, which one
file's bytes must pass through in order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from amoeba_deploy.bundle import read_manifest, verify_files, write_manifest
from amoeba_deploy.delivery.signing import Trust, sign, verify_signature
from amoeba_deploy.device import install as module
from amoeba_deploy.device.durable import sync_tree
from amoeba_deploy.device.health import Health
from amoeba_deploy.device.install import InstallOptions, install
from amoeba_deploy.device.source import FolderSource, Target
from amoeba_deploy.device.state import read_state
from amoeba_deploy.device.switch import switch
from amoeba_deploy.progress import Progress

RUNS = 7
QUIET = Progress(quiet=True)
BLOCK = 1 << 20


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read(folder: Path, each: Callable[[memoryview], object] = len) -> None:
    """Read every file of a folder once, unbuffered."""
    buffer = bytearray(BLOCK)
    for file in files(folder):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                each(memoryview(buffer)[:count])


def forget(folder: Path) -> None:
    """Let the system drop the pages of a folder's files, where it does that."""
    for file in files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_releases(place: Path, megabytes: int) -> list[Path]:
    """Two signed releases of one large bundle, and the key that devices trust."""
    options = ("--device", "raspberry-pi-5", "--flow", "onnx", "--precision", "int8", "--shape", "6x0.5", "--no-verify")
    command = [sys.executable, "-m", "amoeba_deploy", "export", *options, "-o", str(place / "1"), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    (place / "1" / "engine" / "more").write_bytes(os.urandom(megabytes * 10**6))
    facts = {key: value for key, value in read_manifest(place / "1").items() if key not in ("format", "files")}
    write_manifest(place / "1", facts)
    shutil.copytree(place / "1", place / "2")
    make_key(place)
    for serial in (1, 2):
        sign(place / str(serial), place / "key.pem", serial=serial)
    return [place / "1", place / "2"]


def make_key(place: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (place / "key.pem").write_bytes(key.private_bytes(pem, form, secret))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (place / "key.pub").write_bytes(key.public_key().public_bytes(pem, form))


def verify(folder: Path, trust: Trust) -> None:
    """What an install verifies: the signature, with every file's digest, and the manifest's list by these digests."""
    verify_files(folder, verify_signature(folder, trust).digests)


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    module.check_health = lambda *_: Health(0)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        place = Path(name)
        releases, root = make_releases(place, megabytes), place / "root"
        (root / "trust").mkdir(parents=True)
        shutil.copy(place / "key.pub", root / "trust")
        trust = Trust.of_folder(root / "trust")
        install(str(releases[0]), root, InstallOptions(), QUIET)
        times: dict[str, list[float]] = {}
        for turn in range(RUNS + 1):
            for part, seconds in one_turn(releases[(turn + 1) % 2], root, trust, place).items():
                times.setdefault(part, []).append(seconds)
    medians = {part: statistics.median(found[1:]) for part, found in times.items()}
    print(f"{megabytes} MB, medians of {RUNS} runs each, in turn")
    for part, middle in medians.items():
        cached, disk, hashed = (
            middle / medians[floor] for floor in ("read, cached", "read, disk", "sha256, one thread")
        )
        print(
            f"{part:36} {1e3 * middle:8.1f} ms  {cached:6.2f}x cached read {disk:6.2f}x disk read {hashed:6.2f}x sha256"
        )


def one_turn(bundle: Path, root: Path, trust: Trust, place: Path) -> dict[str, float]:
    """Seconds of every part once."""
    read(bundle)
    found = {"read, cached": timed(lambda: read(bundle))}
    digest = hashlib.sha256()
    found["sha256, one thread"] = timed(lambda: read(bundle, digest.update))
    found["verify"] = timed(lambda: verify(bundle, trust))
    (staging := place / "staging").mkdir()
    found["copy"] = timed(lambda: FolderSource("x", bundle).fetch(Target(staging, (), QUIET)))
    found["sync"] = timed(lambda: sync_tree(staging / "bundle"))
    shutil.rmtree(staging)
    options = InstallOptions(allow_older=True)
    found["install, all but the health check"] = timed(lambda: install(str(bundle), root, options, QUIET))
    state = read_state(root)
    slot = state.slots[state.confirmed or "a"]
    assert slot is not None
    back = state.changed(confirmed=state.other if state.slots[state.other] else None)
    found["switch"] = timed(lambda: switch(root, back, state.confirmed or "a", lambda _: Health(0), lambda _: None))  # type: ignore[arg-type, return-value]
    found["verify and switch"] = found["verify"] + found["switch"]
    found["install again: nothing to do"] = timed(lambda: install(str(bundle), root, options, QUIET))
    forget(bundle)
    found["read, disk"] = timed(lambda: read(bundle))
    return found


if __name__ == "__main__":
    main()
