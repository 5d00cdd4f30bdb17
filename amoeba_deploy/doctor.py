"""What this installation can do: what is installed, what each flow can do here, and the command for what is missing.

Nothing of an engine is imported: versions come from the metadata of packages, GPUs from NVIDIA's own tools.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amoeba_deploy import __version__
from amoeba_deploy.backends import flow_names, load_backend
from amoeba_deploy.backends.backend import Backend, Toolchain, options_for
from amoeba_deploy.errors import AmoebaError
from amoeba_deploy.files import cache_folder, system_refusal
from amoeba_deploy.installation import installed, missing_of, package_versions, plain, requirements
from amoeba_deploy.profiles.gpu import GpuMeter
from amoeba_deploy.profiles.machine import fingerprint, machine_facts, own_chips

State = Literal["ok", "missing", "problem"]
"""``missing``: what is not installed, which need not be wrong. ``problem``: what should work and does not."""
Kind = Literal["installation", "machine", "cache", "flows", "extras"]

EXTRAS = {
    "build": "select, tune, extract, search, export and build",
    "deliver": "sign, push, pull, install and pack bundles",
    "evaluate": "data sets by name",
    "search": "--method evolutionary",
    "plot": "pictures and reports",
    "nvidia": "clocks, memory and energy of NVIDIA GPUs",
    "distributed": "--workers ray",
    "quantised": "tuning over a base in 4 or 8 bits",
    "tensorboard": "logs for TensorBoard",
}
"""Extras that belong to no engine, and what needs each."""
CONTEXT = 2048
"""Positions of the engine that flows are asked about."""
LEAST_FREE = 2 * 10**9
"""Bytes free on a disk below which builds of small models already fail."""
TOOL_SECONDS = 20
_TEGRA = Path("/etc/nv_tegra_release")
_BOARD = Path("/proc/device-tree/model")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GPU_FILE = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do where that is not as it should be."""

    kind: Kind
    name: str
    state: State
    said: str
    todo: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry of ``doctor --json``."""
        return {"state": self.state, "said": self.said, "todo": self.todo or None, **self.facts}


def examine() -> list[Finding]:
    """Look at everything."""
    gpus = find_gpus()
    return [
        *(package(), interpreter(), torch_build(gpus), system(), memory(), gpus),
        *cache_findings(),
        *map(flow, flow_names()),
        *extras(),
    ]


def report_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """All findings by kind and name, and the names of what is wrong."""
    kinds = dict.fromkeys(found.kind for found in findings)
    by_kind: dict[str, Any] = {
        kind: {each.name: each.to_json() for each in findings if each.kind == kind} for kind in kinds
    }
    wrong = [f"{found.kind}.{found.name}" for found in findings if found.state == "problem"]
    return {**by_kind, "packages": package_versions(), "problems": wrong}


def unable(findings: Sequence[Finding], flows: Sequence[str]) -> list[Finding]:
    """Those of some flows that cannot build here.

    Raises:
        BadInput: no such flow is known.
    """
    for name in flows:
        if name not in flow_names():
            load_backend(name)  # says which are known
    return [each for each in findings if each.kind == "flows" and each.name in flows and not each.facts["builds"]]


# The installation and the machine


def package() -> Finding:
    """This package."""
    place = Path(__file__).parent
    facts = {"version": __version__, "path": str(place)}
    if not requirements():
        todo = f"run pip install {place.parent}"
        return Finding("installation", "amoeba-deploy", "problem", f"{__version__}, not installed", todo, facts)
    lacks = missing_of("")
    if lacks:
        said = f"{__version__} lacks {', '.join(lacks)}"
        return Finding("installation", "amoeba-deploy", "problem", said, "run pip install amoeba-deploy", facts)
    return Finding("installation", "amoeba-deploy", "ok", f"{__version__} in {place}", facts=facts)


def interpreter() -> Finding:
    """The Python that runs."""
    facts = {"version": platform.python_version(), "executable": sys.executable}
    return Finding("installation", "python", "ok", f"{facts['version']} at {sys.executable}", facts=facts)


def torch_build(gpus: Finding) -> Finding:
    """PyTorch, which building needs and running on a device does not; and whether it is one for the GPUs here."""
    found = installed("torch")
    facts = {"version": found}
    if found is None:
        todo = "to build, run pip install 'amoeba-deploy[build]'; a device that only runs bundles needs none"
        return Finding("installation", "torch", "missing", "not installed", todo, facts)
    if gpus.facts["gpus"] and found.endswith("+cpu"):
        todo = "to tune or run on the GPU, install the CUDA build that https://pytorch.org/get-started/locally names"
        return Finding("installation", "torch", "missing", f"{found} computes on the CPU alone", todo, facts)
    return Finding("installation", "torch", "ok", found, facts=facts)


def system() -> Finding:
    """The processor, the cores that may be used, and the operating system."""
    found = machine_facts()
    facts = {**found, "platform": platform.platform(), "chips": list(own_chips()), "fingerprint": fingerprint()}
    said = f"{found['processor']}, {found['cores']} of {os.cpu_count()} cores usable, {platform.platform()}"
    return Finding("machine", "system", "ok", said, facts=facts)


def memory() -> Finding:
    """Memory in bytes: of the machine, what is free, and the limit of the container where there is one."""
    import psutil

    now = psutil.virtual_memory()
    limit = _memory_limit(now.total)
    facts = {"bytes": now.total, "free_bytes": now.available, "limit_bytes": limit}
    said = f"{now.total / 1e9:.1f} GB, {now.available / 1e9:.1f} GB free"
    said += "" if limit is None else f"; this container may use {limit / 1e9:.1f} GB"
    return Finding("machine", "memory", "ok", said, facts=facts)


def _memory_limit(total: int) -> int | None:
    try:
        text = _MEMORY_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < total else None


# GPUs


def find_gpus() -> Finding:
    """NVIDIA's GPUs with their driver: by nvidia-smi, else by NVML; on a Jetson by its system."""
    gpus, failed = _by_tool()
    gpus = gpus or _by_library() or _jetson()
    facts = {"gpus": gpus}
    if gpus:
        said = "; ".join(
            " ".join(f"{key} {value}" if key != "name" else value for key, value in g.items()) for g in gpus
        )
        return Finding("machine", "gpu", "ok", said, facts=facts)
    if failed or _GPU_FILE.exists():
        said = "there is one, and its driver does not answer" + (f": {failed}" if failed else "")
        todo = "run nvidia-smi, and install or load NVIDIA's driver; in a container, start it with the GPU"
        return Finding("machine", "gpu", "problem", said, todo, facts)
    return Finding("machine", "gpu", "ok", "none of NVIDIA's", facts=facts)


def _by_tool() -> tuple[list[dict[str, str]], str | None]:
    """Name, driver and memory as nvidia-smi tells them; or what it failed with."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], None
    command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi failed ({type(error).__name__})"
    if done.returncode:
        return [], " ".join((done.stdout or done.stderr).split())[:200] or f"nvidia-smi ended with {done.returncode}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [_known(name=row[0], driver=row[1], memory=row[2]) for row in rows if len(row) == 3], None


def _known(**facts: str) -> dict[str, str]:
    return {name: value for name, value in facts.items() if value and "N/A" not in value}


def _by_library() -> list[dict[str, str]]:
    meter = GpuMeter.of_this_machine()
    return [_known(name=str(facts["name"])) for facts in (meter.facts() if meter else []) if "name" in facts]


def _jetson() -> list[dict[str, str]]:
    """The board and the release of its system, whose driver is a part of it."""
    try:
        release = _TEGRA.read_text(encoding="utf-8", errors="replace").splitlines()[0].lstrip("# ")
    except (OSError, IndexError):
        return []
    with suppress(OSError):
        return [_known(name=_BOARD.read_text(errors="replace").strip("\0 \n"), system=release.split(", GCID")[0])]
    return [_known(name="Jetson", system=release.split(", GCID")[0])]


# The cache


def cache_findings() -> list[Finding]:
    """The cache folder: its size, the room on its disk, and whether locks and links work there; and temporary files."""
    folder = cache_folder()
    facts: dict[str, Any] = {"path": str(folder), "bytes": _sizes(folder)}
    total = sum(facts["bytes"].values())
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in facts["bytes"].items() if size)
    said = f"{folder}, {total / 1e6:.1f} MB" + (f" ({parts})" if parts else "")
    todo = "set AMOEBA_CACHE to a folder on a local disk"
    try:
        facts |= {"free_bytes": shutil.disk_usage(_existing(folder)).free, **try_folder(folder)}
    except OSError as error:
        said = f"{folder} cannot be written: {system_refusal(error)}"
        return [Finding("cache", "cache", "problem", said, todo, facts), temporary()]
    broken = [name for name in ("locks", "links") if not facts[name]]
    if broken:
        said = f"{folder}: {' and '.join(broken)} do not work on its file system"
        return [Finding("cache", "cache", "problem", said, todo, facts), temporary()]
    return [_room("cache", f"{said}; locks and links work", facts), temporary()]


def temporary() -> Finding:
    """The folder of temporary files, into which engines are built first."""
    try:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        said = f"no folder for temporary files can be written ({error.strerror})"
        return Finding("cache", "temporary", "problem", said, "set TMPDIR to a folder that can")
    return _room("temporary", str(folder), {"path": str(folder), "free_bytes": free})


def _room(name: str, said: str, facts: Mapping[str, Any]) -> Finding:
    free = facts["free_bytes"]
    said += f", {free / 1e9:.1f} GB free"
    if free >= LEAST_FREE:
        return Finding("cache", name, "ok", said, facts=facts)
    ways = {
        "cache": "run 'amoeba cache prune', or set AMOEBA_CACHE to a folder on another disk",
        "temporary": "set TMPDIR to a folder on another disk",
    }
    return Finding("cache", name, "problem", said, f"free some there, or {ways[name]}", facts)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes below each folder of the cache; what vanishes meanwhile is not counted."""
    found = {"builds": 0, "tables": 0}
    with suppress(OSError):
        for part in sorted(folder.iterdir()):
            found[part.name] = _bytes(part)
    return found


def _bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            with suppress(OSError):
                total += 0 if file.is_symlink() else file.stat().st_size
    return total


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def try_folder(folder: Path) -> dict[str, bool]:
    """Whether a lock keeps others out of a file and whether links can be made, tried in a folder; nothing is left.

    Raises:
        OSError: nothing can be written there.
    """
    made = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as work:
            return {"locks": _locks(Path(work, "lock")), "links": _links(Path(work, "link"))}
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _locks(file: Path) -> bool:
    file.touch()
    with file.open() as one, file.open() as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _links(file: Path) -> bool:
    try:
        file.symlink_to("target")
        return file.readlink() == Path("target")
    except OSError:
        return False


# Flows and extras


def flow(name: str) -> Finding:
    """Whether a flow can build here and run here, and what gets what is missing."""
    try:
        backend = load_backend(name)
        return _flow(backend, backend.toolchain())
    except Exception as error:  # whatever another package's flow raises
        facts = {"builds": False, "runs": False, "versions": {}, "missing": [], "install": None, "cannot_run": None}
        said = str(error) if isinstance(error, AmoebaError) else f"cannot be asked: {error!r:.200}"
        return Finding("flows", name, "problem", said, "install the package that offers it again, or remove it", facts)


def _flow(backend: Backend, toolchain: Toolchain) -> Finding:
    lacks_build = missing_of("build")
    lacks_engine = [name for name in toolchain.missing if plain(name) not in requirements().get("build", ())]
    lacks, cannot = [*lacks_engine, *lacks_build], _cannot_run(backend, toolchain)
    install = _install(backend.flow, toolchain, lacks_engine, lacks_build)
    facts = {
        "builds": not lacks,
        "runs": cannot is None,
        "versions": dict(toolchain.versions),
        "missing": lacks,
        "install": install,
        "cannot_run": cannot,
    }
    able = [word for word, holds in (("builds", not lacks), ("runs", cannot is None)) if holds]
    said = " and ".join(able) or ("neither builds nor runs" if toolchain.versions else "not installed")
    if toolchain.versions:
        said += ": " + ", ".join(f"{name} {version}" for name, version in toolchain.versions.items())
    if not lacks:
        said += f"; does not run here: {cannot}" if cannot else ""
        return Finding("flows", backend.flow, "ok", said, facts=facts)
    said += f"; to build it lacks {_listed(lacks)}"
    todo = f"run {install}"
    if cannot and f"device-{backend.flow}" in requirements():
        todo += f", or on a device that only runs it pip install 'amoeba-deploy[device-{backend.flow}]'"
    return Finding("flows", backend.flow, "missing", said, todo, facts)


def _listed(packages: Sequence[str]) -> str:
    """Names for people; those that all builds need are told once, by the extra that brings them."""
    build = requirements().get("build", frozenset())
    others = [name for name in packages if plain(name) not in build]
    return ", ".join([*others, *(["the extra build"] if len(others) < len(packages) else [])])


def _install(flow: str, toolchain: Toolchain, engine: Sequence[str], build: Sequence[str]) -> str | None:
    """The commands that get what a flow lacks; an extra of the flow's own brings what all builds need."""
    own = flow in requirements()
    commands = ["pip install 'amoeba-deploy[build]'"] if build and not own else []
    commands += [toolchain.install] if engine or (build and own) else []
    return " and ".join(commands) or None


def _cannot_run(backend: Backend, toolchain: Toolchain) -> str | None:
    """Why engines of a flow do not run here, as half a sentence, or None."""
    device = f"device-{backend.flow}"
    if device in requirements():
        others = tuple(map(plain, toolchain.versions))  # such as onnxruntime-gpu instead of onnxruntime
        lacks = [name for name in missing_of(device, without="device") if not any(o.startswith(name) for o in others)]
        install = f"; run pip install 'amoeba-deploy[{device}]'"
    else:
        lacks, install = list(toolchain.missing), ""
    reason = backend.cannot_run(backend.precisions()[0], options_for(backend, CONTEXT))
    if reason is None and lacks:
        return f"{', '.join(lacks)} is not installed{install}"
    if reason is None and not backend.opens:
        return "only its engine's own tools run it"
    return reason


def extras() -> Iterator[Finding]:
    """The extras that belong to no engine."""
    for name, what in EXTRAS.items():
        if name not in requirements():
            continue
        lacks = missing_of(name)
        facts = {"needed_for": what, "missing": lacks}
        if lacks:
            said = ", ".join(lacks) if name == "build" else _listed(lacks)
            todo = f"run pip install 'amoeba-deploy[{name}]'"
            yield Finding("extras", name, "missing", f"for {what}; lacks {said}", todo, facts)
        else:
            yield Finding("extras", name, "ok", f"for {what}", facts=facts)
