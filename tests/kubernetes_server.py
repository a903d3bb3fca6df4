"""The stand-ins for an API server. `serving` says again what Kubernetes 1.36.2 was recorded to say.

tests/kubernetes_answers holds the recorded exchanges. Where a test needs an answer to a request
that was not recorded (server-side apply, a log), it gives it in the open. `storing` keeps objects,
for tests in which several commands meet.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
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
    with _listening(server, kubeconfig):
        yield server


@contextmanager
def storing(kubeconfig: Path) -> Iterator[Cluster]:
    """A server that stores objects, on a free port, and the kubeconfig that leads to it."""
    cluster = Cluster()
    with _listening(cluster, kubeconfig):
        yield cluster


@dataclass
class Cluster:
    """The objects of a namespace, stored as an API server stores them: names are unique, a uid in a
    patch or a deletion must be that of the object. No controller runs: `collect` is the collector
    of objects whose owner is gone.

    Sources: the API conventions (metadata, concurrency control) and "Server-Side Apply" of the
    Kubernetes documentation; recorded answers exist of creation and deletion only.
    """

    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    before: Callable[[Request], Answer | None] = lambda request: None
    """Called before each request; an answer is given instead of the server's own."""
    after: Callable[[Request], Answer | None] = lambda request: None
    """Called when a request has had its effect; may give another answer."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _lock: Any = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        instead = self.before(request)
        if instead is not None:
            return instead
        with self._lock:
            answer = self._answer(request)
        return self.after(request) or answer

    def collect(self) -> None:
        """Delete the objects all of whose owners are gone."""
        uids = {each["metadata"]["uid"] for each in self.objects.values()}
        for key, each in list(self.objects.items()):
            owners = [owner["uid"] for owner in each["metadata"].get("ownerReferences", [])]
            if owners and not uids & set(owners):
                del self.objects[key]

    def _answer(self, request: Request) -> Answer:
        kind, _, name = request.path.partition("/namespaces/ml-train/")[2].partition("/")
        found = self.objects.get((kind, name))
        match request.method:
            case "POST":
                name = request.body["metadata"]["name"]
                if (kind, name) in self.objects:
                    return _status(409, "AlreadyExists", f'{kind} "{name}" already exists', name)
                return self._stored(kind, name, request.body, new=True)
            case "GET" if not name:
                return Answer(
                    200, {"items": [each for (k, _), each in self.objects.items() if k == kind]}
                )
            case "PATCH" if request.content_type == "application/apply-patch+yaml":
                return self._stored(kind, name, request.body, new=found is None)
        if found is None:
            return _status(404, "NotFound", f'{kind} "{name}" not found', name)
        if request.method == "PATCH":
            if (
                request.body["metadata"].get("uid", found["metadata"]["uid"])
                != found["metadata"]["uid"]
            ):
                return _status(422, "Invalid", "metadata.uid: field is immutable", name)
            return self._stored(kind, name, _merged(found, request.body), new=False)
        if request.method == "DELETE":
            only = request.body.get("preconditions", {})
            if any(found["metadata"][key] != value for key, value in only.items()):
                return _status(409, "Conflict", "Precondition failed", name)
            del self.objects[kind, name]
        return Answer(200, found)

    def _stored(self, kind: str, name: str, made: dict[str, Any], *, new: bool) -> Answer:
        version = str(next(self._numbers))
        uid = f"uid-{version}" if new else self.objects[kind, name]["metadata"]["uid"]
        metadata = {**made["metadata"], "uid": uid, "resourceVersion": version}
        self.objects[kind, name] = {**made, "metadata": metadata}
        return Answer(201 if new else 200, self.objects[kind, name])


def _merged(found: Any, change: Any) -> Any:
    """A JSON merge patch (RFC 7386)."""
    if not isinstance(change, dict):
        return change
    merged = dict(found) if isinstance(found, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def _status(code: int, reason: str, message: str, name: str) -> Answer:
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason}
    return Answer(code, {**body, "message": message, "details": {"name": name}})


@contextmanager
def _listening(server: Server | Cluster, kubeconfig: Path) -> Iterator[None]:

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: the second would wait 40 ms for the client

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
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))  # how soon it ends
    thread.start()
    kubeconfig.write_text(json.dumps(_config(http.server_address[1])))
    try:
        yield
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
