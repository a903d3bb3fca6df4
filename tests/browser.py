"""A real browser for the tests of pages: what a script finds in a page, once it is laid out."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from commands import DEADLINE_SECONDS
from injuring import until
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; `apt install chromium`")


def probe(page: Path, script: str, *, width: int, dark: bool = False) -> Any:
    """What the body of a function, `script`, returns in `page` when it is `width` pixels wide.

    The page stands in a frame: a window cannot be made as narrow as a phone.
    """
    asked = page.with_name(f"probed-{page.name}")
    sends = f"addEventListener('load', () => parent.postMessage((() => {{{script}}})(), '*'))"
    asked.write_text(page.read_text().replace("</body>", f"<script>{sends}</script></body>"))
    frame = page.with_name(f"frame-{page.name}")
    frame.write_text(
        "<script>addEventListener('message', event => document.body.dataset.found ="
        " JSON.stringify(event.data))</script><body>"
        f'<iframe src="{asked.name}" style="width:{width}px;height:900px;border:0"></iframe></body>'
    )
    found = re.search('data-found="(.*?)"', _dom(frame, width=width + 40, dark=dark))
    assert found, "the page ran its script to the end"
    return json.loads(html.unescape(found[1]))


def _dom(page: Path, *, width: int, dark: bool) -> str:
    assert CHROMIUM is not None
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    words += [f"--window-size={width},1000", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *words, *scheme, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


class Tab:
    """An open page, driven by the protocol of Chromium's developer tools."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._asked = 0
        self.errors: list[str] = []
        """Exceptions of the page's scripts, and what its own policy has blocked."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str, *, before: str = "") -> None:
        """Go to an address; a script, `before`, runs before those of the page."""
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What an expression is in the page now; None where it raises."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return None if "exceptionDetails" in found else found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page."""
        until(lambda: self.value(expression), expression)

    def call(self, method: str, **asked: Any) -> dict[str, Any]:
        self._asked += 1
        self._connection.send(json.dumps({"id": self._asked, "method": method, "params": asked}))
        while True:
            told = json.loads(self._connection.recv(timeout=DEADLINE_SECONDS))
            if told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(told["params"]["exceptionDetails"]))
            elif told.get("method") == "Log.entryAdded":
                entry = told["params"]["entry"]
                if entry["level"] == "error" and "favicon" not in entry.get("url", ""):
                    self.errors.append(entry["text"])
            elif told.get("id") == self._asked:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result


@contextmanager
def opened(profile: Path) -> Iterator[Tab]:
    """A browser with an empty page; its profile is kept in this directory."""
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [CHROMIUM, *words, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = profile / "DevToolsActivePort"
        until(lambda: told.exists() and told.read_text().count("\n"), "it listens", of=process)
        port = int(told.read_text().splitlines()[0])
        pages = until(lambda: _pages(port), "it has a page", of=process)
        with connect(pages[0], max_size=None, compression=None, proxy=None) as connection:
            yield Tab(connection)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_SECONDS)


def _pages(port: int) -> list[str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    try:
        connection.request("GET", "/json/list")
        found = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return [each["webSocketDebuggerUrl"] for each in found if each["type"] == "page"]
