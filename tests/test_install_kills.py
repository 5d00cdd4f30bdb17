"""Kills at any moment of an install: what ``current`` names works before and after a recovery, every time.

A kill is SIGKILL to the whole process group, at moments spread evenly from when the bundle begins to be fetched to
when it is confirmed, each drawn from a fixed seed within its share. That is not a power cut: what was written reaches
the disk here, synced or not.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from bundles import Shop, check_confirmed, check_running, checked_here, copy_device, install, started, step

from amoeba_deploy.device.state import read_state
from amoeba_deploy.device.status import recover
from amoeba_deploy.progress import Progress

pytest_plugins = ["device_fixtures"]

KILLS, MANY = 50, 500
LARGE = 16 << 20
"""Bytes of random weights beside the engine, so that copying, hashing and syncing take their time, too."""


@pytest.fixture(scope="module")
def nine(shop: Shop) -> Path:
    """A large release with steps that take a while."""
    (shop.built / "engine" / "more").write_bytes(random.Random(1).randbytes(LARGE))
    steps = [step("sleep 0.05; head -c 9000000 engine/more > engine/part"), step("mkdir x; sleep 0.05; cp -r engine x")]
    made = shop.release(9, steps=steps)
    (shop.built / "engine" / "more").unlink()
    return made


def begun(bundle: Path, root: Path) -> tuple[subprocess.Popen[str], float]:
    """An install that has just begun to fetch, and when."""
    process = started("bundle", "install", bundle, "--root", root)
    assert process.stderr is not None
    assert "fetching" in process.stderr.readline()
    return process, time.monotonic()


def seconds_of(bundle: Path, root: Path) -> float:
    """From the beginning of the fetch to when the new bundle is confirmed."""
    process, begin = begun(bundle, root)
    while read_state(root).highest_serial != 9:
        assert process.poll() in (None, 0)
        time.sleep(0.002)
    taken = time.monotonic() - begin
    process.communicate()
    return taken


def phase(root: Path) -> str:
    """How far an install came that was killed."""
    state = read_state(root)
    if state.highest_serial == 9:
        return "confirmed"
    if state.pending is not None:
        return "switching"
    if state.slots["a"] is None:
        return "in the slot"
    return "in staging" if (root / "staging" / "bundle").exists() else "before"


def kill_at_moments(count: int, nine: Path, with_two: Path, place: Path) -> Counter[str]:
    """Kill that many installs, each on a device of its own; how many had come how far."""
    seconds = min(seconds_of(nine, copy_device(with_two, place / f"whole-{number}")) for number in range(3))
    drawn, phases = random.Random(11), Counter[str]()
    for number in range(count):
        root = copy_device(with_two, place / f"{number}")
        process, begin = begun(nine, root)
        moment = seconds * (number + drawn.random()) / count
        time.sleep(max(0.0, begin + moment - time.monotonic()))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        phases[phase(root)] += 1
        state = check_running(root)
        assert state is not None
        recover(root, Progress(quiet=True))
        after = check_confirmed(root)
        assert after.running is not None
        assert after.running.serial in (8, 9)
        assert after.running.serial == 9 or state.highest_serial == 8
        with checked_here():
            done = install(nine, root)
        assert done["bundle"]["serial"] == 9
        assert check_confirmed(root, engine=False).confirmed == "a"
        shutil.rmtree(root)
    return phases


def test_kills_at_moments_all_over_an_install(nine: Path, with_two: Path, tmp_path: Path) -> None:
    phases = kill_at_moments(KILLS, nine, with_two, tmp_path)
    print(phases)
    assert {"in the slot", "switching"} <= set(phases)
    # Files of the devices are shared by links: none was written into.
    check_confirmed(with_two)


@pytest.mark.slow
def test_many_kills(nine: Path, with_two: Path, tmp_path: Path) -> None:
    phases = kill_at_moments(MANY, nine, with_two, tmp_path)
    print(phases)
    assert {"in staging", "in the slot", "switching"} <= set(phases)
    check_confirmed(with_two)


def test_kills_of_the_first_install(nine: Path, shop: Shop, tmp_path: Path) -> None:
    for number in range(4):
        root = shop.device(tmp_path / f"{number}")
        process, _ = begun(nine, root)
        time.sleep(0.25 * number)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        check_running(root)
        recover(root, Progress(quiet=True))
        check_running(root)
        assert install(nine, root)["bundle"]["serial"] == 9
        check_confirmed(root)


def test_a_killed_rollback(with_two: Path, tmp_path: Path) -> None:
    for number, command in enumerate(("sleep 30", "sh -c 'kill -9 $PPID; sleep 30'")):
        root = copy_device(with_two, tmp_path / f"{number}")
        process = started("bundle", "rollback", "--root", root, "--health", command)
        while read_state(root).pending is None and process.poll() is None:
            time.sleep(0.01)
        if number == 0:
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.wait()
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        state = check_running(root)
        assert state is not None
        assert state.pending == "a"
        recover(root, Progress(quiet=True))
        # What was rolled back to had proven itself, and is kept.
        after = check_confirmed(root)
        assert (after.confirmed, after.previous) == ("b", "a")
