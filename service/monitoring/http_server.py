"""A small HTTP server that only reads, and that no client can make slow, large or forgetful.

One request for each connection. A client has a few seconds to send its request and to take the
answer; the number of connections and the length of a request are limited. Where there are too many
connections, one is closed for the next: the oldest without a whole request, or else the one that
takes its answer for the longest time. So a flood of silent or slow clients does not keep out one
that asks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

MOST_CONNECTIONS = 32
REQUEST_SECONDS = 5.0
"""For a client to send its whole request."""
TAKE_SECONDS = 10.0
"""For a client to take the answer."""
HEAD_BYTES = 8192
"""Of the request line and all headers."""
_QUEUE = 1024  # connections that the kernel holds for us
_ACCEPTED_AT_ONCE = 16  # of these, before the ones that we have get their turn
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain")  # which no public DNS can give away
_WORDS = {
    200: "OK",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Request(NamedTuple):
    """What a client asks for."""

    path: str
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    """Names in lower case."""


class Answer(NamedTuple):
    """What it gets."""

    status: int
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}


class BadRequest(Exception):
    """The answer to a request that is wrong."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.answer = Answer(status, f"{words}\n".encode())


Answering = Callable[[Request], Awaitable[Answer]]
_Clients = dict[asyncio.Task[None], asyncio.StreamWriter]


@dataclass
class ReadOnlyServer:
    """Answers GET and HEAD on sockets that are bound already."""

    sockets: Sequence[socket.socket]
    answer: Answering
    names_allowed: bool = True
    """Whether the Host header may be a name. With `False` it is an address or `localhost`: a page
    of another site that has its name point to this machine (DNS rebinding) then gets nothing."""
    _waiting: _Clients = field(default_factory=dict)
    """Connections without a whole request, the oldest first."""
    _taking: _Clients = field(default_factory=dict)
    """Connections whose answer is being sent, the oldest first."""
    _open: int = 0
    _has_failed: bool = False

    async def serve(self) -> None:
        """Serve until this task is cancelled."""
        servers = [
            await asyncio.start_server(
                self._connected, sock=each, limit=HEAD_BYTES, backlog=_ACCEPTED_AT_ONCE
            )
            for each in self.sockets
        ]
        for each in self.sockets:
            each.listen(_QUEUE)  # asyncio takes its `backlog` for both
        try:
            await asyncio.gather(*(server.serve_forever() for server in servers))
        finally:
            for server in servers:
                server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= MOST_CONNECTIONS and not self._closed_the_oldest():
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None, "asyncio runs it in one"
        self._open += 1
        self._waiting[task] = writer
        try:
            answer, has_body = await self._answer(reader, task)
            self._taking[task] = writer
            await _send(writer, answer, has_body=has_body)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()  # too slow, gone, or in the way of others
        finally:
            self._waiting.pop(task, None)
            self._taking.pop(task, None)
            self._open -= 1

    def _closed_the_oldest(self) -> bool:
        """Whether a connection that its client holds up was closed for a new one."""
        clients = self._waiting or self._taking
        for task, writer in clients.items():
            del clients[task]
            writer.transport.abort()
            task.cancel()
            return True
        return False

    async def _answer(
        self, reader: asyncio.StreamReader, task: asyncio.Task[None]
    ) -> tuple[Answer, bool]:
        """(the answer, whether its body is sent)."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return BadRequest(431, f"at most {HEAD_BYTES} bytes of headers").answer, True
        finally:
            self._waiting.pop(task, None)
        try:
            method, request = self._request(head)
            return await self.answer(request), method == "GET"
        except BadRequest as error:
            return error.answer, True
        except Exception:  # ours: whoever asks is told that much, and the log gets it once
            if not self._has_failed:
                self._has_failed = True
                traceback.print_exc()
            return BadRequest(
                500, "this cannot be answered: see the log of the server"
            ).answer, True

    def _request(self, head: bytes) -> tuple[str, Request]:
        """(the method, the request) of the bytes of a request.

        Raises:
            BadRequest: it is none, or none that is answered here.
        """
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequest(400, "this is no request of HTTP/1")
        if words[0] not in ("GET", "HEAD"):
            raise BadRequest(405, "GET and HEAD only")
        pairs = [line.partition(":") for line in lines if line]
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if not self.names_allowed and not is_address(headers.get("host", "")):
            raise BadRequest(421, "ask by the address or by localhost, not by another name")
        try:
            url = urlsplit(words[1])
            query = parse_qs(url.query, max_num_fields=100)
        except ValueError as error:
            raise BadRequest(400, "this is no path") from error
        return words[0], Request(url.path, query, headers)


def is_address(host: str) -> bool:
    """Whether a Host header is a name of loopback or an address, with or without a port."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or (":" in name and not name.startswith("[")):
        name = host
    if name.lower().removesuffix(".") in _LOOPBACK_NAMES:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


async def _send(writer: asyncio.StreamWriter, answer: Answer, *, has_body: bool) -> None:
    headers = {
        "Content-Type": answer.kind,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **answer.headers,
    }
    lines = [f"HTTP/1.1 {answer.status} {_WORDS[answer.status]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    if has_body:
        writer.write(answer.body)
    async with asyncio.timeout(TAKE_SECONDS):
        writer.close()
        with suppress(ConnectionError):  # it has gone before it had everything
            await writer.wait_closed()


def bound(address: str, port: int) -> socket.socket:
    """A socket that listens on this address as soon as a server takes it.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        made.listen(_QUEUE)
    except OSError:
        made.close()
        raise
    return made
