"""An end of the process before every single change that an install makes durably: none leaves a device that is broken.

``tests/crashing.py`` counts the system calls of ``amoeba_deploy.device.durable`` and ends its process, as a kill does,
before a chosen one. Here that is done for all of them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import Shop, check_confirmed, check_running, copy_device, install, own_copy, started, step

from amoeba_deploy.device.status import recover
from amoeba_deploy.progress import Progress

pytest_plugins = ["device_fixtures"]

SCRIPT = Path(__file__).parent / "crashing.py"


def crash_everywhere(template: Path, place: Path, *arguments: object, fault: str = "end") -> int:
    """Run a command on copies of a device, with a fault at another system call in each; how many there are."""
    work = {
        "template": str(template),
        "place": str(place),
        "arguments": [str(each) for each in arguments],
        "fault": fault,
    }
    place.mkdir()
    done = subprocess.run([sys.executable, SCRIPT, json.dumps(work)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_crash_before_every_change_of_an_install(shop: Shop, with_two: Path, tmp_path: Path) -> None:
    nine = shop.release(9, steps=[step("echo 1 > engine/more")])
    count = crash_everywhere(with_two, tmp_path / "devices", "install", nine)
    assert count > 45
    found = set()
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        state = check_running(root, engine=False)
        assert state is not None
        found.add((state.confirmed, state.pending, (root / "current").readlink().name))
        recover(root, Progress(quiet=True))
        after = check_confirmed(root, engine=False)
        assert after.running is not None
        assert after.running.serial == (9 if state.highest_serial == 9 else 8)
        if number % 16 == 0:
            assert install(nine, root)["bundle"]["serial"] == 9
            check_confirmed(root, engine=False)
        shutil.rmtree(root)
    # Before the switch, in it, after it, and confirmed.
    assert found == {("b", None, "b"), ("b", "a", "b"), ("b", "a", "a"), ("a", None, "a")}


def test_a_crash_before_every_change_of_the_first_install(shop: Shop, tmp_path: Path) -> None:
    template = shop.device(tmp_path / "template")
    nine = shop.release(9, "first")
    count = crash_everywhere(template, tmp_path / "devices", "install", nine)
    assert count > 30
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        state = check_running(root, engine=False)
        if not (root / "slots").exists():
            continue
        recover(root, Progress(quiet=True))
        after = check_running(root, engine=False)
        assert (after is None) == (state is None or state.confirmed is None)
        if number % 16 == 0:
            install(nine, root)
            check_confirmed(root, engine=False)


def test_a_crash_before_every_change_of_a_rollback(with_two: Path, tmp_path: Path) -> None:
    count = crash_everywhere(with_two, tmp_path / "devices", "rollback")
    assert count > 10
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        assert check_running(root, engine=False) is not None
        recover(root, Progress(quiet=True))
        after = check_confirmed(root, engine=False)
        assert after.previous == ("a" if after.confirmed == "b" else "b")


def test_a_crash_before_every_change_of_a_recovery(shop: Shop, with_two: Path, tmp_path: Path) -> None:
    template = copy_device(with_two, tmp_path / "template")
    command = ("--health", "sh -c 'kill -9 $PPID'")
    assert started("bundle", "install", shop.release(9, "recovered"), "--root", template, *command).wait() == -9
    state = check_running(template)
    assert state is not None
    assert state.pending == "a"
    count = crash_everywhere(template, tmp_path / "devices", "status", "--recover")
    assert count > 8
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        assert check_running(root, engine=False) is not None
        recover(root, Progress(quiet=True))
        assert check_confirmed(root, engine=False).confirmed == "b"


@pytest.mark.parametrize("target", ["slots/b", "slots/a", None])
def test_a_crash_before_every_change_when_the_other_slot_takes_over(
    with_two: Path, tmp_path: Path, target: str | None
) -> None:
    template = own_copy(with_two, tmp_path / "template")
    (template / "slots" / "b" / "tokenizer.json").unlink()
    (template / "current").unlink()
    if target:
        (template / "current").symlink_to(target)
    count = crash_everywhere(template, tmp_path / "devices", "status", "--recover")
    assert count > 8
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        recover(root, Progress(quiet=True))
        state = check_confirmed(root, engine=False)
        assert (state.confirmed, state.slots["b"], state.highest_serial) == ("a", None, 8)


def test_a_crash_before_every_change_when_a_state_is_rebuilt(with_two: Path, tmp_path: Path) -> None:
    template = copy_device(with_two, tmp_path / "template")
    (template / "state.json").unlink()
    count = crash_everywhere(template, tmp_path / "devices", "status", "--recover")
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        recover(root, Progress(quiet=True))
        state = check_confirmed(root, engine=False)
        assert (state.confirmed, state.previous, state.highest_serial) == ("b", "a", 8)


def test_a_crash_before_every_change_of_an_automatic_rollback(shop: Shop, with_two: Path, tmp_path: Path) -> None:
    nine = shop.release(9, "unhealthy")
    count = crash_everywhere(with_two, tmp_path / "devices", "install", nine, "--health", "false")
    assert count > 45
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        assert check_running(root, engine=False) is not None
        recover(root, Progress(quiet=True))
        state = check_confirmed(root, engine=False)
        assert (state.confirmed, state.highest_serial) == ("b", 8)


@pytest.mark.parametrize("more", [(), ("--health", "false")], ids=["healthy", "unhealthy"])
def test_a_disk_that_is_full_from_any_change_on(
    shop: Shop, with_two: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    nine = shop.release(9, f"full-{len(more)}")
    count = crash_everywhere(with_two, tmp_path / "devices", "install", nine, *more, fault="full")
    assert count > 30
    for number in range(count):
        root = tmp_path / "devices" / str(number)
        state = check_running(root, engine=False)
        assert state is not None
        recover(root, Progress(quiet=True))
        after = check_confirmed(root, engine=False)
        assert after.running is not None
        assert after.running.serial == 8
