"""Installs where the system says no: a full disk, no write access elsewhere, missing packages; and systemd's units."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import Shop, build, check_confirmed, copy_device, own_copy, started, step
from conftest import amoeba, sentence

from amoeba_deploy.device.state import read_state

ROOT = Path(__file__).parent.parent
BLOCKED = ("torch", "transformers", "safetensors", "huggingface_hub", "onnx", "tokenizers")
MIB = 2**20


@pytest.fixture(scope="module")
def eight(shop: Shop) -> Path:
    """A release with a step that writes another mebibyte."""
    return shop.release(8, steps=[step("head -c 1048576 /dev/zero > engine/more")])


# Two at once.


def test_two_installs_at_once(with_seven: Path, eight: Path, tmp_path: Path) -> None:
    root = copy_device(with_seven, tmp_path / "root")
    first = started("bundle", "install", eight, "--root", root, "--health", "sleep 2", "--quiet")
    while read_state(root).pending is None:
        time.sleep(0.01)
    for command in (("install", eight), ("rollback",), ("status", "--recover")):
        said = sentence(amoeba("bundle", *command, "--root", root, "--quiet"), 2)
        assert "another install, rollback or recovery is at work there" in said
    assert "is not confirmed" in amoeba("bundle", "status", "--root", root).stdout
    second = amoeba("bundle", "install", eight, "--root", root, "--quiet", "--wait")
    assert "already, nothing was done" in second.stdout
    first.communicate()
    assert first.returncode == 0
    assert check_confirmed(root).confirmed == "b"


def test_many_installs_at_once_leave_one_of_them(shop: Shop, with_seven: Path, tmp_path: Path) -> None:
    root = copy_device(with_seven, tmp_path / "root")
    running = [
        started("bundle", "install", shop.release(serial), "--root", root, "--wait", "--quiet")
        for serial in (11, 12, 13)
    ]
    for each in running:
        _, said = each.communicate()
        assert each.returncode == 0 or "had release" in said
    state = check_confirmed(root)
    assert state.highest_serial == 13
    assert state.running is not None
    assert state.running.serial == 13


# A full disk.

FULL = """
set -e
mount -t tmpfs -o size=$1 none "$2"
cp -a "$3"/. "$2"
status=0
"$4" -m amoeba_deploy bundle install "$5" --root "$2" --quiet 2> "$6/error" > "$6/out" || status=$?
echo $status > "$6/status"
"$4" "$7" "$2" > "$6/checked"
mount -o remount,size=64m "$2"
"$4" -m amoeba_deploy bundle status --recover --root "$2" --quiet > "$6/recovered"
"$4" "$7" "$2" confirmed > "$6/after"
"""
CHECK = """
import sys
from pathlib import Path
from bundles import check_confirmed, check_running

pytest_plugins = ["device_fixtures"]
state = (check_confirmed if sys.argv[2:] else check_running)(Path(sys.argv[1]))
print(state.model_dump_json())
"""


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def pages(path: Path) -> int:
    """What the files of a folder take in a tmpfs."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.rglob("*") if file.is_file())


def test_a_disk_that_is_full_at_any_stage(with_seven: Path, eight: Path, tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("no tmpfs can be mounted in a namespace of this user's")
    script, check = tmp_path / "full.sh", tmp_path / "check.py"
    script.write_text(FULL)
    check.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{CHECK}")
    kept, new = pages(with_seven), pages(eight)
    # While it is copied; a byte more and less than it needs; while the step writes; at the last small files.
    sizes = [kept + 8192, *(kept + new * part // 4 for part in (1, 3)), kept + new, kept + new + 16384]
    sizes += [kept + new + more * MIB // 2 for more in (1, 2)]
    sizes += [kept + new + MIB + more * 4096 for more in (8, 16, 24, 64)]
    outcomes: list[tuple[int, str]] = []
    for number, size in enumerate(sizes):
        (root := tmp_path / f"root-{number}").mkdir()
        (logs := tmp_path / f"logs-{number}").mkdir()
        inputs = (str(size), root, with_seven, sys.executable, eight, logs, check)
        done = subprocess.run(
            ["unshare", "-rm", "sh", script, *inputs], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, (size, done.stderr, (logs / "error").read_text())
        status, said = int((logs / "status").read_text()), (logs / "error").read_text()
        after = json.loads((logs / "after").read_text())
        assert after["highest_serial"] == (8 if status == 0 else 7), (size, said)
        if status:
            assert len(said.splitlines()) == 1, said
            assert said.startswith("amoeba: ")
            assert "Traceback" not in said
            outcomes.append((status, said.partition(": ")[2]))
    full = [said for _, said in outcomes if "No space left" in said]
    assert len(full) >= 6, outcomes
    assert {status for status, said in outcomes if "No space left" in said} <= {1, 2}
    assert len(outcomes) < len(sizes)
    print(outcomes)


# A user who may write nowhere else.


AS_NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs")


@dataclass(frozen=True)
class Nobody:
    """A user who owns one folder, in a place that only root may write to; and a Python that this user can run."""

    place: Path
    root: Path
    python: str

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the command as that user."""
        return as_nobody(self.python, "-m", "amoeba_deploy", *map(str, arguments))


def as_nobody(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = (str(ROOT), *(path for path in sys.path if path.endswith("site-packages")))
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": ":".join(paths),
    }
    # By a shell, which starts it with that user's rights.
    command = [*AS_NOBODY, "sh", "-c", 'exec "$@"', "sh", python, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)


@pytest.fixture
def nobody() -> Iterator[Nobody]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    same = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    wanted = "import amoeba_deploy, onnxruntime, model_signing"
    usable = (python for python in (sys.executable, same) if as_nobody(python, "-c", wanted).returncode == 0)
    python = next(usable, None)
    if python is None:
        pytest.skip("another user cannot read this installation")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (root := Path(place) / "root").mkdir()
        os.chown(root, 65534, 65534)
        yield Nobody(Path(place), root, python)


def owned(user: int) -> set[Path]:
    """What a user owns where anybody may write."""
    found = set()
    for place in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        for folder, folders, files in os.walk(place):
            for name in (*folders, *files):
                path = Path(folder) / name
                if path.lstat().st_uid == user:
                    found.add(path)
            folders[:] = [name for name in folders if not name.startswith("pytest-of")]
    return found


def test_nothing_is_written_outside_the_root(nobody: Nobody, shop: Shop, seven: Path, eight: Path) -> None:
    place, root = nobody.place, nobody.root
    shutil.copytree(seven, place / "seven")
    shutil.copytree(eight, place / "eight")
    shutil.copy(shop.pair.public, place / "key.pub")
    trust = ("--trust", place / "key.pub")
    before = owned(65534)
    for command in (
        ("install", place / "seven", *trust, "--device", "raspberry-pi-5"),
        ("install", place / "eight", *trust),
        ("rollback",),
        ("status", "--recover"),
    ):
        done = nobody.run("bundle", *command, "--root", root)
        assert done.returncode == 0, done.stderr
    assert {path for path in owned(65534) - before if root not in (path, *path.parents)} == set()
    check_confirmed(root)


def test_status_needs_no_write_access(nobody: Nobody, with_seven: Path) -> None:
    place = own_copy(with_seven, nobody.place / "device")
    done = nobody.run("bundle", "status", "--root", place, "--json")
    assert json.loads(done.stdout)["confirmed"] == "a"
    for command in (("status", "--recover"), ("rollback",)):
        done = nobody.run("bundle", *command, "--root", place)
        assert done.returncode == 2
        assert "cannot be written (Permission denied)" in done.stderr


# What is not installed on a device.


@pytest.fixture
def lean(tmp_path: Path) -> dict[str, str]:
    """The environment of processes, and those that they start, that can import none of what bundles are built with."""
    (tmp_path / "lean").mkdir()
    (tmp_path / "lean" / "sitecustomize.py").write_text(
        "import os, sys\n\n\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in os.environ['BLOCKED'].split(','):\n"
        "            raise ImportError(f'{name} is not installed here')\n\n\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    return {"PYTHONPATH": str(tmp_path / "lean"), "BLOCKED": ",".join(BLOCKED)}


FLOWS = [("onnx", "int8", "raspberry-pi-5"), ("gguf", "q8_0", "raspberry-pi-5"), ("openvino", "int8", "local")]


@pytest.mark.parametrize(("flow", "precision", "device"), FLOWS)
def test_a_device_needs_nothing_that_builds(
    tmp_path: Path, shop: Shop, lean: dict[str, str], flow: str, precision: str, device: str
) -> None:
    from amoeba_deploy.delivery.signing import sign

    try:
        made = build(tmp_path / "bundle", flow, precision, device)
    except AssertionError as error:
        pytest.skip(f"no {flow} bundle can be built here: {error}")
    sign(made, shop.pair.private, serial=1)
    root = shop.device(tmp_path / "root")
    for command in (("install", made), ("status",), ("status", "--recover"), ("verify", None)):
        place = (
            ((root / "current").resolve(), "--public-key", root / "trust")
            if command[0] == "verify"
            else ("--root", root)
        )
        words = [word for word in command if word is not None]
        process = started("bundle", *words, *place, environment=lean)
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert out
    check_confirmed(root)


def test_the_blocked_modules_are_blocked(lean: dict[str, str]) -> None:
    for name in BLOCKED:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            env={**os.environ, **lean},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{name} is not installed here" in done.stderr


def test_text_streams_on_a_device_with_tokenizers(with_seven: Path, lean: dict[str, str]) -> None:
    lean["BLOCKED"] = ",".join(name for name in BLOCKED if name != "tokenizers")
    process = started("run", with_seven / "current", "-p", "Question:", "--tokens", "3", environment=lean)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.strip()


# systemd.

UNITS = sorted((ROOT / "docs/examples/systemd").iterdir())


def test_there_are_units_for_polling_boot_and_restart() -> None:
    assert {unit.suffix for unit in UNITS} >= {".service", ".timer", ".path"}
    assert any("--recover" in unit.read_text() for unit in UNITS)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    for unit in UNITS:
        text = unit.read_text()
        for program in ("/opt/amoeba/bin/amoeba", "/usr/local/bin/my-service"):
            text = text.replace(program, "/bin/true")
        (tmp_path / unit.name).write_text(text)
    files = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", *files],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    said = [line for line in done.stderr.splitlines() if "amoeba" in line or "my-service" in line]
    assert said == []
    assert done.returncode == 0, done.stderr


def test_the_commands_in_the_units_are_there() -> None:
    for unit in UNITS:
        for line in unit.read_text().splitlines():
            if line.startswith("ExecStart=/opt/amoeba/bin/amoeba"):
                words = line.split()[1:]
                options = {word for word in words if word.startswith("--")}
                shown = amoeba(words[0], words[1], "-h").stdout
                assert options <= {word.strip(",") for word in shown.split()}
