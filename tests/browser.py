"""A real browser for the tests of pages: what a script finds in a page, once it is laid out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
