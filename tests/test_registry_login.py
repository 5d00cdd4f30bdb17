"""Logins: Docker's own file, basic and token authentication, and whom credentials are not sent to."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QUIET, amoeba, sentence
from registries import Answer, Proxy, Registry, Rule, Seen, contents, needs_registry, running_registry, small_bundle

from amoeba_deploy.delivery.connection import Connection
from amoeba_deploy.delivery.credentials import credentials_for
from amoeba_deploy.delivery.reference import Reference
from amoeba_deploy.delivery.registry import pull, push
from amoeba_deploy.errors import BadInput

pytestmark = needs_registry
USER, PASSWORD = "device", "s3cret:with colon"
HASHED = "$2y$04$/NhRrm75bBKOBdn4LelPNOOX2fOZUUm1AKpyf.A3v6JBlVVq7WOMG"
"""The password as htpasswd writes it, with bcrypt."""
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that wants a user and a password."""
    root = tmp_path_factory.mktemp("closed")
    (root / "users").write_text(f"{USER}:{HASHED}\n")
    with running_registry(root, f"auth: {{htpasswd: {{realm: tests, path: {root / 'users'}}}}}\n") as running:
        yield running


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that is open; proxies in front of it want tokens."""
    with running_registry(tmp_path_factory.mktemp("opened")) as running:
        yield running


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's file of this test; there is none yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr("amoeba_deploy.delivery.connection.FIRST_PAUSE", 0.001)
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle."""
    return small_bundle(tmp_path / "bundle")


def log_in(config: Path, host: str, user: str = USER, password: str = PASSWORD) -> None:
    """Write what ``docker login`` writes."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


# Basic authentication, by the registry itself


def test_a_login_of_docker_is_used(closed: Registry, config: Path, bundle: Path, tmp_path: Path) -> None:
    log_in(config, f"127.0.0.1:{closed.port}")
    push(bundle, closed.reference("team/basic:1"), progress=QUIET)
    pull(closed.reference("team/basic:1"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(bundle)


def test_without_a_login_it_is_said_how_to_log_in(closed: Registry, bundle: Path, tmp_path: Path) -> None:
    host = f"127.0.0.1:{closed.port}"
    for command in (("pull", f"{host}/team/basic:1", "-o", tmp_path / "out"), ("push", bundle, f"{host}/team/basic:2")):
        said = sentence(amoeba("bundle", *command, "--quiet"), 2)
        assert f"{host} wants a login; run 'docker login {host}'" in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_password_is_said(closed: Registry, config: Path, tmp_path: Path) -> None:
    host = f"127.0.0.1:{closed.port}"
    log_in(config, host, password="wrong")
    said = sentence(amoeba("bundle", "pull", f"{host}/team/basic:1", "-o", tmp_path / "out", "--quiet"), 2)
    assert f"{host} does not accept the login" in said
    assert "wrong" not in said


def test_a_login_for_another_host_is_not_sent(closed: Registry, config: Path, tmp_path: Path) -> None:
    log_in(config, f"127.0.0.1:{closed.port + 1}")
    with Proxy(closed.port) as proxy, pytest.raises(BadInput, match="wants a login"):
        pull(proxy.reference("team/basic:1"), tmp_path / "out", progress=QUIET)
    assert all("Authorization" not in seen.headers for seen in proxy.seen)


def test_what_a_netrc_says_is_not_put_in_its_place(
    closed: Registry, config: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    log_in(config, f"127.0.0.1:{closed.port}")
    push(bundle, closed.reference("team/netrc:1"), progress=QUIET)


# Tokens


def token_server(token: str = "t0ken", accepts: str | None = BASIC) -> Rule:
    """A rule that wants a bearer token for all, and gives one to whom it accepts; None gives one to everybody."""

    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        if seen.path.startswith("/token"):
            if accepts is not None and seen.headers.get("Authorization") != accepts:
                return Answer(401, {"Content-Type": "application/json"}, b'{"details": "no"}')
            return Answer(200, {"Content-Type": "application/json"}, json.dumps({"token": token}).encode())
        if seen.headers.get("Authorization") == f"Bearer {token}":
            del seen.headers["Authorization"]  # type: ignore[attr-defined]
            seen.headers["X-Had-Token"] = "yes"  # type: ignore[index]
            return None
        realm = (
            f'Bearer realm="http://127.0.0.1:{proxy.port}/token",service="tests",scope="repository:team/x:pull,push"'
        )
        return Answer(401, {"Www-Authenticate": realm}, b"{}")

    return rule


def test_a_token_is_got_with_the_login_and_used(opened: Registry, config: Path, bundle: Path, tmp_path: Path) -> None:
    with Proxy(opened.port, token_server()) as proxy:
        log_in(config, f"127.0.0.1:{proxy.port}")
        push(bundle, proxy.reference("team/x:1"), progress=QUIET)
        pull(proxy.reference("team/x:1"), tmp_path / "out", progress=QUIET)
    asked = [seen for seen in proxy.seen if seen.path.startswith("/token")]
    assert contents(tmp_path / "out") == contents(bundle)
    assert len(asked) == 2
    assert "scope=repository%3Ateam%2Fx%3Apull%2Cpush" in asked[0].path
    assert "service=tests" in asked[0].path
    # The password goes to the token server alone.
    assert all(seen.headers.get("Authorization") != BASIC for seen in proxy.seen if seen not in asked)


def test_a_token_is_got_without_a_login_where_everybody_may_read(
    opened: Registry, bundle: Path, tmp_path: Path
) -> None:
    push(bundle, opened.reference("team/public:1"), progress=QUIET)
    with Proxy(opened.port, token_server(accepts=None)) as proxy:
        pull(proxy.reference("team/public:1"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(bundle)


def test_a_token_that_runs_out_is_got_anew(opened: Registry, config: Path, bundle: Path, tmp_path: Path) -> None:
    push(bundle, opened.reference("team/expires:1"), progress=QUIET)
    first, second = token_server("first"), token_server("second")

    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        return (second if any("/blobs/" in other.path for other in proxy.seen) else first)(seen, proxy)

    with Proxy(opened.port, rule) as proxy:
        log_in(config, f"127.0.0.1:{proxy.port}")
        pull(proxy.reference("team/expires:1"), tmp_path / "out", progress=QUIET)
    assert proxy.count("/token") == 2
    assert contents(tmp_path / "out") == contents(bundle)


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_token_server_that_refuses_is_said(
    opened: Registry, config: Path, tmp_path: Path, password: str | None
) -> None:
    with Proxy(opened.port, token_server()) as proxy:
        host = f"127.0.0.1:{proxy.port}"
        if password:
            log_in(config, host, password=password)
        said = sentence(amoeba("bundle", "pull", f"{host}/team/x:1", "-o", tmp_path / "out", "--quiet"), 2)
        assert len(proxy.seen) <= 3
    assert ("does not accept the login" if password else "wants a login") in said


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"token": 5}', b"<html>", b'"x"', b"null"])
def test_a_token_server_that_gives_no_token_is_said(
    opened: Registry, config: Path, tmp_path: Path, body: bytes
) -> None:
    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        return Answer(200, {}, body) if seen.path.startswith("/token") else token_server()(seen, proxy)

    with Proxy(opened.port, rule) as proxy:
        host = f"127.0.0.1:{proxy.port}"
        log_in(config, host)
        sentence(amoeba("bundle", "pull", f"{host}/team/x:1", "-o", tmp_path / "out", "--quiet"), 2)


def test_a_token_server_that_never_ends_is_left(opened: Registry, config: Path, tmp_path: Path) -> None:
    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        endless = (b" " * (1 << 16) for _ in range(1600))
        return Answer(200, {}, endless) if seen.path.startswith("/token") else token_server()(seen, proxy)

    with Proxy(opened.port, rule) as proxy:
        host = f"127.0.0.1:{proxy.port}"
        log_in(config, host)
        said = sentence(amoeba("bundle", "pull", f"{host}/team/x:1", "-o", tmp_path / "out", "--quiet"), 2)
    assert "sends more than 4 MB" in said
    assert proxy.sent("/token") < 24 << 20


def test_a_password_is_not_sent_to_a_token_server_without_tls(opened: Registry, config: Path, tmp_path: Path) -> None:
    realm = 'Bearer realm="http://192.0.2.1/token",service="tests"'
    with Proxy(opened.port, lambda *_: Answer(401, {"Www-Authenticate": realm})) as proxy:
        host = f"127.0.0.1:{proxy.port}"
        log_in(config, host)
        said = sentence(amoeba("bundle", "pull", f"{host}/team/x:1", "-o", tmp_path / "out", "--quiet"), 2)
    assert "'http://192.0.2.1/token', which is not https" in said


# Whom credentials are not sent to


@pytest.mark.parametrize("kind", ["basic", "token"])
def test_a_redirect_to_another_host_takes_no_credentials_along(
    opened: Registry, config: Path, bundle: Path, tmp_path: Path, kind: str
) -> None:
    push(bundle, opened.reference("team/away:1"), progress=QUIET)
    wants = token_server()

    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        if kind == "token" and (answer := wants(seen, proxy)) is not None:
            return answer
        if kind == "basic" and seen.headers.get("Authorization") != BASIC:
            return Answer(401, {"Www-Authenticate": 'Basic realm="tests"'})
        return (
            Answer(307, {"Location": f"http://localhost:{other.port}{seen.path}"}) if "/blobs/" in seen.path else None
        )

    with Proxy(opened.port) as other, Proxy(opened.port, rule) as proxy:
        log_in(config, f"127.0.0.1:{proxy.port}")
        # The other host has a login too, which it did not ask for.
        known = json.loads(config.read_text())
        known["auths"][f"localhost:{other.port}"] = known["auths"][f"127.0.0.1:{proxy.port}"]
        config.write_text(json.dumps(known))
        pull(proxy.reference("team/away:1"), tmp_path / "out", progress=QUIET)
    assert contents(tmp_path / "out") == contents(bundle)
    assert other.count("/blobs/") == 6  # all but the empty one
    assert all("Authorization" not in seen.headers for seen in other.seen)


def test_an_upload_that_is_led_to_another_host_takes_no_credentials_along(
    opened: Registry, config: Path, bundle: Path
) -> None:
    def rule(seen: Seen, proxy: Proxy) -> Answer | None:
        if seen.headers.get("Authorization") != BASIC:
            return Answer(401, {"Www-Authenticate": 'Basic realm="tests"'})
        if seen.method != "POST":
            return None
        found = proxy.ask(seen)
        here, there = f"127.0.0.1:{proxy.port}", f"localhost:{other.port}"
        found.headers["Location"] = found.headers["Location"].replace(here, there)
        return found

    with Proxy(opened.port) as other, Proxy(opened.port, rule) as proxy:
        log_in(config, f"127.0.0.1:{proxy.port}")
        push(bundle, proxy.reference("team/led:1"), progress=QUIET)
    assert other.count("uploads", "PUT") == 8
    assert all("Authorization" not in seen.headers for seen in other.seen)


# Docker's file


@pytest.mark.parametrize("name", ["r.io:5000", "https://r.io:5000", "http://r.io:5000", "https://r.io:5000/v2/"])
def test_a_login_is_found_under_every_name_that_docker_gives_it(config: Path, name: str) -> None:
    log_in(config, name)
    assert credentials_for("r.io:5000") == (USER, PASSWORD)
    assert credentials_for("r.io") is None


def test_the_login_of_docker_hub_is_found(config: Path) -> None:
    log_in(config, "https://index.docker.io/v1/")
    assert credentials_for("docker.io") == (USER, PASSWORD)
    assert Connection(Reference.parse("docker.io/team/x")).url("y") == "https://registry-1.docker.io/v2/team/x/y"


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_dockers_helpers_are_asked(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    helper = tmp_path / "docker-credential-tests"
    helper.write_text(
        '#!/bin/sh\nread -r host || true\n[ "$1" = get ] && [ "$host" = r.io ] || exit 1\n'
        'echo \'{"ServerURL": "r.io", "Username": "u", "Secret": "p"}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config.write_text(json.dumps({key: {"r.io": "tests", "q.io": "tests"} if key == "credHelpers" else "tests"}))
    assert credentials_for("r.io") == ("u", "p")
    assert credentials_for("q.io") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"auths": {"r.io": {"auth": "%"}}}', '{"auths": {"r.io": {"auth": 5}}}']
)
def test_a_damaged_file_is_said(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        credentials_for("r.io")


@pytest.mark.parametrize(
    "text", ["{}", '{"auths": []}', '{"auths": {"r.io": {}}}', '{"auths": {"r.io": 5}}', '{"credsStore": "not-there"}']
)
def test_a_file_that_knows_nothing_of_a_host_gives_no_login(config: Path, text: str) -> None:
    config.write_text(text)
    assert credentials_for("r.io") is None
