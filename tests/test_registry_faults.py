"""Transfers that break, and registries that lie: a pull goes on where it broke, and nothing wrong is ever put in place.

A proxy stands between the client and a real registry, misbehaves, and counts every byte that it sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import QUIET, amoeba, sentence
from registries import (
    WEIGHTS,
    Answer,
    Proxy,
    Registry,
    Rule,
    Seen,
    contents,
    free_port,
    needs_registry,
    noise,
    running_registry,
    small_bundle,
)

from amoeba_deploy.bundle import read_manifest
from amoeba_deploy.delivery.artifact import digest_of
from amoeba_deploy.delivery.connection import MAX_REDIRECTS, TRIES
from amoeba_deploy.delivery.registry import Pulled, pull, push
from amoeba_deploy.errors import BadInput, VerificationFailed

pytestmark = [needs_registry, pytest.mark.usefixtures("bundle")]
SIZE = 3_000_000
WEIGHTS_DIGEST = digest_of(noise(SIZE))
BLOB = f"blobs/{WEIGHTS_DIGEST}"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that the tests of this file share."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def bundle(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with weights of 3 MB, which the registry has as team/model:1."""
    folder = small_bundle(tmp_path_factory.mktemp("made") / "bundle", SIZE)
    push(folder, registry.reference("team/model:1"), progress=QUIET)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where pulls go, in a folder of their own."""
    return tmp_path / "place" / "out"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands wait as little as possible between tries."""
    monkeypatch.setattr("amoeba_deploy.delivery.connection.FIRST_PAUSE", 0.001)


def fetch(proxy: Proxy, out: Path, **options: object) -> Pulled:
    """Pull team/model:1 through a proxy, without waiting."""
    given: dict[str, object] = {"progress": QUIET, "sleep": lambda _: None}
    return pull(proxy.reference("team/model:1"), out, **(given | options))  # type: ignore[arg-type]


def on_blob(answer: Callable[[Seen, Proxy, int], Answer | None]) -> Rule:
    """A rule for the weights alone, told how often they were asked for before."""
    times = [0]

    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        if seen.method != "GET" or BLOB not in seen.path:
            return None
        times[0] += 1
        return answer(seen, proxy, times[0] - 1)

    return rule


def cut_at(size: int) -> Callable[[Seen, Proxy, int], Answer]:
    """Send so many bytes of an answer, and close the connection."""

    def answer(seen: Seen, proxy: Proxy, _: int) -> Answer:
        found = proxy.ask(seen)
        found.cut = size
        return found

    return answer


def nothing_is_left(out: Path, *but: str) -> None:
    """Check that an output is not there, nor anything beside it but what is named."""
    left = sorted(path.name for path in out.parent.iterdir()) if out.parent.exists() else []
    assert left == sorted(but)


# Connections that break


def test_a_connection_that_drops_is_gone_on_with_and_no_byte_is_sent_twice(
    registry: Registry, bundle: Path, out: Path
) -> None:
    def drop_twice(seen: Seen, proxy: Proxy, times: int) -> Answer | None:
        return cut_at(700_000)(seen, proxy, times) if times < 2 else None

    with Proxy(registry.port, on_blob(drop_twice)) as proxy:
        fetch(proxy, out)
    assert contents(out) == contents(bundle)
    assert [seen.headers.get("Range") for seen in proxy.seen if BLOB in seen.path] == [
        None,
        "bytes=700000-",
        "bytes=1400000-",
    ]
    assert proxy.sent(BLOB) == SIZE
    nothing_is_left(out, "out")


def test_after_a_pull_that_failed_the_next_goes_on_from_there(registry: Registry, bundle: Path, out: Path) -> None:
    with Proxy(registry.port, on_blob(cut_at(100_000))) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert f"{TRIES * 100_000} of {SIZE} bytes are kept" in said
    assert proxy.sent(BLOB) == TRIES * 100_000
    nothing_is_left(out, ".out.pull")
    with Proxy(registry.port) as proxy:
        done = fetch(proxy, out)
    assert proxy.sent(BLOB) == SIZE - TRIES * 100_000
    assert done.bytes_kept >= TRIES * 100_000
    assert contents(out) == contents(bundle)
    nothing_is_left(out, "out")


def test_files_that_are_complete_are_kept_for_the_next_pull(registry: Registry, bundle: Path, out: Path) -> None:
    with Proxy(registry.port, on_blob(cut_at(0))) as proxy, pytest.raises(BadInput):
        fetch(proxy, out)
    others = sum(map(len, contents(bundle).values())) - SIZE
    kept = sum(path.stat().st_size for path in (out.parent / ".out.pull").iterdir())
    with Proxy(registry.port) as proxy:
        done = fetch(proxy, out)
    assert done.bytes_fetched == proxy.sent("/blobs/") == SIZE + others - kept


def test_as_long_as_more_comes_connections_may_drop_any_number_of_times(registry: Registry, out: Path) -> None:
    big = small_bundle(out.parent / "big", 12_000_000, seed=7)
    push(big, registry.reference("team/big:1"), progress=QUIET)
    part = f"blobs/{digest_of(noise(12_000_000, 7))}"

    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        return cut_at(1_100_000)(seen, proxy, 0) if part in seen.path else None

    with Proxy(registry.port, rule) as proxy:
        pull(proxy.reference("team/big:1"), out, progress=QUIET, sleep=lambda _: None)
    assert proxy.count(part) == 11 > TRIES
    assert proxy.sent(part) == 12_000_000
    assert contents(out) == contents(big)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_killed_or_interrupted_is_gone_on_with(
    registry: Registry, bundle: Path, out: Path, by: signal.Signals
) -> None:
    def slowly(seen: Seen, proxy: Proxy, _: int) -> Answer:
        found = proxy.ask(seen)
        body = bytes(found.body)  # type: ignore[arg-type]

        def parts() -> Iterator[bytes]:
            yield body[:2_000_000]
            time.sleep(60)

        return Answer(found.status, found.headers, parts())

    program = (
        "import sys; from pathlib import Path; from amoeba_deploy.progress import Progress; "
        "from amoeba_deploy.delivery.registry import pull; "
        "pull(sys.argv[1], Path(sys.argv[2]), progress=Progress(True))"
    )
    with Proxy(registry.port, on_blob(slowly)) as proxy:
        process = subprocess.Popen([sys.executable, "-c", program, proxy.reference("team/model:1"), str(out)])
        part = out.parent / ".out.pull" / f"{WEIGHTS_DIGEST.removeprefix('sha256:')}.part"
        while not part.exists() or part.stat().st_size < 1_000_000:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(by)
        process.wait()
    kept = part.stat().st_size
    nothing_is_left(out, ".out.pull")
    with Proxy(registry.port) as proxy:
        fetch(proxy, out)
    assert proxy.sent(BLOB) == SIZE - kept
    assert contents(out) == contents(bundle)
    nothing_is_left(out, "out")


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(registry: Registry, bundle: Path, out: Path) -> None:
    def whole(seen: Seen, proxy: Proxy, times: int) -> Answer:
        if times == 0:
            return cut_at(700_000)(seen, proxy, times)
        assert "Range" in seen.headers
        return Answer(200, {"Content-Type": "application/octet-stream"}, noise(SIZE))

    with Proxy(registry.port, on_blob(whole)) as proxy:
        fetch(proxy, out)
    assert proxy.sent(BLOB) == 700_000 + SIZE
    assert contents(out) == contents(bundle)


@pytest.mark.parametrize("said", ["bytes 0-2999999/3000000", "nonsense", "bytes 700001-2999999/3000000"])
def test_a_server_that_sends_another_part_is_asked_again_from_the_beginning(
    registry: Registry, bundle: Path, out: Path, said: str
) -> None:
    def other(seen: Seen, proxy: Proxy, times: int) -> Answer | None:
        if times == 0:
            return cut_at(700_000)(seen, proxy, times)
        return Answer(206, {"Content-Range": said}, noise(SIZE)) if times == 1 else None

    with Proxy(registry.port, on_blob(other)) as proxy:
        fetch(proxy, out)
    assert contents(out) == contents(bundle)


def test_a_server_that_has_no_more_to_send_is_asked_again_from_the_beginning(
    registry: Registry, bundle: Path, out: Path
) -> None:
    def refuse(seen: Seen, proxy: Proxy, times: int) -> Answer | None:
        return [cut_at(700_000)(seen, proxy, times), Answer(416)][times] if times < 2 else None

    with Proxy(registry.port, on_blob(refuse)) as proxy:
        fetch(proxy, out)
    assert proxy.sent(BLOB) == 700_000 + SIZE
    assert contents(out) == contents(bundle)


@pytest.mark.parametrize("kept", [0, 1, 700_000, SIZE - 1, SIZE, SIZE + 1])
def test_what_was_kept_and_is_damaged_is_fetched_again(registry: Registry, bundle: Path, out: Path, kept: int) -> None:
    staging = out.parent / ".out.pull"
    staging.mkdir(parents=True)
    name = WEIGHTS_DIGEST.removeprefix("sha256:")
    (staging / (name if kept == SIZE else f"{name}.part")).write_bytes(bytes(kept))
    (staging / "stranger").write_bytes(b"left by another bundle")
    with Proxy(registry.port) as proxy:
        fetch(proxy, out)
    assert contents(out) == contents(bundle)
    nothing_is_left(out, "out")


def test_a_busy_registry_is_asked_again_when_it_says(registry: Registry, bundle: Path, out: Path) -> None:
    busy = [Answer(503), Answer(429, {"Retry-After": "7"}), Answer(500, {"Retry-After": "100000"}), Answer(0)]
    slept: list[float] = []

    def rule(seen: Seen, _: Proxy) -> Answer | None:
        return busy.pop(0) if busy and "manifests" in seen.path else None

    with Proxy(registry.port, rule) as proxy:
        fetch(proxy, out, sleep=slept.append)
    assert slept == [0.001, 7, 60, 0.008]
    assert contents(out) == contents(bundle)


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503])
def test_a_registry_that_stays_busy_is_given_up(registry: Registry, out: Path, status: int) -> None:
    with Proxy(registry.port, lambda *_: Answer(status)) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert f"{TRIES} times; try again later" in said
    assert len(proxy.seen) == TRIES
    nothing_is_left(out)


def test_a_push_whose_connection_drops_is_tried_again(registry: Registry, tmp_path: Path) -> None:
    dropped = []

    def rule(seen: Seen, _: Proxy) -> Answer | None:
        if seen.method == "PUT" and "uploads" in seen.path and len(dropped) < 3:
            dropped.append(seen)
            return Answer(0)
        return None

    made = small_bundle(tmp_path / "made", seed=3)
    with Proxy(registry.port, rule) as proxy:
        done = push(made, proxy.reference("team/dropped:1"), progress=QUIET, sleep=lambda _: None)
    assert len(dropped) == 3
    assert done.layers_sent == 7
    pull(registry.reference("team/dropped:1"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.parametrize("status", [0, 400, 401, 403, 404, 405, 500])
def test_what_is_not_mounted_is_sent(registry: Registry, tmp_path: Path, status: int) -> None:
    made = small_bundle(tmp_path / "made", seed=6)
    with Proxy(registry.port, lambda seen, _: Answer(status) if "mount=" in seen.path else None) as proxy:
        push(made, proxy.reference("team/source:1"), progress=QUIET)
        done = push(made, proxy.reference(f"team/unmounted-{status}:1"), progress=QUIET, sleep=lambda _: None)
        assert proxy.count("mount=", "POST") == 2
    assert (done.layers_mounted, done.layers_sent) == (0, 7)


def test_a_push_that_fails_gives_no_name_to_what_is_not_whole(registry: Registry, tmp_path: Path) -> None:
    def rule(seen: Seen, _: Proxy) -> Answer | None:
        return Answer(0) if seen.method == "PUT" and "uploads" in seen.path else None

    made = small_bundle(tmp_path / "made", seed=4)
    with Proxy(registry.port, rule) as proxy:
        said = sentence(amoeba("bundle", "push", made, proxy.reference("team/half:1"), "--quiet"), 2)
    assert f"{TRIES} times" in said
    assert registry.get("team/half/manifests/1").status_code == 404


# Bytes that are wrong


def refused_as_wrong(proxy: Proxy, out: Path) -> str:
    """The sentence of a pull that fails its check; nothing of the weights is kept."""
    said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 5)
    staging = out.parent / ".out.pull"
    left = [path.name for path in staging.iterdir()] if staging.exists() else []
    assert not any(WEIGHTS_DIGEST.removeprefix("sha256:") in name for name in left)
    assert not out.exists()
    return said


def test_a_wrong_digest_is_refused_and_what_came_is_removed(registry: Registry, bundle: Path, out: Path) -> None:
    with Proxy(registry.port, on_blob(lambda *_: Answer(200, {}, noise(SIZE - 1) + b"!"))) as proxy:
        said = refused_as_wrong(proxy, out)
        assert WEIGHTS_DIGEST in said
        assert proxy.count(BLOB) == 1
    pull(registry.reference("team/model:1"), out, progress=QUIET)
    assert contents(out) == contents(bundle)


def test_a_wrong_digest_after_a_resumed_transfer_is_fetched_whole_once_more(
    registry: Registry, bundle: Path, out: Path
) -> None:
    def spoiled(_: Seen, __: Proxy, times: int) -> Answer | None:
        return Answer(200, {}, bytes(SIZE), cut=700_000) if times == 0 else None

    with Proxy(registry.port, on_blob(spoiled)) as proxy:
        fetch(proxy, out)
    assert contents(out) == contents(bundle)
    broken = on_blob(lambda *_: Answer(200, {}, bytes(SIZE), cut=700_000))
    with Proxy(registry.port, broken) as proxy, contextlib.suppress(BadInput):
        fetch(proxy, out.with_name("two"))
    always = on_blob(lambda *_: Answer(200, {}, bytes(SIZE)))
    with Proxy(registry.port, always) as proxy, pytest.raises(VerificationFailed, match="have another digest"):
        fetch(proxy, out.with_name("two"))


def test_a_truncated_file_is_refused(registry: Registry, out: Path) -> None:
    with Proxy(registry.port, on_blob(lambda *_: Answer(200, {}, noise(SIZE)[:-1]))) as proxy:
        assert f"{SIZE - 1} bytes in the registry where {SIZE} are listed" in refused_as_wrong(proxy, out)
        assert proxy.count(BLOB) == 1


def test_a_file_that_says_it_is_longer_is_refused_before_it_is_read(registry: Registry, out: Path) -> None:
    with Proxy(registry.port, on_blob(lambda *_: Answer(200, {}, noise(SIZE) + b"!"))) as proxy:
        assert f"{SIZE + 1} bytes in the registry where {SIZE} are listed" in refused_as_wrong(proxy, out)


def test_a_file_that_never_ends_is_left_where_it_should_end(registry: Registry, out: Path) -> None:
    def endless() -> Iterator[bytes]:
        yield noise(SIZE)
        while True:
            yield bytes(1 << 16)

    with Proxy(registry.port, on_blob(lambda *_: Answer(200, {}, endless()))) as proxy:
        assert f"more bytes in the registry where {SIZE} are listed" in refused_as_wrong(proxy, out)
    assert proxy.sent(BLOB) < SIZE + (16 << 20)  # what the system's buffers take


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_a_manifest_that_was_changed_on_the_way_is_refused(registry: Registry, out: Path, by: str) -> None:
    def change(seen: Seen, proxy: Proxy) -> Answer | None:
        if "manifests" not in seen.path:
            return None
        found = proxy.ask(seen)
        headers = {key: value for key, value in found.headers.items() if key != "Content-Length"}
        if by == "digest":
            headers.pop("Docker-Content-Digest")
        return Answer(200, headers, bytes(found.body).replace(b"empty.txt", b"empty.exe"))  # type: ignore[arg-type]

    digest = registry.get("team/model/manifests/1").headers["Docker-Content-Digest"]
    with Proxy(registry.port, change) as proxy:
        name = "team/model:1" if by == "tag" else f"team/model@{digest}"
        said = sentence(amoeba("bundle", "pull", proxy.reference(name), "-o", out, "--quiet"), 5)
    assert f"and not {digest}" in said
    nothing_is_left(out)


def test_a_manifest_of_a_hundred_megabytes_is_not_read(registry: Registry, out: Path) -> None:
    def huge(seen: Seen, _: Proxy) -> Answer | None:
        parts = (b" " * (1 << 16) for _ in range(1600))
        return Answer(200, {"Content-Type": "application/json"}, parts) if "manifests" in seen.path else None

    with Proxy(registry.port, huge) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert "sends more than 4 MB where a manifest belongs" in said
    assert proxy.sent("manifests") < 24 << 20
    assert len(proxy.seen) == 1
    nothing_is_left(out)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"schemaVersion": 1}', b"[" * 100_000])
def test_an_answer_that_is_no_manifest_is_refused(registry: Registry, out: Path, body: bytes) -> None:
    with Proxy(registry.port, lambda *_: Answer(200, {"Content-Type": "text/html"}, body)) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert "check the address" in said


def test_a_bundles_manifest_of_more_than_32_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(BadInput, match="has more than 32 MB"):
        read_manifest(tmp_path)


# Redirects


def test_redirects_without_end_are_not_followed_for_ever(registry: Registry, out: Path) -> None:
    with Proxy(registry.port, on_blob(lambda seen, *_: Answer(307, {"Location": seen.path}))) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert f"redirects more than {MAX_REDIRECTS} times" in said
    assert proxy.count(BLOB) == MAX_REDIRECTS + 1
    assert not out.exists()


def test_a_redirect_to_another_host_is_followed_from_the_middle_too(
    registry: Registry, bundle: Path, out: Path
) -> None:
    def elsewhere(port: int) -> Rule:
        return on_blob(lambda seen, *_: Answer(307, {"Location": f"http://localhost:{port}{seen.path}"}))

    def first_breaks(seen: Seen, proxy: Proxy, times: int) -> Answer | None:
        return cut_at(700_000)(seen, proxy, times) if times == 0 else None

    with Proxy(registry.port, on_blob(first_breaks)) as other, Proxy(registry.port, elsewhere(other.port)) as proxy:
        fetch(proxy, out)
    assert [seen.headers.get("Range") for seen in other.seen] == [None, "bytes=700000-"]
    assert other.sent(BLOB) == SIZE
    assert proxy.sent(BLOB) == 0
    assert contents(out) == contents(bundle)


@pytest.mark.parametrize("target", ["http://192.0.2.1/x", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_a_redirect_to_what_is_not_safe_is_refused(registry: Registry, out: Path, target: str) -> None:
    # The registry is spoken to with plain HTTP because it is this machine; that does not hold for another one.
    with Proxy(registry.port, on_blob(lambda *_: Answer(302, {"Location": target}))) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert "which is not https" in said
    assert not out.exists()


def test_an_upload_is_not_sent_to_another_host_without_tls(registry: Registry, tmp_path: Path) -> None:
    def rule(seen: Seen, _: Proxy) -> Answer | None:
        return Answer(202, {"Location": "http://192.0.2.1/upload"}) if seen.method == "POST" else None

    made = small_bundle(tmp_path / "made", seed=5)
    with Proxy(registry.port, rule) as proxy:
        assert "which is not https" in sentence(
            amoeba("bundle", "push", made, proxy.reference("team/led:1"), "--quiet"), 2
        )


# Registries that are not there, or refuse


@pytest.mark.parametrize(
    ("status", "said"), [(403, "denies access"), (404, "is not in the registry"), (405, "answers 405"), (418, "418")]
)
def test_a_refusal_is_one_sentence(registry: Registry, out: Path, status: int, said: str) -> None:
    body = b'{"errors": [{"code": "X", "message": "what the\\nregistry says"}]}'
    with Proxy(registry.port, lambda *_: Answer(status, {"Content-Type": "application/json"}, body)) as proxy:
        found = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
        assert len(proxy.seen) == 1
    assert said in found
    assert "(what the registry says)" in found


def test_a_name_or_a_tag_that_is_not_there_is_said(registry: Registry, out: Path) -> None:
    for name in ("team/model:2", "team/unknown:1", f"team/model@sha256:{'0' * 64}"):
        said = sentence(amoeba("bundle", "pull", registry.reference(name), "-o", out, "--quiet"), 2)
        assert f"{name}: is not in the registry" in said


def test_a_refused_connection_is_said_at_once(out: Path) -> None:
    port = free_port()
    said = sentence(amoeba("bundle", "pull", f"127.0.0.1:{port}/a:1", "-o", out, "--quiet"), 2)
    assert f"127.0.0.1:{port} refuses connections" in said


def test_an_unknown_host_is_said_at_once(out: Path) -> None:
    said = sentence(amoeba("bundle", "pull", "no-such-host.invalid/a:1", "-o", out, "--quiet"), 2)
    assert "the host no-such-host.invalid is not known" in said


def test_a_registry_without_tls_is_not_spoken_to_as_if_it_had_it(
    registry: Registry, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch)
    said = sentence(amoeba("bundle", "pull", registry.reference("team/model:1"), "-o", out, "--quiet"), 2)
    assert "speaks no TLS" in said
    assert "--plain-http" in said


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine pass for another one."""
    monkeypatch.setattr("amoeba_deploy.delivery.connection.is_loopback", lambda _: False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl is here")
def test_a_registry_with_tls_is_trusted_by_its_authority(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=tests"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *request.split(), *names], check=True, capture_output=True)
    elsewhere(monkeypatch)
    made = small_bundle(tmp_path / "made", seed=8)
    with running_registry(tmp_path / "tls", tls=f"{{certificate: {certificate}, key: {key}}}") as secure:
        said = sentence(amoeba("bundle", "push", made, secure.reference("team/tls:1"), "--quiet"), 2)
        assert "has no certificate that is trusted here" in said
        assert "set REQUESTS_CA_BUNDLE" in said
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        push(made, secure.reference("team/tls:1"), progress=QUIET)
        pull(secure.reference("team/tls:1"), out, progress=QUIET)
    assert contents(out) == contents(made)


def test_a_proxy_is_used_for_other_machines_alone(
    registry: Registry, bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(registry.port) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        pull(registry.reference("team/model:1"), out, progress=QUIET)
        assert not proxy.seen
        elsewhere(monkeypatch)
        pull(registry.reference("team/model:1"), out.with_name("two"), progress=QUIET, plain_http=True)
        assert proxy.sent(BLOB) == SIZE
    assert contents(out) == contents(out.with_name("two")) == contents(bundle)


# This machine


def test_a_full_disk_is_said_before_anything_is_fetched(
    registry: Registry, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(2_000_000))
    with Proxy(registry.port) as proxy:
        said = sentence(amoeba("bundle", "pull", proxy.reference("team/model:1"), "-o", out, "--quiet"), 2)
        assert proxy.count("/blobs/") == 0
    assert "2 MB free, and 3 MB are to come" in said
    nothing_is_left(out)


class _Usage:
    """What shutil.disk_usage gives."""

    def __init__(self, free: int) -> None:
        self.free = free


def test_two_pulls_into_one_place_are_not_done_at_once(registry: Registry, out: Path) -> None:
    staging = out.parent / ".out.pull"
    staging.mkdir(parents=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        said = sentence(amoeba("bundle", "pull", registry.reference("team/model:1"), "-o", out, "--quiet"), 2)
    finally:
        os.close(descriptor)
    assert "another pull is at work there" in said
    pull(registry.reference("team/model:1"), out, progress=QUIET)


def test_without_oras_it_is_said_how_to_get_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    said = sentence(amoeba("bundle", "pull", "localhost:1/a:1", "-o", out, "--quiet"), 6)
    assert "pip install 'amoeba-deploy[deliver]'" in said


def test_links_where_downloads_are_kept_are_not_followed(registry: Registry, bundle: Path, out: Path) -> None:
    staging, victim = out.parent / ".out.pull", out.parent / "victim"
    staging.mkdir(parents=True)
    victim.write_bytes(b"precious")
    for name in (f"{WEIGHTS_DIGEST.removeprefix('sha256:')}.part", "other"):
        (staging / name).symlink_to(victim)
    pull(registry.reference("team/model:1"), out, progress=QUIET)
    assert victim.read_bytes() == b"precious"
    assert contents(out) == contents(bundle)
    assert not (out / WEIGHTS).is_symlink()
    other = out.with_name("other")
    other.with_name(".other.pull").symlink_to(out)
    assert "is a link" in sentence(
        amoeba("bundle", "pull", registry.reference("team/model:1"), "-o", other, "--quiet"), 2
    )
    assert contents(out) == contents(bundle)
