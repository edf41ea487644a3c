"""Control a headless Chromium through a pipe with the DevTools protocol, without a driver or library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "win32":
    import fcntl

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIRTUAL_KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "End": 35, "Home": 36}


def find_browser() -> str:
    """Return the path of the browser; skip the test if there is none."""
    if sys.platform == "win32":
        pytest.skip("the browser is controlled through inherited file descriptors, which Windows does not support")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    return found


IS_READY = """location.protocol === "file:" && document.readyState === "complete"
    && (document.documentElement.dataset.ready === "yes" || document.getElementById("failure")?.hidden === false)"""


class Page:
    """One tab. `problems` collects JavaScript errors and requests for anything other than the page itself."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._last = write, os.fdopen(read, "rb", buffering=0), b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self._url = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._notice(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._read.read(1 << 16)
            if not chunk:
                raise AssertionError("the browser has exited")
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _notice(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:600])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url.split("#")[0] != self._url:
                self.problems.append(f"request for {url[:200]}")

    def open(self, path: Path, fragment: str = "", *, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Open a file and wait until the page is ready."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self._url = path.resolve().as_uri()
        self.call("Page.navigate", url=self._url + fragment)
        deadline = time.monotonic() + 60
        while not self.evaluate(IS_READY):
            assert time.monotonic() < deadline, "the page was not ready within a minute"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """Return the awaited value of an expression."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise AssertionError(json.dumps(result["exceptionDetails"])[:600])
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press and release keys."""
        for key in keys:
            event = {
                "key": key,
                "windowsVirtualKeyCode": VIRTUAL_KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0),
            }
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path: Path) -> None:
        """Save the visible part of the page as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """Run a browser with one tab inside the block."""
    command, (to_read, to_write), (from_read, from_write) = find_browser(), os.pipe(), os.pipe()
    # The protocol uses file descriptors 3 and 4, so move ours out of the way first.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_read, from_write)]
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    arguments += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
    process = os.posix_spawn(
        command,
        [command, *arguments, "about:blank"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
    )
    for end in (to_read, from_write, *high):
        os.close(end)
    try:
        yield Page(to_write, from_read)
    finally:
        os.close(to_write)  # the browser exits when its pipe closes
        wait_or_kill(process)


def wait_or_kill(process: int) -> None:
    """Wait at most twenty seconds for a process to end, then kill it."""
    deadline = time.monotonic() + 20
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return
        time.sleep(0.05)
