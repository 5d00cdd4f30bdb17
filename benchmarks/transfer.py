"""Push to and pull from a registry against copying and hashing the same files: ``python -m benchmarks.transfer``.

A bundle of random bytes, 200 MB unless told otherwise, as one file or as several; a fresh docker-registry on the
loopback interface for every run. The floor is what any transfer does at least: ``cp`` of the files, and their sha256,
in one thread. Runs are interleaved, and medians are shown. Beside them stands what a push or pull cannot make faster:
the registry's own time to take the same bytes from ``curl``, and to give them.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from registries import Registry, running_registry

from amoeba_deploy.bundle import write_manifest
from amoeba_deploy.delivery.archive import pack, unpack
from amoeba_deploy.delivery.artifact import digest_of
from amoeba_deploy.delivery.registry import pull, push
from amoeba_deploy.progress import Progress

QUIET = Progress(quiet=True)


def write_bundle(folder: Path, size: int, files: int) -> None:
    """A bundle whose engine has that many bytes in that many files."""
    (folder / "engine").mkdir(parents=True)
    for index in range(files):
        (folder / "engine" / f"model-{index}.gguf").write_bytes(os.urandom(size // files))
    write_manifest(folder, {"checkpoint": "random", "flow": "gguf", "precision": "q8_0"})


def copy_and_hash(folder: Path, target: Path) -> None:
    """The floor: every file copied by ``cp``, and hashed."""
    subprocess.run(["cp", "-r", folder, target], check=True)
    for file in folder.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)


def curl_up(folder: Path, registry: Registry) -> None:
    """Send every file of the engine by curl, one after the other, without hashing anything."""
    import requests

    for file in sorted((folder / "engine").iterdir()):
        at = requests.post(registry.url("curl/x/blobs/uploads/")).headers["Location"]
        joint = "&" if "?" in at else "?"
        command = ["curl", "-sf", "-T", str(file), f"{at}{joint}digest={DIGESTS[file.name]}"]
        subprocess.run([*command, "-H", "Content-Type: application/octet-stream"], check=True, capture_output=True)


def curl_down(folder: Path, registry: Registry, target: Path) -> None:
    """Fetch them again, without checking anything."""
    target.mkdir()
    for name in (file.name for file in (folder / "engine").iterdir()):
        subprocess.run(["curl", "-sf", "-o", target / name, registry.url(f"curl/x/blobs/{DIGESTS[name]}")], check=True)


DIGESTS: dict[str, str] = {}


def timed(times: dict[str, list[float]], name: str, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    times.setdefault(name, []).append(time.perf_counter() - began)


def one_run(bundle: Path, place: Path, registry: Registry, times: dict[str, list[float]]) -> None:
    """Everything once, in a folder and a registry of its own."""
    reference = registry.reference("team/random:1")
    timed(times, "cp and sha256", lambda: copy_and_hash(bundle, place / "copy"))
    timed(times, "push", lambda: push(bundle, reference, progress=QUIET))
    timed(times, "push again", lambda: push(bundle, reference, progress=QUIET))
    timed(times, "pull", lambda: pull(reference, place / "out", progress=QUIET))
    timed(times, "pull again", lambda: pull(reference, place / "out", progress=QUIET))
    shutil.rmtree(place / "registry" / "data")
    timed(times, "curl up", lambda: curl_up(bundle, registry))
    timed(times, "curl down", lambda: curl_down(bundle, registry, place / "curled"))
    timed(times, "pack", lambda: pack(bundle, place / "x.tar.zst"))
    timed(times, "unpack", lambda: unpack(place / "x.tar.zst", place / "unpacked"))


def measure(root: Path, size: int, files: int, runs: int) -> dict[str, list[float]]:
    """The times of every run of everything, the first of each left out."""
    bundle, times = root / "bundle", dict[str, list[float]]()
    write_bundle(bundle, size, files)
    DIGESTS.update({file.name: digest_of(file.read_bytes()) for file in (bundle / "engine").iterdir()})
    for run in range(runs + 1):
        place = root / f"run{run}"
        place.mkdir()
        with running_registry(place / "registry") as registry:
            one_run(bundle, place, registry, times)
        shutil.rmtree(place)
    shutil.rmtree(bundle)
    return {name: found[1:] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 4], help="into how many files they are divided")
    parser.add_argument("--folder", type=Path, help="where everything is written  [default: a temporary folder]")
    asked = parser.parse_args()
    for files in asked.files:
        with tempfile.TemporaryDirectory(dir=asked.folder) as root:
            os.environ["AMOEBA_CACHE"] = f"{root}/cache"
            times = measure(Path(root), asked.megabytes * 10**6, files, asked.runs)
        floor = statistics.median(times["cp and sha256"])
        print(f"{asked.megabytes} MB in {files} files, median of {asked.runs} runs")
        for name, found in times.items():
            middle = statistics.median(found)
            print(
                f"  {name:14} {1e3 * middle:7.0f} ms ({1e3 * min(found):.0f} to {1e3 * max(found):.0f})"
                f"  {middle / floor:5.2f}x of cp and sha256"
            )


if __name__ == "__main__":
    main()
