"""Whether what was installed works is found out by running it, in a process of its own, and undone if it does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from bundles import Shop, check_confirmed, check_running, install, spoil_weights, started, try_install
from conftest import amoeba, sentence

from amoeba_deploy.delivery.signing import sign
from amoeba_deploy.device.source import FolderSource
from amoeba_deploy.device.state import read_state

pytest_plugins = ["device_fixtures"]


def test_an_engine_that_only_its_own_tools_run(device: Path, eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_deploy.backends import onnx

    monkeypatch.setattr(onnx.BACKEND.__class__, "opens", False)
    assert "give a command that tries it with --health" in sentence(try_install(eight, device), 6)
    sentence(try_install(eight, device, "--health", "false"), 5)
    done = install(eight, device, "--retry", "--health", "test -d engine -o -d current/engine")
    assert done["health"]["selftest_tokens"] is None


def test_room_is_made_by_giving_up_what_is_kept(device: Path, shop: Shop, eight: Path) -> None:
    install(eight, device)
    nine = shop.release(9, "nine-too-slow", budget={"metric": "tpot", "ms": 1e-6, "memory_bytes": None})
    sentence(try_install(nine, device, "--drop-previous"), 5)
    state = check_confirmed(device)
    assert (state.confirmed, state.previous) == ("b", None)


def test_an_engine_that_is_too_slow_is_rolled_back(device: Path, shop: Shop) -> None:
    slow = shop.release(9, "slow", budget={"metric": "tpot", "ms": 1e-6, "memory_bytes": None})
    said = sentence(try_install(slow, device), 5)
    assert "is not healthy here: its TPOT is" in said
    assert said.endswith("what ran before runs again")
    state = check_confirmed(device)
    assert (state.confirmed, state.highest_serial) == ("a", 7)
    assert "install another, or this one with --retry" in sentence(try_install(slow, device), 5)
    install(slow, device, "--retry", "--no-health-latency")
    state = check_confirmed(device)
    assert (state.confirmed, state.refused) == ("b", [])


@pytest.mark.parametrize("metric", ["tpot", "ttft", "e2e"])
def test_latency_is_measured_against_the_budget(empty: Path, shop: Shop, metric: str) -> None:
    made = shop.release(8, f"budget-{metric}", budget={"metric": metric, "ms": 5e4, "memory_bytes": None})
    health = install(made, empty, "--tolerance", 0.5)["health"]
    assert (health["metric"], health["limit_ms"]) == (metric, 7.5e4)
    assert 0 < health["measured_ms"] < health["limit_ms"]


def test_an_engine_that_gives_other_tokens_although_its_digests_fit(device: Path, copy: Path, shop: Shop) -> None:
    sign(spoil_weights(copy), shop.pair.private, serial=9)
    said = sentence(try_install(copy, device), 5)
    assert "the engine gives token" in said
    assert "what ran before runs again" in said
    assert check_confirmed(device).confirmed == "a"


def test_an_unhealthy_first_bundle_leaves_nothing(empty: Path, copy: Path, shop: Shop) -> None:
    sign(spoil_weights(copy), shop.pair.private, serial=9)
    assert "nothing runs, as before" in sentence(try_install(copy, empty), 5)
    assert check_running(empty) is None
    assert "nothing is installed" in amoeba("bundle", "status", "--root", empty).stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sh -c 'echo not answering >&2; exit 7'", "ended with status 7: not answering"),
        ("sh -c 'kill -11 $$'", "ended with SIGSEGV"),
        ("current/no-such-command", "does not start"),
    ],
)
def test_a_health_command_that_fails(device: Path, eight: Path, command: str, said: str) -> None:
    assert said in sentence(try_install(eight, device, "--health", command), 5)
    assert check_confirmed(device).confirmed == "a"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-command -x", "'no-such-command' is not found"),
        ("/no/such/command", "'/no/such/command' is not found"),
        ("./tool", "'./tool' is not found"),
        ("state.json", "'state.json' is not found"),
        ("./state.json", "'./state.json' is not executable"),
        ("trust/", "'trust/' is not found"),
        ("", "the command is empty"),
        ("  ", "the command is empty"),
        ("sh -c 'exit", '"sh -c \'exit" cannot be read (No closing quotation)'),
        ("curl -f localhost && true", ""),
    ],
)
def test_a_health_command_that_cannot_start_is_refused_before_anything_is_done(
    device: Path, eight: Path, command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderSource, "digest", lambda _: pytest.fail("asked for the bundle"))
    monkeypatch.setenv("PATH", "/nowhere")
    for action in (("install", eight), ("rollback",)):
        found = sentence(amoeba("bundle", *action, "--root", device, "--health", command, "--quiet"), 2)
        assert f"--health: {said}" in found
        assert "not run by a shell" in found


def test_a_health_command_in_the_devices_folder(device: Path, eight: Path) -> None:
    (device / "tool").write_text("#!/bin/sh\ntest -f current/manifest.json\n")
    (device / "tool").chmod(0o755)
    install(eight, device, "--health", "./tool")


def test_a_health_command_sees_the_new_bundle_through_the_link(device: Path, eight: Path) -> None:
    install(eight, device, "--health", 'sh -c "cmp $AMOEBA_BUNDLE/release.json slots/b/release.json"')
    check_confirmed(device)


def test_an_engine_that_never_answers(device: Path, eight: Path) -> None:
    said = sentence(try_install(eight, device, "--health", "sleep 1000", "--health-timeout", "2s"), 5)
    assert "did not answer in 2 s" in said
    assert check_confirmed(device).confirmed == "a"


def test_a_rollback_to_what_is_not_healthy_any_more_is_undone(device: Path, eight: Path) -> None:
    install(eight, device)
    said = sentence(amoeba("bundle", "rollback", "--root", device, "--quiet", "--health", "false"), 5)
    assert "what ran before runs again" in said
    state = check_confirmed(device)
    assert (state.confirmed, state.previous) == ("b", "a")


def test_an_install_that_is_asked_to_end_undoes_its_switch(device: Path, eight: Path) -> None:
    process = started("bundle", "install", eight, "--root", device, "--health", "sleep 30", "--quiet")
    while read_state(device).pending is None:
        time.sleep(0.01)
    time.sleep(0.2)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 1
    assert said == "amoeba: interrupted; what ran before runs on\n"
    # At once, and not only by the next command.
    assert check_running(device) == read_state(device)
    assert (read_state(device).confirmed, read_state(device).pending) == ("a", None)
