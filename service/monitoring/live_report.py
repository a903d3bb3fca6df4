"""`report --serve`: the report's page, live, on loopback; and a list where there are many runs."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape
from importlib import resources
from urllib.parse import quote

from service.basics.errors import EvenstepError, SpecError
from service.monitoring.http_server import Answer, BadRequest, ReadOnlyServer, Request
from service.monitoring.live_runs import LiveRuns, RunNow
from service.monitoring.watch import HEAD, cells_of, sparkline
from service.observability.report import page, shell

MOST_SIDE_BY_SIDE = 20
"""Runs on one page of curves."""
_LOOK_SECONDS = 1.0  # the files are looked at so often, however many browsers ask
_HTML = "text/html; charset=utf-8"
_JSON = "application/json"


@dataclass
class LiveReport:
    """The pages about some runs; what was made stays until a file has changed."""

    runs: LiveRuns
    title: str
    lists: bool
    """Whether the first page is a list to choose runs from; else it is about all of them."""
    now: Callable[[], float] = time.time
    _looked: float = -1e9
    _found: tuple[list[RunNow], list[str]] = ((), ())  # type: ignore[assignment]  # before a look
    _pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """By what was asked for: its version, and the page."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            BadRequest: there is nothing of this kind.
        """
        if request.path not in ("/", "/state"):
            raise BadRequest(404, "there is / and nothing else")
        with self._lock:  # one page at a time, however many ask
            asked = list(dict.fromkeys(request.query.get("run", ())))
            found, broken = self._look()
            chosen = self._chosen(asked, found)
            version = _version_of(found if chosen is None else chosen, broken)
            if request.path == "/state":
                state = {"version": version, "seen": self._seen()}
                return Answer(200, json.dumps(state).encode(), _JSON)
            key = "\0".join(asked)
            if self._pages.get(key, ("", b""))[0] != version:
                if len(self._pages) >= MOST_SIDE_BY_SIDE:
                    self._pages.clear()
                text = self._page(chosen, found, broken, version=version)
                self._pages[key] = (version, text.encode(errors=_ESC))
            return Answer(200, self._pages[key][1], _HTML, _POLICY)

    def _look(self) -> tuple[list[RunNow], list[str]]:
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._found, self._looked = self.runs.look(), time.monotonic()
        return self._found

    def _seen(self) -> str | None:
        """How old what is shown is, for runs that are read from a store."""
        told = (self.runs.seen(self.now()), self.runs.trouble)
        return "; ".join(words for words in told if words) or None

    def _chosen(self, asked: Sequence[str], found: Sequence[RunNow]) -> list[RunNow] | None:
        """The runs that a page of curves is about; None for the list of all."""
        if not asked:
            return None if self.lists else list(found)
        if len(asked) > MOST_SIDE_BY_SIDE:
            raise BadRequest(400, f"at most {MOST_SIDE_BY_SIDE} runs side by side")
        # By the names in the list only: what a client sends never becomes a path.
        known = {run.name: run for run in found}
        missing = [name for name in asked if name not in known]
        if missing:
            raise BadRequest(404, "there is no such run here")
        return [known[name] for name in asked]

    def _page(
        self,
        chosen: list[RunNow] | None,
        found: Sequence[RunNow],
        broken: Sequence[str],
        *,
        version: str,
    ) -> str:
        """The page; what was written since `version` may be in it, and is then told as new."""
        if chosen is None:
            body = list_of(self.title, found, broken)
            return shell(self.title, body, script=_script(), version=version)
        histories = []
        for run in chosen:
            try:
                histories.append(self.runs.history(run))
                _ = histories[-1].curves
            except EvenstepError as error:
                status = 404 if isinstance(error, SpecError) else 503  # a store may answer later
                raise BadRequest(status, str(error)) from error
        if not histories:
            raise BadRequest(404, "there is no run yet")
        return page(histories, now=self.now(), script=_script(), version=version)


_ESC = "backslashreplace"
_POLICY: Mapping[str, str] = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
}


def _version_of(runs: Sequence[RunNow], broken: Sequence[str]) -> str:
    told = [(str(run.path), run.state, run.signature) for run in runs]
    return sha256(repr((told, list(broken))).encode(errors=_ESC)).hexdigest()[:16]


def list_of(title: str, runs: Sequence[RunNow], broken: Sequence[str]) -> str:
    """All runs as a table; the chosen ones are shown side by side."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *HEAD, "loss of late"))
    rows = "".join(map(_row, runs))
    warnings = "".join(f"<li>{escape(words)}</li>" for words in broken[:20])
    return (
        f'<header><p class="mark">evenstep <b>runs</b></p><h1>{escape(title)}</h1>'
        f"<p>{len(runs):,} runs, the latest news first</p></header>"
        '<form class="card" method="get" action="./"><div class="scroll"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p><button type="submit">Show the chosen runs side by side</button></p></form>'
        + (
            f'<section class="card"><h2>Not readable</h2><ul>{warnings}</ul></section>'
            * bool(broken)
        )
    )


def _row(run: RunNow) -> str:
    name, state, *rest = cells_of(run)
    link = f'<a href="./?run={quote(run.name, safe="")}">{escape(name)}</a>'
    box = f'<input type="checkbox" name="run" value="{escape(run.name)}">'
    tone = escape(state.replace(" ", "-"))
    pill = f'<span class="pill {tone}">{escape(state)}</span>'
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    chart = escape(sparkline(run.losses, columns=24))
    return f"<tr><td>{box}</td><td>{link}</td><td>{pill}</td>{cells}<td>{chart}</td></tr>"


def _script() -> str:
    return resources.files("service.monitoring").joinpath("live.js").read_text(encoding="utf-8")


def serve(report: LiveReport, sockets: Sequence[socket.socket]) -> None:
    """Serve the pages on these sockets until a signal to end."""

    async def answer(request: Request) -> Answer:
        return await asyncio.to_thread(report.answer, request)

    async def until_stopped() -> None:
        own, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert own is not None, "asyncio runs it in one"
        # A handler of Python's would raise anywhere, also amid an answer.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, own.cancel)
        with suppress(asyncio.CancelledError):
            await ReadOnlyServer(sockets, answer, names_allowed=False).serve()

    asyncio.run(until_stopped())
