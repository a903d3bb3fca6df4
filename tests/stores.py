"""A real server that speaks S3 over HTTP, in a process of its own, and a proxy that does harm."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from injuring import until

BUCKET = "evenstep-test"
LISTED_AT_ONCE = 7
"""Names in one answer to a list of objects; a thousand in S3."""
DRIP_SECONDS = 0.05
"""Between two bytes of an answer that drips."""
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "host"}


class Server(NamedTuple):
    """An S3 server on loopback."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of a client must hold."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@contextmanager
def s3_server(bucket: str = BUCKET) -> Iterator[Server]:
    """A server with one empty bucket, until the context ends."""
    port = free_port()
    variables = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(LISTED_AT_ONCE)}
    words = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    with serving(words, port, variables):
        put_bucket(port, bucket)
        yield Server(port)


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serving(
    words: Sequence[str], port: int, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The program of a server, which answers on this port, until the context ends."""
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(words, env=variables, **quiet)
    told = " ".join(words[:3])
    try:
        until(lambda: process.poll() is not None or _answers(port), f"the start of {told}")
        assert process.poll() is None, f"{told} did not start"
        yield process
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def put_bucket(port: int, bucket: str) -> None:
    """Create the bucket."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{bucket}", headers={"Authorization": _SIGNED})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host"

Harm = str | int | float | bytes | Callable[[], None] | None
"""What happens to a request, if not None.

`drop`: no answer; `lose`: done, but no answer; `cut`: half an answer; `drip`: an answer byte by
byte, until the proxy ends; `chunk`: an answer in chunks, without a length; `stall`: nothing is
read and answered until then; an int: a status; a float: so many seconds pass first; a code of S3,
with its status; bytes: this is the answer; a function: done, and called before the answer, which
is lost.
"""
_STATUS = {"AuthorizationHeaderMalformed": 400, "PermanentRedirect": 301, "NoSuchBucket": 404}
_STATUS |= {"SlowDown": 503, "InternalError": 500, "ExpiredToken": 400, "NotImplemented": 501}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client was killed
            super().handle_error(request, client_address)


class Proxy:
    """Forwards requests to a server; `harm(method, path)` says what happens to each."""

    def __init__(self, server: Server) -> None:
        self.harm: Callable[[str, str], Harm] = lambda method, path: None
        self.ignored: set[str] = set()
        """Headers of requests that the server does not get, in small letters."""
        self.clock_seconds = 0.0
        """How far the clock of the store is ahead, according to its answers."""
        self.seen: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        """Of the same requests, with names in small letters."""
        self._server = server
        self._over = threading.Event()
        self._listener = _Listener(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._listener.serve_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *told: object) -> None:
        self._over.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    @property
    def server(self) -> Server:
        """What a client sees."""
        return Server(self._listener.server_address[1])

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the client

            def _forward(self) -> None:
                proxy.seen.append((self.command, self.path))
                proxy.headers.append({k.lower(): v for k, v in self.headers.items()})
                harm = proxy.harm(self.command, self.path)
                if harm == "stall":
                    proxy._over.wait()
                    self.close_connection = True
                    return
                body = _body(self)
                if isinstance(harm, float):
                    proxy._over.wait(harm)
                if isinstance(harm, bytes):
                    self._answer(200, [("Content-Type", "application/xml")], harm)
                    return
                if isinstance(harm, int):
                    self._answer(harm, [], _ERRORS[harm])
                    return
                if isinstance(harm, str) and harm[0].isupper():
                    self._answer(_STATUS.get(harm, 403), [], _error(harm))
                    return
                if harm == "drop":
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", proxy._server.port)
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in _HOP | proxy.ignored
                }
                headers["Host"] = self.headers["Host"]
                upstream.request(self.command, self.path, body=body, headers=headers)
                answer = upstream.getresponse()
                content = answer.read()
                upstream.close()
                if harm == "lose" or callable(harm):
                    if callable(harm):
                        harm()
                    self.close_connection = True
                    return
                kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
                kept = [(k, _later(k, v, proxy.clock_seconds)) for k, v in kept]
                self._answer(answer.status, kept, content, how=harm)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

            def _answer(
                self,
                status: int,
                headers: list[tuple[str, str]],
                content: bytes,
                how: Harm = None,
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if how == "chunk":
                    self.send_header("Transfer-Encoding", "chunked")
                    content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
                elif self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if how == "drip":
                    self._drip(content)
                elif self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if how == "cut" else content)
                self.close_connection = self.close_connection or how in ("cut", "drip")

            def _drip(self, content: bytes) -> None:
                """Send bytes one by one until the proxy ends."""
                for byte in content:
                    if proxy._over.wait(DRIP_SECONDS):
                        return
                    self.wfile.write(bytes([byte]))

            def log_message(self, *told: Any) -> None:
                """Nothing: the tests print what they need."""

        return Handler


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        content = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            content += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return content
    return request.rfile.read(int(request.headers.get("Content-Length", 0)))


def _later(name: str, value: str, seconds: float) -> str:
    """The value of a header; a time in it is so much later."""
    if name.lower() not in ("date", "last-modified"):
        return value
    return formatdate(parsedate_to_datetime(value).timestamp() + seconds, usegmt=True)


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


_ERRORS = {
    405: b"<html>Welcome</html>",
    403: _error("AccessDenied"),
    500: _error("InternalError"),
    503: _error("SlowDown"),
}
