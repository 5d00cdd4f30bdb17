"""A browser for tests of pages: Debian's chromium without a window, spoken to over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT_NETWORK = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is at hand")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34, "Tab": 9}


class Page:
    """One open page; ``complaints`` are the console's warnings and errors, ``requests`` all addresses asked for."""

    def __init__(self, socket: Any, session: str) -> None:
        self._socket, self._session, self._numbers = socket, session, itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; events that come before its answer are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, "sessionId": self._session}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, facts: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([one.get("value", one.get("description")) for one in facts["args"]]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(facts["exceptionDetails"]))
        elif event == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.complaints.append(facts["entry"]["text"])
        elif event == "Page.loadEventFired":
            self.loaded = True

    def open(self, file: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.loaded = False
        self.send("Page.navigate", url=file.as_uri())
        self.until("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait until what was done is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def size(self, width: int, height: int, *, touch: bool = False, scale: float = 1) -> None:
        """Show the page in a window of that size, as a phone does where it is touched."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=touch
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.settle()

    def media(self, *, scheme: str = "light", kind: str = "") -> None:
        """Prefer light or dark, on a screen or in ``print``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=kind, features=features)
        self.settle()

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, which is scrolled into sight."""
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            " return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        return found[0], found[1]

    def drag(self, selector: str, by: float, *, touch: bool = False, moves: int = 6) -> None:
        """Drag an element sideways by some pixels, with the mouse or a finger."""
        x, y = self.place(selector)
        path = [(x + by * move / moves, y) for move in range(moves + 1)]
        if touch:
            self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            for at, up in path[1:]:
                self.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": at, "y": up}])
            self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self._mouse("mousePressed", x, y)
            for at, up in path[1:]:
                self._mouse("mouseMoved", at, up)
            self._mouse("mouseReleased", *path[-1])
        self.settle()

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        x, y = self.place(selector)
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)
        self.settle()

    def _mouse(self, kind: str, x: float, y: float) -> None:
        held = 0 if kind == "mouseReleased" else 1
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=held, clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key in what has the focus."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **code)
        self.settle()

    def type(self, selector: str, text: str) -> None:
        """Type into a field instead of what stands in it."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)
        self.settle()

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def screenshot(self, file: Path, clip: dict[str, float] | None = None, *, whole: bool = False) -> None:
        """Write what is seen, a rectangle of the page, or all of it."""
        more: dict[str, Any] = {"captureBeyondViewport": whole or clip is not None}
        if clip is not None:
            more["clip"] = {**clip, "scale": 1}
        elif whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            more["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", **more)
        file.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, file: Path) -> None:
        """Print the page."""
        found = self.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser_page(profile: Path) -> Iterator[Page]:
    """An empty page in a browser of its own, whose profile is kept in a folder that is not there yet."""
    import websocket

    command = [str(CHROMIUM), *WITHOUT_NETWORK, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    with subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            socket = websocket.create_connection(_address(profile, process), suppress_origin=True, timeout=120)
            target = _call(socket, "Target.createTarget", url="about:blank")["targetId"]
            session = _call(socket, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            page = Page(socket, session)
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.send(f"{domain}.enable")
            yield page
            socket.close()
        finally:
            process.terminate()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser answers, which it writes into its profile."""
    file, end = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (file.is_file() and len(file.read_text().split()) == 2):
        assert process.poll() is None, "chromium ended at once"
        assert time.monotonic() < end, "chromium does not answer"
        time.sleep(0.05)
    port, path = file.read_text().split()
    return f"ws://127.0.0.1:{port}{path}"


def _call(socket: Any, method: str, **parameters: Any) -> dict[str, Any]:
    """A call to the browser itself, before there is a page."""
    socket.send(json.dumps({"id": 0, "method": method, "params": parameters}))
    while True:
        answer = json.loads(socket.recv())
        if answer.get("id") == 0:
            return dict(answer["result"])
