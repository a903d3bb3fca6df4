"""Clients of an HTTP server, among them ones that mean no good."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import NamedTuple

from commands import DEADLINE_SECONDS

from service.monitoring.http_server import Answer, ReadOnlyServer, Request, bound


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    headers: dict[str, str]
    text: str


def get(port: int, path: str, **headers: str) -> Reply:
    """The answer to a GET on loopback; `Host` is that of the address unless it is given."""
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, named, answer.read().decode())
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def raw(port: int, sent: bytes) -> bytes:
    """Everything that a server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as connection:
        got = b""
        with suppress(ConnectionError):  # it closed the connection while we were sending
            connection.sendall(sent)
            while more := connection.recv(1 << 16):
                got += more
        return got


def silent(port: int, count: int) -> list[socket.socket]:
    """So many connections, each of which sends the beginning of a request and no more."""
    opened = []
    for _ in range(count):
        connection = socket.socket()
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(("127.0.0.1", port))
        with suppress(ConnectionError):  # closed for a newer one
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        opened.append(connection)
    return opened


def closed_by_server(connection: socket.socket, seconds: float = DEADLINE_SECONDS) -> bool:
    """Whether the server closes it in time, without an answer."""
    deadline = time.monotonic() + seconds
    connection.settimeout(1.0)
    while time.monotonic() < deadline:
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


@contextmanager
def serving(answer: Answer, *, names_allowed: bool = True) -> Iterator[int]:
    """The port of a server that gives this answer to everybody."""
    listening = bound("127.0.0.1", 0)

    async def same(request: Request) -> Answer:
        return answer

    server = ReadOnlyServer([listening], same, names_allowed=names_allowed)
    loop = asyncio.new_event_loop()
    task = loop.create_task(server.serve())
    thread = threading.Thread(target=lambda: _until_cancelled(loop, task))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        listening.close()


def _until_cancelled(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
