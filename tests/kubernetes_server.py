"""The one stand-in for an API server: says again what Kubernetes 1.36.2 was recorded to say.

tests/kubernetes_answers holds the recorded exchanges. Where a test needs an answer to a request
that was not recorded (server-side apply, a log), it gives it in the open.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ANSWERS = Path(__file__).parent / "kubernetes_answers"


@dataclass(frozen=True)
class Answer:
    """A status, headers and a body."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


HANGS_UP = Answer(0, None)
"""No answer: the connection ends."""


def recorded(number: int) -> Answer:
    """The answer of one recorded exchange."""
    (path,) = ANSWERS.glob(f"{number:02d}-*.json")
    response = json.loads(path.read_text())["response"]
    return Answer(response["status"], response["body"], response["headers"])


@dataclass(frozen=True)
class Request:
    """What the client asked."""

    method: str
    path: str
    query: dict[str, list[str]]
    content_type: str | None
    body: Any
    authorization: str


@dataclass
class Server:
    """Answers by method and end of the path; the last answer of several is given again."""

    answers: dict[tuple[str, str], list[Answer]]
    requests: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        for (method, end), several in self.answers.items():
            if request.method == method and request.path.endswith(end):
                return several.pop(0) if len(several) > 1 else several[0]
        return Answer(501, {"message": f"no answer to {request.method} {request.path}"})


@contextmanager
def serving(answers: dict[tuple[str, str], list[Answer]], kubeconfig: Path) -> Iterator[Server]:
    """A server on a free port, and the kubeconfig that leads to it."""
    server = Server({key: list(several) for key, several in answers.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            kind = self.headers.get("Content-Type")
            who = self.headers.get("Authorization", "")
            request = Request(self.command, parts.path, parse_qs(parts.query), kind, body, who)
            answer = server.answer(request)
            if answer is HANGS_UP:
                self.close_connection = True
                return
            text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PATCH = do_DELETE = do_POST = _answer

        def log_message(self, *words: object) -> None:
            """Nothing on the terminal."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    kubeconfig.write_text(json.dumps(_config(http.server_address[1])))
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _config(port: int) -> dict[str, Any]:
    named = {
        "clusters": {"cluster": {"server": f"http://127.0.0.1:{port}"}},
        "users": {"user": {"token": "a-token"}},
        "contexts": {"context": {"cluster": "c", "user": "c", "namespace": "ml-train"}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        **{key: [{"name": "c", **value}] for key, value in named.items()},
    }
