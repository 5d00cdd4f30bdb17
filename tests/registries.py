"""A registry of the tests' own on the loopback interface, a proxy in front of it that misbehaves, and small bundles."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from amoeba_deploy.bundle import write_manifest
from amoeba_deploy.delivery.artifact import digest_of

SERVER = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(SERVER is None, reason="no docker-registry is here: see tools/install_test_servers")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
WEIGHTS = "engine/model-q8_0.gguf"


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def small_bundle(folder: Path, size: int = 300_000, seed: int = 0, **more: bytes) -> Path:
    """A bundle with weights of some bytes, a tokenizer that all such bundles share, and what is not listed."""
    (folder / "engine").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(noise(size, seed))
    (folder / "tokenizer.json").write_bytes(noise(50_000, 99))
    (folder / "README.md").write_text("A small bundle.\n")
    (folder / "empty.txt").write_bytes(b"")
    for name, data in more.items():
        (folder / name).write_bytes(data)
    facts = {"checkpoint": "stories", "flow": "gguf", "precision": "q8_0", "device": "orin-nx"}
    write_manifest(folder, facts | {"shape": {"depth": 4, "width": 0.5}, "seed": seed})
    (folder / "measured.json").write_text(json.dumps({"format": "amoeba.measured/1", "date": "2026-11-27"}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def free_port() -> int:
    """A port on which nothing listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Registry:
    """A running docker-registry."""

    port: int

    def reference(self, name: str) -> str:
        """The reference of a repository here."""
        return f"127.0.0.1:{self.port}/{name}"

    def url(self, tail: str) -> str:
        """The address of something below /v2/."""
        return f"http://127.0.0.1:{self.port}/v2/{tail}"

    def get(self, tail: str, kind: str = MANIFEST_TYPE) -> requests.Response:
        """What the registry answers to a plain request."""
        return requests.get(self.url(tail), headers={"Accept": kind})

    def put_blob(self, name: str, data: bytes) -> dict[str, Any]:
        """Bring bytes into a repository by hand; their descriptor."""
        at = requests.post(self.url(f"{name}/blobs/uploads/")).headers["Location"]
        done = requests.put(at, params={"digest": digest_of(data)}, data=data)
        assert done.status_code == 201, done.text
        return {"digest": digest_of(data), "size": len(data)}

    def put_manifest(self, name: str, value: object, tag: str = "latest", kind: str = MANIFEST_TYPE) -> str:
        """Bring a manifest into a repository by hand, whatever it says; its digest."""
        data = json.dumps(value).encode()
        done = requests.put(self.url(f"{name}/manifests/{tag}"), data=data, headers={"Content-Type": kind})
        assert done.status_code == 201, done.text
        return digest_of(data)


@contextmanager
def running_registry(root: Path, auth: str = "", tls: str = "{}") -> Iterator[Registry]:
    """A registry that keeps all in a folder; ``auth`` and ``tls`` are parts of its configuration."""
    port = free_port()
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', tls: {tls}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {root / 'data'}}}}}\n{auth}"
    )
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([str(SERVER), "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        while True:
            assert process.poll() is None, (root / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield Registry(port)
    finally:
        process.terminate()
        process.wait()


@dataclass
class Seen:
    """A request that a proxy got: with which headers, and how many bytes of a body it sent for it."""

    method: str
    path: str
    headers: Mapping[str, str]
    sent: int = 0
    status: int = 0


@dataclass
class Answer:
    """What goes back: the body is sent as it is, cut where ``cut`` says, and the connection is closed then."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Iterator[bytes] = b""
    cut: int | None = None


Rule = Callable[[Seen, "Proxy"], "Answer | None"]


class _Server(ThreadingHTTPServer):
    """A server that says nothing of clients who hang up."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


class Proxy:
    """A server between a client and a registry. Each rule may answer a request itself; None leaves it to the next."""

    def __init__(self, upstream: int, *rules: Rule) -> None:
        self.upstream, self.rules, self.seen = upstream, list(rules), list[Seen]()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = int(self.server.server_address[1])

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reference(self, name: str, host: str = "127.0.0.1") -> str:
        """The reference of a repository through this proxy."""
        return f"{host}:{self.port}/{name}"

    def sent(self, part: str, method: str = "GET") -> int:
        """Bytes of bodies sent for requests whose path has some part."""
        return sum(seen.sent for seen in self.seen if part in seen.path and seen.method == method)

    def count(self, part: str, method: str = "GET") -> int:
        """How many requests had that part in their path."""
        return sum(part in seen.path and seen.method == method for seen in self.seen)

    def ask(self, seen: Seen, body: bytes = b"") -> Answer:
        """What the registry answers to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream)
        passed = {name: value for name, value in seen.headers.items() if name.lower() != "host"}
        # Uploads go on through the proxy.
        passed["Host"] = f"127.0.0.1:{self.port}"
        connection.request(seen.method, seen.path, body, passed)
        answer = connection.getresponse()
        data = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        connection.close()
        return Answer(answer.status, headers, data)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen = Seen(self.command, self.path, dict(self.headers.items()))
            proxy.seen.append(seen)
            found = next((answer for rule in proxy.rules if (answer := rule(seen, proxy)) is not None), None)
            self.reply(seen, found or proxy.ask(seen, body))

        def reply(self, seen: Seen, answer: Answer) -> None:
            seen.status = answer.status
            if answer.status == 0:  # not even a status: the connection just ends
                self.close_connection = True
                return
            self.send_response(answer.status)
            names = {name.lower() for name in answer.headers}
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if isinstance(answer.body, bytes) and "content-length" not in names:
                self.send_header("Content-Length", str(len(answer.body)))
            elif not isinstance(answer.body, bytes):
                self.close_connection = True
            self.end_headers()
            if seen.method == "HEAD":
                return
            parts = [answer.body[: answer.cut]] if isinstance(answer.body, bytes) else answer.body
            try:
                for part in parts:
                    self.wfile.write(part)
                    seen.sent += len(part)
            except OSError:
                self.close_connection = True
            if answer.cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = answer  # noqa: N815

    return Handler
