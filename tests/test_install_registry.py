"""Installs from a real registry on the loopback interface: polls, what is fetched, and transfers that break."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import Shop, check_confirmed, check_running, copy_device, install, started
from conftest import QUIET, amoeba, sentence
from registries import Answer, Proxy, Registry, Seen, needs_registry, running_registry

from amoeba_deploy.delivery.registry import push
from amoeba_deploy.device.status import recover
from amoeba_deploy.files import folder_bytes, sha256_of

pytestmark = needs_registry
LARGE = 8_000_000


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.make(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def eight(shop: Shop) -> Path:
    """Release 8, which has a large file that release 7 lacks."""
    (more := shop.built / "engine" / "more").write_bytes(random.Random(1).randbytes(LARGE))
    made = shop.release(8)
    more.unlink()
    return made


@pytest.fixture(scope="module")
def with_seven(shop: Shop, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device that got release 7 from the registry."""
    root = shop.device(tmp_path_factory.mktemp("device") / "root")
    push(shop.release(7), registry.reference("team/stories:7"), progress=QUIET)
    install(registry.reference("team/stories:7"), root)
    return root


@pytest.fixture
def device(with_seven: Path, tmp_path: Path) -> Path:
    return copy_device(with_seven, tmp_path / "root")


def tag(bundle: Path, registry: Registry, name: str) -> None:
    push(bundle, registry.reference(f"team/stories:{name}"), progress=QUIET)


def test_a_poll_costs_one_request_and_writes_nothing(device: Path, shop: Shop, eight: Path, registry: Registry) -> None:
    tag(shop.place / "release-7", registry, "stable")
    with Proxy(registry.port) as proxy:
        reference = proxy.reference("team/stories:stable")
        assert install(reference, device)["unchanged"] is True
        before = {path: path.stat().st_mtime_ns for path in device.rglob("*") if path.is_file()}
        proxy.seen.clear()
        assert install(reference, device)["unchanged"] is True
        assert [seen.path for seen in proxy.seen] == ["/v2/team/stories/manifests/stable"]
        assert {path: path.stat().st_mtime_ns for path in device.rglob("*") if path.is_file()} == before
        tag(eight, registry, "stable")
        proxy.seen.clear()
        assert install(reference, device)["bundle"]["serial"] == 8
        check_confirmed(device)
        # Of what release 7 has, nothing is fetched again.
        assert proxy.sent("blobs/") < LARGE + 100_000
        assert folder_bytes(eight) - LARGE > 2_000_000


def test_a_killed_transfer_goes_on_where_it_broke(device: Path, eight: Path, registry: Registry) -> None:
    tag(eight, registry, "8")
    large, half = sha256_of(eight / "engine" / "more"), threading.Event()

    def stall(seen: Seen, proxy: Proxy) -> Answer | None:
        if large not in seen.path or half.is_set():
            return None
        found = proxy.ask(seen)
        assert isinstance(found.body, bytes)
        whole = found.body

        def parts() -> Iterator[bytes]:
            yield whole[: LARGE // 2]
            half.set()
            time.sleep(30)

        found.body = parts()
        return found

    with Proxy(registry.port, stall) as proxy:
        process = started("bundle", "install", proxy.reference("team/stories:8"), "--root", device, "--quiet")
        part = device / "staging" / "pull" / f"{large}.part"
        while not part.exists() or part.stat().st_size < LARGE // 2 - (1 << 20):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert check_running(device) is not None
        recover(device, QUIET)
        assert check_confirmed(device).confirmed == "a"
        half.set()
        proxy.seen.clear()
        assert install(proxy.reference("team/stories:8"), device)["bundle"]["serial"] == 8
        assert proxy.sent(large) <= LARGE // 2 + (1 << 20)
    assert not (device / "staging" / "pull").exists()
    check_confirmed(device)


def test_a_registry_that_sends_other_bytes(device: Path, eight: Path, registry: Registry) -> None:
    tag(eight, registry, "8")
    large = sha256_of(eight / "engine" / "more")

    def lie(seen: Seen, proxy: Proxy) -> Answer | None:
        if large not in seen.path:
            return None
        found = proxy.ask(seen)
        assert isinstance(found.body, bytes)
        found.body = found.body[:1000] + bytes([found.body[1000] ^ 1]) + found.body[1001:]
        return found

    with Proxy(registry.port, lie) as proxy:
        sentence(amoeba("bundle", "install", proxy.reference("team/stories:8"), "--root", device, "--quiet"), 5)
    assert check_confirmed(device).confirmed == "a"


def test_a_registry_that_is_not_there(device: Path, registry: Registry) -> None:
    with Proxy(registry.port) as proxy:
        gone = proxy.reference("team/stories:8")
    sentence(amoeba("bundle", "install", gone, "--root", device, "--quiet"), 2)
    missing = registry.reference("team/stories:no-such-tag")
    sentence(amoeba("bundle", "install", missing, "--root", device, "--quiet"), 2)
    check_confirmed(device)


def test_a_tag_that_moves_while_it_is_fetched(device: Path, shop: Shop, eight: Path, registry: Registry) -> None:
    tag(eight, registry, "moving")
    moved = []

    def move(seen: Seen, _: Proxy) -> Answer | None:
        if "manifests/moving" in seen.path and not moved:
            moved.append(seen)
            return None
        if moved and len(moved) == 1 and "manifests/" in seen.path:
            moved.append(seen)
            tag(shop.place / "release-7", registry, "moving")
        return None

    with Proxy(registry.port, move) as proxy:
        assert install(proxy.reference("team/stories:moving"), device)["bundle"]["serial"] == 8
    assert len(moved) == 2
    check_confirmed(device)
