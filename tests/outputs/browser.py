"""Headless Chromium over its DevTools protocol: a page is opened, typed into, asked, and watched.

As a program it takes a picture of a page, as docs/report.png is one:
    python tests/outputs/browser.py table1/report.html#at=2,0 docs/report.png 1160 900
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)
SECONDS = 60.0
KEYS = {"Enter": ("\r", 13), "Escape": (None, 27), "Tab": (None, 9), "Home": (None, 36), "End": (None, 35)}
KEYS |= {f"Arrow{way}": (None, 37 + i) for i, way in enumerate(("Left", "Up", "Right", "Down"))}
KEYS |= {"PageUp": (None, 33), "PageDown": (None, 34)}


def find_chromium() -> str | None:
    """The browser: CHROMIUM, or the first of the usual names on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Browser:
    """One browser with one page. ``requests``, ``errors`` and ``logs`` are of the page since it was opened."""

    def __init__(self, program: str):
        import websocket

        self._profile = tempfile.mkdtemp(prefix="ddim-browser-")
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._count, self._answers, self._events = 0, {}, []
        try:
            self._socket = websocket.create_connection(self._address(), timeout=SECONDS)
            [page] = [t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
            attached = self._send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _address(self) -> str:
        """Where the browser listens, once it does."""
        file, end = Path(self._profile, "DevToolsActivePort"), time.monotonic() + SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                port, path = file.read_text().split()
                return f"ws://127.0.0.1:{port}{path}"
            time.sleep(0.05)
        raise RuntimeError(f"the browser did not start (exit code {self._process.poll()})")

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        question = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(question | ({"sessionId": session} if session else {})))
        while True:
            told = json.loads(self._socket.recv())
            if told.get("id") == self._count:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']['message']}")
                return told["result"]
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._send(method, self._session, **parameters)

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Load a page anew, also where only the part after # differs."""
        self.send("Page.navigate", url="about:blank")
        self.requests.clear()
        self.errors.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url.split('#')[0])}) && document.readyState === 'complete'")
        self.settle()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; what it throws is raised."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", expression))
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression holds."""
        end = time.monotonic() + SECONDS
        while not self.ask(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def settle(self) -> None:
        """Until what was asked for is drawn, and the pictures that are wanted are there."""
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        self.wait("[...document.images].every(image => image.complete)")

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element, which is scrolled to."""
        name = json.dumps(selector)
        self.ask(f"document.querySelector({name}).scrollIntoView({{block: 'nearest'}})")
        self.settle()
        x, y = self.ask(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector({name}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str, times: int = 1) -> None:
        """A key, by its name, or a character."""
        text, code = KEYS.get(key, (key, ord(key.upper()) if len(key) == 1 else 0))
        for _ in range(times):
            down = {"key": key, "code": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **down)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
        self.settle()

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)
        self.settle()

    def screenshot(self) -> bytes:
        """What is on the screen, as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser, and remove what it kept."""
        with contextlib.suppress(Exception):
            self._send("Browser.close")
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(Exception):
            self._socket.close()
        shutil.rmtree(self._profile, ignore_errors=True)


def main(page: str, picture: str, width: str = "1280", height: str = "800") -> None:
    path, _, fragment = page.partition("#")
    browser = Browser(find_chromium() or sys.exit("no Chromium is here; CHROMIUM may name one"))
    try:
        browser.open(f"{Path(path).absolute().as_uri()}#{fragment}", int(width), int(height))
        Path(picture).write_bytes(browser.screenshot())
    finally:
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
