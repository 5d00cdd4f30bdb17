"""Kits over ssh, to a server of this test's own on the loopback interface: copied, run, fetched, gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import amoeba, sentence
from kits import bare_python, imported, written

from amoeba_deploy.errors import BadInput
from amoeba_deploy.profiles.kit.remote import Remote
from amoeba_deploy.profiles.kit.results import read_results
from amoeba_deploy.profiles.table import read_table

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or os.geteuid() != 0,
    reason="no sshd that root may start is here: see tools/install_test_servers",
)


@dataclass(frozen=True)
class Device:
    """A server, the interpreter there, and a folder of its own."""

    port: int
    python: Path
    folder: Path
    server: subprocess.Popen[bytes]

    def measure(self, kit: Path, *options: object, folder: str = "kit") -> object:
        """The result of running a kit there."""
        address = f"ssh://root@127.0.0.1:{self.port}{self.folder / folder}"
        return amoeba("profile", "kit", kit, "--on", address, "--python", self.python, *options)


def free_port() -> int:
    """A port on which nothing listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def key(file: Path) -> Path:
    """A new key pair."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """sshd with keys and a configuration of its own, and an ssh in front of the PATH that knows the key."""
    root, port = tmp_path_factory.mktemp("sshd"), free_port()
    host, user = key(root / "host"), key(root / "user")
    Path("/run/sshd").mkdir(exist_ok=True)
    (root / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {user}.pub\nStrictModes no\n"
        f"UsePAM no\nPasswordAuthentication no\nPidFile none\nPermitRootLogin yes\n"
    )
    (root / "client").write_text(
        f"Host *\n  IdentityFile {user}\n  IdentitiesOnly yes\n  UserKnownHostsFile {root}/known\n"
        f"  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    (root / "bin").mkdir()
    real = shutil.which("ssh")
    (root / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {root}/client "$@"\n')
    (root / "bin" / "ssh").chmod(0o755)
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(root / "config")], stderr=log)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{root / 'bin'}{os.pathsep}{before}"
    try:
        while not listens(port):
            assert process.poll() is None, (root / "log").read_text()
            time.sleep(0.05)
        yield Device(port, bare_python(root / "venv"), root / "device", process)
    finally:
        os.environ["PATH"] = before
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    """Whether something takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small kit; tests take copies."""
    return written(tmp_path_factory.mktemp("kits") / "kit", "--precision", "int8", shapes="6x0.5")


@pytest.fixture
def kit(original: Path, tmp_path: Path) -> Path:
    """A kit of a test's own."""
    return Path(shutil.copytree(original, tmp_path / "kit"))


@needs_sshd
@pytest.mark.parametrize("tool", ["rsync", "tar"])
def test_a_kit_is_copied_run_and_its_results_are_fetched(
    server: Device, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    if tool == "rsync" and shutil.which("rsync") is None:
        pytest.skip("no rsync is here: see tools/install_test_servers")
    if tool == "tar":
        monkeypatch.setattr("shutil.which", lambda name, **_: None if name == "rsync" else f"/usr/bin/{name}")
    done = server.measure(kit, "--json", folder=tool)
    assert done.exit_code == 0, done.output
    assert f"by {tool}" in done.stderr
    found = Path(json.loads(done.stdout)["results"])
    assert found == kit / "results-127.0.0.1"
    assert (found / "results.jsonl").read_bytes() == (server.folder / tool / "results/results.jsonl").read_bytes()
    told = imported(found, tmp_path / "pi.json")
    assert told.exit_code == 0, told.output
    assert len(read_table(tmp_path / "pi.json").rows) == 1


@needs_sshd
def test_what_is_there_is_not_sent_again_and_what_differs_is(server: Device, kit: Path) -> None:
    assert server.measure(kit, folder="again").exit_code == 0
    unchanged = server.measure(kit, folder="again")
    assert unchanged.exit_code == 0, unchanged.output
    assert "has all" in unchanged.stderr
    there = server.folder / "again"
    (there / "run.py").write_text("broken")
    mended = server.measure(kit, folder="again")
    assert mended.exit_code == 0, mended.output
    assert "copying 1 of" in mended.stderr
    assert (there / "run.py").read_bytes() == (kit / "run.py").read_bytes()
    assert len(read_results(there / "results/results.jsonl").sessions) == 3


@needs_sshd
def test_a_folder_name_is_no_command_there(server: Device, kit: Path) -> None:
    done = server.measure(kit, folder="a b; touch c")
    assert done.exit_code == 0, done.output
    assert (server.folder / "a b; touch c" / "kit.json").is_file()


@needs_sshd
def test_a_failed_item_is_one_sentence_and_its_results_are_fetched(server: Device, kit: Path, tmp_path: Path) -> None:
    without = bare_python(tmp_path / "bare")
    for entry in next((tmp_path / "bare/lib").glob("python3.*/site-packages")).glob("onnxruntime*"):
        entry.unlink()
    address = f"ssh://root@127.0.0.1:{server.port}{server.folder}/failing"
    done = amoeba("profile", "kit", kit, "--on", address, "--python", without, "--quiet")
    said = sentence(done, 6)
    assert "1 of 1 items failed" in said
    assert "pip install onnxruntime" in said
    assert (kit / "results-127.0.0.1" / "results.jsonl").is_file()


@needs_sshd
def test_a_lost_connection_is_one_sentence_and_the_same_command_goes_on(server: Device, kit: Path) -> None:
    address = f"ssh://root@127.0.0.1:{server.port}{server.folder}/lost"
    words = ("profile", "kit", str(kit), "--on", address, "--python", str(server.python))
    started = subprocess.Popen(
        [sys.executable, "-m", "amoeba_deploy", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    results = server.folder / "lost" / "results" / "results.jsonl"
    while not (results.is_file() and results.read_bytes().count(b"\n") >= 2):
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    for session in children(server.server.pid):
        os.kill(session, signal.SIGKILL)
    out, told = started.communicate()
    assert started.returncode == 1, told
    assert out == ""
    assert "ssh lost it while it measured; run the same command again to go on" in told.splitlines()[-1]
    done = server.measure(kit, folder="lost")
    assert done.exit_code == 0, done.output


def children(process: int) -> list[int]:
    """The processes that one started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@needs_sshd
def test_an_interpreter_that_is_not_there_is_one_sentence(server: Device, kit: Path) -> None:
    address = f"ssh://root@127.0.0.1:{server.port}{server.folder}/none"
    said = sentence(amoeba("profile", "kit", kit, "--on", address, "--python", "python7", "--quiet"), 1)
    assert "name its interpreter by --python" in said


@needs_sshd
def test_a_host_that_is_not_reached_is_one_sentence_before_anything_is_built(tmp_path: Path) -> None:
    asked = ("--device", "raspberry-pi-5", "--flow", "onnx", "--quiet", "-o", tmp_path / "kit")
    refused = amoeba("profile", "kit", *asked, "--on", f"ssh://root@127.0.0.1:{free_port()}")
    assert "ssh does not reach it" in sentence(refused, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("ssh://orin", Remote("orin", None, None, None, "python3")),
        ("ssh://me@orin.local:2222/data/kits", Remote("orin.local", "me", 2222, "/data/kits", "python3")),
        ("ssh://me@[fe80::1]/~/kits", Remote("fe80::1", "me", None, "kits", "python3")),
    ],
)
def test_addresses_name_user_host_port_and_folder(address: str, found: Remote) -> None:
    assert Remote.parse(address) == found


@pytest.mark.parametrize(
    "address", ["orin", "ssh://", "http://orin", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://h:x"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadInput, match="is no address"):
        Remote.parse(address)
