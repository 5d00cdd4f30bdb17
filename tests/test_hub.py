"""Pushing a subnet to the hub, through the real client, against a hub of one repository on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import amoeba


class Hub(ThreadingHTTPServer):
    """Keeps what was committed; large files come by the LFS protocol, small ones inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        data, hub = self.body(), self.server
        if self.headers.get("Authorization") != "Bearer hf_test" or hub.refuses:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            large = (".safetensors", ".json")
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(data)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            upload_to = {"upload": {"href": f"{hub.address}/lfs"}}
            self.answer({"transfer": "basic", "objects": [{**each, "actions": upload_to} for each in objects]})
        elif "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "deletedFile":
                    hub.files.pop(value["path"], None)
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            self.answer(
                {"commitUrl": f"{hub.address}/someone/subnet/commit/1", "commitOid": "1", "pullRequestUrl": None}
            )
        else:
            self.answer({})

    def do_PUT(self) -> None:
        data = self.body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self) -> None:
        paths = sorted(self.server.files)
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in paths])
        else:
            files = [{"rfilename": path} for path in paths]
            self.answer({"siblings": files, "id": "someone/subnet", "sha": "0" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants
    import huggingface_hub.hf_api as hf_api

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # What HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET say when the library is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api, "ENDPOINT", server.address, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_every_file_arrives(hub: Hub, tmp_path: Path) -> None:
    done = amoeba(
        "extract", "--shape", "8x0.75", "-o", tmp_path / "out", "--push-to-hub", "someone/subnet", "--json", "--quiet"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.address}/someone/subnet"
    here = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files == here
    assert b"library_name: transformers" in hub.files["README.md"]


def test_a_refusal_is_one_sentence_and_the_folder_stays(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = amoeba("extract", "--shape", "8x0.75", "-o", tmp_path / "out", "--push-to-hub", "someone/subnet")
    assert done.exit_code == 2
    assert "was not uploaded to someone/subnet" in done.stderr
    assert "hf auth login" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "out/config.json").is_file()


def test_a_name_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    done = amoeba("extract", "--shape", "8x0.75", "-o", tmp_path / "out", "--push-to-hub", "a/b/c")
    assert (done.exit_code, "not the name of a repository" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_second_push_leaves_no_weights_of_the_first(hub: Hub, tmp_path: Path) -> None:
    for name, size in (("one", "5GB"), ("many", "1MB")):
        output = tmp_path / name
        done = amoeba("extract", "--shape", "8x0.75", "-o", output, "--shard-size", size, "--push-to-hub", "a/subnet")
        assert done.exit_code == 0, done.stderr
    assert "model.safetensors" not in hub.files
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "many").iterdir()}


def test_a_hub_out_of_reach_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    done = amoeba("extract", "--shape", "8x0.75", "-o", tmp_path / "out", "--push-to-hub", "someone/subnet")
    assert (done.exit_code, "was not uploaded to someone/subnet" in done.stderr) == (2, True), done.stderr
